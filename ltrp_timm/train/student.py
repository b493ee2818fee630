"""What training calls when logits alone are not enough: tokens to compare, a ranker to reach."""

from typing import Any

import torch
from torch import Tensor, nn

from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.selection import choose_keep_indices, num_keep

GATES = ("straight-through",)


class Student(nn.Module):
    """A module around a pruned model, for training; weights are those of the model.

    Args:
        model: what is trained.
        gate: let the gradient pass to the ranker, see ``straight_through``.
    """

    def __init__(self, model: LTRPModel, gate: bool = False) -> None:
        super().__init__()
        self.model, self.gate = model, gate

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) -> logits (B, C), tokens (B, P + K, D), keep indices (B, K)."""
        if self.gate:
            keep, factors = straight_through(self.model, images)
            with gated(self.model, factors):
                tokens = self.model.forward_features(images, keep_indices=keep)
        else:
            keep = self.model.keep_indices(images)
            tokens = self.model.forward_features(images, keep_indices=keep)
        return self.model.forward_head(tokens), tokens, keep


def straight_through(model: LTRPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Keep indices, and factors of 1 through which a gradient reaches the ranker's scores.

    The factor of a kept patch is 1 + p - stop(p), p = sigmoid(score - the lowest kept score): its
    value is 1 to rounding, its gradient that of p, as if a token came with the weight p. Patches
    that are not kept have no token, hence no gradient.

    Args:
        model: its ranker must require a gradient.
        images: (B, 3, H, W), normalised for the backbone.

    Returns:
        (B, K) int64 and (B, K).

    Source: Bengio et al. (2013), Estimating or propagating gradients through stochastic neurons.
    """
    h, w = model.grid_size(images)
    scores = model.ranker_scores(images, h, w)
    keep = choose_keep_indices(
        scores.detach(),
        None,
        model.keep_ratio,
        model.selection,
        model.selection_args,
        (h, w),
        model._padded(images, h, w),
    )
    if num_keep(h * w, model.keep_ratio) == h * w:
        keep = torch.arange(h * w, device=images.device).expand(len(images), -1)
    kept = scores.gather(1, keep)
    p = torch.sigmoid(kept - kept.detach().amin(dim=1, keepdim=True))
    return keep, 1.0 + p - p.detach()


class gated:  # noqa: N801  # read as a verb: with gated(model, factors)
    """While it lasts, each kept token is multiplied by its factor as it enters the blocks.

    Args:
        model: a pruned model.
        factors: (B, K).
    """

    def __init__(self, model: LTRPModel, factors: Tensor) -> None:
        self.slot: Any = model._adapter.slots(model.backbone)[0]
        self.factors = factors

    def __enter__(self) -> None:
        self.handle = self.slot.register_forward_hook(self._multiply)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _multiply(self, slot: Any, inputs: Any, out: Any) -> Any:
        tokens = out[0] if isinstance(out, tuple) else out
        prefix = tokens.shape[1] - self.factors.shape[1]
        ones = self.factors.new_ones(len(tokens), prefix)
        factors = torch.cat([ones, self.factors], dim=1).unsqueeze(-1).to(tokens.dtype)
        tokens = tokens * factors
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens
