"""Peers at the setting that matches a pruned model: equal FLOPs, or equal tokens at the end."""

from collections.abc import Callable
from typing import Any

from flops import Tokens, plain_tokens, vit_flops

from peers.drop import drop_at_random
from peers.fuse import fuse_inattentive, fuse_tokens
from peers.merge import ATTENTION, match_flops, merge_schedule, merge_similar

MERGING = dict(zip(("merging", "merging_proportional_fused", "merging_plain_fused"), ATTENTION))


class Peer:
    """One method at one setting.

    Args:
        build: makes it of a twin of the plain model.
        tokens: before attention and MLP of each block.
        flops: of one image.
        setting: its knob as text.
    """

    def __init__(self, build: Callable[[Any], Any], tokens: Tokens, flops: int, setting: str):
        self.build, self.tokens, self.flops, self.setting = build, tokens, flops, setting

    @property
    def last(self) -> int:
        """Tokens after the last block."""
        return self.tokens[-1][1]

    def distance(self, other: "Peer", matched: str) -> int:
        """How far from ``other`` in what is to be equal."""
        return abs(self.flops - other.flops) if matched == "flops" else abs(self.last - other.last)


def merging(full: Any, attention: str, r: int) -> Peer:
    """Token merging of r tokens a block."""
    length = 1 + full.patch_embed.num_patches
    tokens = merge_schedule(length, r, len(full.blocks))
    flops = vit_flops(full, tokens) + match_flops(full, r)
    return Peer(lambda model: merge_similar(model, r, attention), tokens, flops, f"r={r}")


def fusing(full: Any, keep_ratio: float) -> Peer:
    """Keep and fuse, a share of the tokens in each of three blocks."""
    length = 1 + full.patch_embed.num_patches
    tokens = fuse_tokens(length, keep_ratio, len(full.blocks))
    flops = vit_flops(full, tokens)
    setting = f"keep={keep_ratio:.3g}"
    return Peer(lambda model: fuse_inattentive(model, keep_ratio), tokens, flops, setting)


def dropping(full: Any, kept: int) -> Peer:
    """Random patches dropped before the first block: what a pruned model's encoder does."""
    tokens = plain_tokens(full, kept)
    flops = vit_flops(full, tokens)
    return Peer(lambda model: drop_at_random(model, kept), tokens, flops, f"K={kept}")


def match(full: Any, kept: int, matched: str) -> dict[str, Peer]:
    """Every peer at the setting nearest to K patches from the first block on."""
    patches = full.patch_embed.num_patches
    target = dropping(full, kept)
    found = {"random": target}
    for name, attention in MERGING.items():
        options = [merging(full, attention, r) for r in range(patches // 2 + 1)]
        found[name] = min(options, key=lambda peer: peer.distance(target, matched))
    shares = [fusing(full, k / patches) for k in range(1, patches + 1)]
    found["fusing"] = min(shares, key=lambda peer: peer.distance(target, matched))
    return found
