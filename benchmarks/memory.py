"""How much memory does a pruned forward need beside the weights?

Claim. The peak of a pruned forward at batch 8 falls nearly with the tokens: at keep ratio 0.5 a
ViT-B needs at most 0.7 of what the plain model needs beside weights and images.

Arithmetic. At its peak a block holds its input, the normalised input and the MLP's hidden layer
twice (before and after the activation): about 10 values of D a token, so 8 · 197 · 10 · 768 · 4
bytes = 48 MB for a ViT-B in float32, and half of it for half of the tokens. The grid of
embedded patches, zeros at dropped places (8 · 196 · 768 · 4 = 5 MB), and the ranker's maps do not
shrink; both come before the blocks and are freed.

Measured: bytes at the highest point of one call above what was in use before it, after a call that
warms buffers up: on CUDA the allocator's count, on a Linux CPU the resident set. Median and
quartiles of --repeats calls (5 where it is 0), in turns in one process. Weights, images and what
libraries keep do not count. Weights are random.
Before the first model, glibc is set to give each block of more than 64 KiB separate pages, which it
returns when the block is freed: the resident set is then what is alive. By default glibc keeps
freed blocks for later ones. The first version of the CSV was measured with that default: it had up
to twice as much, and figures varied between runs (ViT-B batch 8: 98 to 118 MiB for the plain model,
54 to 73 at keep 0.5).
"""

import argparse
import contextlib
import ctypes
import functools
from collections.abc import Iterator

from common import ON_ONE_CORE, VIT_B, VIT_S, Calls, Row, cases, inference, make_parser, pruned
from runner import CASE, Benchmark, cells, figure, lines, plain
from tables import Goal

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal

DIGITS = 1  # of MiB: blocks below 64 KiB still come from a heap, some of them at a time


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "model": VIT_B, "batch": 8, "keep_ratio": 0.5}
    where["method"] = ("contrast", "conv")
    return [Goal("ViT-B keep 0.5 batch 8, peak ÷ full", where, "peak_ratio", "<=", 0.7)]


@contextlib.contextmanager
def only_what_is_alive() -> Iterator[None]:
    """glibc gives blocks of more than 64 KiB separate pages; other C libraries stay as they are."""
    m_mmap_threshold = -3  # malloc.h
    _mallopt(m_mmap_threshold, 64 * 1024)
    try:
        yield
    finally:
        _mallopt(m_mmap_threshold, 32 * 1024 * 1024)  # the largest value that glibc itself sets


def _mallopt(option: int, value: int) -> None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another libc, another system
        ctypes.CDLL(None).mallopt(option, value)


def peaks(calls: Calls, args: argparse.Namespace) -> dict[str, list[int]]:
    """Bytes by method, one for each round.

    Raises:
        SystemExit: This system does not report memory.
    """
    found: dict[str, list[int]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for name, call in list(calls.items()) * (args.repeats or 5):
        peak = throughput.peak_memory(call, args.device)
        if peak is None:
            raise SystemExit("peak memory is not known here: it needs CUDA or Linux's /proc")
        found[name].append(peak)
    return found


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model, batch size and keep ratio; from the first model on, no heap is made."""
    with only_what_is_alive():
        for full, images, case in cases(args):
            kept = ltrp_timm.num_keep(full.patch_embed.num_patches, case["keep_ratio"])
            models = {"full": full, "ideal": ideal(full, kept)}
            models |= {name: pruned(full, name, case["keep_ratio"]) for name in args.rankers}
            calls: Calls = {key: inference(model, images) for key, model in models.items()}
            yield to_rows(peaks(calls, args), case)


def to_rows(found: dict[str, list[int]], case: Row) -> list[Row]:
    """One row for each method; ratios are to the full model."""
    full = throughput.quartiles(found["full"])[1]
    rows = []
    for method, sizes in found.items():
        low, peak, high = throughput.quartiles(sizes)
        row = {**case, "method": method, "rounds": len(sizes)}
        figures = {"peak_mib": peak, "peak_mib_low": low, "peak_mib_high": high}
        row |= {name: round(size / 2**20, DIGITS) for name, size in figures.items()}
        row["peak_ratio"] = round(peak / full, 4) if full else float("nan")
        rows.append(row)
    return rows


main = Benchmark(
    name="memory",
    doc=__doc__,
    title="Peak memory of a forward beside the weights",
    run=run,
    progress="{method} {peak_mib:.1f} MiB",
    table=cells(
        {
            **CASE,
            "method": plain("method"),
            "peak MiB (quartiles)": figure("peak_mib", ".1f"),
            "÷ full": figure("peak_ratio", ".2f"),
        }
    ),
    goals=goals,
    plot=lambda rows, _: lines(rows, "peak_mib", "peak, MiB"),
    parser=functools.partial(make_parser, models=[VIT_S, VIT_B], keep_ratios=[0.75, 0.5, 0.25]),
).main


if __name__ == "__main__":
    main()
