"""The processes of a run, one or those that ``torchrun`` started, their devices and folders."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ltrp_timm._text import printable
from ltrp_timm._timm import init_distributed_device_so
from ltrp_timm.runtime.stopping import signals_handled

_LOCK = ".lock"
T = TypeVar("T")
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = {"WORLD_SIZE": "SLURM_NTASKS", "RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
_PATIENCE = timedelta(days=30)  # the first process to finish waits for the last


class World:
    """The processes of a run and the device of this one.

    Args:
        rank: number of this process; process 0 writes and prints.
        size: number of processes.
        device: device of this process.
        patient: processes may wait for each other for hours; while one waits, signals end it.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, *, patient: bool = False
    ) -> None:
        self.rank, self.size, self.device, self.patient = rank, size, device, patient

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
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

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with self._waiting():
                dist.barrier()

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
    if mine and patient:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            dist.init_process_group("gloo", timeout=_PATIENCE)
            if device == "cuda":
                device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    elif mine:
        found = init_distributed_device_so(device)
        rank, size, device = found["global_rank"], found["world_size"], found["device"]
    else:
        rank, size = dist.get_rank(), dist.get_world_size()
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
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
    """Take what SLURM sets where torchrun has set nothing, and check it.

    Raises:
        ValueError: a variable is missing, or is no number in its range.
    """
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
