"""BEiT and ViT-RelPos: no ``patch_drop``, and a relative position bias for every pair of patches.

Both pass one argument to their blocks, for a bias that these share. If they do, it is that bias of
the kept pairs. If each block has its own, a module in place of the shared one makes what the
attentions need to find theirs: the pair index of the kept patches (BEiT), or their indices
(ViT-RelPos). A checkpointed block thus gets all it needs as arguments, never from state.
"""

from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.layers import PatchEmbed, RelPosBias, RelPosMlp
from timm.models.beit import Attention, Beit, RelativePositionBias
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor, nn

from ltrp_timm.selection.rules import token_indices
from ltrp_timm.slots.base import (
    SlotAdapter,
    TokenSlot,
    TokenSlotWithDropout,
    as_kind,
    as_slot,
    check_free,
    check_known,
    renamed,
    slots_in,
)


def kept_pairs(pair_index: Tensor, keep_indices: Tensor) -> Tensor:
    """Pair index (1 + N, 1 + N), keep_indices (B, K) -> (B, 1 + K, 1 + K)."""
    rows = token_indices(keep_indices, 1)
    return pair_index[rows.unsqueeze(2), rows.unsqueeze(1)]


torch.fx.wrap("kept_pairs")


class KeepIndexSlot(nn.Module):
    """Stands at the shared bias of a model with one bias per block."""

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

    def forward(self) -> Optional[Tensor]:
        """As ``get_bias``, which BEiT calls by the module."""
        return self.get_bias()


class PairAttention(Attention):
    """timm's BEiT attention; it looks its bias up by the keep indices that it receives."""

    _timm_forward = renamed(Attention.forward, "_timm_forward")

    def _get_rel_pos_bias(self) -> Tensor:
        # timm adds this to the bias that forward passes on, which is complete
        table = self.relative_position_bias_table
        return table.new_zeros(1, 1, 1, 1)

    def forward(self, x: Tensor, shared_rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """Tokens (B, L, D), keep_indices (B, K) or None for all patches -> (B, L, D)."""
        if shared_rel_pos_bias is None:
            pairs = self.relative_position_index.unsqueeze(0)
        else:
            pairs = kept_pairs(self.relative_position_index, shared_rel_pos_bias)
        bias = self.relative_position_bias_table[pairs].permute(0, 3, 1, 2).contiguous()
        return self._timm_forward(x, bias)


class SharedBiasSlot(RelativePositionBias):
    """timm's shared bias; with keep indices in it, the bias of the kept pairs."""

    keep_indices: Optional[Tensor]
    _timm_forward = renamed(RelativePositionBias.forward, "_timm_forward")

    def forward(self) -> Tensor:
        """Bias (H, 1 + N, 1 + N), or (B, H, 1 + K, 1 + K)."""
        keep = self.keep_indices
        if keep is None:
            return self._timm_forward()
        self.keep_indices = None
        pairs = kept_pairs(self.relative_position_index, keep)
        return self.relative_position_bias_table[pairs].permute(0, 3, 1, 2).contiguous()


class BeitAdapter(SlotAdapter):
    """The slot stands at ``pos_drop``; the bias follows, whether blocks own it or share it."""

    family = "Beit"
    host = Beit
    places = ("pos_drop", "rel_pos_bias")

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot, and modules that look up the bias of kept pairs."""
        found: Dict[str, nn.Module] = {
            "pos_drop": TokenSlotWithDropout(backbone.num_prefix_tokens, backbone.pos_drop.p)
        }
        if backbone.rel_pos_bias is not None:
            found["rel_pos_bias"] = as_slot(backbone.rel_pos_bias, SharedBiasSlot)
        elif backbone.blocks[0].attn.relative_position_bias_table is not None:
            found["rel_pos_bias"] = KeepIndexSlot()
            for i, block in enumerate(backbone.blocks):
                found[f"blocks.{i}.attn"] = as_kind(block.attn, PairAttention)
        return found

    def check(self, backbone: Any) -> None:
        """Raise TypeError for a model with both kinds of bias: one argument cannot carry both."""
        own = backbone.blocks[0].attn.relative_position_bias_table is not None
        if own and backbone.rel_pos_bias is not None:
            raise TypeError(
                "cannot drop patches from Beit: it has a shared and an own relative position bias."
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
            check_known(self.family, "relative position", bias, SLOTS)
