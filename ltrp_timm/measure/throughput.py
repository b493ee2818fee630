"""Measure callables honestly: side by side in one process, interleaved, with medians and quartiles.

What is compared must be timed in turns (A B C A B C …): a machine that slows down for a second then
slows all of them, and the ratio of two calls of one round is worth more than that of two averages.
"""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """What one callable took.

    Args:
        name: what was timed.
        seconds: one figure per round, in the order of the rounds.
        peak_memory: bytes at the highest point of one call above what was in use before it; None
            where it was not measured.

    Raises:
        ValueError: there are no rounds.
    """

    name: str
    seconds: tuple[float, ...]
    peak_memory: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError(f"a Timing needs at least one round, got none for {self.name!r}.")

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
        """Throughput at the median, for a callable that works on ``n`` items (images) per call."""
        return n / self.median


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of two callables' times, round by round."""

    median: float
    low: float
    high: float


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """How many times longer ``slow`` took: median and quartiles of ``slow_i / fast_i``.

    Args:
        slow: the numerator.
        fast: the denominator, from the same call of ``compare``.

    Returns:
        The ratio; above 1 where ``fast`` is the faster one.

    Raises:
        ValueError: the timings have different numbers of rounds: they are not of one comparison.

    >>> ratio(Timing("a", (4.0, 6.0, 9.0)), Timing("b", (2.0, 2.0, 2.0)))
    Ratio(median=3.0, low=2.5, high=3.75)
    """
    if len(slow.seconds) != len(fast.seconds):
        raise ValueError(
            "ratio needs two timings of one comparison, pair by pair: "
            f"{slow.name!r} has {len(slow.seconds)} rounds, {fast.name!r} has {len(fast.seconds)}."
        )
    low, median, high = quartiles([a / b for a, b in zip(slow.seconds, fast.seconds)])
    return Ratio(median=median, low=low, high=high)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, linear in between; one value stands for all three.

    >>> quartiles([1.0, 3.0, 2.0])
    (1.5, 2.0, 2.5)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def measure(
    fn: Callable[[], Any],
    *,
    name: str = "",
    repeats: int = 10,
    warmup: int = 2,
    device: str | torch.device | None = None,
    memory: bool = False,
) -> Timing:
    """Time one callable; see ``compare``, which is the thing to use for two.

    >>> measure(lambda: sum(range(100)), name="sum", repeats=3).name
    'sum'
    """
    fns = {name: fn}
    return compare(fns, repeats=repeats, warmup=warmup, device=device, memory=memory)[name]


def compare(
    fns: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: str | torch.device | None = None,
    memory: bool = False,
) -> dict[str, Timing]:
    """Time callables in turns: A B C A B C …, each call for itself.

    Each call runs between two synchronisations of the device, with the garbage collector off.
    Gradients are the caller's business: to time inference, wrap each callable in
    ``torch.inference_mode()``. What a callable returns is freed after its clock has stopped.

    Args:
        fns: callables without arguments, by name.
        repeats: timed rounds.
        warmup: rounds before them that are not counted.
        device: where the work runs; a device other than the CPU is waited for. None is the CPU.
        memory: also measure peak memory, one more call each, after all timing.

    Returns:
        A Timing by name, in the order of ``fns``; the i-th seconds of all are from the same round.

    Raises:
        ValueError: no callables, ``repeats`` below 1 or ``warmup`` below 0.
    """
    if not fns:
        raise ValueError("compare needs at least one callable, got an empty mapping.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}.")
    where = torch.device("cpu" if device is None else device)
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    with _collector_off():
        for round_number in range(warmup + repeats):
            for name, fn in fns.items():
                took = _time_once(fn, where)
                if round_number >= warmup:
                    seconds[name].append(took)
    peaks = {name: peak_memory(fn, where) if memory else None for name, fn in fns.items()}
    return {name: Timing(name, tuple(seconds[name]), peaks[name]) for name in fns}


def timed(fn: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """One call between two synchronisations: what it returns, and its seconds.

    >>> timed(lambda: 3, torch.device("cpu"))[0]
    3
    """
    _synchronise(device)
    start = time.perf_counter()
    result = fn()
    _synchronise(device)
    return result, time.perf_counter() - start


def _time_once(fn: Callable[[], Any], device: torch.device) -> float:
    result, seconds = timed(fn, device)
    del result  # only now: freeing memory is not the callable's work
    return seconds


def _synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was asked; a no-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Collect once, then keep Python's garbage collector out; afterwards it is as it was before."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def peak_memory(fn: Callable[[], Any], device: str | torch.device | None = None) -> int | None:
    """Bytes at the highest point of one call above what was in use before it.

    On CUDA the allocator's own count; on a Linux CPU the resident set of the process, to some
    pages. A first call also pays for libraries and buffers that stay: call ``fn`` once before.

    Args:
        fn: the callable.
        device: where its memory is; None is the CPU.

    Returns:
        Bytes, or None where neither count is available.
    """
    where = torch.device("cpu" if device is None else device)
    gc.collect()
    if where.type == "cuda":
        return _peak_cuda(fn, where)
    return _peak_resident(fn) if where.type == "cpu" else None


def _peak_cuda(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = fn()
    torch.cuda.synchronize(device)
    del result
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def _peak_resident(fn: Callable[[], Any]) -> int | None:
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
        before = _status_bytes("VmRSS")
    except (OSError, ValueError):
        return None
    result = fn()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _return_free_memory() -> None:
    """Have glibc give freed heap back: kept from one call, it would hide what the next needs."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another libc, another system
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    """A size from Linux's ``/proc/self/status``, which counts in KiB.

    Raises:
        OSError: there is no such file.
        ValueError: it has no such line.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}.")


def environment(device: str | torch.device | None = None) -> dict[str, str]:
    """What a figure depends on, as columns for every row of a CSV file.

    No names of hosts or users and no paths.

    Args:
        device: where the work ran; for CUDA the machine is named after its GPU first.

    Returns:
        machine, cores, threads, torch, timm, ltrp_timm, python and platform; none is empty.
    """
    machine = _cpu_model()
    if device is not None and torch.device(device).type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    return {
        "machine": machine,
        "cores": str(num_cores()),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "timm": _version("timm"),
        "ltrp_timm": _version("ltrp-timm"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def num_cores() -> int:
    """Cores that this process may use, where the system says; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


NUM_WORKERS = min(4, num_cores())  # processes that read images, where nobody says


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a source tree on the path, not installed
        return "unknown"
