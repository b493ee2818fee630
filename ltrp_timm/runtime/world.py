"""One process or many: what ``torchrun`` has started."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

T = TypeVar("T")


class World:
    """The processes of a run and the device of this one.

    Args:
        rank: of this process; 0 writes and talks.
        size: number of processes.
        device: of this process.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device

    @property
    def main(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        out: list[float] = tensor.tolist()
        return out

    def on_main(self, action: Callable[[], T]) -> T:
        """Run on rank 0; what it returns or raises there reaches every process, and none waits.

        What a process decides by looking at files goes through here: another one that looks a
        moment later may find other files.
        """
        outcome: list[Any] = [None, None]  # what it returns, what it raises
        if self.main:
            try:
                outcome[0] = action()
            except Exception as problem:
                outcome[1] = problem
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        value: T = outcome[0]
        return value

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """The values of all processes, process by process."""
        every: list[list[Any]] = [list(values)]
        if self.size > 1:
            every = [[] for _ in range(self.size)]
            dist.all_gather_object(every, list(values))
        return [value for some in every for value in some]

    def gather_names(self, names: Sequence[str]) -> list[str]:
        """The names of all processes, each once, sorted."""
        return sorted(set(self.gather(names)))


@contextlib.contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """The world that the environment describes: that of ``torchrun``, or this process alone.

    Args:
        device: "cpu", "cuda", …; None for a GPU when there is one.

    Raises:
        ValueError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    mine = not dist.is_initialized()
    if mine:
        found = init_distributed_device_so(device)
        rank, size, device = found["global_rank"], found["world_size"], found["device"]
    else:
        rank, size = dist.get_rank(), dist.get_world_size()
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        yield World(rank, size, torch.device(device))
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
