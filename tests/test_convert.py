"""Checkpoints of the authors: read where weights are named, or converted whole or not at all."""

import argparse
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import SMALL_MAE, lively, records_arguments, small_teacher
from safetensors.torch import save_file
from test_parity import SHARED, load
from torch import Tensor

from ltrp_timm import create_ranker, create_teacher

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("convert_ltrp", ROOT / "scripts/convert_ltrp.py")
assert _spec is not None
script: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)  # type: ignore[union-attr]

REFERENCE = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 4}
HEADS = {"num_heads": SMALL_MAE["num_heads"], "decoder_num_heads": 3}
Tensors = dict[str, Tensor]


def training(model: Tensors, **args: Any) -> dict[str, Any]:
    """What a training script leaves: weights, optimiser, epoch, scaler, arguments."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    state = {"optimizer": optimizer.state_dict(), "epoch": 399, "scaler": {"scale": 65536.0}}
    return {"model": model, **state, "args": argparse.Namespace(lr=1e-3, **args)}


def prefixed(prefix: str, weights: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in weights.items()}


def stage_1(path: Path, without: str = "", more: Tensors | None = None, **args: Any) -> Path:
    """The reference ranker and a small MAE in the authors' layout of stage 1."""
    model = prefixed("mim.", small_teacher().state_dict())
    model |= prefixed("score_net.", load("c_ranker_small")[1]) | (more or {})
    torch.save(training({n: t for n, t in model.items() if n != without}, **args), path)
    return path


def fine_tuned(name: str = "vit_tiny_patch16_224", **changes: Any) -> Any:
    """A plain ViT as MAE's fine-tuning leaves it."""
    args = {"img_size": 64, "depth": 2, "num_classes": 7, **changes}
    return lively(timm.create_model(name, **args)).eval()


def stage_2(path: Path, vit: Any, **args: Any) -> Path:
    torch.save(training(vit.state_dict(), **args), path)
    return path


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("form", ["stage 1", "alone", "parallel", "in a pickle"])
def test_the_published_ranker_is_read_as_it_is(tmp_path: Path, form: str) -> None:
    arrays, weights = load("c_ranker_small")
    path = tmp_path / "ltrp.pth"
    if form == "stage 1":
        stage_1(path)
    elif form == "alone":
        path = tmp_path / "ranker.safetensors"
        save_file(weights, path)
    elif form == "parallel":
        torch.save(training(prefixed("module.score_net.", weights)), path)
    else:
        torch.save(weights, path)
    ranker = create_ranker("vit_small", pretrained=path, **REFERENCE).eval()
    assert same(ranker.state_dict(), weights)
    assert ranker.trained
    assert (ranker(arrays["images"]).flatten(1) - arrays["scores_full"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base"])
def test_rankers_of_the_published_sizes_need_no_options(tmp_path: Path, name: str) -> None:
    ranker = create_ranker(name, depth=1)
    torch.save(training(prefixed("score_net.", ranker.state_dict())), tmp_path / "a.pth")
    loaded = create_ranker(name, pretrained=tmp_path / "a.pth", depth=1)
    assert loaded.config() == ranker.config()
    assert same(loaded.state_dict(), ranker.state_dict())


@pytest.mark.parametrize("told", [{}, {"norm_pix_loss": True}, {"norm_pix_loss": "yes"}], ids=str)
def test_the_teacher_of_stage_1_is_read_as_it_is(tmp_path: Path, told: dict[str, Any]) -> None:
    path = stage_1(tmp_path / "ltrp.pth", more={"lpips.lin0.weight": torch.zeros(1)}, **told)
    teacher = create_teacher(path, **HEADS)
    stored = torch.load(path, weights_only=False)["model"]
    inner = {name: tensor for name, tensor in stored.items() if name.startswith("mim.")}
    assert same(prefixed("mim.", teacher.state_dict()), inner)
    assert teacher.norm_pix_loss is (told.get("norm_pix_loss") is True)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("score_net.head.weight", r"missing     head\.weight$"),
        ("score_net.pos_embed", r"(?s)does not fit the model.*missing     pos_embed$"),
        ("score_net.blocks.1.norm1.bias", r"missing     blocks\.1\.norm1\.bias$"),
        ("mim.blocks.0.mlp.fc1.bias", r"missing     blocks\.0\.mlp\.fc1"),
        ("mim.decoder_blocks.1.norm2.bias", r"missing     decoder_blocks\.1\.norm2\.bias"),
        ("mim.mask_token", r"is not a whole MAE: it lacks mask_token\."),
    ],
)
def test_anything_missing_is_refused(tmp_path: Path, without: str, message: str) -> None:
    path = stage_1(tmp_path / "ltrp.pth", without)
    readers = [
        lambda: create_ranker("vit_small", pretrained=path, **REFERENCE),
        lambda: create_teacher(path, **HEADS),
    ]
    readers = readers[::-1] if without.startswith("mim.") else readers
    with pytest.raises((RuntimeError, ValueError), match=message):
        readers[0]()
    readers[1]()  # the other one is whole


