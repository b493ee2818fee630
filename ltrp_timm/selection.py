"""Scores to keep indices to tokens: the arithmetic of patch selection.

Axes: B images, N patches, P prefix tokens, L = P + N, D width, K kept patches. Everything here is a
function of its arguments, runs without host synchronisation (but for ``validate_keep_indices``) and
can be scripted, traced, compiled and exported.
"""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

SELECTIONS = ("top", "random")
FILLS = ("zeros", "nearest")


def num_keep(num_patches: int, keep_ratio: float) -> int:
    """The number of patches K that a keep ratio means: ``max(1, int(N * keep_ratio + 0.5))``.

    Raises:
        ValueError: keep_ratio is not in (0, 1].

    >>> num_keep(196, 0.5)
    98
    """
    if not torch.jit.is_scripting():  # there it was checked when it was set
        check_keep_ratio(keep_ratio)
    return max(1, int(num_patches * keep_ratio + 0.5))


def check_keep_ratio(keep_ratio: float) -> float:
    """Return ``keep_ratio`` as a float.

    Raises:
        ValueError: it is not a number in (0, 1].
    """
    number = isinstance(keep_ratio, (int, float)) and not isinstance(keep_ratio, bool)
    if not number or not 0.0 < keep_ratio <= 1.0:  # a NaN fails both comparisons
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}.")
    return float(keep_ratio)


