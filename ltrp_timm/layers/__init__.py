"""Bricks of rankers, heads and teachers."""

from ltrp_timm.layers.bridge import InputBridge, make_bridge, resize_score_map

__all__ = ["InputBridge", "make_bridge", "resize_score_map"]
