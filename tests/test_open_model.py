"""One way from a name to a model: every command reads the same weights from the same file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import small_teacher
from finetune_setup import NARROW, make_classes, small_vit
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltrp_timm import LTRPModel, create_ranker, create_teacher, drop_patches, save_pretrained
from ltrp_timm.commands import main
from ltrp_timm.models.open_model import open_model, with_front_end
from ltrp_timm.weights.files import read_weights

NAME = "vit_tiny_patch16_224"
COMMANDS = ("evaluate", "export", "finetune", "save")
Weights = dict[str, Tensor]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of three classes, and timm models that are narrow."""
    monkeypatch.chdir(tmp_path)
    make_classes(tmp_path / "set", 2)
    real = timm.create_model

    def create(name: str, *args: Any, **kwargs: Any) -> Any:
        narrow = NARROW if name == NAME or kwargs.get("backbone") == NAME else {}
        return real(name, *args, **{**narrow, **kwargs})

    monkeypatch.setattr(timm, "create_model", create)
    return tmp_path


def run(command: str, checkpoint: str, *more: str) -> int:
    """A command that begins with a file of weights for three classes."""
    flags = ["--checkpoint", checkpoint, *more]
    if command == "evaluate":
        flags += ["--data", "set", "--batch-size", "4", "--device", "cpu", "--num-workers", "0"]
    elif command == "export":
        flags += ["--format", "torchscript", "--output", "out.pt", "--repeats", "0", "--no-check"]
    elif command == "finetune":
        flags += ["--data", "set", "--output", "run", "--epochs", "1", "--num-workers", "0"]
        flags += ["--keep-ratio", "0.5", "--batch-size", "2", "--no-tensorboard", "--no-progress"]
    else:
        flags += ["--output", "saved"]
    return main([command, NAME, *flags])


def as_model(weights: Weights) -> Weights:
    return {f"backbone.{name}": tensor for name, tensor in weights.items()}


