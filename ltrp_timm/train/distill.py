"""What a fine-tuned model learns from beside labels: an unpruned teacher, a gate to its ranker."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers.bridge import make_bridge
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.selection.rules import keep_tokens
from ltrp_timm.weights.files import digest

Gate = Literal["straight-through"]


class Distillation:
    """A frozen teacher that sees all patches: images -> logits (B, C); tokens too by ``features``.

    The other arguments are those of ``Recipe``. ValueError if it and the student differ in classes.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        weight: float = 0.5,
        temperature: float = 1.0,
        features: float = 0.0,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        if isinstance(teacher, LTRPModel):
            teacher.selection = "top"
            teacher.keep_ratio = 1.0
        if teacher.num_classes != student.num_classes:
            raise ValueError(
                f"distill: the teacher has {teacher.num_classes} classes, the data has "
                f"{student.num_classes}."
            )
        self.weight, self.temperature, self.features = weight, temperature, features
        self.num_prefix_tokens = getattr(student, "num_prefix_tokens", 0)
        cfg = getattr(teacher, "pretrained_cfg", None) or {}
        wanted = SimpleNamespace(mean=cfg.get("mean"), std=cfg.get("std"))
        self.bridge = make_bridge(wanted, student)

    def check(self, images: Tensor, student: Any) -> None:
        """Run the teacher once on images (1, 3, H, W); ValueError if it does not fit."""
        size = "x".join(str(side) for side in images.shape[-2:])
        try:
            with torch.no_grad():
                logits, tokens = self._teach(images)
                plain = student.backbone if isinstance(student, LTRPModel) else student
                own = plain.forward_features(images) if self.features else None
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"distill: the teacher takes no images of {size}: {error}") from error
        if logits.dim() != 2:
            raise ValueError("distill: the teacher gives no logits (B, C).")
        if tokens is not None and own is not None and tokens.shape != own.shape:
            shapes = f"{list(tokens.shape)}, the student's {list(own.shape)}"
            raise ValueError(f"distill_features: the teacher's tokens are {shapes}.")

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {
            "teacher": digest(self.teacher.state_dict()),
            "weight": self.weight,
            "temperature": self.temperature,
            "features": self.features,
        }

    def _teach(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = self.bridge(images)
        if not self.features:
            return self.teacher(images), None
        tokens = self.teacher.forward_features(images)
        return self.teacher.forward_head(tokens), tokens

    def loss(
        self, images: Tensor, logits: Tensor, tokens: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Measure how far the student's logits (B, C) are from those of its teacher.

        With ``features``, also how far its tokens (B, P + K, D) are; ``keep`` (B, K) are their
        patches, None for all.

        Returns:
            KL divergence · T², the mean over images, plus ``features`` times one minus the cosine
            similarity of kept tokens.

        Source: Hinton et al. (2015), Distilling the knowledge in a neural network.
        """
        with torch.no_grad():
            wanted, features = self._teach(images)
        t = self.temperature
        loss = t**2 * F.kl_div(
            (logits.float() / t).log_softmax(dim=1),
            (wanted.float() / t).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
        if features is None or tokens is None:
            return loss
        if keep is not None:
            features = keep_tokens(features, keep, self.num_prefix_tokens)
        similar = F.cosine_similarity(tokens.float(), features.float(), dim=-1)
        return loss + self.features * (1.0 - similar.mean())


class Student(nn.Module):
    """What training calls when logits alone are not enough; its weights are those of the model.

    With ``gate`` the gradient reaches the ranker, see ``straight_through``.
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
    """Keep indices (B, K), and factors (B, K) of 1 that pass a gradient to the ranker's scores.

    The factor of a kept patch is 1 + p - stop(p), p = sigmoid(score - the lowest kept score): its
    value is 1 to rounding, its gradient that of p, as if p weighted the token. Dropped patches have
    no token, hence no gradient. The ranker must require one; images are (B, 3, H, W).

    Source: Bengio et al. (2013), Estimating or propagating gradients through stochastic neurons.
    """
    h, w = model.grid_size(images)
    scores = model.ranker_scores(images, h, w)
    keep = model.select(scores.detach(), images)
    kept = scores.gather(1, keep)
    p = torch.sigmoid(kept - kept.detach().amin(dim=1, keepdim=True))
    return keep, 1.0 + p - p.detach()


@contextlib.contextmanager
def gated(model: LTRPModel, factors: Tensor) -> Iterator[None]:
    """Multiply each kept token by its factor (B, K) as it enters the blocks of a pruned model."""

    def multiply(slot: Any, inputs: Any, out: Any) -> Any:
        tokens = out[0] if isinstance(out, tuple) else out
        prefix = factors.new_ones(len(tokens), tokens.shape[1] - factors.shape[1])
        tokens = tokens * torch.cat([prefix, factors], dim=1).unsqueeze(-1).to(tokens.dtype)
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens

    slot: Any = model._adapter.slots(model.backbone)[0]
    handle = slot.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()
