"""Checkpoints of other layouts become folders that load, whole or not at all."""

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import SMALL_MAE, lively, records_arguments, small_teacher
from safetensors.torch import load_file, save_file
from test_parity import SHARED, load
from test_teacher import hf_model, older_names
from torch import Tensor

import ltrp_timm
from ltrp_timm import convert, convert_checkpoint, create_ranker, create_teacher
from ltrp_timm.commands import main
from ltrp_timm.convert.plain_vit import read_sizes, usual_heads
from ltrp_timm.rankers.vit import VitRanker

HEADS = {"teacher_num_heads": SMALL_MAE["num_heads"], "decoder_num_heads": 3}
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


def said(done: convert.Conversion, word: str) -> list[str]:
    return [line for found, line in done.report if found == word]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def test_stage_1_becomes_a_ranker_and_a_teacher(tmp_path: Path) -> None:
    path = stage_1(tmp_path / "ltrp.pth", norm_pix_loss=True)
    out, mae = tmp_path / "new" / "ranker", tmp_path / "mae"
    done = convert_checkpoint(path, out, mae, num_heads=4, **HEADS)
    assert (done.layout, done.folders) == ("LTRP stage 1", (out, mae))
    arrays, weights = load("c_ranker_small")
    ranker = create_ranker("vit_small", pretrained=out).eval()
    assert same(ranker.state_dict(), weights)
    assert (ranker(arrays["images"]).flatten(1) - arrays["scores_full"]).abs().max() <= 1e-5
    stored = torch.load(path, weights_only=False)["model"]
    teacher = create_teacher(mae)
    assert same(
        prefixed("mim.", teacher.state_dict()), {n: stored[n] for n in stored if "mim" in n}
    )
    assert teacher.norm_pix_loss  # as the arguments in the file say
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (out / "README.md").read_text()
    assert "Converted from ltrp.pth (LTRP stage 1)." in card
    assert str(tmp_path) not in card
    assert said(done, "found")[0].endswith("beside them args, epoch, optimizer, scaler")
    assert [line.split(" to a ")[0] for line in said(done, "mapped")] == [
        *(f"score_net.* ({len(weights)} tensors)", f"mim.* ({len(teacher.state_dict())} tensors)")
    ]
    assert said(done, "ignored") == ["epoch, optimizer, scaler: no weights"]
    assert said(done, "missing") == ["nothing"]


def test_what_is_not_asked_for_is_said(tmp_path: Path) -> None:
    lpips = {"lpips.lin0.weight": torch.zeros(1)}
    path = stage_1(tmp_path / "ltrp.pth", more=lpips)
    done = convert_checkpoint(path, tmp_path / "ranker", num_heads=4)
    count = len(small_teacher().state_dict())
    assert said(done, "ignored")[0] == (
        f"mim.* ({count}), lpips.* (1); --teacher DIR (teacher=) writes mim.*"
    )
    done = convert_checkpoint(
        path, tmp_path / "mae", kind="teacher", num_heads=4, decoder_num_heads=3
    )
    assert said(done, "ignored")[0] == "score_net.* (44), lpips.* (1)"
    assert create_teacher(tmp_path / "mae").config()["depth"] == SMALL_MAE["depth"]


@torch.no_grad()
@records_arguments
@pytest.mark.parametrize(
    ("args", "changes"),
    [
        ({}, {}),
        ({}, {"num_classes": 100, "img_size": 96, "global_pool": "avg"}),
        ({"num_heads": 4}, {"embed_dim": 48, "num_heads": 4, "mlp_ratio": 2.0, "in_chans": 1}),
        ({}, {"name": "vit_small_patch32_224", "img_size": (64, 96), "qkv_bias": False}),
    ],
)
def test_stage_2_becomes_a_pruned_model(
    tmp_path: Path, args: dict[str, Any], changes: dict[str, Any]
) -> None:
    vit = fine_tuned(**changes)
    path = stage_2(tmp_path / "tuned.pth", vit, **args)
    size = changes.get("img_size")
    convert_checkpoint(
        path,
        tmp_path / "model",
        ranker="contrast",
        keep_ratio=0.3,
        img_size=size if isinstance(size, tuple) else None,
    )
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
    """Beside it, by its folder; or within the same file."""
    convert_checkpoint(stage_1(tmp_path / "a.pth"), tmp_path / "ranker", num_heads=4)
    vit = fine_tuned()
    path = stage_2(tmp_path / "b.pth", vit)
    convert_checkpoint(path, tmp_path / "apart", ranker=tmp_path / "ranker", selection="top")
    both = vit.state_dict() | prefixed("score_net.", load("c_ranker_small")[1])
    torch.save(training(both, score_net_num_heads=4), tmp_path / "c.pth")
    convert_checkpoint(tmp_path / "c.pth", tmp_path / "one", selection="top")
    images = torch.randn(2, 3, 64, 64)
    ranker = create_ranker("vit_small", pretrained=tmp_path / "ranker").eval()
    logits = []
    for name in ("apart", "one"):
        model = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert torch.equal(model.patch_scores(images), ranker(images).flatten(1))
        logits.append(model(images))
    assert torch.equal(*logits)
    assert (logits[0] - vit(images)).abs().max() > 1e-2
    assert "those of ranker" in (tmp_path / "apart" / "README.md").read_text()


