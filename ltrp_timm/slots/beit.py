"""BEiT: no ``patch_drop``, and a relative position bias for every pair of patches.

The bias of the kept pairs must reach every block, and BEiT passes only ``shared_rel_pos_bias`` to
its blocks. So a module in place of ``rel_pos_bias`` makes the pair index of the kept patches, the
blocks receive it as that argument, and each attention looks it up in its own table. A checkpointed
block thus gets all it needs as arguments, never from state.
"""

from typing import Any, Dict, Optional, Tuple

import torch
from timm.models.beit import Attention, Beit, RelativePositionBias, gen_relative_position_index
from torch import Tensor, nn

from ltrp_timm.layers.bridge import ComputedBuffers
from ltrp_timm.selection.rules import token_indices
from ltrp_timm.slots.base import SlotAdapter, TokenSlotWithDropout, as_kind, as_slot, renamed


def kept_pairs(pair_index: Tensor, keep_indices: Tensor) -> Tensor:
    """Pair index (1 + N, 1 + N), keep_indices (B, K) -> (B, 1 + K, 1 + K)."""
    rows = token_indices(keep_indices, 1)
    return pair_index[rows.unsqueeze(2), rows.unsqueeze(1)]


torch.fx.wrap("kept_pairs")


class PairIndexSlot(ComputedBuffers):
    """Stands at ``rel_pos_bias`` of a BEiT with one table per block, for a grid (h, w)."""

    keep_indices: Optional[Tensor]
    pair_index: Tensor

    def __init__(self, window_size: Tuple[int, int], device: Any = None) -> None:
        super().__init__()
        self.keep_indices = None
        self._window_size = window_size
        self.register_buffer("pair_index", None, persistent=False)
        self.pair_index = self.buffer_values(device)["pair_index"]

    def buffer_values(self, device: Any = None) -> Dict[str, Tensor]:
        """timm's index (1 + N, 1 + N) of all pairs."""
        return {"pair_index": gen_relative_position_index(self._window_size, device=device)}

    def set_window_size(self, window_size: Tuple[int, int]) -> None:
        """Follow the backbone to another patch grid; timm calls this."""
        self._window_size = window_size
        self.init_non_persistent_buffers()

    def forward(self) -> Optional[Tensor]:
        """The pair index (B, 1 + K, 1 + K) of the kept patches; None when all stay."""
        keep = self.keep_indices
        if keep is None:
            return None
        self.keep_indices = None
        return kept_pairs(self.pair_index, keep)


class PairAttention(Attention):
    """timm's BEiT attention; the pair index to look its bias up arrives as an argument."""

    _timm_forward = renamed(Attention.forward, "_timm_forward")

    def _get_rel_pos_bias(self) -> Tensor:
        # timm adds this to the bias that forward passes on, which is complete
        table = self.relative_position_bias_table
        return table.new_zeros(1, 1, 1, 1)

    def forward(self, x: Tensor, shared_rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """Tokens (B, L, D), pair index (B, L, L) or None for all pairs -> (B, L, D)."""
        if shared_rel_pos_bias is None:
            pairs = self.relative_position_index.unsqueeze(0)
        else:
            pairs = shared_rel_pos_bias
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
        first = backbone.blocks[0].attn
        if backbone.rel_pos_bias is not None:
            found["rel_pos_bias"] = as_slot(backbone.rel_pos_bias, SharedBiasSlot)
        elif first.relative_position_bias_table is not None:
            device = first.relative_position_index.device
            found["rel_pos_bias"] = PairIndexSlot(first.window_size, device)
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
