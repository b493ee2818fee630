"""Time the methods of a case in turns. A method that fails is a row too; the others go on."""

import argparse
import csv
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import Row

from ltrp_timm.measure import throughput

Make = Callable[[], Callable[[], Any]]


class NotHereError(RuntimeError):
    """This device cannot run it."""


class Method(NamedTuple):
    """One row of a comparison: its columns, and what makes the callable to time."""

    columns: Row
    make: Make


class Case(NamedTuple):
    """Methods to time in turns, the baseline first; ``build`` is called when the case begins."""

    columns: Row
    build: Callable[[], Iterable[Method]]


class Record:
    """A CSV file; each row is in it as soon as it is added."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writeheader()

    def add(self, row: Row) -> None:
        """Append a row; missing columns stay empty."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)


def spread_of(name: str) -> tuple[str, str, str]:
    """The columns of ``common.spread``."""
    return (name, f"{name}_low", f"{name}_high")


MEASURED = "measured"
CASE = ("model", "img_size", "batch", "keep_ratio", "method", "form", "setting", "status")
TIMES = ("rounds", "seconds_median", "seconds_low", "seconds_high", "images_per_second")
FIGURES = (*TIMES, "peak_mib", *spread_of("speedup"), *spread_of("share_of_ideal"))
PLACE = ("runs", "device", "dtype", "depth", *throughput.environment())
COLUMNS = (*CASE, *FIGURES, *PLACE)
HELD = ("graph", "compiled")  # forms that keep their memory between calls: no peak to measure


def trouble(error: Exception) -> str:
    """The status of a method that could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, NotHereError):
        return str(error)
    traceback.print_exception(error)
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"failed: {type(error).__name__}: {text}"[:200]


def free_memory(device: str) -> None:
    """Return the memory of finished cases to the device."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def run_case(case: Case, record: Record, args: argparse.Namespace, where: Row) -> None:
    """Time the methods of a case in turns, and write a row for each, measured or not."""
    place = {**where, **case.columns}
    try:
        methods = list(case.build())
    except Exception as error:  # the next case may run
        record.add({**place, "status": trouble(error)})
        return
    status, calls = dict.fromkeys(range(len(methods)), MEASURED), {}
    for i, method in enumerate(methods):
        try:
            calls[str(i)] = method.make()
            calls[str(i)]()
        except Exception as error:  # the other methods may run
            calls.pop(str(i), None)
            status[i] = trouble(error)
        if status[i] != MEASURED:
            free_memory(args.device)
    try:
        timings = common.compare(calls, args) if calls else {}
        peaks = {name: throughput.peak_memory(calls[name], args.device) for name in timings}
    except Exception as error:
        status, timings, peaks = dict.fromkeys(status, trouble(error)), {}, {}
    best = {
        _like(method): timings.get(str(i))
        for i, method in enumerate(methods)
        if method.columns["method"] == "ideal"
    }
    for i, method in enumerate(methods):
        row = {**place, **method.columns, "status": status[i]}
        if timing := timings.get(str(i)):
            row |= common.timing_columns(timing, row["batch"])
            if (peak := peaks[str(i)]) is not None and row.get("form") not in HELD:
                row["peak_mib"] = round(peak / 2**20, 1)
            if full := timings.get("0"):
                row |= common.spread("speedup", throughput.ratio(full, timing))
            if given := best.get(_like(method)):
                row |= common.spread("share_of_ideal", throughput.ratio(given, timing))
        record.add(row)


def _like(method: Method) -> tuple[Any, Any]:
    """What a method must share with the ideal to be compared with it."""
    return method.columns.get("keep_ratio"), method.columns.get("form")


def run_cases(
    cases: Sequence[Case], record: Record, args: argparse.Namespace, where: Row, end: float
) -> None:
    """Run all cases; each gets an equal share of the time left, half of it for its rounds."""
    for i, case in enumerate(cases):
        args.seconds = max(0.1, (end - time.monotonic()) / (len(cases) - i) / 2)
        run_case(case, record, args, where)
        free_memory(args.device)
