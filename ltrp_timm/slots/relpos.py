"""ViT-RelPos: no ``patch_drop``, and a relative position bias for every pair of patches.

It passes only ``shared_rel_pos`` to its blocks. If the blocks share a bias, it is that bias, cut to
the kept pairs. If each block has its own, a module in place of the shared one passes the keep
indices as that argument, and each attention gives them to its own bias. A checkpointed block thus
gets all it needs as arguments, never from state.
"""

from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.layers import PatchEmbed, RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor, nn

from ltrp_timm.selection.rules import token_indices
from ltrp_timm.slots.base import (
    SlotAdapter,
    TokenSlot,
    as_kind,
    as_slot,
    check_free,
    renamed,
    slots_in,
)


def bias_of_kept(bias: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Bias (1, H, P + N, P + N) of all pairs, keep_indices (B, K) -> (B, H, P + K, P + K)."""
    rows = token_indices(keep_indices, num_prefix_tokens)
    pairs = rows.unsqueeze(2) * bias.shape[-1] + rows.unsqueeze(1)
    # one flat index: several times faster than rows and columns, forward and backward
    kept = bias.flatten(2).squeeze(0).index_select(1, pairs.flatten())
    return kept.reshape(bias.shape[1], pairs.shape[0], pairs.shape[1], pairs.shape[2]).transpose(
        0, 1
    )


torch.fx.wrap("bias_of_kept")


class BiasSlot(nn.Module):
    """A mixin for timm's relative position biases: timm's bias of all pairs, cut to kept ones."""

    keep_indices: Optional[Tensor]
    prefix_tokens: int
    _timm_get_bias: Any

    def get_bias(self) -> Tensor:
        """Bias (1, H, P + N, P + N), or (B, H, P + K, P + K) with keep indices in the slot."""
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
    """Stands at ``shared_rel_pos`` of a model with one bias per block."""

    keep_indices: Optional[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.keep_indices = None

    def set_window_size(self, window_size: Tuple[int, int]) -> None:
        """Do nothing: timm calls this for a new patch grid, on which indices do not depend."""

    def get_bias(self) -> Optional[Tensor]:
        """The keep indices (B, K), for the blocks; None when all stay."""
        keep = self.keep_indices
        self.keep_indices = None
        return keep


class KeptPairsAttention(RelPosAttention):
    """timm's attention; it gives the keep indices that it receives to its own bias."""

    _timm_forward = renamed(RelPosAttention.forward, "_timm_forward")

    @torch.jit.unused
    def _fill(self, keep: Optional[Tensor]) -> None:
        for slot in slots_in(self.rel_pos):
            slot.keep_indices = keep

    def forward(self, x: Tensor, shared_rel_pos: Optional[Tensor] = None) -> Tensor:
        """Tokens (B, L, D), keep_indices (B, K) or None for all patches -> (B, L, D)."""
        # timm's forward passes nothing to get_bias, which empties the slot during this very call
        if torch.jit.is_scripting():
            self.rel_pos.keep_indices = shared_rel_pos
        else:
            self._fill(shared_rel_pos)
        return self._timm_forward(x)


class RelPosAdapter(SlotAdapter):
    """The slot stands behind the patch embedding; the bias follows, own or shared."""

    family = "VisionTransformerRelPos"
    host = VisionTransformerRelPos
    places = ("patch_embed.norm", "shared_rel_pos")

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot, which the class token joins later, and the biases of kept pairs."""
        found: Dict[str, nn.Module] = {"patch_embed.norm": TokenSlot(0)}
        shared = backbone.shared_rel_pos
        if shared is not None:
            return {**found, "shared_rel_pos": as_slot(shared, SLOTS[type(shared)])}
        found["shared_rel_pos"] = KeepIndexSlot()
        for i, block in enumerate(backbone.blocks):
            bias = block.attn.rel_pos
            found[f"blocks.{i}.attn"] = as_kind(block.attn, KeptPairsAttention)
            found[f"blocks.{i}.attn.rel_pos"] = as_slot(bias, SLOTS[type(bias)])
        return found

    def slots(self, backbone: Any) -> List[Any]:
        """As in ``SlotAdapter``; RuntimeError if the patch embedding is checkpointed."""
        if type(backbone.patch_embed).__name__ == "CheckpointWrapper":
            raise RuntimeError(
                f"cannot drop patches from {self.family}: its patch_embed is checkpointed, and its "
                "second run would not drop patches; checkpoint the blocks alone."
            )
        return super().slots(backbone)

    def check(self, backbone: Any) -> None:
        """Raise TypeError for a patch embedding or a bias that timm does not build here."""
        if type(backbone.patch_embed) is not PatchEmbed or not backbone.patch_embed.flatten:
            kind = type(backbone.patch_embed).__name__
            raise TypeError(
                f"cannot drop patches from {self.family}: its patch_embed is a {kind}, "
                "not timm's PatchEmbed with flatten=True."
            )
        check_free(backbone, "patch_embed.norm")
        shared = backbone.shared_rel_pos
        for bias in [b.attn.rel_pos for b in backbone.blocks] if shared is None else [shared]:
            if type(bias) not in SLOTS:
                raise TypeError(
                    f"cannot drop patches from {self.family}: its relative position is a "
                    f"{type(bias).__name__}, not one of {', '.join(k.__name__ for k in SLOTS)}."
                )
