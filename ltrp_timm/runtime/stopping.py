"""Stop in order: a signal requests it, and the loop stops when its step is done."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, NoReturn


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
        """Leave as an exception if a stop was requested.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; the exit code is 143.
        """
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
