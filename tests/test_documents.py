"""Blocks and commands of the documents, docstring examples and every example really run."""

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import ltrp_timm
from ltrp_timm.commands import _make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in DOCUMENTS.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S), start=1)
]
# the Hub is not there for tests: the same lines with random weights
OFFLINE = {"pretrained=True": "pretrained=False"}
# the same lines with smaller models and batches
QUICK = {"vit_base": "vit_tiny", "naflexvit_tiny": "naflexvit_base", "(8, 3": "(2, 3"}
COMMANDS = [
    pytest.param(line, id=f"{name}-{number}")
    for name, text in DOCUMENTS.items()
    for number, line in enumerate(
        re.findall(
            r"^(?:ltrp-timm|torchrun [^\n]*-m ltrp_timm) ((?:.*\\\n)*.*)$",
            "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)),
            re.M,
        ),
        start=1,
    )
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# those that train, with less of it
QUICK_EXAMPLES = {
    "segmentation_linear_probe.py": {"for ratio in (0.5, 0.25):": "for ratio in (0.25,):"},
    "train_ranker.py": {"epochs=12": "epochs=4"},
}
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
def test_example(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < LONGER.get(path.name, 60)
    for old, new in QUICK_EXAMPLES.get(path.name, {}).items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / path.name).write_text(source, encoding="utf-8")
    runpy.run_path(str(tmp_path / path.name), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", QUICK_EXAMPLES)
def test_example_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out


def run_block(source: str, changes: dict[str, str]) -> None:
    for library in re.findall(r"^# needs: (\w+)", source, re.M):  # not all are in the extra `test`
        pytest.importorskip(library)
    for old, new in changes.items():
        source = source.replace(old, new)
    names = {"__name__": "__main__", "torch": torch, "images": torch.randn(2, 3, 224, 224)}
    exec(compile(source, "block", "exec"), names)  # noqa: S102


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str) -> None:
    run_block(block, {**OFFLINE, **QUICK})


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("block", BLOCKS)
def test_block_as_it_is(block: str) -> None:
    run_block(block, OFFLINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert _make_parser().parse_args(words).command == words[0]


def test_readme_is_one_page_with_the_two_commands() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12 * 1024
    assert "```python" in README
    assert "pip install '.[demo]' && ltrp-timm demo" in README
    assert "pip install '.[test]' && pytest" in README


def test_the_citation_is_that_of_the_readme() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["title"] == ltrp_timm.__name__
    assert cited["authors"] == [{"name": "ltrp_timm contributors"}]
    paper = cited["preferred-citation"]
    assert f"title     = {{{paper['title']}}}" in README
    people = [f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]]
    assert f"author    = {{{' and '.join(people)}}}" in README
    assert f"year      = {{{paper['year']}}}" in README


def test_the_reference_names_everything_public() -> None:
    reference = DOCUMENTS["docs/reference/index.md"]
    for name in (*ltrp_timm.list_rankers(), *ltrp_timm.__all__):
        assert f"`{name}`" in reference, name


def headings(text: str) -> set[str]:
    """Anchors that GitHub and the site make of a page's headings."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", plain, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", DOCUMENTS[name]):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor and not anchor.startswith("ltrp_timm."):  # those are made of docstrings
            anchors = headings(file.read_text(encoding="utf-8"))
            if file.name == "commands.md":  # its headings are made of the parser
                anchors |= {param.values[0].split()[0] for param in COMMANDS}
            assert anchor in anchors, f"{name}: {target}"


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
