"""Checkpoints, locks and going on: exact, whole, and refused when they do not fit."""

import math
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
from processes import Started
from train_setup import QUIET, TEACHER_ARGS, make_photos, run, same_bits, tiny_teacher, weights

from ltrp_timm.runtime.world import locked
from ltrp_timm.train import Augmentation, NonFiniteLossError, Recipe, Settings, train_teacher
from ltrp_timm.train.engine import Engine
from ltrp_timm.train.folder import check_same, read_log, read_state, save_state
from ltrp_timm.train.loop import Trainer
from ltrp_timm.train.settings import _RANGES
from ltrp_timm.weights.files import digest

# on a machine of one core
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
LONG = {"epochs": 3, "ema_decay": 0.9, "batch_size": 4, "clip_grad": 1.0, "holdout": 0.2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 20)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 epochs of 4 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(photos, folder, **LONG)
    return folder


def tree() -> dict[str, Any]:
    return {
        "tensors": {
            0: torch.randn(3),
            "half": torch.randn(2, 2).bfloat16(),
            "step": torch.ones(()),
        },
        "numbers": (1, 0.1 + 0.2, math.inf, True, None),
        "list": ["a", {"dict": 1, 5: [torch.arange(3)]}],
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = tree()
    save_state(tmp_path / "state", state)
    assert equal(read_state(tmp_path / "state"), state)
    state["tensors"][0] += 1
    assert not equal(read_state(tmp_path / "state"), state)
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold pathlib.*Path\."):
        save_state(tmp_path / "state", {"a": tmp_path})


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match="state is not a readable checkpoint"):
        read_state(file)
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="state is not a checkpoint of a training run"):
        read_state(file)


