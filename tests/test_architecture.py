"""The rooms of the package, and what an import costs."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path
from types import FrameType

import timm
import torch

import ltrp_timm

PACKAGE = Path(__file__).parents[1] / "ltrp_timm"

# a room imports from rooms on the lines above it, and from itself
ROOMS = [
    ["_text", "_timm"],
    ["selection", "layers", "weights", "runtime"],
    ["slots", "metrics", "teacher"],
    ["losses", "rankers", "data"],
    ["models"],
    ["share", "deploy", "measure", "visualize"],
    ["scoring"],
    ["train"],
    ["commands"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in ("__init__.py", "__main__.py")
)
MAX_FILES, MAX_LINES, MAX_ROOM, MAX_CORE = 93, 19_430, 2_880, 6_410  # less is better
CORE = ("selection", "layers", "slots", "rankers", "models")


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


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in FILES
        for room in sorted(imported_rooms(path) - {room_of(path), "__version__"})
        if LEVEL[room] >= LEVEL[room_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_file_has_a_room() -> None:
    assert {room_of(path) for path in FILES} == set(LEVEL)
    assert not list(PACKAGE.rglob("utils.py")) + list(PACKAGE.rglob("helpers.py"))


def test_the_house_stays_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    rooms: dict[str, int] = {}
    for path, count in lines.items():
        rooms[room_of(path)] = rooms.get(room_of(path), 0) + count
    assert len(lines) <= MAX_FILES
    assert sum(lines.values()) <= MAX_LINES
    assert max(rooms.values()) <= MAX_ROOM, rooms
    assert sum(rooms[room] for room in CORE) <= MAX_CORE, rooms


def test_an_image_passes_few_files() -> None:
    """The files of one forward, as a debugger enters them, and how often it changes file."""
    model = ltrp_timm.drop_patches(timm.create_model("vit_tiny_patch16_224", depth=1))
    images, entered = torch.zeros(1, 3, 224, 224), []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            entered.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        model.eval()(images)
    finally:
        sys.setprofile(None)
    changes = sum(one != other for one, other in itertools.pairwise(entered))
    assert len(set(entered)) <= 7, sorted(set(entered))
    assert changes <= 14


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
        "assert not {'ltrp_timm.commands', 'ltrp_timm.deploy'} & set(sys.modules)\n"
        "assert ltrp_timm.export_model is ltrp_timm.deploy.export_model\n"
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
