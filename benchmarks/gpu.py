"""What does dropping patches save on a GPU? One command measures it, the most valuable part first.

    python benchmarks/gpu.py --out DIR --budget 420    on a machine with CUDA
    python benchmarks/gpu.py --out DIR --smoke         rehearses every part on a CPU, toy models

Claim. In bfloat16 at batch 256 a ViT-L at keep ratio 0.5 reaches at least 0.95 of its ideal, which
is given its patches for nothing; smaller models reach less, since the ranking takes as long in
front of them. At 1024 px and keep ratio 0.25 the gain is at least fourfold. Exact pseudo-scores in
one batch are at least twice as fast as one after another.

Arithmetic. Half of 196 patches is 99 of 197 tokens: half of the matrix products, which fill the GPU
at batch 64 and above. At batch 1 a ViT-B launches around 150 kernels, whatever the number of tokens
is, and the front-end adds 60 to 70 operators, so eager mode should gain nothing; a captured graph
is launched once. At 1024 px a quarter of 4096 patches takes a quarter of the linear layers and a
sixteenth of the attention.

Each part runs in a separate process with a share of the budget and writes a CSV of that name. Time
that a part does not use goes to the later ones.
    tests          pytest -m gpu
    speed          ViT-S, B, L: full, ideal, pruned; images/s, share of the ideal, peak memory
    latency        eager, a captured graph, torch.compile with CUDA graphs: from batch 1 on
    merging        token merging with fused attention at equal FLOPs and at equal time
    multiple_of_8  ViT-B on 95 to 104 tokens: does a multiple of 8 pay?
    large_images   DINOv3 ViT-L at 1024 px
    training       training steps; pseudo-scores in one batch against one after another
Timed, in turns in one process, between two synchronisations of the device, after a warm-up. Rows
are written as they come; status.csv says how each part ended. Weights are random: they do not
change the time. Images are on the device already; a captured graph copies them into its input.
torch and timm are enough; where ltrp_timm is not installed, set PYTHONPATH to the repository.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import tables
import torch
from common import Row
from gpu import parts
from gpu.record import COLUMNS, PLACE, Case, Record, run_cases

ROOT = Path(__file__).parents[1]
TEST_COLUMNS = ("test", "status", "seconds", "message", *PLACE)
STATUS_COLUMNS = ("part", "status", "rows", "problems", "seconds", "limit", "reason")


def run_tests(record: Record, args: argparse.Namespace, where: Row) -> None:
    """Run ``pytest -m gpu`` in this process; each outcome is written as it comes.

    Raises:
        SystemExit: pytest is not installed, or it could not run the tests.
    """
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit("pytest is not installed")
    every = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path) for path in every if "mark.gpu" in path.read_text(encoding="utf-8")]
    chosen = parts.pick(args, ["-m", "gpu"], ["-m", "not gpu", "-k", "cpu and (mask or pseudo)"])
    # pyproject's options need pytest-xdist; a warning of another version of torch is no failure
    options = ["-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "default"]
    options += ["-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                crash = getattr(report.longrepr, "reprcrash", None)
                message = crash.message.splitlines()[0][:200] if crash else ""
                row = {"test": report.nodeid, "status": report.outcome, "message": message}
                record.add({**where, **row, "seconds": round(report.duration, 2)})

    pytest: Any = importlib.import_module("pytest")
    if pytest.main([*options, *chosen, *files], plugins=[Outcomes()]) not in (0, 1):
        raise SystemExit("pytest did not run the tests")


class Part(NamedTuple):
    """What to measure: name of the CSV, share of the budget, cases; None runs the tests."""

    name: str
    share: int
    cases: Callable[[argparse.Namespace], Iterator[Case]] | None


PARTS = (
    Part("tests", 20, None),
    Part("speed", 28, parts.speed),
    Part("latency", 16, parts.latency),
    Part("merging", 12, parts.merging_against_dropping),
    Part("multiple_of_8", 6, parts.multiple_of_8),
    Part("large_images", 12, parts.large_images),
    Part("training", 12, parts.training),
)


def run_part(args: argparse.Namespace, part: Part) -> None:
    """Run one part in this process."""
    end = time.monotonic() + args.budget
    where = common.set_up(args)
    gc.freeze()  # each measurement collects garbage; skip all that was imported
    if part.cases is None:
        run_tests(Record(args.out / f"{part.name}.csv", TEST_COLUMNS), args, where)
    else:
        record = Record(args.out / f"{part.name}.csv", COLUMNS)
        run_cases(list(part.cases(args)), record, args, where, end)


def run_apart(part: Part, args: argparse.Namespace, limit: float) -> Row:
    """Run one part in a process group, kill that at its limit; returns the row of status.csv."""
    start = time.monotonic()
    path = args.out / f"{part.name}.csv"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", part.name, "--out", str(args.out)]
    command += ["--budget", str(limit), *(["--smoke"] if args.smoke else [])]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603  # this very script
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    rows = tables.read_csv(path) if path.exists() else []
    problems = sum(row["status"].startswith(("failed", "out of memory")) for row in rows)
    if status == "failed" or problems:
        print("\n".join(lines[-40:]), file=sys.stderr)
    reason = lines[-1][:200] if status == "failed" and lines else ""
    row = {"part": part.name, "status": status, "rows": len(rows), "problems": problems}
    seconds = round(time.monotonic() - start, 1)
    return {**row, "seconds": seconds, "limit": round(limit, 1), "reason": reason}


def not_started() -> list[Row]:
    """The rows of status.csv before the first part."""
    empty = dict.fromkeys(STATUS_COLUMNS, "")
    return [{**empty, "part": part.name, "status": "not started"} for part in PARTS]


def run_all(args: argparse.Namespace) -> list[Row]:
    """Run all parts, one after another; status.csv is written after each."""
    end = time.monotonic() + args.budget
    rows = not_started()
    for i, part in enumerate(PARTS):
        left = end - time.monotonic()
        if left > 0:
            limit = left * part.share / sum(other.share for other in PARTS[i:])
            rows[i] = run_apart(part, args, limit)
        tables.write_csv(rows, args.out / "status.csv")
        text = "{part}: {status}, {rows} rows, {problems} problems, {seconds} s {reason}"
        print(text.format(**rows[i]).rstrip(), flush=True)
    return rows


def seconds(text: str) -> float:
    """A positive number of seconds.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a positive number, got {text}.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and those that the functions of other benchmarks read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the CSV files")
    add("--budget", type=seconds, default=420.0, help="seconds for all parts (default: 420)")
    add("--smoke", action="store_true", help="rehearse every part on a CPU, with toy models")
    names = [part.name for part in PARTS]
    add("--part", choices=names, help="run this part alone, in this process")
    args = parser.parse_args(argv)
    device, depth, repeats, threads = ("cpu", 1, 1, 1) if args.smoke else ("cuda", 0, 0, 0)
    more = {"device": device, "dtype": "bfloat16", "depth": depth}
    return argparse.Namespace(**vars(args), **more, repeats=repeats, threads=threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, or one. Returns 1 if a part failed, 2 if nothing could begin."""
    args = parse(argv)
    if not args.smoke and not torch.cuda.is_available():
        print("no CUDA device: --smoke rehearses on a CPU", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.part:
            tables.write_csv(not_started(), args.out / "status.csv")
    except OSError as error:
        print(f"cannot write into {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    if args.part:
        run_part(args, next(part for part in PARTS if part.name == args.part))
        return 0
    return 1 if any(row["status"] == "failed" for row in run_all(args)) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # kills the running part too
    sys.exit(main())
