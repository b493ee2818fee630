"""Scores of the patches of whole data sets: written once, read in place of a ranker."""

from ltrp_timm.scoring.run import Ranked, rank_images
from ltrp_timm.scoring.store import IndexCache
from ltrp_timm.scoring.transform import CachedTransform

__all__ = ["CachedTransform", "IndexCache", "Ranked", "rank_images"]
