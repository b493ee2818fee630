"""Draw the pictures of the committed CSVs again, after a change of style.

python benchmarks/redraw.py            all of them
python benchmarks/redraw.py peers      only these

fairness_scenes is drawn with the committed weights. learning_maps needs the models of its study.
"""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from common import RESULTS
from pooling import typed
from runner import Benchmark
from tables import read_csv, save_picture

HERE = Path(__file__).parent
PLOTS = {"learning": "studies/learning_pictures.py", "fairness": "studies/fairness/pictures.py"}


def load(path: Path) -> ModuleType:
    """A script by its path: packages have the names of some."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no script.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(name: str) -> tuple[Any, str]:
    """The picture of a benchmark's committed rows, and its title."""
    script = next(
        path for path in (HERE / f"{name}.py", HERE / f"studies/{name}.py") if path.exists()
    )
    module, rows = load(script), [typed(row) for row in read_csv(RESULTS / f"{name}.csv")]
    benchmark = getattr(module.main, "__self__", None)
    if isinstance(benchmark, Benchmark):
        args = benchmark.parser("").parse_args([])
        benchmark.set_cases(args, rows)
        return benchmark.plot(rows, args), benchmark.title
    plots = load(HERE / PLOTS[name]) if name in PLOTS else module
    if name == "fairness":
        plots.draw_scenes(module.load_shipped(module.WEIGHTS)[0], RESULTS / "fairness_scenes.png")
    return plots.plot(rows), module.TITLE


def main() -> None:
    """Draw."""
    names = sorted(path.stem for path in RESULTS.glob("*.csv"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which (default: all of {', '.join(names)})")
    for name in parser.parse_args().names or names:
        save_picture(*draw(name), RESULTS / f"{name}.png")
        print(name, flush=True)


if __name__ == "__main__":
    main()
