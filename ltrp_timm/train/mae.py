"""Train a teacher, an MAE, on your own images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.sources import SCALE
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
from ltrp_timm.train.loop import Summary, Task, fit
from ltrp_timm.train.recipe import cropped_sources
from ltrp_timm.train.settings import CropScale, check_value, make_settings
from ltrp_timm.visualize import kept_patches, show_images

DEFAULTS = {"epochs": 400, "base_lr": 1.5e-4, "weight_decay": 0.05}


def train_teacher(
    data: Any,
    output: Any,
    img_size: int | None = None,
    teacher_args: Mapping[str, Any] | None = None,
    init_from: Any = None,
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = False,
    scale: CropScale = SCALE,
    **settings: Any,
) -> Summary:
    """Train an MAE to reconstruct masked patches; ``create_teacher(output)`` loads it.

    Args:
        data: Images without labels: a folder, a ``.tar`` or a name that timm's ``create_dataset``
            takes (``hfds/…``, ``wds/…``, ``torch/…``). In Python also a torch dataset of pictures.
        output: Folder of the run, new or empty.
        img_size: Side of the images (default: 224, or that of ``init_from``).
        teacher_args: More arguments of ``MAETeacher``: patch size, widths, depths, heads.
        init_from: A teacher to start from: Hub id, folder or file.
        mask_ratio: Share of patches that are masked.
        norm_pix_loss: Reconstruct patches normalised by their own mean and standard deviation.
        scale: Share of a picture's area that a random crop takes, from and to.
        **settings: See ``Settings``. Defaults here are MAE's: 400 epochs, a tenth of them warm-up,
            AdamW (0.9, 0.95), weight decay 0.05, 1.5e-4 · images per update / 256.

    Returns:
        How the run ended.

    Raises:
        ValueError: An argument is out of its range, no image is readable, or the checkpoint is of
            another configuration.
        TypeError: An argument is unknown.
        FileNotFoundError: Data or teacher do not exist.
        FileExistsError: ``output`` holds a run.
        BlockingIOError: Another process writes to ``output``.
        NonFiniteLossError: The loss is not finite.

    Source: He et al. (2022), Masked autoencoders are scalable vision learners.

    >>> train_teacher("photos", "mae", img_size=96, epochs=100)  # doctest: +SKIP
    """
    common = make_settings(DEFAULTS, settings)
    check_value("scale", scale, "two numbers, 0 < from <= to <= 1")
    args: dict[str, Any] = {**(teacher_args or {}), "norm_pix_loss": norm_pix_loss, "frozen": False}
    if img_size is not None:
        args["img_size"] = img_size
    with join_world(common.device) as world:
        with seeded(sample_seed(common.seed, 0, 0, "weights")):
            teacher = create_teacher(init_from, **args) if init_from else MAETeacher(**args)
        task = TeacherTask(teacher.to(world.device), mask_ratio)
        sources = cropped_sources(data, common, world, teacher, scale)
        return fit(task, sources, common, world, output)


class TeacherTask(Task):
    """An MAE that learns to reconstruct: on the device, and not frozen."""

    name = "train-teacher"
    metric = "loss"
    higher_is_better = False

    def __init__(self, teacher: MAETeacher, mask_ratio: float) -> None:
        num_visible(teacher.num_patches, mask_ratio)
        super().__init__(teacher)
        self.mask_ratio = mask_ratio

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {"teacher": self.model.config(), "mask_ratio": self.mask_ratio}

    def _visible(self, batch: Batch) -> Tensor:
        generators = batch.generators("patches")
        count, device = self.model.num_patches, batch.images.device
        return random_visible_indices(len(batch), count, self.mask_ratio, generators, device)

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error over masked patches."""
        predictions, visible = forward(batch.images, self._visible(batch))
        return self.model.reconstruction_loss(batch.images, predictions, visible)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss of each image."""
        predictions, visible = model(batch.images, self._visible(batch))
        parts = zip(*(values.split(1) for values in (batch.images, predictions, visible)))
        return {"loss": torch.stack([self.model.reconstruction_loss(*part) for part in parts])}

    def save(self, model: Any, folder: Path) -> None:
        """Write the teacher for ``create_teacher``."""
        model.save(folder, overwrite=True)

    def panels(self, model: Any, batch: Batch) -> list[list[tuple[Image.Image, str]]]:
        """The visible patches, the reconstruction, the photo."""
        predictions, visible = model(batch.images, self._visible(batch))
        true = model.patchify(batch.images).float()
        hidden = masked_indices(visible, model.num_patches)
        painted = model.to_pixels(
            gather_patches(predictions.float(), hidden), gather_patches(true, hidden)
        )
        places = hidden.unsqueeze(2).expand_as(painted)
        pixels = model.unpatchify(model.denormalise(true).scatter(1, places, painted))
        photos, paintings = show_images(batch.images, model.mean, model.std), show_images(pixels)
        return [
            [
                (kept_patches(photo, shown, model.grid_size), "visible"),
                (painting, "painted"),
                (photo, "photo"),
            ]
            for photo, painting, shown in zip(photos, paintings, visible)
        ]
