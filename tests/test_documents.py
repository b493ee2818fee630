"""README blocks, docstring examples and every example really run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ltrp_timm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGER = {"segmentation_linear_probe.py": 100}  # it draws scenes and masks of its own


def run_python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGER.get(path.name, 60)
    done = run_python([str(path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_block(index: int, tmp_path: Path) -> None:
    # the Hub is not there for tests: the same lines with random weights
    source = BLOCKS[index].replace("pretrained=True", "pretrained=False")
    preamble = "import torch\nimages = torch.randn(2, 3, 224, 224)\n"
    done = run_python(["-c", preamble + source], tmp_path)
    assert done.returncode == 0, f"{source}\n{done.stderr}"


def test_readme_has_blocks_and_the_two_commands() -> None:
    assert len(BLOCKS) >= 3
    assert "pip install '.[demo]' && ltrp-timm demo" in README
    assert "pip install '.[test]' && pytest" in README


def test_readme_names_everything_public() -> None:
    for name in (*ltrp_timm.list_rankers(), *ltrp_timm.__all__):
        assert f"`{name}" in README or f"{name}(" in README, name


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_docstring_examples() -> None:
    names = [m.name for m in pkgutil.walk_packages(ltrp_timm.__path__, "ltrp_timm.")]
    results = [
        doctest.testmod(
            importlib.import_module(name),
            extraglobs={"torch": importlib.import_module("torch")},
            optionflags=doctest.NORMALIZE_WHITESPACE,
        )
        for name in names
        if not name.endswith("cli")
    ]
    assert sum(result.attempted for result in results) >= 5
    assert sum(result.failed for result in results) == 0