@records_arguments
@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger reference vectors are not here")
@torch.no_grad()
def test_reference_vectors_of_both_stages(tmp_path: Path) -> None:
    arrays, weights = load("e_vit_small", SHARED)
    torch.save(training(weights), tmp_path / "b.pth")
    convert_checkpoint(tmp_path / "b.pth", tmp_path / "model", ranker="contrast", num_heads=4)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    for k in (4, 8, 12):
        logits = model(arrays["images"], keep_indices=arrays[f"k{k}_ids"].long())
        assert (logits - arrays[f"k{k}_logits"]).abs().max() <= 1e-5
    arrays, weights = load("a_small_p16", SHARED)
    torch.save(training(prefixed("mim.", weights), norm_pix_loss=True), tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "mae", num_heads=4, decoder_num_heads=4)
    painted, _ = create_teacher(tmp_path / "mae")(arrays["images"], arrays["visible_ids"])
    assert (painted - arrays["anchor"]).abs().max() <= 1e-5


@torch.no_grad()
def test_maes_of_every_layout_become_the_same_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file(older_names(load_file(file)), tmp_path / "older.safetensors")
    save_file(dict(model.state_dict()), tmp_path / "memory.safetensors")
    plain = create_teacher(tmp_path / "hf").state_dict()
    torch.save(training(plain), tmp_path / "mae_visualize.pth")
    torch.save(training(prefixed("module.", plain)), tmp_path / "parallel.pth")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "pickled")
    torch.save(dict(model.state_dict()), tmp_path / "pickled" / "pytorch_model.bin")
    hub = tmp_path / "cache" / "models--me--mae"
    shutil.copytree(tmp_path / "hf", hub / "snapshots" / ("01" * 20))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("01" * 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    images, visible = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 9, 15], [1, 2, 3, 4]])
    told = {"hf", "pickled", "me/mae"}  # a configuration lies beside the weights
    names = ["older.safetensors", "memory.safetensors", "mae_visualize.pth", "parallel.pth"]
    for number, name in enumerate((*told, *names)):
        folder = tmp_path / f"out{number}"
        heads = {} if name in told else {"num_heads": 4, "decoder_num_heads": 3}
        source = name if "/" in name else tmp_path / name
        done = convert_checkpoint(source, folder, cache_dir=tmp_path / "cache", **heads)
        hugging = name in told or name in names[:2]
        assert done.layout == ("Hugging Face ViTMAE" if hugging else "MAE"), name
        assert ("query, key and value as one" in said(done, "mapped")[0]) == hugging
        assert same(create_teacher(folder).state_dict(), plain), name
        expected, _ = create_teacher(tmp_path / "hf", norm_eps=1e-12 if name in told else 1e-6)(
            images, visible
        )
        assert torch.equal(create_teacher(folder)(images, visible)[0], expected), name


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (48, None)]
)
def test_sizes_of_every_vit(width: int, heads: int | None) -> None:
    patch, side = (14, 16) if width == 1280 else (16, 14)
    shapes = {"patch_embed.proj.weight": (width, 3, patch, patch), "head.weight": (5, width)}
    shapes |= {"pos_embed": (1, side * side + 1, width), "blocks.11.norm1.bias": (width,)}
    shapes |= {f"blocks.{number}.norm1.bias": (width,) for number in range(11)}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    sizes = read_sizes(weights, "x")
    assert sizes["img_size"] == (224, 224)
    assert (sizes["embed_dim"], sizes["depth"], sizes["patch_size"]) == (width, 12, (patch, patch))
    assert usual_heads(width) == heads


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base"])
def test_rankers_of_the_published_sizes_need_no_options(tmp_path: Path, name: str) -> None:
    ranker = create_ranker(name, img_size=(32, 32), depth=1)
    model = prefixed("score_net.", ranker.state_dict())
    torch.save(training(model), tmp_path / "a.pth")
    done = convert_checkpoint(tmp_path / "a.pth", tmp_path / "out")
    assert "usual at this width" in said(done, "mapped")[0]
    loaded = create_ranker(name, pretrained=tmp_path / "out")
    assert loaded.config() == {**ranker.config(), "mean": loaded.mean, "std": loaded.std}
    assert same(loaded.state_dict(), ranker.state_dict())


