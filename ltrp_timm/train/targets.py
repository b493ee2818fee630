"""What a ranker learns: lists of patches, and the scores that order them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ltrp_timm.data.keyed import Batch
from ltrp_timm.layers.bridge import InputBridge, resize_score_map, to_pair
from ltrp_timm.models.feature_teacher import FeatureTeacher
from ltrp_timm.scoring.scorer import open_ranker
from ltrp_timm.selection import select_top
from ltrp_timm.teacher import (
    MAETeacher,
    PatchTeacher,
    create_teacher,
    draw_uniform,
    num_visible,
    random_visible_indices,
)
from ltrp_timm.teacher.density import CellTeacher, semantic_density
from ltrp_timm.weights.files import digest

LIST_SIZE = 20


class Lists(NamedTuple):
    """The lists of a batch.

    Attributes:
        indices: (B, R) patches of the grid.
        scores: (B, R) targets, larger = keep first, each with its weight in the loss.
        visible: (B, V) patches that the teacher saw, or None.
    """

    indices: Tensor
    scores: list[tuple[float, Tensor]]
    visible: Tensor | None


class Targets:
    """The scores of an MAE or a timm ViT, of another ranker, or of both, for images of one size.

    Most arguments are those of ``train_ranker``; ``patch_size`` is that of the grid without a
    teacher, ``scoring`` holds removal, metric, aggregate and chunk of ``semantic_density``.

    Raises:
        ValueError: There is neither teacher nor ranker, or too few patches are visible.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        distill_from: Any = None,
        distill_args: Mapping[str, Any] | None = None,
        distill_weight: float = 0.5,
        img_size: Any = None,
        patch_size: Any = None,
        list_size: int | None = None,
        mask_ratio: float,
        scoring: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        if teacher is None and distill_from is None:
            raise ValueError("a ranker needs a teacher, or distill_from, to learn from.")
        if distill_args and distill_from is None:
            raise ValueError("distill_args need distill_from, a ranker to give them to.")
        if not 0.0 < distill_weight < 1.0:
            raise ValueError(f"distill_weight must be in (0, 1), got {distill_weight}.")
        self.mask_ratio, self.scoring, self.device = mask_ratio, dict(scoring), device
        self.mean, self.std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
        self.img_size, self.patch_size = to_pair(img_size or 224), to_pair(patch_size or 16)
        self.teacher: Any = None
        if teacher is not None:
            found = _open_teacher(teacher, img_size, scoring.get("removal", "full"))
            self.teacher = found.to(device)
            self.mean, self.std = tuple(self.teacher.mean), tuple(self.teacher.std)
            self.img_size, self.patch_size = self.teacher.img_size, self.teacher.patch_size
        (height, width), (p, q) = self.img_size, self.patch_size
        if height < p or width < q:
            raise ValueError(f"img_size {self.img_size} is smaller than a patch {self.patch_size}.")
        self.grid_size = (height // p, width // q)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.list_size = self._check_list(list_size)
        if self.teacher is not None:  # refuse bad scoring arguments before anything is written
            image = torch.zeros(1, 3, *self.img_size, device=device)
            _, values, _ = self._score(image, [torch.Generator().manual_seed(0)], 1)
            if not bool(values.isfinite().all()):
                raise ValueError("the teacher's scores are not finite: check its weights.")
        self.shares = (1.0, 0.0) if distill_from is None else (1.0 - distill_weight, distill_weight)
        self.other: nn.Module | None = None
        if distill_from is not None:
            self.other = open_ranker(distill_from, self.patch_size, distill_args)
            self.score_map = self.scorer(self.other)
        self.kept: dict[tuple[int, int], Tensor] = {}  # maps by crop and index

    def _check_list(self, list_size: int | None) -> int:
        count = self.num_patches
        if self.teacher is not None:
            visible = num_visible(count, self.mask_ratio)
            if visible < 2:
                raise ValueError(
                    f"mask_ratio = {self.mask_ratio} leaves {visible} of {count} patches visible: "
                    "an order needs at least 2."
                )
            count, list_size = visible, list_size or LIST_SIZE
        if list_size is not None and list_size < 2:
            raise ValueError(f"list_size must be at least 2, got {list_size}.")
        return min(count, list_size or count)

    def bridge_to(self, ranker: Any) -> nn.Module:
        """The module between these images and those that a ranker takes."""
        mean, std = getattr(ranker, "mean", None), getattr(ranker, "std", None)
        size = getattr(ranker, "img_size", None)
        stats = (self.mean, self.std)
        wanted = (mean or self.mean, std or self.std)
        return InputBridge(stats, wanted, None if size is None else to_pair(size)).to(self.device)

    def scorer(self, ranker: Any) -> Callable[[Tensor], Tensor]:
        """The function images (B, 3, H, W) -> scores (B, N) of a ranker, here on the device."""
        bridge = self.bridge_to(ranker.to(self.device))
        return lambda images: resize_score_map(ranker(bridge(images)), *self.grid_size)

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        teacher, other = self.teacher, self.other
        name = f"{getattr(other, 'name', '')}({other.extra_repr()})" if other else ""
        return {
            "teacher": None if teacher is None else digest(teacher.state_dict()),
            "distill_from": other and [name, digest(other.state_dict())],
            "shares": list(self.shares),
            "img_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "list_size": self.list_size,
            "mask_ratio": self.mask_ratio,
            **{name: str(value) for name, value in self.scoring.items() if name != "chunk"},
        }

    def _score(
        self, images: Tensor, generators: list[torch.Generator], size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) -> visible patches (B, V), scores (B, R), their patches (B, R)."""
        count, ratio = self.num_patches, self.mask_ratio
        visible = random_visible_indices(len(images), count, ratio, generators, self.device)
        values, indices = semantic_density(
            self.teacher, images, visible, num_removed=size, generator=generators, **self.scoring
        )
        return visible, values, indices

    @torch.no_grad()
    def draw(self, batch: Batch) -> Lists:
        """The lists of a batch, each drawn by its image's own random numbers."""
        generators = batch.generators("patches")
        scores: list[tuple[float, Tensor]] = []
        visible = None
        if self.teacher is None:
            uniform = draw_uniform(len(generators), self.num_patches, generators, self.device)
            indices = select_top(uniform, self.list_size)
        else:
            visible, values, indices = self._score(batch.images, generators, self.list_size)
            scores.append((self.shares[0], values))
        if self.other is not None:
            share = self.shares[1] if scores else 1.0
            scores.append((share, self._maps(batch).gather(1, indices)))
        return Lists(indices, scores, visible)

    def _maps(self, batch: Batch) -> Tensor:
        """Scores (B, N) by ``other``; those of crops that come again are computed once and kept.

        They are computed image by image: a run that resumes, with other batches, gets the same.
        """
        if batch.crop is None or batch.problems:  # what cannot be read now may be there later
            return self.score_map(batch.images)
        keys = [(batch.crop, index) for index in batch.indices]
        for key, image in zip(keys, batch.images.split(1)):
            if key not in self.kept:
                self.kept[key] = self.score_map(image)[0].cpu()
        return torch.stack([self.kept[key] for key in keys]).to(self.device)


def _open_teacher(teacher: Any, img_size: Any, removal: str) -> Any:
    """An MAE, or a timm ViT as a ``FeatureTeacher``: a module, or by its name in timm."""
    rest = "coarse" if removal == "coarse" else "drop"
    if isinstance(teacher, nn.Module):
        if not isinstance(teacher, PatchTeacher):
            teacher = FeatureTeacher(teacher, rest=rest)
        own = tuple(teacher.img_size)
        if img_size is not None and to_pair(img_size) != own:
            raise ValueError(f"img_size is {img_size}, the teacher takes {own}.")
    elif timm.is_model(str(teacher)):
        return FeatureTeacher(str(teacher), img_size, rest)
    else:
        size = {} if img_size is None else {"img_size": img_size}
        teacher = create_teacher(teacher, **size)
    by_cells = rest == "coarse" and isinstance(teacher, MAETeacher)
    return CellTeacher(teacher) if by_cells else teacher
