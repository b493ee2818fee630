"""ViT-RelPos: no ``patch_drop``, and a relative position bias for every pair of patches.

All that it hands to its blocks is the argument ``shared_rel_pos``. Where the blocks share a bias it
is that bias, cut to the kept pairs. Where each has its own, a module in place of the shared one
hands out the keep indices as that argument, and each attention gives them to its own bias. What a
checkpointed block needs thus arrives as an argument, never from state.
"""

from typing import Any, ClassVar, Optional, Tuple

import torch
from timm.layers import PatchEmbed, RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor, nn

from ltrp_timm.selection import token_indices
from ltrp_timm.slots.base import (
    SlotAdapter,
    TokenSlot,
    as_kind,
    as_slot,
    check_free,
    renamed,
    undo_slot,
)


def bias_of_kept(bias: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Bias (1, H, P + N, P + N) of all pairs, keep_indices (B, K) -> (B, H, P + K, P + K)."""
    rows = token_indices(keep_indices, num_prefix_tokens)
    pairs = rows.unsqueeze(2) * bias.shape[-1] + rows.unsqueeze(1)
    # one flat index: several times faster than rows and columns, forward and backward
    kept = bias.flatten(2).squeeze(0).index_select(1, pairs.flatten())
    return kept.reshape(-1, pairs.shape[0], pairs.shape[1], pairs.shape[2]).transpose(0, 1)


torch.fx.wrap("bias_of_kept")


class BiasSlot(nn.Module):
    """A mixin for timm's relative position biases: that of the kept pairs alone.

    The bias of all pairs is made as timm makes it, whatever it is made of, and then cut.
    """

    keep_indices: Optional[Tensor]
    prefix_tokens: int
    _timm_get_bias: Any

    def get_bias(self) -> Tensor:
        """Bias (1, H, P + N, P + N), or (B, H, P + K, P + K) while keep indices lie here."""
        bias: Tensor = self._timm_get_bias()
        keep = self.keep_indices
        if keep is None:
            return bias
        self.keep_indices = None
        return bias_of_kept(bias, keep, self.prefix_tokens)


class RelPosBiasSlot(BiasSlot, RelPosBias):
    """timm's bias table."""

    _timm_get_bias = renamed(RelPosBias.get_bias, "_timm_get_bias")


class RelPosMlpSlot(BiasSlot, RelPosMlp):
    """timm's MLP of log coordinates."""

    _timm_get_bias = renamed(RelPosMlp.get_bias, "_timm_get_bias")


SLOTS = {RelPosBias: RelPosBiasSlot, RelPosMlp: RelPosMlpSlot}


class KeepIndexSlot(nn.Module):
    """Stands at ``shared_rel_pos`` of a model whose blocks have biases of their own."""

    keep_indices: Optional[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.keep_indices = None

    def set_window_size(self, window_size: Tuple[int, int]) -> None:
        """timm tells the patch grid to what stands here; indices need none."""

    def get_bias(self) -> Optional[Tensor]:
        """The keep indices (B, K), for the blocks; None when all stay."""
        keep = self.keep_indices
        self.keep_indices = None
        return keep


class KeptPairsAttention(RelPosAttention):
    """timm's attention, which gives the keep indices that it is handed to its own bias."""

    _timm_forward = renamed(RelPosAttention.forward, "_timm_forward")

    def forward(self, x: Tensor, shared_rel_pos: Optional[Tensor] = None) -> Tensor:
        """Tokens (B, L, D), keep_indices (B, K) or None for all patches -> (B, L, D)."""
        # timm's forward hands nothing to get_bias, which takes them out again during this very call
        self.rel_pos.keep_indices = shared_rel_pos
        out: Tensor = self._timm_forward(x)
        return out


class RelPosAdapter(SlotAdapter):
    """The slot stands behind the patch embedding; the bias follows, own or shared."""

    family = "VisionTransformerRelPos"
    host = VisionTransformerRelPos
    places = ("patch_embed.norm", "shared_rel_pos")
    how = "behind `patch_embed`; the relative position bias follows, own or shared"
    examples: ClassVar = {
        "ViT-RelPos, ViT-SRelPos": (
            "vit_relpos_base_patch16_cls_224",
            "vit_srelpos_small_patch16_224",
        )
    }

    def make_slot(self, backbone: Any) -> TokenSlot:
        """The slot of the tokens; the class token joins behind it."""
        return TokenSlot(0)

    def check(self, backbone: Any) -> None:
        """Raise TypeError for a patch embedding or a bias that is none of timm's own here."""
        if type(backbone.patch_embed) is not PatchEmbed or not backbone.patch_embed.flatten:
            kind = type(backbone.patch_embed).__name__
            raise TypeError(
                f"cannot drop patches from {self.family}: its patch_embed is a {kind} of "
                "somebody else's, not timm's PatchEmbed."
            )
        check_free(backbone, "patch_embed.norm")
        shared = backbone.shared_rel_pos
        for bias in [b.attn.rel_pos for b in backbone.blocks] if shared is None else [shared]:
            if type(bias) not in SLOTS:
                raise TypeError(
                    f"cannot drop patches from {self.family}: its relative position is a "
                    f"{type(bias).__name__}, not one of {', '.join(k.__name__ for k in SLOTS)}."
                )

    def install(self, backbone: Any) -> Any:
        """Put empty slots in; returns the modules that stood there."""
        shared, attentions = backbone.shared_rel_pos, [block.attn for block in backbone.blocks]
        biases = [attention.rel_pos for attention in attentions]
        original = (super().install(backbone), shared, attentions, biases)
        if shared is not None:
            backbone.shared_rel_pos = as_slot(shared, SLOTS[type(shared)])
            return original
        backbone.shared_rel_pos = KeepIndexSlot().train(backbone.training)
        for block, bias in zip(backbone.blocks, biases):
            block.attn = as_kind(block.attn, KeptPairsAttention)
            block.attn.rel_pos = as_slot(bias, SLOTS[type(bias)])
        return original

    def restore(self, backbone: Any, original: Any) -> None:
        """Put the original modules back, with everything as it is now."""
        norm, shared, attentions, biases = original
        super().restore(backbone, norm)
        if shared is not None:
            backbone.shared_rel_pos = undo_slot(shared, backbone.shared_rel_pos)
            return
        backbone.shared_rel_pos = None
        for block, attention, bias in zip(backbone.blocks, attentions, biases):
            attention.__dict__ = block.attn.__dict__
            attention.rel_pos = undo_slot(bias, attention.rel_pos)
            block.attn = attention
