"""Train a teacher, an MAE, on images of one's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.sources import cropped_sources
from ltrp_timm.runtime.keyed_rng import sample_seed, seeded
from ltrp_timm.runtime.world import join_world
from ltrp_timm.selection import gather_patches
from ltrp_timm.teacher import (
    MAETeacher,
    create_teacher,
    masked_indices,
    num_visible,
    random_visible_indices,
)
from ltrp_timm.train.loop import fit
from ltrp_timm.train.pictures import show_images
from ltrp_timm.train.settings import SCALE, check_range, make_settings
from ltrp_timm.train.state import digest
from ltrp_timm.train.task import Summary
from ltrp_timm.visualize import kept_patches, row, stack_rows

DEFAULTS = {"epochs": 400, "base_lr": 1.5e-4, "weight_decay": 0.05}


def train_teacher(
    data: Any,
    output: Any,
    img_size: int | None = None,
    teacher_args: Mapping[str, Any] | None = None,
    init_from: Any = None,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = False,
    scale: Sequence[float] = SCALE,
    **settings: Any,
) -> Summary:
    """Train an MAE to paint hidden patches; ``create_teacher(output)`` loads it.

    Args:
        data: images without labels, see ``train_ranker``.
        output: folder of the run, new or empty.
        img_size: side of the images; None for 224, or that of ``init_from``.
        teacher_args: other arguments of ``MAETeacher``: patch size, widths, depths, heads.
        init_from: what ``create_teacher`` takes, to begin with its weights.
        mask_ratio: share of patches that are hidden.
        norm_pix_loss: paint each patch normalised by its own mean and standard deviation.
        scale: share of a picture's area that a random crop takes, from and to.
        **settings: see ``Settings``. Defaults here are MAE's: 400 epochs, a tenth of them warm-up,
            AdamW (0.9, 0.95), weight decay 0.05, 1.5e-4 · images per update / 256.

    Returns:
        How it ended.

    Raises:
        ValueError: an argument out of its range, no readable image, or a checkpoint of another
            configuration.
        TypeError: an argument of no such name.
        FileNotFoundError: data or teacher do not exist.
        FileExistsError: ``output`` holds a run, or is in use.
        NonFiniteLossError: the loss is no finite number.

    Source: He et al. (2022), Masked autoencoders are scalable vision learners.

    >>> train_teacher("photos", "mae", img_size=96, epochs=100)  # doctest: +SKIP
    """
    common = make_settings(DEFAULTS, settings)
    check_range("scale", scale, 1.0)
    args: dict[str, Any] = {**(teacher_args or {}), "norm_pix_loss": norm_pix_loss, "frozen": False}
    if img_size is not None:
        args["img_size"] = img_size
    with join_world(common.device) as world:
        with seeded(sample_seed(common.seed, 0, 0, "weights")):
            teacher = create_teacher(init_from, **args) if init_from else MAETeacher(**args)
        task = TeacherTask(teacher.to(world.device), mask_ratio)
        sources = cropped_sources(data, common, world, teacher, scale)
        return fit(task, sources, common, world, output)


class TeacherTask:
    """An MAE that learns to paint.

    Args:
        teacher: not frozen, on the device.
        mask_ratio: share of patches that are hidden.

    Raises:
        ValueError: the ratio leaves no patch visible, or none hidden.
    """

    name = "train-teacher"
    chance: float | None = None
    metric = "loss"
    higher_is_better = False

    def __init__(self, teacher: MAETeacher, mask_ratio: float) -> None:
        num_visible(teacher.num_patches, mask_ratio)
        self.model, self.mask_ratio = teacher, mask_ratio
        self.start = digest(teacher.state_dict())

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {
            "teacher": self.model.config(),
            "start": self.start,
            "mask_ratio": self.mask_ratio,
        }

    def _visible(self, batch: Batch) -> Tensor:
        own = batch.generators("patches")
        count, device = self.model.num_patches, batch.images.device
        return random_visible_indices(len(batch), count, self.mask_ratio, own, device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error over hidden patches."""
        predictions, visible = model(batch.images, self._visible(batch))
        return self.model.reconstruction_loss(batch.images, predictions, visible)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss of each image."""
        predictions, visible = model(batch.images, self._visible(batch))
        parts = zip(*(values.split(1) for values in (batch.images, predictions, visible)))
        return {"loss": torch.stack([self.model.reconstruction_loss(*part) for part in parts])}

    def save(self, model: Any, folder: Path) -> None:
        """Write the teacher for ``create_teacher``."""
        model.save(folder, overwrite=True)

    def draw(self, model: Any, batch: Batch) -> Image.Image:
        """A row for each image: what is visible, what is painted, the image."""
        predictions, visible = model(batch.images, self._visible(batch))
        true = model.patchify(batch.images).float()
        hidden = masked_indices(visible, model.num_patches)
        painted = model.to_pixels(
            gather_patches(predictions.float(), hidden), gather_patches(true, hidden)
        )
        places = hidden.unsqueeze(2).expand_as(painted)
        pixels = model.unpatchify(model.denormalise(true).scatter(1, places, painted))
        photos = show_images(batch.images, model.mean, model.std)
        rows = []
        for photo, reconstruction, seen in zip(photos, show_images(pixels), visible):
            parts = {
                "visible": kept_patches(photo, seen, model.grid_size),
                "painted": reconstruction,
                "photo": photo,
            }
            rows.append(row([(part, text) for text, part in parts.items()]))
        return stack_rows(rows)
