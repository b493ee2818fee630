"""Check that an exported model gives the outputs of the pruned model, not of the full one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.models.ltrp import LTRPModel

_NOISE = 5e-6  # relative change of a pixel, above the rounding of any float32 runtime
_MARGIN = 10.0  # least ratio of the distances from the full and from the pruned outputs
_IMAGES = 4  # least number of images
_DRAWS = 8  # images drawn for each one needed, before giving up


@dataclass(frozen=True)
class Parity:
    """Differences between the outputs of a file and of a model.

    Args:
        error: Largest absolute difference from the eager pruned outputs.
        from_full: Largest absolute difference from the full model, in the batch where it is
            smallest; None if all patches are kept.
        scale: Largest absolute output.
        batch_sizes: Sizes of the batches.
        left_out: Number of excluded images, in which the last kept patch is a near tie.
    """

    error: float
    from_full: float | None
    scale: float
    batch_sizes: tuple[int, ...]
    left_out: int

    @property
    def num_images(self) -> int:
        """Number of images."""
        return sum(self.batch_sizes)

    def raise_if_wrong(self, tolerance: float) -> None:
        """Check that the error is small, also compared with the distance from the full model.

        Args:
            tolerance: Largest allowed error.

        Raises:
            RuntimeError: The error is too large, or the file may be the full model.
        """
        figures = f"largest difference from the eager pruned outputs {self.error:.1e}"
        if not self.error <= tolerance:  # NaN fails too
            batches = ", ".join(map(str, self.batch_sizes))
            raise RuntimeError(
                f"the file does not give the model's outputs: {figures}, allowed {tolerance:.1e} "
                f"(outputs up to {self.scale:.1e}, batches of {batches})."
            )
        if self.from_full is None:
            return
        if not self.from_full > _MARGIN * self.error:
            raise RuntimeError(
                f"the file cannot be distinguished from the full model: {figures}, from the full "
                f"model's {self.from_full:.1e}. Weights may be missing (LayerScale near 0 hides "
                "patches)."
            )


@torch.no_grad()
def check_parity(
    model: LTRPModel,
    run: Callable[[Tensor], Tensor],
    input_size: tuple[int, int, int],
    batch_size: int,
    dynamic: bool,
) -> Parity:
    """Run a loaded file and its model on the same images.

    When two scores at the cut are nearly equal, another runtime may keep the other patch. Such
    images are excluded and counted.

    Args:
        model: The eager model.
        run: The file in its runtime: images (B, C, H, W) -> outputs.
        input_size: (C, H, W).
        batch_size: B of the file.
        dynamic: Also run batches of other sizes.

    Raises:
        RuntimeError: The shapes differ, or too few images have a clear order of patches.
    """
    sizes = [1, 2, batch_size + 2] if dynamic else [batch_size] * max(2, -(-_IMAGES // batch_size))
    parameter = next(model.backbone.parameters())
    images, left_out = _clear_images(model, input_size, sum(sizes), parameter)
    error, scale, from_full = 0.0, 0.0, []
    for batch in images.split(sizes):
        wanted, full = model(batch), model.backbone(batch)
        out = run(batch)
        if out.shape != wanted.shape:
            raise RuntimeError(
                f"the file gives outputs {list(out.shape)}, the model {list(wanted.shape)}."
            )
        worst = (out - wanted).abs().max().item()
        error = worst if worst != worst else max(error, worst)
        scale = max(scale, wanted.abs().max().item())
        from_full.append((out - full).abs().max().item())
        if error != error:
            break
    h, w = model.grid_size(images)
    all_kept = model.keep_indices(images[:1]).shape[1] == h * w
    return Parity(error, None if all_kept else min(from_full), scale, tuple(sizes), left_out)


def _clear_images(
    model: LTRPModel, input_size: tuple[int, int, int], count: int, like: Tensor
) -> tuple[Tensor, int]:
    """Images (count, C, H, W) whose kept patches survive rounding; the number of excluded ones."""
    kept: list[Tensor] = []
    left_out = 0
    generator = torch.Generator().manual_seed(0)
    for image in _draw(input_size, count * _DRAWS, generator):
        image = image.to(like.device, like.dtype)
        if _has_near_tie(model, image, generator):
            left_out += 1
        else:
            kept.append(image)
        if len(kept) == count:
            return torch.cat(kept), left_out
    raise RuntimeError(
        f"only {len(kept)} of {count * _DRAWS} images have a clear order of patches: the scores "
        "are too close to each other to compare runtimes."
    )


def _draw(
    input_size: tuple[int, int, int], count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Normalised images (1, C, H, W): noise, and soft shapes with some texture."""
    channels, h, w = input_size
    for number in range(count):
        noise = torch.randn(1, channels, h, w, generator=generator)
        if number % 2 == 0:
            yield noise
            continue
        shapes = torch.randn(1, channels, 7, 7, generator=generator)
        texture = torch.rand(1, 1, 5, 5, generator=generator)
        shapes = F.interpolate(shapes, size=(h, w), mode="bicubic")
        yield shapes + 0.2 * F.interpolate(texture, size=(h, w)) * noise


def _has_near_tie(model: LTRPModel, image: Tensor, generator: torch.Generator) -> bool:
    """Whether rounding could change which patches of an image (1, C, H, W) are kept."""
    keep = model.keep_indices(image)
    noise = torch.randn(image.shape, generator=generator).to(image.device, image.dtype)
    changed = [image * (1 + _NOISE), image * (1 - _NOISE), image + _NOISE * noise]
    return any(not torch.equal(model.keep_indices(other), keep) for other in changed)
