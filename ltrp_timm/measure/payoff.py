"""Does dropping patches pay? The full model, its ideal and pruned ones, timed interleaved.

The ideal model gets K patches without ranking and embeds only these: it is the ceiling. A pruned
model also ranks, which may cost more than it saves, selects and gathers. Its rival is the plain
model on a smaller image, which has about K patches too.
"""

import contextlib
import copy
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers.bridge import set_image_size
from ltrp_timm.measure.throughput import Ratio, Timing, compare, ratio
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.slots import find_adapter
from ltrp_timm.slots.base import KeptPatchEmbed, as_slot, can_embed_kept

FULL, IDEAL, GIVEN, SMALLER = "full", "ideal", "no ranking", "smaller image"
CompileMode = Literal["default", "freezing", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class Payoff:
    """One variant of a model compared with the full one.

    Attributes:
        method: "full", "ideal" (the plain model on K patches), "no ranking" (the pruned model with
            given indices), "smaller image" (the plain model on one), or the name of a ranker.
        keep_ratio: Share of the patches; 1 for the full model.
        num_kept: K; of a smaller image, all its patches.
        img_size: (height, width) of the images.
        timing: Seconds of each round, and peak memory.
        speedup: Speed-up over the full model.
        achieved: Time of the ideal model ÷ time of this one; None without an ideal model.
        ranking: Time that ranking adds ÷ time of the full model, median over rounds; None without
            ranking.
    """

    method: str
    keep_ratio: float
    num_kept: int
    img_size: tuple[int, int]
    timing: Timing
    speedup: Ratio
    achieved: Ratio | None = None
    ranking: float | None = None


class FirstPatchEmbed(KeptPatchEmbed):
    """Embeds only the first ``num_kept`` patches of each image."""

    num_kept: int

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> timm's embedding, with zeros for the other patches."""
        self.keep_indices = torch.arange(self.num_kept, device=x.device).expand(x.shape[0], -1)
        return super().forward(x)


def twin(model: Any) -> Any:
    """Copy a model's modules; the weights are shared."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def ideal(full: Any, kept: int) -> Any:
    """Build the ceiling: a twin of a plain timm ViT that encodes the first K = ``kept`` patches.

    It embeds only these if a pruned model would: all its work is also work of a pruned model. None
    for a family whose blocks need the indices of the tokens (relative position bias, NaFlexViT).
    """
    adapter = find_adapter(full)
    if len(adapter.places) > 1:
        return None
    model = twin(full)
    slot: Any = adapter.modules(model)[adapter.places[0]].train(model.training)
    length = slot.num_prefix_tokens + kept

    def take(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :length].contiguous(), torch.arange(kept, device=x.device).expand(len(x), -1)

    slot.take = take
    setattr(model, adapter.places[0], slot)
    embed = adapter.embed_of(model)
    if can_embed_kept(embed):
        embed = as_slot(embed, FirstPatchEmbed)
        embed.num_kept = kept
        setattr(model, adapter.patch_embed, embed)
    return model


def smaller_grid(grid: tuple[int, int], num_kept: int) -> tuple[int, int]:
    """The patch grid of a smaller image of the same shape with about as many patches as are kept.

    Of the grids with the proportions of ``grid`` (h, w), to a patch, it is the one with nearest to
    K patches; of equally near ones, that with the closer proportions.

    >>> smaller_grid((14, 14), 98)
    (10, 10)
    """
    h, w = grid
    tall = [(rows, max(1, round(rows * w / h))) for rows in range(1, h + 1)]
    wide = [(max(1, round(cols * h / w)), cols) for cols in range(1, w + 1)]

    def distance(found: tuple[int, int]) -> tuple[int, float]:
        rows, cols = found
        return abs(rows * cols - num_kept), abs(math.log(rows * w / (cols * h)))

    return min(tall + wide, key=distance)


def on_grid(model: Any, grid: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
    """Build the plain model of a timm ViT or an LTRPModel for images of another patch grid (h, w).

    Position tables, relative position biases and rotary embeddings are resampled as timm does; all
    other weights are shared. Also returns the size (height, width) of its images.

    Raises:
        TypeError: Patches cannot be dropped from this model.
        ValueError: The model takes images of one size only.
    """
    plain = twin(model)
    plain = plain.restore() if isinstance(plain, LTRPModel) else plain
    adapter = find_adapter(plain)
    height, width = adapter.patch_pixels(plain)
    size = (grid[0] * height, grid[1] * width)
    fixed = getattr(adapter.embed_of(plain), "strict_img_size", False)
    if fixed or hasattr(plain, "set_input_size"):
        set_image_size(plain, size)  # the others, such as NaFlexVit, take images of any size
    return plain, size


def measure_payoff(
    full: nn.Module,
    images: Tensor,
    rankers: Mapping[str, nn.Module],
    keep_ratios: Sequence[float],
    *,
    compile_mode: CompileMode | None = None,
    repeats: int = 10,
    warmup: int = 2,
    memory: bool = False,
    smaller_image: bool = False,
    **front: Any,
) -> list[Payoff]:
    """Time the full model and, at each keep ratio, the ideal and the pruned ones, interleaved.

    Args:
        full: A timm ViT in eval mode, on the device and in the dtype to time; it is not changed.
        images: (B, C, H, W), normalised, of the same device and dtype.
        rankers: Rankers by name.
        keep_ratios: Shares of patches to keep, in (0, 1).
        compile_mode: A mode of torch.compile, or "freezing", which also packs the weights on a CPU;
            None for eager.
        repeats: Number of timed rounds.
        warmup: Number of rounds before them; the first one compiles.
        memory: Also measure the peak memory of one call each.
        smaller_image: Also time the plain model at the image size with about as many patches as are
            kept, at each keep ratio (see ``smaller_grid``).
        **front: Selection and its arguments, rest, scales and size bias of ``drop_patches``.

    Returns:
        The full model, then the variants at each keep ratio, largest first.

    Raises:
        TypeError: Patches cannot be dropped from this model.
        ValueError: There is no keep ratio or no ranker, a keep ratio is not in (0, 1), or the mode
            is unknown; or, with ``smaller_image``, the model takes images of one size only.

    >>> import timm
    >>> from ltrp_timm import create_ranker
    >>> vit = timm.create_model("vit_tiny_patch16_224").eval()
    >>> rankers = {"contrast": create_ranker("contrast")}
    >>> lines = measure_payoff(vit, torch.randn(1, 3, 224, 224), rankers, [0.5], repeats=3)
    >>> [line.method for line in lines]
    ['full', 'ideal', 'no ranking', 'contrast']
    """
    _check(rankers, keep_ratios, compile_mode)
    variants = _variants(full, images, rankers, keep_ratios, front, smaller_image)
    with _compiling(compile_mode, len(variants)) as prepare:
        calls = {
            key: torch.inference_mode()(partial(prepare(model), *inputs))
            for key, (model, inputs, _) in variants.items()
        }
        timings = compare(
            {str(key): call for key, call in calls.items()},
            repeats=repeats,
            warmup=max(warmup, 1) if compile_mode else warmup,
            device=images.device,
            memory=memory,
        )
    by_key = dict(zip(calls, timings.values()))
    return [_payoff(key, variants[key], by_key) for key in by_key]


Key = tuple[str, float]  # method, keep ratio
Variant = tuple[nn.Module, tuple[Tensor, ...], int]  # model, inputs, K


def _check(rankers: Mapping[str, Any], keep_ratios: Sequence[float], mode: str | None) -> None:
    if not rankers or not keep_ratios:
        raise ValueError("measure_payoff needs at least one ranker and one keep ratio.")
    reserved = sorted({FULL, IDEAL, GIVEN, SMALLER} & set(rankers))
    if reserved:
        raise ValueError(f"{reserved[0]!r} is reserved; give the ranker another name.")
    for keep_ratio in keep_ratios:
        if not 0 < keep_ratio < 1:
            raise ValueError(f"keep_ratios must be in (0, 1), got {keep_ratio}.")
    if mode is not None and mode not in get_args(CompileMode):
        modes = ", ".join(get_args(CompileMode))
        raise ValueError(f"compile_mode must be one of {modes}, got {mode!r}.")


def _variants(
    full: nn.Module,
    images: Tensor,
    rankers: Mapping[str, nn.Module],
    keep_ratios: Sequence[float],
    front: Mapping[str, Any],
    smaller_image: bool,
) -> dict[Key, Variant]:
    """Models with shared weights, and the inputs of each."""
    probe = drop_patches(twin(full), ranker="random")
    h, w = probe.grid_size(images)
    found: dict[Key, Variant] = {(FULL, 1.0): (full, (images,), h * w)}
    generator = torch.Generator().manual_seed(0)
    for keep_ratio in sorted(set(keep_ratios), reverse=True):
        # random patches or cells, which no ranker has to find
        chance = {**front, "selection": "random", "selection_args": None}
        given = drop_patches(twin(full), "random", keep_ratio, **chance)
        kept = given.num_tokens()
        inputs: tuple[Tensor, ...] = (images,)
        best = ideal(full, kept)
        if best is not None:
            found[IDEAL, keep_ratio] = (best, inputs, kept)
        if given.rest == "drop":
            keep = torch.rand(images.shape[0], h * w, generator=generator).argsort(dim=1)[:, :kept]
            inputs = (*inputs, keep.sort(dim=1).values.to(images.device))
        found[GIVEN, keep_ratio] = (given, inputs, kept)
        for name, ranker in rankers.items():
            model = drop_patches(twin(full), twin(ranker), keep_ratio, **front)
            found[name, keep_ratio] = (model.eval(), (images,), kept)
        if smaller_image:
            grid = smaller_grid((h, w), kept)
            plain, size = on_grid(full, grid)
            found[SMALLER, keep_ratio] = (plain, (F.interpolate(images, size),), math.prod(grid))
    return found


@contextlib.contextmanager
def _compiling(
    mode: str | None, graphs: int
) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """Give a function that compiles a model; allow as many graphs as there are variants."""
    if mode is None:
        yield lambda model: model
        return
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    inductor: Any = importlib.import_module("torch._inductor.config")
    limits = {"recompile_limit": 8 * graphs, "accumulated_recompile_limit": 64 * graphs}
    torch_mode = "default" if mode == "freezing" else mode
    with dynamo.patch(**limits), inductor.patch(freezing=mode == "freezing"):
        yield lambda model: torch.compile(model, dynamic=False, mode=torch_mode)


def _payoff(key: Key, variant: Variant, timings: Mapping[Key, Timing]) -> Payoff:
    method, keep_ratio = key
    timing, full = timings[key], timings[FULL, 1.0]
    best, given = (timings.get((name, keep_ratio)) for name in (IDEAL, GIVEN))
    ranking = None
    if given is not None and method not in (IDEAL, GIVEN, SMALLER):
        rounds = zip(timing.seconds, given.seconds, full.seconds)
        ranking = statistics.median((ours - theirs) / whole for ours, theirs, whole in rounds)
    achieved = ratio(best, timing) if best is not None and method != IDEAL else None
    _, (images, *_), kept = variant
    height, width = images.shape[-2:]
    gain = ratio(full, timing)
    return Payoff(method, keep_ratio, kept, (height, width), timing, gain, achieved, ranking)


def break_even(keep_ratios: Sequence[float], costs: Sequence[float]) -> float:
    """The largest keep ratio that costs no more than the full model.

    ``costs`` are times of the pruned model ÷ times of the full one, at ascending keep ratios. It is
    the last ratio where the cost crosses 1, interpolated linearly; the largest if it pays, 0 if
    none does.

    >>> break_even([0.25, 0.5], [0.8, 1.2])
    0.375
    """
    pairs = list(zip(keep_ratios, costs))
    if pairs[-1][1] <= 1:
        return pairs[-1][0]
    for (low, cheap), (high, dear) in reversed(list(itertools.pairwise(pairs))):
        if cheap <= 1 < dear:
            return low + (high - low) * (1 - cheap) / (dear - cheap)
    return 0.0


def by_ranker(lines: Sequence[Payoff]) -> dict[str, list[Payoff]]:
    """The variants of each ranker, keep ratios ascending."""
    found: dict[str, list[Payoff]] = {}
    for line in sorted(lines, key=lambda line: line.keep_ratio):
        if line.method not in (FULL, IDEAL, GIVEN, SMALLER):
            found.setdefault(line.method, []).append(line)
    return found


def pays_up_to(lines: Sequence[Payoff]) -> float:
    """``break_even`` of one ranker's variants."""
    costs = [1 / line.speedup.median for line in lines]
    return break_even([line.keep_ratio for line in lines], costs)


def recommend(lines: Sequence[Payoff]) -> str:
    """Say which ranker to use for speed, and which loses time; a sentence without a full stop.

    A ranker is faster if the lower quartile of its speed-up is above 1. Accuracy is not considered.
    """
    found = by_ranker(lines)
    order = sorted(
        found, key=lambda name: -sum(math.log(line.speedup.median) for line in found[name])
    )
    parts: list[str] = []
    for name in order:
        shown = min(found[name], key=lambda line: (abs(line.keep_ratio - 0.5), line.keep_ratio))
        faster = [line for line in found[name] if line.speedup.low > 1]
        if not parts and faster:
            shown = shown if shown in faster else faster[-1]
            parts.append(f"use {name} ({shown.speedup.median:.2f}x at keep {shown.keep_ratio:g})")
        elif not faster:
            slower = all(line.speedup.high < 1 for line in found[name])
            parts.append(f"{name} {'loses' if slower else 'saves no'} time")
        elif len(faster) < len(found[name]):
            parts.append(f"{name} pays up to keep {pays_up_to(found[name]):.2g}")
    if not parts[0].startswith("use"):
        parts.insert(0, "the full model is the fastest")
    return "; ".join(parts)
