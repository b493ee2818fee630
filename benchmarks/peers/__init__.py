"""Other ways to spend fewer tokens, written from the published algorithms for a fair comparison.

Each of them changes a timm ``VisionTransformer`` in place and is the plain model where it has
nothing to do; a pure function beside it says how many tokens each block will see. They are for
measuring: plain ViTs with one class token, inference only.
"""

from peers.drop import drop_at_random
from peers.fuse import fuse_inattentive, fuse_tokens
from peers.merge import merge_schedule, merge_similar, merge_tokens

__all__ = [
    "drop_at_random",
    "fuse_inattentive",
    "fuse_tokens",
    "merge_schedule",
    "merge_similar",
    "merge_tokens",
]