def test_what_is_too_much_or_of_another_shape(tmp_path: Path) -> None:
    more = {"score_net.extra": torch.zeros(1), "score_net.head.bias": torch.zeros(9)}
    path = stage_1(tmp_path / "ltrp.pth", more=more)
    message = r"(?s)unexpected  extra\n  mismatched  head\.bias: \[9\], the model has \[16\]$"
    with pytest.raises(RuntimeError, match=message):
        create_ranker("vit_small", pretrained=path, **REFERENCE)


@torch.no_grad()
@records_arguments
@pytest.mark.parametrize(
    ("num_heads", "changes"),
    [
        (None, {}),
        (None, {"num_classes": 100, "img_size": 96, "global_pool": "avg"}),
        (4, {"embed_dim": 48, "num_heads": 4, "mlp_ratio": 2.0, "in_chans": 1}),
        (None, {"name": "vit_small_patch32_224", "img_size": (64, 96), "qkv_bias": False}),
    ],
)
def test_stage_2_becomes_a_pruned_model(
    tmp_path: Path, num_heads: int | None, changes: dict[str, Any]
) -> None:
    vit = fine_tuned(**changes)
    path, size = stage_2(tmp_path / "tuned.pth", vit), changes.get("img_size")
    size = size if isinstance(size, tuple) else None
    settings = {"keep_ratio": 0.3, "img_size": size, "num_heads": num_heads}
    script.convert(path, tmp_path / "model", "contrast", **settings)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert (model.num_classes, model.keep_ratio) == (vit.num_classes, 0.3)
    assert (model.selection, model.selection_args["ratio"]) == ("mixed", 0.7)
    data = timm.data.resolve_model_data_config(model)
    mean = [0.485, 0.456, 0.406] if vit.in_chans == 3 else [0.449]
    assert list(data["mean"]) == pytest.approx(mean, abs=1e-3)  # not those of timm's own weights
    assert data["input_size"] == (vit.in_chans, *vit.patch_embed.img_size)
    images = torch.randn(2, *data["input_size"])
    pruned = model(images)
    model.keep_ratio = 1.0
    assert torch.equal(model(images), vit(images))
    assert (pruned - model(images)).abs().max() > 1e-2
    assert "tag" not in json.loads((tmp_path / "model" / "config.json").read_text())


@torch.no_grad()
@records_arguments
def test_stage_2_with_the_ranker_of_stage_1(tmp_path: Path) -> None:
    """In a checkpoint beside it, in a saved folder, or within the same file."""
    ranker = create_ranker("vit_tiny", img_size=32, patch_size=8, depth=1)
    ranker.trained = True
    ranker = lively(ranker).eval()
    ranker.save(tmp_path / "saved")
    inner = prefixed("score_net.", ranker.state_dict())
    first = inner | prefixed("mim.", small_teacher().state_dict())
    torch.save(training(first), tmp_path / "stage1.pth")
    vit = fine_tuned()
    stage_2(tmp_path / "stage2.pth", vit)
    torch.save(training(vit.state_dict() | first), tmp_path / "both.pth")
    images = torch.randn(2, 3, 64, 64)
    logits = []
    for file, front in (("stage2", "stage1.pth"), ("stage2", "saved"), ("both", None)):
        source, folder = tmp_path / f"{file}.pth", tmp_path / f"out-{front}"
        front = None if front is None else tmp_path / front
        script.convert(source, folder, front, selection="top", license="mit")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(model.patch_scores(images), ranker(model.bridge(images)).flatten(1))
        logits.append(model(images))
        card = (folder / "README.md").read_text()
        assert f"Converted from {file}.pth." in card
        assert re.search(r"^license: \"?mit\"?$", card, re.M)
        assert str(tmp_path) not in card
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert (logits[0] - vit(images)).abs().max() > 1e-2


