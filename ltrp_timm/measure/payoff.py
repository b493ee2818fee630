"""Does dropping patches pay? One model in full, at its ceiling, and behind rankers, in turns.

The ceiling ("ideal") is the plain model that is given K patches for nothing and embeds only these.
Between it and a pruned model lie the ranking, which may cost more than it saves, the selection and
the gather.
"""

import contextlib
import copy
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ltrp_timm.measure.throughput import Ratio, Timing, compare, ratio
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.selection import num_keep
from ltrp_timm.slots import find_adapter
from ltrp_timm.slots.base import as_slot
from ltrp_timm.slots.kept_embed import KeptPatchEmbed, can_embed_kept

FULL, IDEAL, GIVEN = "full", "ideal", "no ranking"
CompileMode = Literal["default", "freezing", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class Payoff:
    """One variant of a model beside the full one.

    Attributes:
        method: "full", "ideal" (the plain model on K patches), "no ranking" (the front-end with
            indices that are given), or the name of a ranker.
        keep_ratio: share of the patches; 1 for the full model.
        num_kept: K.
        timing: seconds of each round, peak memory.
        speedup: times as fast as the full model.
        achieved: time of the ideal model ÷ time of this one; None where there is no ideal one.
        ranking: time that the ranking adds ÷ time of the full model, a median over rounds; None
            where nothing is ranked.
    """

    method: str
    keep_ratio: float
    num_kept: int
    timing: Timing
    speedup: Ratio
    achieved: Ratio | None = None
    ranking: float | None = None


class FirstPatchEmbed(KeptPatchEmbed):
    """Embeds the first ``num_kept`` patches of each image alone."""

    num_kept: int

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> as timm's, but for the tokens of other patches."""
        self.keep_indices = torch.arange(self.num_kept, device=x.device).expand(x.shape[0], -1)
        return super().forward(x)


def twin(model: Any) -> Any:
    """Modules of its own, the weights in common with ``model``."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def ideal(full: Any, kept: int) -> Any:
    """The ceiling: a twin of the plain model that is given K patches for nothing.

    It encodes the first K patches. It embeds only these where a pruned model would, so that all it
    does is part of what a pruned model does.

    Args:
        full: a timm ViT.
        kept: K.

    Returns:
        The twin, or None for a family that needs more of a selection than fewer tokens (relative
        position bias, NaFlexViT): there is no plain model on K tokens.
    """
    adapter = find_adapter(full)
    first = adapter.first_tokens(full, kept)
    if first is None:
        return None
    model = twin(full)
    setattr(model, adapter.places[0], first)
    embed = adapter.embed_of(model)
    if can_embed_kept(embed):
        embed = as_slot(embed, FirstPatchEmbed)
        embed.num_kept = kept
        setattr(model, adapter.patch_embed, embed)
    return model


def measure_payoff(
    full: nn.Module,
    images: Tensor,
    rankers: Mapping[str, nn.Module],
    keep_ratios: Sequence[float],
    *,
    selection: str = "top",
    compile_mode: CompileMode | None = None,
    repeats: int = 10,
    warmup: int = 2,
    memory: bool = False,
) -> list[Payoff]:
    """Time the full model, and at each keep ratio the ideal one and those behind each ranker.

    All of them take turns in one process, so that a ratio of two compares the same moments.

    Args:
        full: a timm ViT, in eval, where and in the dtype it is to be timed; it is not changed.
        images: (B, C, H, W), normalised, of the same device and dtype.
        rankers: by the names to show, as ``create_ranker`` makes them.
        keep_ratios: shares of patches to keep, below 1.
        selection: how scores become patches.
        compile_mode: None for eager; "default", "reduce-overhead" or "max-autotune" of
            torch.compile; "freezing" also packs the weights, on a CPU.
        repeats: timed rounds.
        warmup: rounds before them; the first one compiles.
        memory: also measure the peak of one call each.

    Returns:
        The full model's line, then those of each keep ratio, largest first.

    Raises:
        TypeError: patches cannot be dropped from this model.
        ValueError: no keep ratios or no rankers, a keep ratio that is not in (0, 1), an unknown
            mode.

    >>> import timm
    >>> from ltrp_timm import create_ranker
    >>> vit = timm.create_model("vit_tiny_patch16_224").eval()
    >>> rankers = {"contrast": create_ranker("contrast")}
    >>> lines = measure_payoff(vit, torch.randn(1, 3, 224, 224), rankers, [0.5], repeats=3)
    >>> [line.method for line in lines]
    ['full', 'ideal', 'no ranking', 'contrast']
    """
    _check(rankers, keep_ratios, compile_mode)
    variants = _variants(full, images, rankers, keep_ratios, selection)
    with _compiling(compile_mode, len(variants)) as prepare:
        calls = {
            key: _inference(prepare(model), *inputs) for key, (model, inputs) in variants.items()
        }
        names = {str(key): key for key in calls}
        timings = compare(
            {name: calls[key] for name, key in names.items()},
            repeats=repeats,
            warmup=max(warmup, 1) if compile_mode else warmup,
            device=images.device,
            memory=memory,
        )
    by_key = {key: timings[name] for name, key in names.items()}
    return [_payoff(key, by_key) for key in by_key]


Key = tuple[str, float, int]  # method, keep ratio, K


def _check(
    rankers: Mapping[str, nn.Module], keep_ratios: Sequence[float], compile_mode: CompileMode | None
) -> None:
    if not rankers or not keep_ratios:
        raise ValueError("measure_payoff needs a ranker and a keep ratio at least.")
    reserved = sorted({FULL, IDEAL, GIVEN} & set(rankers))
    if reserved:
        raise ValueError(f"no ranker may be called {reserved[0]!r} here.")
    for keep_ratio in keep_ratios:
        if not 0 < keep_ratio < 1:
            raise ValueError(f"keep ratios must be in (0, 1), got {keep_ratio}.")
    if compile_mode is not None and compile_mode not in get_args(CompileMode):
        modes = ", ".join(get_args(CompileMode))
        raise ValueError(f"compile_mode must be one of {modes}, got {compile_mode!r}.")


def _variants(
    full: nn.Module,
    images: Tensor,
    rankers: Mapping[str, nn.Module],
    keep_ratios: Sequence[float],
    selection: str,
) -> dict[Key, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Models of their own modules and common weights, and what each is called with."""
    probe = drop_patches(twin(full), ranker="random")
    h, w = probe.grid_size(images)
    found: dict[Key, tuple[nn.Module, tuple[Tensor, ...]]] = {(FULL, 1.0, h * w): (full, (images,))}
    generator = torch.Generator().manual_seed(0)
    for keep_ratio in sorted(set(keep_ratios), reverse=True):
        kept = num_keep(h * w, keep_ratio)
        best = ideal(full, kept)
        if best is not None:
            found[IDEAL, keep_ratio, kept] = (best, (images,))
        keep = torch.rand(images.shape[0], h * w, generator=generator).argsort(dim=1)[:, :kept]
        keep = keep.sort(dim=1).values.to(images.device)
        found[GIVEN, keep_ratio, kept] = (drop_patches(twin(full), ranker="random"), (images, keep))
        for name, ranker in rankers.items():
            model = drop_patches(twin(full), twin(ranker), keep_ratio, selection)
            found[name, keep_ratio, kept] = (model.eval(), (images,))
    return found


@contextlib.contextmanager
def _compiling(
    mode: str | None, graphs: int
) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """What makes a callable of a model; within, torch.compile may make that many graphs."""
    if mode is None:
        yield lambda model: model
        return
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    inductor: Any = importlib.import_module("torch._inductor.config")
    limits = {"recompile_limit": 8 * graphs, "accumulated_recompile_limit": 64 * graphs}
    torch_mode = "default" if mode == "freezing" else mode
    with dynamo.patch(**limits), inductor.patch(freezing=mode == "freezing"):
        yield lambda model: torch.compile(model, dynamic=False, mode=torch_mode)


def _inference(fn: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return fn(*inputs)

    return call


def _payoff(key: Key, timings: Mapping[Key, Timing]) -> Payoff:
    method, keep_ratio, kept = key
    timing = timings[key]
    full = next(timings[other] for other in timings if other[0] == FULL)
    best, given = (timings.get((name, keep_ratio, kept)) for name in (IDEAL, GIVEN))
    ranking = None
    if given is not None and method not in (IDEAL, GIVEN):
        rounds = zip(timing.seconds, given.seconds, full.seconds)
        ranking = statistics.median((ours - theirs) / whole for ours, theirs, whole in rounds)
    achieved = ratio(best, timing) if best is not None and method != IDEAL else None
    return Payoff(method, keep_ratio, kept, timing, ratio(full, timing), achieved, ranking)


def break_even(keep_ratios: Sequence[float], costs: Sequence[float]) -> float:
    """The largest keep ratio that costs no more than the full model.

    Args:
        keep_ratios: ascending.
        costs: time of the pruned model ÷ time of the full one at each.

    Returns:
        The ratio where the cost crosses 1, linear between neighbours, the largest keep ratio when
        all pay above the last crossing, 0 when none does.

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
    """The lines of each ranker, keep ratios ascending."""
    found: dict[str, list[Payoff]] = {}
    for line in sorted(lines, key=lambda line: line.keep_ratio):
        if line.method not in (FULL, IDEAL, GIVEN):
            found.setdefault(line.method, []).append(line)
    return found


def pays_up_to(lines: Sequence[Payoff]) -> float:
    """``break_even`` of one ranker's lines."""
    costs = [1 / line.speedup.median for line in lines]
    return break_even([line.keep_ratio for line in lines], costs)


def recommend(lines: Sequence[Payoff]) -> str:
    """Which ranker to use for speed, and which loses time: a sentence about these measurements.

    A ranker counts as faster where even the lower quartile of its speed-up is above 1. What the
    rankers keep, hence accuracy, is another question.

    Args:
        lines: of one call of ``measure_payoff``.

    Returns:
        The sentence, without a full stop.
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
            if shown not in faster:
                shown = faster[-1]
            text = f"use {name} ({shown.speedup.median:.2f}x at keep {shown.keep_ratio:g})"
            parts.append(text)
        elif not faster:
            slower = all(line.speedup.high < 1 for line in found[name])
            parts.append(f"{name} {'loses' if slower else 'saves no'} time")
        elif len(faster) < len(found[name]):
            parts.append(f"{name} pays up to keep {pays_up_to(found[name]):.2g}")
    if not parts[0].startswith("use"):
        parts.insert(0, "the full model is the fastest")
    return "; ".join(parts)
