"""The rooms of the package, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ltrp_timm"

# a room may import from rooms on the lines above it, and from its own
ROOMS = [
    ["configs"],
    ["hub"],
    ["selection", "checkpoints", "throughput", "photos", "change", "ml_decoder"],
    ["slots", "metrics"],
    ["rankers", "losses"],
    ["timm_interface", "adaptive", "dense", "teacher"],
    ["model", "pseudo_scores"],
    ["front_end"],
    ["factory"],
    ["ltrp_vit"],
    ["visualize", "console", "cards", "payoff"],
    ["arguments", "index_cache", "named_model", "parity", "formats"],
    ["sharing"],
    ["export", "train"],
    ["convert"],
    ["demo", "evaluate", "rank"],
    ["benchmark_command", "convert_command", "export_command", "train_command", "share_command"],
    ["finetune_command"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [module] if "." in module else [f"{module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("ltrp_timm.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = room_of(path)
    for room in imported_rooms(path) - {here, "__version__"}:
        assert LEVEL[room] < LEVEL[here], f"{here} must not import {room}"


def test_every_file_has_a_room() -> None:
    assert {room_of(path) for path in FILES} == set(LEVEL)
    assert not list(PACKAGE.rglob("utils.py")) + list(PACKAGE.rglob("helpers.py"))


def test_the_import_is_silent_and_light() -> None:
    source = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import timm, torch\n"
        "state = torch.get_rng_state()\n"
        "before = set(sys.modules)\n"
        "import ltrp_timm\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'matplotlib', 'skimage', 'sklearn', 'transformers', 'onnx', 'PIL'}\n"
        "assert not new & heavy, new\n"
        "assert not {'ltrp_timm.cli', 'ltrp_timm.export'} & set(sys.modules)\n"
        "assert ltrp_timm.export_model is ltrp_timm.export.export_model\n"
        "assert timm.is_model('ltrp_vit_base')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:ltrp_timm", "-c", source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_nothing_runs_a_pickle_or_asserts_on_user_input() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" for k in node.keywords), path.name