def same(model: Any, weights: Weights) -> bool:
    own = model.backbone.state_dict() if isinstance(model, LTRPModel) else model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[n], weights[n]) for n in own)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_image_size_loads_everywhere(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    save_file(small_vit(img_size=32).state_dict(), "small.safetensors")
    assert run(command, "small.safetensors", "--img-size", "48") == 0
    assert "weights: read from small.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_position_tables_are_resampled(here: Path, plain: bool, whole: bool) -> None:
    expected, vit = small_vit(img_size=48), small_vit(img_size=32)
    weights = timm.models.vision_transformer.checkpoint_filter_fn(vit.state_dict(), expected)
    assert weights["pos_embed"].shape != vit.pos_embed.shape
    save_file(as_model(vit.state_dict()) if whole else vit.state_dict(), "small.safetensors")
    if plain and whole:
        with pytest.raises(RuntimeError, match=r"missing +cls_token"):
            open_model(NAME, checkpoint="small.safetensors", plain=True, img_size=48)
        return
    model, origin = open_model(NAME, checkpoint="small.safetensors", plain=plain, img_size=48)
    assert isinstance(model, LTRPModel) is not plain
    assert same(model, weights)
    assert not model.training
    assert origin == "read from small.safetensors"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prefers_the_average(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """As timm's own loader does; the raw weights here do not even fit."""
    average = small_vit(num_classes=3).state_dict()
    raw = small_vit(num_classes=3, depth=1).state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": average, "epoch": 3}, "last.pth.tar")
    assert run(command, "last.pth.tar", "--img-size", "32") == 0
    assert "read from last.pth.tar (average of the weights)" in capsys.readouterr().out
    if command == "save":
        saved = load_file("saved/model.safetensors")
        assert all(torch.equal(saved[f"backbone.{name}"], average[name]) for name in average)


def test_without_an_average_nothing_is_said_of_one(here: Path) -> None:
    weights = small_vit().state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": None}, "last.pth.tar")
    model, origin = open_model(NAME, checkpoint="last.pth.tar", img_size=32)
    assert origin == "read from last.pth.tar"
    assert same(model, weights)


def under(*prefixes: str) -> Callable[[Weights], dict[str, Any]]:
    return lambda weights: {"".join(prefixes) + name: weights[name] for name in weights}


LAYOUTS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "bare": under(),
    "parallel": under("module."),
    "compiled": under("_orig_mod."),
    "parallel and compiled": under("module.", "_orig_mod."),
    "compiled and parallel": under("_orig_mod.", "module."),
    "Lightning": lambda weights: {
        "state_dict": under("model.")(weights),
        "pytorch-lightning_version": "2.5.0",
        "global_step": 7,
    },
    "Lightning, compiled": lambda weights: {"state_dict": under("model.", "_orig_mod.")(weights)},
    "state_dict": lambda weights: {"state_dict": weights},
    "model": lambda weights: {"model": weights},
    "state_dict in model": lambda weights: {"model": {"state_dict": weights}},
    "an average": lambda weights: {"state_dict": {"x": torch.zeros(1)}, "model_ema": weights},
    "numbers of numpy": lambda weights: {
        "model": weights,
        "best": np.float64(81.5),
        "metrics": {"top1": np.float32(0.5), "images": np.int64(-3), "done": np.bool_(True)},
    },
}
READERS = ("ranker", "teacher", "model", "plain model")


def written(reader: str) -> Weights:
    """Weights that a reader takes."""
    if reader == "ranker":
        return dict(create_ranker("conv", width=8, depth=1).state_dict())
    return dict(small_teacher().state_dict() if reader == "teacher" else small_vit().state_dict())


def read(reader: str, path: Any) -> Weights:
    if reader == "ranker":
        return dict(create_ranker("conv", pretrained=path, width=8, depth=1).state_dict())
    if reader == "teacher":
        return dict(create_teacher(path, num_heads=4, decoder_num_heads=3).state_dict())
    model, _ = open_model(NAME, checkpoint=path, plain=reader == "plain model", img_size=32)
    return dict(getattr(model, "backbone", model).state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_every_layout(here: Path, reader: str, layout: str) -> None:
    weights = written(reader)
    path = "weights.ckpt" if layout.startswith("Lightning") else "weights.pth"
    torch.save(LAYOUTS[layout](weights), path)
    found = read(reader, path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def write_shards(folder: Path, weights: Weights, config: dict[str, Any] | None = None) -> Path:
    """The weights in two files and their index, as ``save_pretrained`` of transformers has them."""
    folder.mkdir()
    names = sorted(weights)
    parts = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / f"{file}.safetensors")
    places = {name: f"{file}.safetensors" for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return index


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_sharded_files(here: Path, reader: str) -> None:
    weights = written(reader)
    config: dict[str, Any] = {"ranker": "conv", "args": {"width": 8, "depth": 1}}
    index = write_shards(here / "shards", weights, config if reader == "ranker" else {})
    for source in (index, here / "shards"):
        found = read(reader, source)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(weight_map={}), "lists no weights"),
        (lambda index: index.pop("weight_map"), "lists no weights"),
        (lambda index: index["weight_map"].update(x="../other.safetensors"), "beside it, got"),
        (lambda index: index["weight_map"].update(x="/etc/passwd"), "beside it, got"),
        (lambda index: index["weight_map"].update(x="a.safetensors"), "holds no a.safetensors"),
        (
            lambda index: index["weight_map"].update(x="model-00001-of-00002.safetensors"),
            "and its files differ in x",
        ),
        (lambda index: index["weight_map"].pop("stem.bias"), "and its files differ in stem.bias"),
    ],
)
def test_an_index_that_is_wrong(
    here: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    file = write_shards(here / "shards", written("ranker"))
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_weights(file)


@pytest.mark.parametrize(
    "value",
    [
        np.array([1.0, 2.0]),
        np.complex64(1),
        np.str_("x"),
        np.datetime64("2024-01-01"),
        np.void(b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_numbers_of_numpy_are_read(here: Path, value: Any) -> None:
    torch.save({"model": written("ranker"), "x": value}, "odd.pth")
    with pytest.raises(ValueError, match="cannot be read as a pickle of weights only"):
        read_weights("odd.pth")


def test_numbers_of_numpy_become_those_of_python(here: Path) -> None:
    metrics = {"a": np.float64(81.5), "b": np.int32(-3), "c": np.bool_(True), "d": np.uint8(200)}
    big = np.dtype(">f4").type(2.5)
    torch.save({"model": written("ranker"), "metrics": {**metrics, "e": big}}, "a.pth")
    found = read_weights("a.pth").beside["metrics"]
    assert found == {"a": 81.5, "b": -3, "c": True, "d": 200, "e": 2.5}
    assert [type(found[name]) for name in "abcd"] == [float, int, bool, int]


def test_weights_that_do_not_fit_are_listed(here: Path) -> None:
    weights = small_vit().state_dict()
    del weights["blocks.1.mlp.fc1.bias"]
    save_file({**weights, "extra": torch.zeros(1)}, "odd.safetensors")
    for plain, prefix in ((False, "backbone."), (True, "")):
        with pytest.raises(RuntimeError) as caught:
            open_model(NAME, checkpoint="odd.safetensors", plain=plain, img_size=32)
        assert f"missing     {prefix}blocks.1.mlp.fc1.bias" in str(caught.value)
        assert f"unexpected  {prefix}extra" in str(caught.value)
    save_file(small_vit(num_classes=5).state_dict(), "five.safetensors")
    assert open_model(NAME, checkpoint="five.safetensors", img_size=32)[0].num_classes == 5
    with pytest.raises(RuntimeError, match=r"mismatched +backbone.head.weight"):
        open_model(NAME, checkpoint="five.safetensors", img_size=32, num_classes=4)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), "not finite  {}"),
        (lambda t: t.index_fill(0, torch.tensor([0]), torch.inf), "not finite  {}"),
        (lambda t: t.to(torch.int8), "mismatched  {}: torch.int8, the model has torch.float32"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_weights_that_are_no_numbers_are_refused(
    here: Path, reader: str, change: Callable[[Tensor], Tensor], line: str
) -> None:
    weights = written(reader)
    name = sorted(name for name in weights if name.endswith("bias"))[0]
    torch.save({**weights, name: change(weights[name])}, "odd.pth")
    with pytest.raises(RuntimeError, match="does not fit the model") as caught:
        read(reader, "odd.pth")
    last = name.removeprefix("backbone.").removeprefix("ranker.")
    assert re.search(re.escape(line).replace(r"\{\}", rf"\S*{re.escape(last)}"), str(caught.value))


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("vit_tiny_patch16_225", {}, ValueError, "is unknown: did you mean vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.none", {}, ValueError, "none"),
        (NAME, {"plain": True, "ranker": "conv"}, ValueError, "ranker: patches are not dropped"),
        (NAME, {"ranker": "best"}, ValueError, "ranker must be one of"),
        (NAME, {"keep_ratio": 2.0}, ValueError, r"keep_ratio must be in \(0, 1\]"),
        (NAME, {"no_such_argument": 1}, TypeError, "no_such_argument"),
        (NAME, {"checkpoint": "none.pth"}, FileNotFoundError, "none.pth does not exist"),
        (NAME, {"pretrained": True, "checkpoint": "none.pth"}, ValueError, "give one, not both"),
        ("resnet10t", {}, TypeError, "cannot drop patches from ResNet"),
        ("resnet10t", {"img_size": 64}, TypeError, "cannot drop patches from ResNet"),
        ("resnet10t", {"img_size": 64, "plain": True}, TypeError, "resnet10t takes no img_size"),
    ],
)
def test_wrong_arguments(
    here: Path, name: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        open_model(name, **options)


def test_a_saved_folder_gives_its_weights_unless_a_file_replaces_them(here: Path) -> None:
    save_file(small_vit().state_dict(), "a.safetensors")
    assert run("save", "a.safetensors", "--img-size", "32") == 0
    model, origin = open_model("local-dir:saved")
    assert origin == "those of local-dir:saved"
    assert same(model, small_vit().state_dict())
    other = {name: tensor + 1 for name, tensor in small_vit().state_dict().items()}
    save_file(other, "b.safetensors")
    model, origin = open_model("local-dir:saved", checkpoint="b.safetensors")
    assert origin == "read from b.safetensors"
    assert same(model, other)
    model, origin = open_model("local-dir:saved", pretrained=False)
    assert origin is None
    assert not same(model, small_vit().state_dict())


def test_another_ranker_leaves_the_other_settings(tmp_path: Path) -> None:
    vit = small_vit(img_size=32)
    options: dict[str, Any] = {"selection_args": {"ratio": 0.3}, "fill": "nearest"}
    save_pretrained(drop_patches(vit, "contrast", 0.4, "mixed", **options), tmp_path / "mixed")
    name = f"local-dir:{tmp_path / 'mixed'}"
    found, _ = open_model(name, ranker="pixel_std")
    assert (found.ranker.name, found.keep_ratio, found.fill) == ("pixel_std", 0.4, "nearest")
    assert (found.selection, found.selection_args["ratio"]) == ("mixed", 0.3)
    other, _ = open_model(name, ranker="pixel_std", selection="stratified")
    assert (other.selection, other.selection_args) == ("stratified", {"cell": 2})


def test_another_ranker_ends_a_budget_at_its_mean(tmp_path: Path) -> None:
    model = drop_patches(small_vit(img_size=32), "pixel_std", fill="nearest")
    model.calibrate(torch.rand(6, 3, 32, 32), mean_keep_ratio=0.4)
    save_pretrained(model, tmp_path / "budget")
    name = f"local-dir:{tmp_path / 'budget'}"
    assert open_model(name)[0].budget == model.budget
    found, _ = open_model(name, ranker="gradient")
    assert (found.budget, found.keep_ratio, found.fill) == (None, 0.4, "nearest")
    learned = drop_patches(small_vit(img_size=32), create_ranker("conv", width=8, depth=1))
    ranker, learned.budget = learned.ranker, model.budget
    same = with_front_end(learned, {"ranker": "conv"})
    assert (same.ranker is ranker, same.budget, same.keep_ratio) == (True, None, 0.4)
    save_pretrained(found, tmp_path / "fixed")
    assert open_model(f"local-dir:{tmp_path / 'fixed'}")[0].budget is None


def test_a_coarse_rest_that_ended_does_not_come_back(tmp_path: Path) -> None:
    model = drop_patches(small_vit(img_size=32), rest="coarse", scales=(1, 2))
    save_pretrained(model, tmp_path / "coarse")
    created = timm.create_model(f"local-dir:{tmp_path / 'coarse'}", pretrained=True, rest="drop")
    assert (created.rest, created.fill) == ("drop", "zeros")
    created.fill = "nearest"
    save_pretrained(created, tmp_path / "nearest")
    for rest, fill in (("drop", "nearest"), ("coarse", "zeros")):
        found = timm.create_model(f"local-dir:{tmp_path / 'nearest'}", pretrained=True, rest=rest)
        assert (found.rest, found.fill) == (rest, fill)
    found, _ = open_model(f"local-dir:{tmp_path / 'coarse'}", rest="drop")
    assert open_model(f"local-dir:{tmp_path / 'coarse'}")[0].rest == "coarse"
    save_pretrained(found, tmp_path / "drop")
    assert open_model(f"local-dir:{tmp_path / 'drop'}")[0].rest == "drop"


def test_a_configuration_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": ')
    with pytest.raises(ValueError, match=f"the configuration in {tmp_path} is not JSON: Expecting"):
        open_model(f"local-dir:{tmp_path}")
