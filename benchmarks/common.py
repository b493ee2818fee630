"""What the benchmarks share: command-line options, the tables they write, the goals they check."""

import argparse
import csv
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltrp_timm import throughput

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def make_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options every timing benchmark has; ``defaults`` are a benchmark's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["vit_base_patch16_224"], help="timm models")
    add("--batch-sizes", nargs="+", type=int, default=[1, 8], help="images per call")
    add("--keep-ratios", nargs="+", type=float, default=[0.5], help="shares of patches to encode")
    add("--rankers", nargs="+", default=["contrast", "conv"], help="names of ltrp_timm rankers")
    add("--device", default="cpu", help="cpu, cuda, …")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of all")
    add("--threads", type=int, default=1, help="threads of torch; 0 leaves them as they are")
    add("--repeats", type=int, default=0, help="timed rounds; 0 fits them to --seconds")
    add("--seconds", type=float, default=20.0, help="what one comparison may take, in seconds")
    add("--compile", action="store_true", help="torch.compile (on a CPU with frozen weights)")
    add("--output", type=Path, default=RESULTS, help="folder of the CSV, PNG and Markdown files")
    parser.set_defaults(**defaults)
    return parser


def compare(
    fns: Mapping[str, Callable[[], Any]],
    args: argparse.Namespace,
    min_rounds: int = 5,
    max_rounds: int = 41,
) -> dict[str, throughput.Timing]:
    """``throughput.compare`` with ``--repeats`` rounds, or as many as fit into ``--seconds``.

    The round that is timed to find that number out is a warm-up too.
    """
    rounds = args.repeats
    if rounds < 1:
        warmup = 1 if args.compile else 0  # the first call compiles
        probe = throughput.compare(fns, repeats=1, warmup=warmup, device=args.device)
        round_seconds = sum(timing.median for timing in probe.values())
        rounds = max(min_rounds, min(max_rounds, round(args.seconds / round_seconds)))
    return throughput.compare(fns, repeats=rounds, warmup=1, device=args.device)


def spread(name: str, value: throughput.Ratio) -> Row:
    """A ratio as three columns: NAME for its median, NAME_low and NAME_high for its quartiles."""
    figures = {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
    return {column: round(figure, 5) for column, figure in figures.items()}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows and columns; the columns are those of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows of text as a Markdown table; the columns are those of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def load_pyplot() -> Any:
    """matplotlib's pyplot for files, not screens.

    Raises:
        SystemExit: matplotlib is not installed; the message has the command to type.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install 'ltrp-timm[demo]'") from error
    return importlib.import_module("matplotlib.pyplot")


def environment_line(env: Mapping[str, str], args: argparse.Namespace) -> str:
    """Machine, settings and versions in one line of prose."""
    mode = "compiled" if args.compile else "eager"
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "timm", "ltrp_timm"))
    where = f"{env['machine']} ({env['cores']} cores, {env['threads']} used)"
    return f"{where}, {args.device}, {args.dtype}, {mode}; {versions}"


def set_up_torch(args: argparse.Namespace) -> None:
    """Apply ``--threads``, and let ``--compile`` make a graph for each number of tokens."""
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    if args.compile:
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        inductor: Any = importlib.import_module("torch._inductor.config")
        dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
        inductor.freezing = torch.device(args.device).type == "cpu"


@dataclass(frozen=True)
class Goal:
    """A figure to reach: ``column`` of the rows that ``where`` describes, against ``bound``."""

    text: str
    where: Mapping[str, Any]
    column: str
    relation: str
    bound: float

    def check(self, rows: Sequence[Row]) -> list[Row]:
        """One line for each row that the goal speaks of."""
        holds = {">=": operator.ge, "<=": operator.le}[self.relation]
        return [
            {
                "goal": f"{self.text}, {row['method']}",
                "asked": f"{self.relation} {self.bound:g}",
                "measured": f"{row[self.column]:.4g} "
                f"({row[f'{self.column}_low']:.4g} – {row[f'{self.column}_high']:.4g})",
                "rounds": row["rounds"],
                "": "met" if holds(row[self.column], self.bound) else "not met",
            }
            for row in rows
            if all(self._matches(row[name], value) for name, value in self.where.items())
        ]

    @staticmethod
    def _matches(found: Any, wanted: Any) -> bool:
        return found in wanted if isinstance(wanted, tuple) else bool(found == wanted)
