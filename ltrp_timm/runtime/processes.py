"""Several processes at one job, as torchrun starts them, and how they are stopped."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ltrp_timm.commands._console import CommandError

_PATIENCE = timedelta(days=30)  # the first to finish waits for the last


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(number of this process, how many there are); (0, 1) without torchrun."""
    number, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield number, world
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_available() and dist.is_initialized():
        with _signals(signal.SIG_DFL):  # a wait inside gloo never gets to a handler of Python's
            dist.barrier()


def first_alone(prepare: Callable[[], Any], number: int) -> None:
    """Let the first process do something, the others wait for it.

    Raises:
        CommandError: what it raised there; in the others, that it failed.
    """
    failed: Exception | None = None
    if number == 0:
        try:
            prepare()
        except (CommandError, OSError) as error:
            failed = error
    flag = torch.tensor([failed is not None])
    if dist.is_available() and dist.is_initialized():
        with _signals(signal.SIG_DFL):
            dist.broadcast(flag, 0)
    if failed is not None:
        raise failed
    if bool(flag):
        raise CommandError("the first process failed.")


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves as an exception, so that nothing half-written stays behind; exit code 143."""
    with _signals(_leave, signal.SIGTERM):
        yield


@contextlib.contextmanager
def stopped_between_batches() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait for the next call of what this yields; a second one does not wait.

    Data workers that are left in the middle of handing something over would complain.
    """
    got: list[int] = []

    def note(number: int, _: Any) -> None:
        if got:
            _leave(number, None)
        got.append(number)

    def check() -> None:
        if got:
            _leave(got[0], None)

    with _signals(note):
        yield check


def _leave(number: int, _: Any) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextlib.contextmanager
def _signals(handler: Any, *numbers: int) -> Iterator[None]:
    """Handle signals so for a while, Ctrl-C and SIGTERM unless others are given."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {n: signal.signal(n, handler) for n in numbers or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ignore_signals(_: int) -> None:
    """A data worker leaves Ctrl-C and SIGTERM to the process that it works for.

    Both reach the whole group, from a terminal and from torchrun; a worker that dies of one would
    be an error there before that process could leave in order.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
