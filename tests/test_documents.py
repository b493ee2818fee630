"""README blocks, docstring examples and every example really run."""

import doctest
import importlib
import pkgutil
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ltrp_timm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGER = {"segmentation_linear_probe.py": 100}  # it draws scenes and masks of its own


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder, command line and thread count of a newcomer; the random state stays ours."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py"])
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGER.get(path.name, 60)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_block(index: int) -> None:
    # the Hub is not there for tests: the same lines with random weights
    source = BLOCKS[index].replace("pretrained=True", "pretrained=False")
    names = {"__name__": "__main__", "torch": torch, "images": torch.randn(2, 3, 224, 224)}
    exec(compile(source, f"README block {index}", "exec"), names)  # noqa: S102


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
            extraglobs={"torch": torch},
            optionflags=doctest.NORMALIZE_WHITESPACE,
        )
        for name in names
        if not name.endswith("__main__")
    ]
    assert sum(result.attempted for result in results) >= 5
    assert sum(result.failed for result in results) == 0
