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
Before the first model glibc is told to give each block of more than 64 KiB pages of its own, which
go back when it is freed, so that the resident set is what is alive. Left alone it keeps freed
blocks for later ones, in an order of its own: the first version of the CSV, measured like that, had
up to twice as much (ViT-B batch 8: 98 to 118 MiB for the plain model, 54 to 73 at keep 0.5), other
figures in each run.
"""

import argparse
import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import tables
from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_S,
    Calls,
    Row,
    cases,
    inference,
    load_pyplot,
    make_parser,
    pruned,
    rows_of,
)
from tables import Goal

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal

NAME = "memory"
DIGITS = 1  # of MiB: blocks below 64 KiB still come from a heap, some of them at a time
TITLE = "Peak memory of a forward beside the weights"


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "model": VIT_B, "batch": 8, "keep_ratio": 0.5}
    where["method"] = ("contrast", "conv")
    return [Goal("ViT-B keep 0.5 batch 8, peak ÷ full", where, "peak_ratio", "<=", 0.7)]


@contextlib.contextmanager
def only_what_is_alive() -> Iterator[None]:
    """glibc gives blocks of more than 64 KiB pages of their own; other C libraries are as ever."""
    m_mmap_threshold = -3  # malloc.h
    _mallopt(m_mmap_threshold, 64 * 1024)
    try:
        yield
    finally:
        _mallopt(m_mmap_threshold, 32 * 1024 * 1024)  # where it comes by itself, at most


def _mallopt(option: int, value: int) -> None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another libc, another system
        ctypes.CDLL(None).mallopt(option, value)


def peaks(calls: Calls, args: argparse.Namespace) -> dict[str, list[int]]:
    """Bytes by method, one for each round.

    Raises:
        SystemExit: this system does not tell them.
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


@only_what_is_alive()
def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every model, batch size and keep ratio; from the first model on, no heap is made."""
    rows: list[Row] = []
    for full, images, case in cases(args):
        keep_ratio = case["keep_ratio"]
        kept = ltrp_timm.num_keep(full.patch_embed.num_patches, keep_ratio)
        models = {"full": full, "ideal": ideal(full, kept)}
        models |= {ranker: pruned(full, ranker, keep_ratio) for ranker in args.rankers}
        calls: Calls = {key: inference(model, images) for key, model in models.items()}
        new = to_rows(peaks(calls, args), case, where)
        rows += new
        shown = "; ".join("{method} {peak_mib:.1f} MiB".format(**row) for row in new)
        print("{model} batch {batch} keep {keep_ratio:g}: ".format(**case) + shown, flush=True)
    return rows


def to_rows(found: dict[str, list[int]], case: Row, where: Row) -> list[Row]:
    """One row for each method; ratios are to the full model."""
    full = throughput.quartiles(found["full"])[1]
    rows = []
    for method, sizes in found.items():
        low, peak, high = throughput.quartiles(sizes)
        row = {**case, "method": method, "rounds": len(sizes)}
        figures = {"peak_mib": peak, "peak_mib_low": low, "peak_mib_high": high}
        row |= {name: round(size / 2**20, DIGITS) for name, size in figures.items()}
        row["peak_ratio"] = round(peak / full, 4) if full else float("nan")
        rows.append({**row, **where})
    return rows


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "model": row["model"],
            "batch": row["batch"],
            "keep": f"{row['keep_ratio']:g}",
            "method": row["method"],
            "peak MiB (quartiles)": tables.figure(row, "peak_mib", ".1f"),
            "÷ full": f"{row['peak_ratio']:.2f}",
        }
        for row in rows
    ]


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Peak against keep ratio: a panel per model, a row per batch size."""
    shape = (len(args.batch_sizes), len(args.models))
    figure, axes = load_pyplot().subplots(
        *shape, figsize=(1 + 4 * shape[1], 1 + 3 * shape[0]), squeeze=False, sharex=True
    )
    for i, batch in enumerate(args.batch_sizes):
        for j, model in enumerate(args.models):
            for method in ("full", "ideal", *args.rankers):
                line = [
                    row
                    for row in rows
                    if (row["model"], row["batch"], row["method"]) == (model, batch, method)
                ]
                style = {"full": "k:o", "ideal": "k--o"}.get(method, "-o")
                x, y = ([row[column] for row in line] for column in ("keep_ratio", "peak_mib"))
                axes[i][j].plot(x, y, style, ms=3, label=method)
            axes[i][j].set_title(f"{model}, batch {batch}", fontsize=9)
            axes[i][j].set_ylim(bottom=0)
            axes[i][j].grid(alpha=0.3)
        axes[i][0].set_ylabel("peak, MiB")
    for ax in axes[-1]:
        ax.set_xlabel("keep ratio")
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = make_parser(
        (__doc__ or "").splitlines()[0], models=[VIT_S, VIT_B], keep_ratios=[0.75, 0.5, 0.25]
    ).parse_args()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows, args), args)


if __name__ == "__main__":
    main()
