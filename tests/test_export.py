"""An exported file ranks and drops as the model does, or it is not written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import aoti_is_slow, every_format
from torch import Tensor, nn

import ltrp_timm
from ltrp_timm import LTRPModel, create_ranker, drop_patches, export_model
from ltrp_timm.deploy import export as export_module
from ltrp_timm.deploy.export import check_parity, describe
from ltrp_timm.deploy.formats import FORMATS, load_exported, write_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = (3, 96, 96)
BackboneOf = Callable[..., tuple[Any, Tensor]]


@pytest.fixture
def pruned_of(backbone_of: BackboneOf) -> Callable[..., tuple[LTRPModel, Tensor]]:
    def make(
        family: str = "vit", ranker: str = "contrast", keep_ratio: float = 0.4
    ) -> tuple[LTRPModel, Tensor]:
        backbone, images = backbone_of(family, **({"depth": 1} if family == "vit" else {}))
        net = create_ranker(ranker, patch_size=backbone.patch_embed.feat_ratio(as_scalar=False))
        net.trained = True
        return drop_patches(backbone, ranker=net, keep_ratio=keep_ratio).eval(), images

    return make


def run_alone(path: Path, format: str, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Outputs and metadata of a file, by the means of its runtime alone."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (out,) = session.run(["logits"], {"images": images.numpy()})
        text = session.get_modelmeta().custom_metadata_map["ltrp_timm"]
        return torch.from_numpy(out), json.loads(text)
    if format == "aoti":
        package = torch._inductor.aoti_load_package(str(path))
        return package(images), json.loads(package.loader.get_metadata()["ltrp_timm"])
    extra: dict[str, Any] = {"ltrp_timm.json": ""}
    if format == "pt2":
        return torch.export.load(path, extra_files=extra).module()(images), json.loads(
            extra["ltrp_timm.json"]
        )
    out = torch.jit.load(path, _extra_files=extra)(images)
    return out, json.loads(extra["ltrp_timm.json"])


@every_format
@torch.no_grad()
def test_a_file_gives_the_pruned_outputs_and_says_what_it_is(
    pruned_of: Callable[..., Any], tmp_path: Path, format: str
) -> None:
    model, images = pruned_of()
    path = tmp_path / f"vit{FORMATS[format][0]}"
    exported = export_model(model, path, format, batch_size=3)
    out, metadata = run_alone(path, format, images)
    assert (out - model(images)).abs().max() <= 1e-4
    assert (out - model.backbone(images)).abs().max() > 1e-2
    assert exported.parity is not None
    assert exported.parity.error <= 1e-4
    assert exported.parity.from_full is not None
    assert exported.parity.from_full > 1e-2
    assert metadata == exported.metadata
    cfg = model.backbone.pretrained_cfg
    expected = {
        "ltrp_timm": ltrp_timm.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "format": format,
        "architecture": "vit_tiny_patch16_224",
        "input_size": [3, 96, 96],
        "batch_size": None if format == "torchscript" else 3,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "crop_pct": cfg["crop_pct"],
        "num_classes": 7,
        "keep_ratio": 0.4,
        "num_keep": 14,
        "num_patches": 36,
        "ranker": "contrast",
        "selection": "top",
    }
    assert metadata == expected
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # one file, nothing beside it
    if format == "aoti":
        check_images_as_services_have_them(model, path, images)


def check_images_as_services_have_them(model: LTRPModel, path: Path, images: Tensor) -> None:
    run, _ = load_exported(path, "aoti")
    wide = torch.randn(3, 3, 96, 200)
    for given in (
        images.contiguous(memory_format=torch.channels_last),
        wide[..., 50:146],
        torch.randn(3, 96, 96, 3).permute(0, 3, 1, 2),
    ):
        assert (run(given) - model(given)).abs().max() <= 1e-4
    for wrong in (images.double(), images.half(), images[:2], images[..., :80]):
        with pytest.raises(ValueError, match=r"takes torch.float32 of shape \[3, 3, 96, 96\], got"):
            run(wrong)
    with pytest.raises(ValueError, match="runs on cpu, got images on meta"):
        run(images.to("meta"))


@aoti_is_slow
@torch.no_grad()
def test_a_dynamic_batch_is_any_and_a_fixed_one_is_that(
    pruned_of: Callable[..., Any], tmp_path: Path, format: str
) -> None:
    model, images = pruned_of()
    path = tmp_path / f"vit{FORMATS[format][0]}"
    exported = export_model(model, path, format, dynamic_batch=True)
    assert exported.metadata["batch_size"] is None
    for size in (1, 2, 7):
        batch = torch.randn(size, *SIZE)
        out, _ = run_alone(path, format, batch)
        assert (out - model(batch)).abs().max() <= 1e-4
    if format != "torchscript":
        export_model(model, path, format, batch_size=2, overwrite=True)
        run, _ = load_exported(path, format)
        with pytest.raises(Exception, match=r"(?i)got invalid dimensions|shape.*2|guard"):
            run(images)


@pytest.mark.slow
@every_format
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("ranker", ["border", "contrast", "conv"])
@pytest.mark.parametrize("family", ["vit", "registers", "eva02", "dinov3", "beit", "cait"])
def test_every_kind_of_backbone(
    pruned_of: Callable[..., Any],
    tmp_path: Path,
    family: str,
    ranker: str,
    dynamic: bool,
    format: str,
) -> None:
    model, images = pruned_of(family, ranker)
    path = tmp_path / f"a{FORMATS[format][0]}"
    exported = export_model(model, path, format, batch_size=3, dynamic_batch=dynamic)
    assert exported.parity is not None
    assert exported.parity.error <= 1e-5
    with torch.no_grad():
        out, _ = run_alone(path, format, images)
        assert (out - model(images)).abs().max() <= 1e-4
        assert (out - model.backbone(images)).abs().max() > 1e-2


def test_onnx_names_and_opset(pruned_of: Callable[..., Any], tmp_path: Path) -> None:
    model, _ = pruned_of()
    export_model(model, tmp_path / "a.onnx", opset=18, dynamic_batch=True)
    proto = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(proto)
    assert [(o.domain, o.version) for o in proto.opset_import if o.domain == ""] == [("", 18)]
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    with pytest.raises(ValueError, match="cannot be written for ONNX opset 99: try 18"):
        export_model(model, tmp_path / "b.onnx", opset=99)
    assert not (tmp_path / "b.onnx").exists()


def test_all_patches_kept_is_the_full_model(pruned_of: Callable[..., Any], tmp_path: Path) -> None:
    model, _ = pruned_of(keep_ratio=1.0)
    parity = export_model(model, tmp_path / "a.pt2", "pt2").parity
    assert parity is not None
    assert parity.from_full is None
    assert parity.error <= 1e-5


@pytest.mark.parametrize(
    ("format", "fault"),
    [
        *(("onnx", "full"), ("pt2", "other"), ("torchscript", "full")),
        *(pytest.param("aoti", fault, marks=pytest.mark.slow) for fault in ("full", "other")),
    ],
)
def test_a_wrong_file_is_not_left_behind(
    pruned_of: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    fault: str,
) -> None:
    def wrong(model: LTRPModel, *args: Any) -> None:
        before = model.keep_ratio
        model.keep_ratio = 1.0 if fault == "full" else 0.3
        write_file(model, *args)
        model.keep_ratio = before

    monkeypatch.setattr(export_module, "write_file", wrong)
    model, _ = pruned_of()
    path = tmp_path / f"a{FORMATS[format][0]}"
    text = r"does not give the model's outputs: .*outputs \d\.\de[-+]\d+, allowed 1\.0e-04"
    with pytest.raises(RuntimeError, match=text):
        export_model(model, path, format)
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    with pytest.raises(RuntimeError, match=text):
        export_model(model, path, format, overwrite=True)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    export_model(model, path, format, overwrite=True, check=False)  # as was asked for
    assert path.stat().st_size > 1000


def test_parity_sees_a_full_model_a_nan_and_another_shape(pruned_of: Callable[..., Any]) -> None:
    model, _ = pruned_of()
    good = check_parity(model, model, SIZE, 1, dynamic=True)
    good.raise_if_wrong(1e-4)
    assert good.error == 0.0
    assert good.batch_sizes == (1, 2, 3)
    with torch.no_grad():
        full = check_parity(model, model.backbone, SIZE, 1, dynamic=False)
    with pytest.raises(RuntimeError, match=r"does not give the model's outputs"):
        full.raise_if_wrong(1e-4)
    with pytest.raises(RuntimeError, match="cannot be distinguished from the full model"):
        full.raise_if_wrong(1e3)  # logits may be small: it is the distances that count
    lost = check_parity(model, lambda x: torch.full_like(model(x), torch.nan), SIZE, 1, False)
    with pytest.raises(RuntimeError, match=r"does not give .* pruned outputs nan"):
        lost.raise_if_wrong(1e-4)
    with pytest.raises(RuntimeError, match=r"gives outputs \[1, 6\], the model \[1, 7\]"):
        check_parity(model, lambda x: model(x)[:, :6], SIZE, 1, False)


def test_hidden_patches_are_no_proof(backbone_of: BackboneOf) -> None:
    backbone, _ = backbone_of("dinov2")
    for name, parameter in backbone.named_parameters():
        if "gamma" in name:
            nn.init.zeros_(parameter)
    model = drop_patches(backbone, keep_ratio=0.4).eval()
    with pytest.raises(RuntimeError, match="LayerScale near 0 hides patches"):
        check_parity(model, model, (3, 84, 84), 1, False).raise_if_wrong(1e-4)


class Nervous(nn.Module):
    """Scores that rounding changes, for some of the images or for all."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def forward(self, images: Tensor) -> Tensor:
        pixels = images[:, 0, ::16, ::16]
        score = (pixels * 1e7).remainder(1.0)
        return score if self.always else torch.where(images[:, :1, 0, 0, None] > 0, score, pixels)


