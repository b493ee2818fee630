"""Time callables side by side in one process, interleaved, with medians and quartiles.

Calls take turns (A B C A B C …), so that a machine that slows down for a second slows all of them,
and speeds are compared round by round.
"""

import contextlib
import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch


@dataclass(frozen=True)
class Timing:
    """The times of one callable.

    Args:
        name: What was timed.
        seconds: Seconds of each round, in order.
        peak_memory: Bytes that one call needed at its highest point; None if not measured.
    """

    name: str
    seconds: tuple[float, ...]
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return quartiles(self.seconds)[1]

    @property
    def low(self) -> float:
        """Lower quartile over the rounds, in seconds."""
        return quartiles(self.seconds)[0]

    @property
    def high(self) -> float:
        """Upper quartile over the rounds, in seconds."""
        return quartiles(self.seconds)[2]

    def items_per_second(self, n: int) -> float:
        """Throughput at the median, with ``n`` items (images) per call."""
        return n / self.median


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of two callables' times, round by round."""

    median: float
    low: float
    high: float


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """Speed-up of ``fast`` over ``slow``: median and quartiles of ``slow_i / fast_i``.

    Args:
        slow: The numerator.
        fast: The denominator, from the same call of ``compare``.

    Raises:
        ValueError: The timings have different numbers of rounds, so they are not of one comparison.

    >>> ratio(Timing("a", (4.0, 6.0, 9.0)), Timing("b", (2.0, 2.0, 2.0)))
    Ratio(median=3.0, low=2.5, high=3.75)
    """
    if len(slow.seconds) != len(fast.seconds):
        raise ValueError(
            "ratio needs two timings of one comparison: "
            f"{slow.name!r} has {len(slow.seconds)} rounds, {fast.name!r} has {len(fast.seconds)}."
        )
    low, median, high = quartiles([a / b for a, b in zip(slow.seconds, fast.seconds)])
    return Ratio(median=median, low=low, high=high)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated linearly.

    >>> quartiles([1.0, 3.0, 2.0])
    (1.5, 2.0, 2.5)
    """
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, median, high


def compare(
    fns: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: str | torch.device | None = None,
    memory: bool = False,
) -> dict[str, Timing]:
    """Time callables interleaved: A B C A B C ….

    Each call runs between two synchronisations of the device, with the garbage collector off. Its
    result is freed after the clock has stopped. To time inference, wrap each callable in
    ``torch.inference_mode()``.

    Args:
        fns: Callables without arguments, by name.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before them.
        device: Device to synchronise with; None is the CPU.
        memory: Also measure peak memory, with one more call each after all timing.

    Returns:
        A Timing by name, in the order of ``fns``; the i-th seconds of all are from the same round.

    Raises:
        ValueError: There are no callables, or ``repeats`` or ``warmup`` is out of range.
    """
    if not fns:
        raise ValueError("compare needs at least one callable, got an empty mapping.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}.")
    where = torch.device("cpu" if device is None else device)
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_number in range(warmup + repeats):
            for name, fn in fns.items():
                result, took = timed(fn, where)
                del result  # only now: freeing memory is not the callable's work
                if round_number >= warmup:
                    seconds[name].append(took)
    finally:
        if was_on:
            gc.enable()
    peaks = {name: peak_memory(fn, where) if memory else None for name, fn in fns.items()}
    return {name: Timing(name, tuple(seconds[name]), peaks[name]) for name in fns}


def timed(fn: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Call once between two synchronisations; return the result and the seconds.

    >>> timed(lambda: 3, torch.device("cpu"))[0]
    3
    """
    _synchronise(device)
    start = time.perf_counter()
    result = fn()
    _synchronise(device)
    return result, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    """Wait for the work queued on the device; a no-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()


def peak_memory(fn: Callable[[], Any], device: str | torch.device | None = None) -> int | None:
    """Bytes that one call needs at its highest point, above what was in use before it.

    The allocator counts on CUDA, the resident set of the process (to a few pages) on a Linux CPU.
    Call ``fn`` once before: a first call also loads libraries and buffers that stay.

    Args:
        fn: The callable.
        device: Device of its memory; None is the CPU.

    Returns:
        Bytes, or None on other devices and systems.
    """
    where = torch.device("cpu" if device is None else device)
    gc.collect()
    if where.type == "cpu":
        return _peak_resident(fn)
    if where.type != "cuda":
        return None
    torch.cuda.synchronize(where)
    before = torch.cuda.memory_allocated(where)
    torch.cuda.reset_peak_memory_stats(where)
    result = fn()
    torch.cuda.synchronize(where)
    del result
    return max(0, torch.cuda.max_memory_allocated(where) - before)


def _peak_resident(fn: Callable[[], Any]) -> int | None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another libc, another system
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed heap, which would hide what fn needs
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
        before = _kibibytes("VmRSS")
    except (OSError, IndexError):
        return None
    result = fn()
    peak = _kibibytes("VmHWM")
    del result
    return max(0, peak - before) * 1024


def _kibibytes(field: str) -> int:
    return int(re.findall(rf"^{field}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[0])


def environment(device: str | torch.device | None = None) -> dict[str, str]:
    """Machine and versions behind a figure, as columns of a CSV file, without hosts and paths.

    Args:
        device: Device of the work; the machine's name then begins with the GPU's.

    Returns:
        machine, cores, threads, torch, timm, ltrp_timm, python and platform, none of them empty.
    """
    from ltrp_timm import __version__

    machine = _cpu_model()
    if device is not None and torch.device(device).type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    return {
        "machine": machine,
        "cores": str(num_cores()),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "ltrp_timm": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError, IndexError):
        return re.findall(r"^model name\s*: *(\S.*)", Path("/proc/cpuinfo").read_text(), re.M)[0]
    return platform.processor() or platform.machine() or "unknown"


def num_cores() -> int:
    """Cores that this process may use; those of the machine if the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


NUM_WORKERS = min(4, num_cores())  # default number of processes that read images
