"""Which patches a teacher sees: how many, and drawn from whose random numbers."""

from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from ltrp_timm.selection import select_top

Generators = Union[torch.Generator, Sequence[torch.Generator]]


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """The number of visible patches V that a mask ratio means: ``int(N * (1 - mask_ratio))``.

    Raises:
        ValueError: the ratio is not in (0, 1), or leaves no patch visible or none masked.

    >>> num_visible(196, 0.9)
    19
    """
    number = isinstance(mask_ratio, (int, float)) and not isinstance(mask_ratio, bool)
    if not number or not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in (0, 1), got {mask_ratio}.")
    visible = int(num_patches * (1 - mask_ratio))
    if visible < 1 or visible == num_patches:
        raise ValueError(f"mask_ratio = {mask_ratio} leaves {visible} of {num_patches} visible.")
    return visible


def draw_uniform(
    batch_size: int, num_items: int, generator: Generators | None, device: Any = None
) -> Tensor:
    """Uniform numbers (B, n) in [0, 1).

    Args:
        batch_size: B.
        num_items: n.
        generator: one for the batch; or B of them, an image's own, so that what is drawn for an
            image does not depend on its place in the batch; None for torch's global state.
        device: where the result goes.

    Raises:
        ValueError: as many generators as images are needed.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.rand(batch_size, num_items, generator=generator, device=where).to(device)
    if len(generator) != batch_size:
        raise ValueError(f"{batch_size} images need as many generators, got {len(generator)}.")
    rows = [torch.rand(num_items, generator=g, device=g.device).to(device) for g in generator]
    return torch.stack(rows)


def random_visible_indices(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    generator: Generators | None = None,
    device: Any = None,
) -> Tensor:
    """Draw the visible patches of each image: those with the V smallest of N random numbers.

    Returns:
        (B, V) int64, ascending.

    Raises:
        ValueError: as for ``num_visible`` and ``draw_uniform``.
    """
    visible = num_visible(num_patches, mask_ratio)
    return select_top(-draw_uniform(batch_size, num_patches, generator, device), visible)


def masked_indices(visible_indices: Tensor, num_patches: int) -> Tensor:
    """visible_indices (B, V), without duplicates -> all others (B, M), ascending."""
    batch, visible = visible_indices.shape
    masked = torch.ones(batch, num_patches, device=visible_indices.device)
    return select_top(masked.scatter(1, visible_indices, 0.0), num_patches - visible)
