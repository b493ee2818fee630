"""Processes for tests, forked from one that has imported everything.

A new interpreter imports torch and timm for five seconds; these start at once. One test still
starts real processes with ``torchrun``.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ltrp_timm.commands import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [f"ltrp_timm.commands.{name}" for name in ("rank", "train", "finetune", "evaluate")]
)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _run(
    call: Callable[..., Any], arguments: Any, environment: dict[str, str], folder: str
) -> None:
    os.setsid()  # signals to its group reach no test
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY), number)
    torch.set_num_threads(1)
    sys.exit(call(*arguments))


class Started:
    """A call in a process and a session of its own; its result is the exit code."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):
            Path(self.folder.name, name).touch()
        given = (call, arguments, {**os.environ, **environment}, self.folder.name)
        self.process = _CONTEXT.Process(target=_run, args=given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            multiprocessing.forkserver.ensure_running()
        self.process.start()
        self.pid: int = self.process.pid  # type: ignore[assignment]

    def poll(self) -> int | None:
        return self.process.exitcode

    def stdout(self) -> str:
        return Path(self.folder.name, "stdout").read_text()

    def wait(self, timeout: float = 120) -> Done:
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        with self.folder as name:
            texts = [Path(name, file).read_text() for file in ("stdout", "stderr")]
        assert code is not None, f"it still ran after {timeout} s: {texts}"
        return Done(code, *texts)


def run_command(*arguments: str) -> Done:
    """``ltrp-timm`` in a process of its own."""
    return Started(main, arguments).wait()


def run_two(*arguments: str) -> Done:
    """``ltrp-timm`` in two processes, with the variables that torchrun sets; output by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        Started(main, arguments, **place, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    first, second = (process.wait() for process in processes)
    assert first.returncode == second.returncode, first.stderr + second.stderr
    return Done(first.returncode, first.stdout + second.stdout, first.stderr + second.stderr)
