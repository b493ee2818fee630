"""The processes of a run, and how they stop in order."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ltrp_timm._text import printable
from ltrp_timm._timm import init_distributed_device_so

T = TypeVar("T")
_LOCK = ".lock"
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = {"WORLD_SIZE": "SLURM_NTASKS", "RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
_PATIENCE = timedelta(days=30)  # the first process to finish waits for the last


class StopRequests:
    """Remembers SIGINT or SIGTERM; a second signal does not wait.

    Attributes:
        signal: the signal that requested the stop, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the handlers from before are in place again."""
        self.signal = number
        for known, handler in self.before.items():
            signal.signal(known, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt or SystemExit (143) if SIGINT or SIGTERM came."""
        if self.signal is not None:
            _leave(self.signal, None)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turn SIGINT and SIGTERM into requests for a while.

    An exception in the middle of a step would leave data workers in the middle of a batch, and
    files incomplete.
    """
    requests = StopRequests()
    with signals_handled(requests.note, signal.SIGINT, signal.SIGTERM) as requests.before:
        yield requests


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Raise SIGTERM as SystemExit (143), so that incomplete files are removed."""
    with signals_handled(_leave, signal.SIGTERM):
        yield


@contextlib.contextmanager
def signals_handled(handler: Any, *numbers: signal.Signals) -> Iterator[dict[int, Any]]:
    """Handle signals this way for a while; only the main thread may, others change nothing.

    Yields:
        The handlers from before, by signal.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {int(number): signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


_STOPPING = (signal.SIGINT, signal.SIGTERM)


def worker_init() -> Callable[[int], None]:
    """What a data worker does first: it ignores SIGINT and SIGTERM; its main process stops it.

    A terminal and torchrun send both to the whole group. A worker that dies of one is an error in
    the main process, which could then not stop in order. Python sends SIGTERM too, to the workers
    that are left when it ends, and waits for them: then a worker ends at once.
    """
    leaving = multiprocessing.RawValue("b", 0)
    Finalize(None, setattr, (leaving, "value", 1), exitpriority=0)  # before Python's SIGTERM
    return partial(_ignore_signals, leaving)


def _ignore_signals(leaving: Any, _: int) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        if leaving.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Workers that start meanwhile hold SIGINT and SIGTERM back, until ``worker_init``."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class World:
    """The processes of a run and the device of this one; process 0 writes and prints.

    Those that are ``patient`` may wait for each other for hours; while one waits, signals end it.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, *, patient: bool = False
    ) -> None:
        self.rank, self.size, self.device, self.patient = rank, size, device, patient

    @property
    def main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum values over all processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def on_main(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0; every process returns its result or raises its exception.

        Decisions that depend on files belong here: a process that looks a moment later may find
        other files.
        """
        outcome: list[Any] = [None, None]  # the result, the exception
        if self.main:
            try:
                outcome[0] = action()
            except Exception as problem:
                outcome[1] = problem
        if self.size > 1:
            with self._waiting():
                dist.broadcast_object_list(
                    outcome, src=0, device=None if self.patient else self.device
                )
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _waiting(self) -> contextlib.AbstractContextManager[Any]:
        """While gloo waits, Python's signal handlers do not run: the default ones end the wait."""
        if not self.patient:
            return contextlib.nullcontext()
        return signals_handled(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM)

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of all processes, process by process."""
        parts: list[list[Any]] = [list(values)]
        if self.size > 1:
            parts = [[] for _ in range(self.size)]
            with self._waiting():
                dist.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def gather_names(self, names: Sequence[str]) -> list[str]:
        """Return the names of all processes, each once, sorted."""
        return sorted(set(self.gather(names)))


def usable_device(name: str) -> torch.device:
    """A device by its name; ValueError if this machine has none such, or it computes nothing."""
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch built without a device asserts
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error


@contextlib.contextmanager
def join_world(device: str | None = None, *, patient: bool = False) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or run alone.

    Args:
        device: "cpu", "cuda", … (default: a GPU if there is one).
        patient: see ``World``; processes then communicate on the CPU.

    Raises:
        ValueError: The device cannot be used, or ``WORLD_SIZE`` is set without what torchrun sets
            beside it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usable_device(device)
    mine = not dist.is_initialized()
    if mine:
        _check_environment()
        if not patient:
            device = init_distributed_device_so(device)["device"]
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("gloo", timeout=_PATIENCE)
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        if device == "cuda":
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        yield World(rank, size, torch.device(device), patient=patient)
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for writing; the system releases it however the process ends.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The folder cannot be made.
    """
    from filelock import FileLock, Timeout  # a dependency of torch; only writers need it

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(f"{printable(folder)} is not a folder.") from None
    except OSError as error:
        raise OSError(f"{printable(folder)}: {error.strerror}.") from error
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = printable(folder)
        raise BlockingIOError(f"another process is writing {name}; wait for it to end.") from None
    try:
        yield
    finally:
        lock.release()


def first_process() -> bool:
    """Whether this process prints, by the environment: the others stay silent."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return size == "1" or rank == "0" or not (rank.isdecimal() and size.isdecimal())


def _check_environment() -> None:
    """Take what SLURM sets where torchrun has set nothing; ValueError if that is wrong."""
    count = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "SLURM_NTASKS"
    size = os.environ.get(count, "1")
    if size == "1" or (count == "SLURM_NTASKS" and "SLURM_PROCID" not in os.environ):
        return
    if count == "SLURM_NTASKS":
        for name, theirs in _SLURM.items():
            os.environ.setdefault(name, os.environ.get(theirs, "0"))
    absent = [name for name in _RENDEZVOUS if name not in os.environ]
    hint = f"start several processes with torchrun, or unset {count}."
    if absent:
        verb = "are" if len(absent) > 1 else "is"
        raise ValueError(f"{count} is {size}, but {', '.join(absent)} {verb} not set; {hint}")
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"{count} must be a number of processes, got {size!r}; {hint}")
    rank = os.environ["RANK"]
    if not rank.isdecimal() or int(rank) >= int(size):
        raise ValueError(f"RANK must be a number from 0 to {int(size) - 1}, got {rank!r}; {hint}")