@records_arguments
@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger reference vectors are not here")
@torch.no_grad()
def test_reference_vectors_of_both_stages(tmp_path: Path) -> None:
    arrays, weights = load("e_vit_small", SHARED)
    torch.save(training(weights), tmp_path / "b.pth")
    script.convert(tmp_path / "b.pth", tmp_path / "model", "contrast", num_heads=4)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    for k in (4, 8, 12):
        logits = model(arrays["images"], keep_indices=arrays[f"k{k}_ids"].long())
        assert (logits - arrays[f"k{k}_logits"]).abs().max() <= 1e-5
    arrays, weights = load("a_small_p16", SHARED)
    torch.save(training(prefixed("mim.", weights), norm_pix_loss=True), tmp_path / "a.pth")
    teacher = create_teacher(tmp_path / "a.pth", num_heads=4, decoder_num_heads=4)
    painted, _ = teacher(arrays["images"], arrays["visible_ids"])
    assert (painted - arrays["anchor"]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (48, None)]
)
def test_sizes_of_every_vit(width: int, heads: int | None) -> None:
    patch, side = (14, 16) if width == 1280 else (16, 14)
    shapes = {"patch_embed.proj.weight": (width, 3, patch, patch), "head.weight": (5, width)}
    shapes |= {"pos_embed": (1, side * side + 1, width), "blocks.11.norm1.bias": (width,)}
    shapes |= {f"blocks.{number}.norm1.bias": (width,) for number in range(11)}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if heads is None:
        with pytest.raises(ValueError, match=r"width 48: pass its number of heads"):
            script.sizes_of(weights, "x")
        heads = 4
    sizes = script.sizes_of(weights, "x", heads=heads if width == 48 else None)
    assert (sizes["img_size"], sizes["num_heads"]) == ((224, 224), heads)
    assert (sizes["embed_dim"], sizes["depth"], sizes["patch_size"]) == (width, 12, (patch, patch))


def refused(error: type[Exception], message: str, path: Path, *args: Any, **options: Any) -> None:
    """Refused with that message, and nothing new is there."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(error, match=message):
        script.convert(path, path.parent / "out", *args, **options)
    assert sorted(path.parent.rglob("*")) == before


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    tuned, vit = stage_2(tmp_path / "tuned.pth", fine_tuned()), fine_tuned().state_dict()
    refused(ValueError, "holds no ranker: pass --ranker", tuned)
    refused(ValueError, "the vit_small ranker must be trained", tuned, "vit_small")
    refused(FileNotFoundError, "no does not exist; give the folder of a ranker", tuned, "no")
    refused(ValueError, r"keep_ratio must be in \(0, 1\]", tuned, "contrast", keep_ratio=2)
    refused(FileNotFoundError, "no.pth does not exist", tmp_path / "no.pth")
    refused(RuntimeError, r"missing     patch_embed\.proj\.weight", stage_1(tmp_path / "1.pth"))
    torch.save(prefixed("score_net.", vit) | vit, tmp_path / "both.pth")
    refused(ValueError, "holds a ranker: leave --ranker out", tmp_path / "both.pth", "contrast")
    decoder = {"head.weight": "head.decoder.query_embed.weight"}
    for name, changes, message in (
        ("encoder", {n: t for n, t in vit.items() if "head" not in n}, r"missing     head\.weight"),
        ("gamma", {**vit, "blocks.0.ls1.gamma": torch.ones(192)}, r"unexpected  blocks\.0\.ls1"),
        ("decoder", {decoder.get(n, n): t for n, t in vit.items()}, r"missing     head\.weight"),
        (
            "flat",
            {**vit, "pos_embed": torch.zeros(17, 192)},
            "embeddings have other dimensions",
        ),
        ("long", {**vit, "pos_embed": torch.zeros(1, 19, 192)}, "has 18 positions, which"),
        ("far", {**vit, "blocks.99999999.norm1.bias": torch.ones(1)}, r"names blocks\.99999999, b"),
        ("bare", {n: t for n, t in vit.items() if "blocks" not in n}, "holds no blocks"),
    ):
        torch.save(changes, tmp_path / f"{name}.pth")
        refused((RuntimeError, ValueError), message, tmp_path / f"{name}.pth", "contrast")
    message = r"has 16 positions, which \(96, 96\) does not fit"
    refused(ValueError, message, tuned, "contrast", img_size=(96, 96))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = stage_2(tmp_path / "tuned.pth", fine_tuned())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for output in ("full", "tuned.pth"):
        with pytest.raises(FileExistsError, match="exists already: choose a new folder"):
            script.convert(path, tmp_path / output, "contrast")
    assert sorted(tmp_path.rglob("*")) == before


@records_arguments
def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage_2(tmp_path / "tuned.pth", fine_tuned())
    flags = ["--ranker", "contrast", "--selection", "top", "--training-data", "photos"]
    assert script.main(["tuned.pth", "-o", "model", *flags]) == 0
    assert capsys.readouterr().out == "written model\n"
    assert timm.create_model("local-dir:model", pretrained=True).selection == "top"
    assert "**Training data:** photos" in (tmp_path / "model" / "README.md").read_text()
    assert script.main(["tuned.pth", "-o", "model", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err == "ltrp-timm: model exists already: choose a new folder.\n"
    guide = (ROOT / "docs" / "guides" / "weights.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python scripts/convert_ltrp.py (.+)$", guide, re.M)
    arguments = shlex.split(line, comments=True)
    assert script.main(arguments) == 2  # only the file is missing
    assert capsys.readouterr().err == f"ltrp-timm: {arguments[0]} does not exist.\n"
