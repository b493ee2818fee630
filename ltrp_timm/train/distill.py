"""Distillation from an unpruned model: its logits, and its tokens where the student kept them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers import make_bridge
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.selection import keep_tokens
from ltrp_timm.train.state import digest


class Distillation:
    """A frozen teacher that sees all patches.

    Args:
        teacher: images -> logits (B, C); a pruned model keeps all of its patches here.
        student: what learns from it.
        weight: share of the distillation in the loss, in (0, 1].
        temperature: of both softmaxes.
        features: weight, beside the logits, of the distance between tokens; 0 for none.

    Raises:
        ValueError: another number of classes, or tokens of another kind.
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
                f"distill teaches {teacher.num_classes} classes, the data has "
                f"{student.num_classes}."
            )
        self.weight, self.temperature, self.features = weight, temperature, features
        self.num_prefix_tokens = getattr(student, "num_prefix_tokens", 0)
        self.bridge: nn.Module = nn.Identity()
        own = (getattr(m, "pretrained_cfg", None) or {} for m in (teacher, student))
        if len({(tuple(cfg.get("mean", ())), tuple(cfg.get("std", ()))) for cfg in own}) > 1:
            self.bridge = make_bridge(_Statistics(teacher.pretrained_cfg), student)

    def check(self, images: Tensor, student: Any) -> None:
        """Run the teacher once, on images (1, 3, H, W).

        Raises:
            ValueError: it takes no such images, or its tokens are not those of the student.
        """
        size = "x".join(str(side) for side in images.shape[-2:])
        try:
            with torch.no_grad():
                logits, tokens = self._teach(images)
                own = _all_tokens(student, images) if self.features else None
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
        """How far the student is from its teacher.

        Args:
            images: (B, 3, H, W).
            logits: of the student, (B, C).
            tokens: of the student, (B, P + K, D), or None.
            keep: where they are, (B, K), or None for all of them.

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


def _all_tokens(model: Any, images: Tensor) -> Tensor:
    """Tokens (B, P + N, D) of a model that keeps all patches."""
    if not isinstance(model, LTRPModel):
        return model.forward_features(images)
    h, w = model.grid_size(images)
    keep = torch.arange(h * w, device=images.device).expand(len(images), -1)
    return model.forward_features(images, keep_indices=keep)


class _Statistics:
    """The normalisation that a teacher wants, as a bridge asks for it."""

    img_size = None

    def __init__(self, cfg: Any) -> None:
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