def test_near_ties_are_left_out_and_counted(backbone_of: BackboneOf) -> None:
    backbone, _ = backbone_of("vit", depth=1)
    model = drop_patches(backbone, ranker=Nervous(always=False)).eval()
    parity = check_parity(model, model, SIZE, 1, False)
    assert sum(parity.batch_sizes) == 4
    assert 0 < parity.left_out < 32
    model = drop_patches(model.restore(), ranker=Nervous(always=True)).eval()
    with pytest.raises(RuntimeError, match="only 0 of 32 images have a clear order"):
        check_parity(model, model, SIZE, 1, False)


def test_what_keeps_aotinductor_from_compiling_is_said(
    pruned_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fail(program: Any, *, inductor_configs: dict[str, Any], **others: Any) -> None:
        asked.update(inductor_configs)
        raise RuntimeError("No working C++ compiler\n  here")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    text = r"^AOTInductor cannot take VisionTransformer with .*: No working C\+\+ compiler here$"
    with pytest.raises(ValueError, match=text):
        export_model(pruned_of()[0], tmp_path / "a.pt2", "aoti")
    assert not list(tmp_path.iterdir())
    assert asked["freezing"] is asked["cpp.dynamic_threads"] is True  # what makes it fast, anywhere


def test_what_torchscript_cannot_hold_is_said(
    pruned_of: Callable[..., Any], tmp_path: Path
) -> None:
    model, _ = pruned_of("beit_shared")
    text = r"^torch.jit.script cannot take Beit with .*: .* \(use format='onnx' or 'pt2'\)$"
    with pytest.raises(ValueError, match=text):
        export_model(model, tmp_path / "a.pt", "torchscript")
    assert not list(tmp_path.iterdir())


class LooksAtValues(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        scores = images[:, 0, ::16, ::16]
        return scores if bool(scores.sum() > 0) else -scores


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_what_cannot_be_exported_is_one_line(
    backbone_of: BackboneOf, tmp_path: Path, format: str
) -> None:
    backbone, _ = backbone_of("vit", depth=1)
    model = drop_patches(backbone, ranker=LooksAtValues()).eval()
    with pytest.raises(ValueError, match=r"^torch\.(onnx\.)?export cannot take .*") as caught:
        export_model(model, tmp_path / f"a.{format}", format)
    assert "VisionTransformer with LooksAtValues: Could not guard on data" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 450
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"format": "tflite"}, ValueError, "format must be one of onnx, pt2, aoti, torchscript"),
        ({"format": "aoti"}, ValueError, r"a aoti file must end in \.pt2, got .*a\.onnx"),
        ({"format": "pt2"}, ValueError, r"a pt2 file must end in \.pt2, got .*a\.onnx"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number from 1, got 0"),
        ({"batch_size": -2}, ValueError, "got -2"),
        ({"batch_size": True}, ValueError, "got True"),
        ({"batch_size": 1.5}, ValueError, "got 1.5"),
        ({"opset": 12}, ValueError, "opset must be 18 or later, got 12"),
        ({"path": "a.pt", "format": "torchscript", "opset": 18}, ValueError, "requires format="),
        ({"path": "there.onnx"}, FileExistsError, r"there\.onnx exists already"),
        ({"path": "no/a.onnx"}, FileNotFoundError, "the folder .*no does not exist"),
        ({"path": "folder.onnx", "overwrite": True}, IsADirectoryError, "is a folder"),
        ({"path": "there.onnx/a.onnx"}, FileNotFoundError, "does not exist"),
    ],
)
def test_wrong_arguments(
    pruned_of: Callable[..., Any],
    tmp_path: Path,
    arguments: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    model, _ = pruned_of()
    (tmp_path / "there.onnx").write_text("old")
    (tmp_path / "folder.onnx").mkdir()
    arguments = {**arguments, "path": tmp_path / arguments.get("path", "a.onnx")}
    with pytest.raises(error, match=text):
        export_model(model, **arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.onnx", "there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "old"


def test_wrong_models(
    pruned_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pruned_of()
    path = tmp_path / "a.onnx"
    with pytest.raises(
        TypeError, match=r"takes an LTRPModel, got VisionTransformer: use drop_patches"
    ):
        export_model(model.backbone, path)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        export_model(model.train(), path)
    with pytest.raises(ValueError, match=r"takes a float32 model, got torch\.bfloat16"):
        export_model(model.eval().bfloat16(), path)
    monkeypatch.setattr(export_module, "ONNX_LIMIT", 1000)
    with pytest.raises(
        ValueError, match=r"smaller than 2 GiB, the weights have 0\.0 GiB: use format"
    ):
        export_model(model.float(), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_one_line(
    pruned_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    model, _ = pruned_of()
    with pytest.raises(ImportError, match=rf"need {name}: pip install 'ltrp-timm\[export\]'"):
        export_model(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(pruned_of: Callable[..., Any], tmp_path: Path) -> None:
    model, _ = pruned_of()
    (tmp_path / "real.bin").write_text("old")
    link = tmp_path / "a.pt2"
    link.symlink_to("real.bin")
    with pytest.raises(FileExistsError, match="exists already"):
        export_model(model, link, "pt2")
    export_model(model, link, "pt2", overwrite=True)
    assert link.is_symlink()
    run, metadata = load_exported(tmp_path / "real.bin", "pt2")
    assert metadata == describe(model, "pt2", 1)
    images = torch.randn(1, *SIZE)
    with torch.no_grad():
        np.testing.assert_allclose(run(images), model(images), atol=1e-5)