def test_a_ranker_saved_alone(tmp_path: Path) -> None:
    """Its head could be that of a classifier: asked for, it is a ranker; else it is said."""
    save_file(load("c_ranker_small")[1], tmp_path / "a.safetensors")
    done = convert_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "r", kind="ranker", num_heads=4
    )
    assert done.layout == "fine-tuned ViT"
    assert isinstance(create_ranker("vit_small", pretrained=tmp_path / "r"), VitRanker)
    done = convert_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "m", ranker="contrast", num_heads=4
    )
    assert "if it is a ranker, ask for that" in said(done, "mapped")[0]


def refused(error: type[Exception], message: str, path: Path, **options: Any) -> None:
    """Refused with that message, and nothing new lies there."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(error, match=message):
        convert_checkpoint(path, path.parent / "out", **options)
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("without", "teacher", "message"),
    [
        ("score_net.head.weight", False, r"(?s)score_net\.\* in .*missing     head\.weight$"),
        ("score_net.pos_embed", False, r"(?s)does not fit the model.*missing     pos_embed$"),
        ("score_net.patch_embed.proj.weight", False, r"missing     patch_embed\.proj\.weight$"),
        ("score_net.blocks.1.norm1.bias", False, r"missing     blocks\.1\.norm1\.bias$"),
        ("score_net.norm.weight", True, r"missing     norm\.weight$"),
        ("mim.blocks.0.mlp.fc1.bias", True, r"(?s)mim\.\* in .*missing     blocks\.0\.mlp\.fc1"),
        ("mim.decoder_blocks.1.norm2.bias", True, r"missing     decoder_blocks\.1\.norm2\.bias"),
        ("mim.mask_token", True, r"mim\.\* in .* is no whole MAE: it lacks mask_token\."),
    ],
)
def test_anything_missing_is_refused(
    tmp_path: Path, without: str, teacher: bool, message: str
) -> None:
    path = stage_1(tmp_path / "ltrp.pth", without)
    more = {"teacher": tmp_path / "mae", **HEADS} if teacher else {}
    kind = ValueError if "whole MAE" in message else RuntimeError
    refused(kind, message, path, num_heads=4, **more)
    if without.startswith("mim."):  # the ranker alone is whole
        convert_checkpoint(path, tmp_path / "out", num_heads=4)


def test_what_is_too_much_or_of_another_shape(tmp_path: Path) -> None:
    more = {"score_net.extra": torch.zeros(1), "score_net.head.bias": torch.zeros(9)}
    path = stage_1(tmp_path / "ltrp.pth", more=more)
    message = r"(?s)unexpected  extra\n  mismatched  head\.bias: \[9\], the model has \[16\]$"
    refused(RuntimeError, message, path, num_heads=4)
    vit = fine_tuned().state_dict()
    decoder = {"head.weight": "head.decoder.query_embed.weight"}
    for name, changes, message in (
        ("gamma", {**vit, "blocks.0.ls1.gamma": torch.ones(192)}, r"unexpected  blocks\.0\.ls1"),
        ("decoder", {decoder.get(n, n): t for n, t in vit.items()}, r"missing     head\.weight"),
        ("flat", {**vit, "pos_embed": torch.zeros(17, 192)}, "its embeddings have shapes of some"),
        ("long", {**vit, "pos_embed": torch.zeros(1, 19, 192)}, "has 18 positions, no square grid"),
        ("far", {**vit, "blocks.99999999.norm1.bias": torch.ones(1)}, r"names blocks\.99999999, b"),
        ("bare", {n: t for n, t in vit.items() if "blocks" not in n}, "holds no blocks"),
    ):
        torch.save(changes, tmp_path / f"{name}.pth")
        kind = RuntimeError if name in ("gamma", "decoder") else ValueError
        refused(kind, message, tmp_path / f"{name}.pth", ranker="contrast")
    torch.save(vit, tmp_path / "vit.pth")
    message = "has 16 positions; images of 96x96 in patches of 16x16 need 36"
    refused(ValueError, message, tmp_path / "vit.pth", ranker="contrast", img_size=96)


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    path = stage_1(tmp_path / "ltrp.pth")
    tuned = stage_2(tmp_path / "tuned.pth", fine_tuned())
    told = "does not tell the number of attention heads at a width of 48"
    refused(ValueError, told, path)
    refused(ValueError, r"5 heads \(as told\) do not divide a width of 48", path, num_heads=5)
    refused(ValueError, "does not tell num_heads and decoder_num", path, kind="teacher")
    refused(ValueError, "can become a ranker or a teacher, not 'model'", path, kind="model")
    refused(ValueError, "without its ranker: pass ranker", tuned)
    refused(ValueError, "the vit_small ranker must be trained", tuned, ranker="vit_small")
    refused(FileNotFoundError, "no is no folder or file of a ranker", tuned, ranker="no")
    refused(ValueError, r"keep_ratio must be in \(0, 1\]", tuned, ranker="contrast", keep_ratio=2)
    refused(ValueError, "a teacher beside the model comes out of", tuned, teacher=tmp_path / "t")
    refused(ValueError, "model_card knows license", path, model_card={"author": "me"})
    vit = fine_tuned().state_dict()
    ranker = prefixed("score_net.", load("c_ranker_small")[1])
    inner = prefixed("backbone.", vit) | prefixed("ranker.", load("c_ranker_small")[1])
    for name, model, message in (
        ("encoder", {n: t for n, t in vit.items() if "head" not in n}, "is an encoder only: with"),
        ("other", {"conv1.weight": torch.zeros(1)}, "none of the known layouts; it begins with c"),
        ("ours", inner, "is a pruned model of this library already"),
        ("alone", ranker, r"holds no MAE \(mim\.\*\): it gives no teacher"),
    ):
        torch.save(model, tmp_path / f"{name}.pth")
        more = {"teacher": tmp_path / "t"} if name == "alone" else {}
        refused(ValueError, message, tmp_path / f"{name}.pth", num_heads=4, **more)
    torch.save(vit | ranker, tmp_path / "both.pth")
    refused(ValueError, "brings a ranker of its own", tmp_path / "both.pth", ranker="contrast")
    small_teacher().save(tmp_path / "mae")
    refused(ValueError, "is in a layout of this library or of timm already", tmp_path / "mae")
    refused(FileNotFoundError, "no.pth does not exist", tmp_path / "no.pth")


def test_nothing_is_overwritten_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stage_1(tmp_path / "ltrp.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    options: dict[str, Any] = {"num_heads": 4, **HEADS}
    before = sorted(tmp_path.rglob("*"))
    for output, teacher in (("full", "t"), ("r", "full"), ("ltrp.pth", "t")):
        with pytest.raises(FileExistsError, match="exists already: choose a new folder"):
            convert_checkpoint(path, tmp_path / output, tmp_path / teacher, **options)
    for output, teacher in (("r", "r"), ("r", "r/t"), ("t/r", "t")):
        with pytest.raises(ValueError, match="output and teacher must be folders apart"):
            convert_checkpoint(path, tmp_path / output, tmp_path / teacher, **options)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ltrp_timm.MAETeacher, "save", full_disk)  # the second of two
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(path, tmp_path / "r", tmp_path / "t", **options)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    convert_checkpoint(path, tmp_path / "empty", tmp_path / "t", **options)
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "full").stat().st_mode


@records_arguments
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(stage_1(tmp_path / "ltrp.pth"))
    out, mae, model = (str(tmp_path / name) for name in ("r", "t", "m"))
    heads = ["--num-heads", "4", "--teacher-num-heads", "4", "--decoder-num-heads", "3"]
    card = ["--license", "mit", "--training-data", "photos"]
    assert main(["convert", path, "-o", out, "--teacher", mae, *heads, *card]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = ["found", "mapped", "mapped", "ignored", "missing", "written", "written"]
    assert [line.split()[0] for line in lines] == words
    assert lines[-2] == f"written  {out}: README.md, config.json, model.safetensors"
    assert 'license: "mit"' in (tmp_path / "r" / "README.md").read_text()
    tuned = str(stage_2(tmp_path / "tuned.pth", fine_tuned()))
    assert main(["convert", tuned, "-o", model, "--ranker", out, "--selection", "top"]) == 0
    assert timm.create_model(f"local-dir:{model}", pretrained=True).selection == "top"
    capsys.readouterr()
    for arguments, message in (
        ([path, "-o", out, *heads], r"r exists already: choose a new folder\."),
        ([path, "-o", f"{out}2"], r"pass num_heads \(--num-heads\)\."),
        ([tuned, "-o", f"{out}2"], "without its ranker"),
        ([tuned, "-o", f"{out}2", "--to", "teacher"], "can become a model or a ranker, not 'tea"),
        ([tuned, "-o", f"{out}2", "--num-heads", "0"], "must be a whole number from 1, got 0"),
        (["no.pth", "-o", f"{out}2"], r"no\.pth does not exist\."),
        ([path], "the following arguments are required: -o/--output"),
    ):
        assert main(["convert", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "r2").exists()
    assert main(["convert", "--help"]) == 0
    assert "--decoder-num-heads" in capsys.readouterr().out


def test_the_lines_of_the_readme_are_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ltrp-timm (convert .+)$", readme, re.M)
    assert len(lines) == 3
    for line in lines:
        arguments = shlex.split(line, comments=True)
        assert main(arguments) == 2  # only the file is missing
        assert capsys.readouterr().err == f"ltrp-timm: {arguments[1]} does not exist.\n"