def check_selection(selection: str) -> str:
    """Return ``selection``.

    Raises:
        ValueError: it names no selection rule.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
    return selection


def check_fill(fill: str) -> str:
    """Return ``fill``.

    Raises:
        ValueError: it names no way to fill dropped places.
    """
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}.")
    return fill


def select_top(scores: Tensor, k: int) -> Tensor:
    """Keep the K best scores of each image.

    Ties go to the lower index, NaN counts as minus infinity.

    Args:
        scores: (B, N) floating point, higher = keep first.
        k: number of patches to keep, 1 <= k <= N.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: scores are not (B, N), or k is out of range.

    >>> select_top(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    tensor([[1, 2]])
    """
    check_k(scores, k)
    scores = torch.nan_to_num(scores, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if not torch.jit.is_scripting():
        if (
            torch.onnx.is_in_onnx_export()
        ):  # ONNX knows no stable sort; its TopK has the same rule for ties
            return scores.topk(k, dim=1).indices.sort(dim=1)[0]
    order = torch.sort(scores, dim=1, descending=True, stable=True)[1]
    return order[:, :k].sort(dim=1)[0]


def select_random(
    scores: Tensor, k: int, generator: Optional[torch.Generator] = None, seed: int = 0
) -> Tensor:
    """Keep K patches at random.

    Without a generator it is the same set for every image and at every call.

    Args:
        scores: (B, N), read for its shape and device only.
        k: number of patches to keep, 1 <= k <= N.
        generator: draws a fresh set for each image when given (eager only).
        seed: chooses the set when no generator is given.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: scores are not (B, N), or k is out of range.
    """
    if not torch.jit.is_scripting():
        if generator is not None:
            draw = torch.rand(scores.shape, generator=generator, device=generator.device)
            return select_top(draw.to(scores.device), k)
    return select_top(seeded_scores(scores.shape[0], scores.shape[1], seed, scores.device), k)


def mean_rank(values: Tensor) -> Tensor:
    """values (B, N) -> ranks in (0, 1): 0.5/N the lowest, ties share their mean rank."""
    count = values.shape[1]
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():  # no searchsorted there; counting pairs is the same
            pairs = values.unsqueeze(2) - values.unsqueeze(1)
            return (pairs.sign().sum(dim=2) + count) / (2 * count)
    ordered = values.sort(dim=1)[0]
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to) / (2 * count)


def seeded_scores(batch_size: int, num_patches: int, seed: int, device: torch.device) -> Tensor:
    """Scores (B, N) float32 in [0, 1) that look random: a function of (seed, N) alone.

    They are the same for every image. The values come from a few rounds of modular squaring of the
    patch index, so that scripted, compiled and exported models draw what eager ones draw, and a
    call draws what the call before drew.
    """
    prime = 2147483647  # 2^31 - 1: products of two residues stay inside int64
    x = torch.arange(1, num_patches + 1, device=device, dtype=torch.int64)
    start = (seed * 40503 + num_patches * 7919 + 12345) % prime
    x = (x * 1103515245 + start) % prime
    for _ in range(4):
        x = ((x * x) % prime + x * 69069 + 362437) % prime
    return (x.to(torch.float32) / prime).unsqueeze(0).expand(batch_size, -1)


def select_patches(scores: Tensor, k: int, selection: str) -> Tensor:
    """Scores (B, N) -> keep indices (B, K) by the rule of that name, "top" or "random"."""
    if selection == "random":
        return select_random(scores, k)
    return select_top(scores, k)


def choose_keep_indices(
    scores: Tensor, keep_indices: Optional[Tensor], keep_ratio: float, selection: str
) -> Tensor:
    """The caller's ``keep_indices`` (B, K) when given, else those that scores (B, N) choose."""
    if keep_indices is not None:
        check_keep_indices(keep_indices, scores.shape[0], scores.shape[1])
        return keep_indices
    return select_patches(scores, num_keep(scores.shape[1], keep_ratio), selection)


def check_keep_indices(
    keep_indices: Tensor, batch_size: int, num_patches: int, name: str = "keep_indices"
) -> None:
    """Check shape (B, K), 1 <= K <= N, and dtype int64 of indices; their values are not read.

    ``name`` is what the caller's argument is called.

    Raises:
        ValueError: the shape is off.
        TypeError: the dtype is off.
    """
    if not torch.jit.is_scripting():
        if not isinstance(keep_indices, Tensor):
            kind = type(keep_indices).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {kind}: use torch.as_tensor.")
    if keep_indices.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {keep_indices.dtype}.")
    shape = keep_indices.shape
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < 1 or shape[1] > num_patches:
        raise ValueError(
            f"{name} must be (B, K) with B = {batch_size} and 1 <= K <= N = {num_patches}, "
            f"got {list(shape)}."
        )


def validate_keep_indices(
    keep_indices: Tensor, num_patches: int, name: str = "keep_indices"
) -> None:
    """Check that indices (B, K) are in range and without duplicates; reads from the device.

    Raises:
        ValueError: an index lies outside 0 … N - 1 or stands twice in a row.
    """
    if keep_indices.numel() == 0:
        return
    low, high = int(keep_indices.min()), int(keep_indices.max())
    if low < 0 or high >= num_patches:
        raise ValueError(f"{name} must lie in 0 … {num_patches - 1}, got {low} … {high}.")
    ordered = keep_indices.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(f"{name} holds the same patch twice in one row.")


def gather_patches(tokens: Tensor, keep_indices: Tensor) -> Tensor:
    """tokens (B, N, D), keep_indices (B, K) -> (B, K, D).

    Whole rows are copied: ``torch.gather`` along an expanded index reads an index for every value
    and takes many times longer on a CPU.

    Raises:
        ValueError: tokens and indices are not of one batch.
        IndexError: an index is out of range (on a GPU an assertion of the device).
    """
    if tokens.shape[0] != keep_indices.shape[0]:
        shapes = [tokens.shape[0], keep_indices.shape[0]]
        raise ValueError(f"tokens and keep_indices must be of one batch, got sizes {shapes}.")
    images = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    return tokens[images, keep_indices]


def keep_tokens(tokens: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Keep the prefix tokens and the chosen patch tokens.

    Args:
        tokens: (B, P + N, D).
        keep_indices: (B, K), prefix tokens not counted.
        num_prefix_tokens: P.

    Returns:
        (B, P + K, D).
    """
    if num_prefix_tokens > 0:
        prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(tokens.shape[0], -1)
        keep_indices = torch.cat([prefix, keep_indices + num_prefix_tokens], dim=1)
    return gather_patches(tokens, keep_indices)


def scatter_patches(
    tokens: Tensor, keep_indices: Tensor, grid_size: Tuple[int, int], fill: str = "zeros"
) -> Tensor:
    """Put kept tokens back at their places of the grid.

    Args:
        tokens: (B, K, D) tokens of the kept patches.
        keep_indices: (B, K), row-major positions on the grid.
        grid_size: (h, w) in patches, N = h * w.
        fill: what stands at dropped places: "zeros", or "nearest" for the token of the nearest kept
            patch (Euclid on the grid, ties to the lower index).

    Returns:
        (B, N, D).

    Raises:
        ValueError: ``fill`` is neither.
    """
    if not torch.jit.is_scripting():
        check_fill(fill)
    if fill == "nearest":
        return gather_patches(tokens, nearest_kept(keep_indices, grid_size))
    batch, _, width = tokens.shape
    dense = tokens.new_zeros(batch, grid_size[0] * grid_size[1], width)
    return dense.scatter(1, keep_indices.unsqueeze(-1).expand(-1, -1, width), tokens)


def nearest_kept(keep_indices: Tensor, grid_size: Tuple[int, int]) -> Tensor:
    """keep_indices (B, K) -> (B, N): which of the K kept patches is nearest to each place."""
    h, w = grid_size
    places = torch.arange(h * w, device=keep_indices.device)
    rows, cols = places // w, places % w
    nearest: List[Tensor] = []
    for kept in keep_indices:  # image by image: N x K distances of a whole batch are gigabytes
        distance = (rows[:, None] - kept // w) ** 2 + (cols[:, None] - kept % w) ** 2
        # distances are integers: the patch index as last digit makes the minimum unique
        nearest.append((distance * (h * w) + kept).argmin(dim=1))
    return torch.stack(nearest)


def check_k(scores: Tensor, k: int) -> None:
    """Check scores (B, N) and 1 <= k <= N, raise ValueError otherwise."""
    if scores.dim() != 2 or k < 1 or k > scores.shape[1]:
        shape: List[int] = list(scores.shape)
        raise ValueError(f"expected scores (B, N) and 1 <= k <= N, got scores {shape} and k = {k}.")


class HasKeepRatio:
    """A mixin for modules with a ``keep_ratio`` that may be set between calls."""

    # torch.jit.script would compile properties; the plain attributes behind them serve it
    __jit_unused_properties__: Tuple[str, ...] = ("keep_ratio",)

    _keep_ratio: float

    @property
    def keep_ratio(self) -> float:
        """Share of patches to keep, in (0, 1]. Each K is one graph to ``torch.compile``."""
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        self._keep_ratio = check_keep_ratio(value)


class PatchSelector(HasKeepRatio, nn.Module):
    """The bare layer for a ViT of your own: put it after the position embedding.

    Args:
        keep_ratio: share of patches to keep, in (0, 1].
        num_prefix_tokens: P, tokens at the front (class, registers) that always stay.
        selection: "top" or "random".

    Raises:
        ValueError: an argument is out of its range.

    >>> tokens, keep = PatchSelector(0.5)(torch.zeros(2, 1 + 196, 8), torch.rand(2, 196))
    >>> tokens.shape, keep.shape
    (torch.Size([2, 99, 8]), torch.Size([2, 98]))
    """

    def __init__(
        self, keep_ratio: float = 0.5, num_prefix_tokens: int = 1, selection: str = "top"
    ) -> None:
        super().__init__()
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be >= 0, got {num_prefix_tokens}.")
        self._keep_ratio = check_keep_ratio(keep_ratio)
        self.num_prefix_tokens = num_prefix_tokens
        self.selection = check_selection(selection)

    def forward(self, tokens: Tensor, scores: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens (B, P + N, D), scores (B, N) -> tokens (B, P + K, D), keep_indices (B, K).

        Raises:
            ValueError: tokens and scores do not belong together.
        """
        expected = tokens.shape[1] - self.num_prefix_tokens
        if scores.dim() != 2 or scores.shape[0] != tokens.shape[0] or scores.shape[1] != expected:
            raise ValueError(
                f"scores must be (B, N) = {[tokens.shape[0], expected]} for tokens "
                f"{list(tokens.shape)} with {self.num_prefix_tokens} prefix tokens, "
                f"got {list(scores.shape)}."
            )
        keep = select_patches(scores, num_keep(scores.shape[1], self._keep_ratio), self.selection)
        return keep_tokens(tokens, keep, self.num_prefix_tokens), keep

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        prefix = f"num_prefix_tokens={self.num_prefix_tokens}"
        return f"keep_ratio={self.keep_ratio}, {prefix}, selection={self.selection!r}"