def test_reading_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"ltrp_timm_training_state": {"a": Trap()}}, tmp_path / "state")
    with pytest.raises(ValueError, match="state is not a readable checkpoint"):
        read_state(tmp_path / "state")
    assert os.listdir(tmp_path) == ["state"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "state"
    save_state(file, tree())
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*; the checkpoint before it is"):
            save_state(file, {"big": torch.randn(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
    save_state(file, {"big": torch.randn(100_000)})


def test_a_full_disk_in_the_middle_of_a_run(photos: Path, tmp_path: Path, whole: Path) -> None:
    size = (whole / "checkpoint.pt").stat().st_size
    folder = tmp_path / "run"

    def fill(self: Any, *args: Any) -> Any:
        if self.progress.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        return original(self, *args)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", fill)
        try:
            with pytest.raises(OSError, match="the checkpoint before it is whole"):
                run(photos, folder, checkpoint_steps=1, **LONG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_state(folder / "checkpoint.pt")["progress"]["step"] == 6
    run(photos, folder, resume="auto", **LONG)
    assert same_bits(weights(folder), weights(whole))


def test_the_fields_that_differ_are_named(tmp_path: Path) -> None:
    saved = {"lr": 0.1, "data": {"images": 3}, "pair": (1, 2)}
    check_same(saved, {"lr": 0.1, "data": {"images": 3}, "pair": [1, 2]}, tmp_path)
    text = r"another configuration: lr \(0.1 there, 0.2 here\), data.images \(3 there, 4 here\)"
    with pytest.raises(ValueError, match=text):
        check_same(saved, {"lr": 0.2, "data": {"images": 4}, "pair": [1, 2]}, tmp_path)


def test_a_checkpoint_of_another_configuration(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(photos, folder, epochs=1)
    before = (folder / "checkpoint.pt").read_bytes()
    more = make_photos(tmp_path / "more", 26)
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.mask_token += 1
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lr": 0.5}, r"lr \(0.01 there, 0.5 here\)"),
        ({"seed": 3}, r"seed \(0 there, 3 here\)"),
        ({"epochs": 2}, r"other epochs \(1 there, 2 here\): its schedule \(cosine\) is laid out"),
        ({"epochs": 2, "sched": "none"}, r"configuration: sched \(cosine there, none here\)\."),
        ({"batch_size": 2}, r"images_per_update \(4 there, 2 here\)"),
        ({"ranker_args": {"width": 8, "depth": 1}}, r"ranker.width \(16 there, 8 here\)"),
        ({"mask_ratio": 0.6}, r"mask_ratio \(0.5 there, 0.6 here\)"),
        ({"data": more}, r"data.images \(19 there, 25 here\)"),
        ({"teacher": teacher}, r"teacher \([0-9a-f]{16} there, [0-9a-f]{16} here\)"),
    ]
    for change, text in cases:
        options = {"data": photos, "epochs": 1, **change}
        with pytest.raises(ValueError, match=text):
            run(options.pop("data"), folder, resume="auto", **options)
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "changes", [{"sched": "none"}, {"sched": "step", "warmup_epochs": 0.5}], ids=["none", "step"]
)
def test_a_finished_run_goes_on_where_the_rates_are_known(
    photos: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(photos, tmp_path / "whole", epochs=3, ema_decay=0.9, **changes)
    run(photos, tmp_path / "run", epochs=1, ema_decay=0.9, **changes)
    assert not same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    done = run(photos, tmp_path / "run", epochs=3, ema_decay=0.9, resume="auto", **changes)
    assert done.epochs == 3
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    rows = [_timeless(read_log(tmp_path / name / "log.csv")) for name in ("run", "whole")]
    assert rows[0] == rows[1]


class CrashError(Exception):
    pass


@pytest.mark.parametrize(
    ("step", "every", "workers"), [(0, 1, 0), (2, 1, 2), (3, 2, 0), (4, None, 2), (11, 3, 0)]
)
def test_a_run_that_broke_off_goes_on_exactly(
    photos: Path, tmp_path: Path, whole: Path, step: int, every: int | None, workers: int
) -> None:
    folder = tmp_path / "run"

    def crash(self: Any, *args: Any) -> Any:
        if self.progress.step == step:
            raise CrashError
        return original(self, *args)

    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", crash)
        with pytest.raises(CrashError):
            run(photos, folder, checkpoint_steps=every, **LONG)
    assert step == 0 or not same_bits(_model(folder), _model(whole))
    run(photos, folder, resume="auto", checkpoint_steps=every, **{**LONG, "num_workers": workers})
    assert equal(read_state(folder / "checkpoint.pt"), _state(whole))
    assert same_bits(weights(folder), weights(whole))
    rows, expected = (_timeless(read_log(path / "log.csv")) for path in (folder, whole))
    assert rows == expected


def _state(folder: Path) -> dict[str, Any]:
    return read_state(folder / "checkpoint.pt")


def _model(folder: Path) -> dict[str, Any]:
    model: dict[str, Any] = _state(folder)["model"]
    return model


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(
    photos: Path, tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"

    def interrupt(self: Any, *args: Any) -> Any:
        if self.progress.step == 5:
            os.kill(os.getpid(), number)
        return original(self, *args)

    original, handlers = Trainer.train_update, signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", interrupt)
        summary = run(photos, folder, **LONG)
    assert signal.getsignal(number) is handlers
    assert summary.stopped_by == number
    assert summary.steps == 6
    assert _state(folder)["progress"]["step"] == 6
    assert run(photos, folder, resume="auto", **LONG).stopped_by is None
    assert same_bits(weights(folder), weights(whole))


def test_a_finished_run_stays(
    photos: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    summary = run(photos, whole, resume="auto", **LONG)
    assert summary.steps == 12
    assert summary.metrics["epoch"] == 3
    assert "is finished: 3 epochs, 12 steps" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}


def test_a_loss_that_is_not_finite_ends_the_run(photos: Path, tmp_path: Path) -> None:
    folder, teacher = tmp_path / "run", tiny_teacher()

    def poison(self: Any, *args: Any) -> Any:
        if self.progress.step == 5:
            self.engine.model.head.bias.data.fill_(math.nan)
        return original(self, *args)

    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", poison)
        text = r"the loss is nan at step 6 \(epoch 2\); losses before it: \d.*; learning rate 0\.0"
        with pytest.raises(NonFiniteLossError, match=text):
            run(photos, folder, checkpoint_steps=1, teacher=teacher, **LONG)
    state = _state(folder)
    assert state["progress"]["step"] == 5
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_saved(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def poison(self: Any, step: int) -> None:
        original(self, step)
        if step == 4:  # after the last loss of the epoch
            self.model.head.bias.data.fill_(math.inf)

    original = Engine.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "update", poison)
        with pytest.raises(NonFiniteLossError, match="a weight is not finite"):
            run(photos, folder, **{**LONG, "ema_decay": None})
    assert _state(folder)["progress"]["step"] == 0
    assert not (folder / "model.safetensors").exists()


def hold(folder: Path) -> None:
    with locked(folder):
        print("held", flush=True)
        time.sleep(60)


def test_a_folder_in_use_is_refused(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    other = Started(hold, folder)
    try:
        while not other.stdout():
            assert other.poll() is None, other.wait()
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match=r"another process is writing .*run; wait"):
            run(photos, folder)
        assert os.listdir(folder) == [".lock"]
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    (folder / ".checkpoint.pt.abc.tmp").touch()  # a write that was cut off
    run(photos, folder, epochs=1)
    assert not list(folder.glob(".*.tmp"))
    with locked(folder):
        pass


@pytest.mark.parametrize("kind", [Settings, Recipe, Augmentation])
def test_every_annotated_range_is_known(kind: type) -> None:
    for hint in get_type_hints(kind, include_extras=True).values():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Annotated:
                assert part.__metadata__[0] in _RANGES


def test_equal_weights_have_one_digest() -> None:
    a, b = tiny_teacher().state_dict(), tiny_teacher().state_dict()
    assert digest(a) == digest(b)
    b["mask_token"] = b["mask_token"] + 1e-6
    assert digest(a) != digest(b)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_twenty_kills_change_nothing(photos: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; the weights are those of a run that nothing disturbed."""
    options = {**LONG, "epochs": 150, "resume": "auto"}

    def start(folder: str, every: int, workers: int) -> Any:
        changes = {**options, "checkpoint_steps": every, "num_workers": workers}
        # forked, so that it need not import everything again
        process = multiprocessing.get_context("fork").Process(
            target=run, args=(photos, tmp_path / folder), kwargs=changes
        )
        process.start()
        return process

    whole = start("whole", 100, 0)
    whole.join()
    assert whole.exitcode == 0
    draw, steps = torch.Generator().manual_seed(0), [0]
    checkpoint = tmp_path / "cut" / "checkpoint.pt"
    for kill in range(20):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start("cut", 1 + kill % 3, kill % 3)
        while process.is_alive():  # not while it starts: there is nothing to disturb
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        time.sleep(0.05 * float(torch.rand((), generator=draw)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        steps.append(_state(tmp_path / "cut")["progress"]["step"])
    last = start("cut", 7, 1)
    last.join()
    assert last.exitcode == 0
    print("killed at steps", steps)
    assert len(set(steps)) > 10
    assert equal(_state(tmp_path / "cut"), _state(tmp_path / "whole"))
    assert same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_teacher_goes_on_too(photos: Path, tmp_path: Path) -> None:
    sizes = {name: value for name, value in TEACHER_ARGS.items() if name != "img_size"}
    options = {"img_size": 32, "teacher_args": sizes, "epochs": 2, "batch_size": 4, **QUIET}

    def crash(self: Any, *args: Any) -> Any:
        if self.progress.step == 6:
            raise CrashError
        return original(self, *args)

    train_teacher(photos, tmp_path / "whole", **options)
    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", crash)
        with pytest.raises(CrashError):
            train_teacher(photos, tmp_path / "cut", checkpoint_steps=1, **options)
    train_teacher(photos, tmp_path / "cut", resume="auto", **options)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("handles", [None, 40])
def test_an_error_ends_the_process(photos: Path, tmp_path: Path, handles: int | None) -> None:
    """A traceback keeps the loader's workers alive: nothing else may wait for them then."""
    script = (
        "import resource, sys\n"
        "from ltrp_timm.train import train_teacher\n"
        "from ltrp_timm.train.loop import Trainer\n"
        "def fail(*_): raise ValueError('on purpose')\n"
        f"if {handles}: resource.setrlimit(resource.RLIMIT_NOFILE, ({handles}, {handles}))\n"
        "else: Trainer.train_update = fail\n"
        f"train_teacher({str(photos)!r}, {str(tmp_path / 'run')!r}, teacher_args={TEACHER_ARGS},\n"
        "    epochs=1, batch_size=1, num_workers=4, tensorboard=False, progress=False)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert ("open files" if handles else "ValueError: on purpose") in done.stderr
