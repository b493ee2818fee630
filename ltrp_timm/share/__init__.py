"""Saving models and putting them on the Hub."""

from ltrp_timm.share.save import push_to_hub, save_pretrained

__all__ = ["push_to_hub", "save_pretrained"]
