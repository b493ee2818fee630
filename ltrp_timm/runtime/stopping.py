"""Ending in order: a signal asks, the loop answers when its step is done."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequests:
    """SIGINT and SIGTERM ask for an end; a second one does not wait."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def note(self, number: int, frame: Any) -> None:
        """Remember the signal."""
        self.signal = number
        signal.signal(number, self.before[number])


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Listen for signals for a while (Python lets the main thread alone do so)."""
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        requests.before[number] = signal.signal(number, requests.note)
    try:
        yield requests
    finally:
        for known, handler in requests.before.items():
            signal.signal(known, handler)
