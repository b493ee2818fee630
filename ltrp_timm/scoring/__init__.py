"""Orders of patches, computed once for a set of images and read instead of running a ranker."""

from ltrp_timm.scoring.follow import FollowedTransform, Step, trace
from ltrp_timm.scoring.store import (
    CACHE_NAME,
    RANKS_NAME,
    ImageIds,
    IndexCache,
    finish_cache,
    rank_type,
    ranker_hash,
    ranks_of,
)

__all__ = [
    "CACHE_NAME",
    "RANKS_NAME",
    "FollowedTransform",
    "ImageIds",
    "IndexCache",
    "Step",
    "finish_cache",
    "rank_type",
    "ranker_hash",
    "ranks_of",
    "trace",
]
