"""timm's validate.py, benchmark.py and onnx_export.py: what they call works with our models.

The scripts are in timm's repository, not in its package; each test makes the same calls of the
library in the same order, with the arguments of the lines in the guide.
"""

import argparse
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import apply_test_time_pool
from timm.models import create_model, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, ParseKwargs, accuracy, reparameterize_model
from timm.utils.onnx import onnx_export, onnx_forward
from torch import nn
from train_setup import make_photos

import ltrp_timm
from ltrp_timm.data.keyed import Batch, KeyedImages, held_out_keys, make_loader
from ltrp_timm.data.labels import open_labelled
from ltrp_timm.measure.accuracy import AccuracyCounter, measure_all
from ltrp_timm.runtime.world import World

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "evaluate.md").read_text(encoding="utf-8")
NAME = "ltrp_vit_tiny"
SMALL = {"img_size": 64, "depth": 2, "num_classes": 3}
CPU = torch.device("cpu")


def keywords(line: str) -> dict[str, Any]:
    """What a script makes of its ``--model-kwargs``."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    found: dict[str, Any] = parser.parse_known_args(line.split())[0].model_kwargs
    return found


def line_of(script: str) -> str:
    (line,) = re.findall(rf'^python -c "\$LTRP" {script} .*$', PAGE, re.M)
    return str(line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for name, count in (("cat", 3), ("dog", 4), ("owl", 2)):
        make_photos(folder / "set" / "val" / name, count)
    torch.manual_seed(0)
    model = create_model(NAME, **SMALL)
    nn.init.normal_(model.backbone.head.weight)
    state = {"state_dict": model.state_dict(), "arch": NAME, "epoch": 1}
    torch.save(state, folder / "last.pth.tar")
    return folder


def test_the_line_of_the_guide_runs_a_script_with_our_models(tmp_path: Path) -> None:
    (code,) = re.findall(r"^LTRP='(.*)'$", PAGE, re.M)
    script = tmp_path / "script.py"
    script.write_text(
        "import argparse, timm\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--model')\n"
        "    print(timm.is_model(parser.parse_args().model))\n"
    )
    command = [sys.executable, "-c", code, str(script), "--model", NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("prefetcher", [True, False])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's own reading
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_validate(folder: Path, prefetcher: bool) -> None:
    given = keywords(line_of("validate.py"))
    assert given == {"keep_ratio": 0.5}
    # resolve_model_input_args passes these on as they are
    common = {"num_classes": None, "global_pool": None, "scriptable": False, "in_chans": None}
    sizes = {name: value for name, value in SMALL.items() if name != "num_classes"}
    model = create_model(NAME, pretrained=False, **{**common, **sizes, **given, "num_classes": 3})
    load_checkpoint(model, str(folder / "last.pth.tar"), False)
    model = reparameterize_model(model)
    config = resolve_data_config({"img_size": None}, model=model, use_test_size=True)
    config["input_size"] = (3, 64, 64)
    pooled, test_time_pool = apply_test_time_pool(model, config)
    assert pooled is model
    assert not test_time_pool
    model = model.to(device="cpu", dtype=None).to(memory_format=torch.channels_last)
    dataset = create_dataset(root=str(folder / "set"), name="", split="validation", class_map="")
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=4,
        use_prefetcher=prefetcher,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=CPU,
    )
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        model(torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        for images, target in loader:
            output = model(images.contiguous(memory_format=torch.channels_last))
            losses.update(nn.functional.cross_entropy(output, target).item(), len(output))
            top1.update(accuracy(output, target, topk=(1, 2))[0].item(), len(output))
    assert top1.count == 9
    own = our_accuracy(model, folder, config)
    assert top1.avg == pytest.approx(100 * own)
    assert losses.avg > 0


def our_accuracy(model: Any, folder: Path, config: dict[str, Any]) -> float:
    images = open_labelled(folder / "set", split="validation")
    transform = timm.data.create_transform(**config, is_training=False)
    keyed = KeyedImages(images, range(len(images)), transform, 0, (3, 64, 64))
    sampler = held_out_keys(len(images), World(0, 1, CPU))
    batches = [Batch(s, 0, -1, CPU) for s in make_loader(keyed, sampler, batch_size=4, device=CPU)]
    with torch.inference_mode():
        calls, counters = {1.0: lambda b: model(b.images)}, {1.0: AccuracyCounter()}
        results = measure_all(calls, batches, World(0, 1, CPU), counters)
    return results[1.0].accuracy.means["top1"]


@pytest.mark.parametrize("torchscript", [False, True])
def test_benchmark(torchscript: bool) -> None:
    given = keywords(line_of("benchmark.py"))
    assert given == {"keep_ratio": 0.5}
    model = create_model(
        NAME,
        num_classes=None,
        in_chans=3,
        global_pool=None,
        scriptable=torchscript,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        img_size=64,
        depth=1,
        **given,
    )
    model.to(device="cpu", dtype=torch.float32)
    assert (model.num_classes, sum(p.numel() for p in model.parameters()) > 0) == (1000, True)
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model, use_test_size=True)
    images = torch.randn((2, *config["input_size"]))
    if torchscript:
        model = torch.jit.script(model)
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 1000)
    model.train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nn.functional.cross_entropy(model(images), torch.tensor([1, 2])).backward()
    optimizer.step()
    changed = [
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert "backbone.head.weight" in changed
    assert not any(name.startswith("ranker.") for name in changed)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")  # what the exporters say of themselves
def test_onnx_export(folder: Path, tmp_path: Path, dynamo: bool) -> None:
    assert "onnx_export.py vit.onnx --model" in line_of("onnx_export.py")
    model = create_model(
        NAME,
        in_chans=3,
        pretrained=False,
        checkpoint_path=str(folder / "last.pth.tar"),
        exportable=True,
        **SMALL,
    )
    model = reparameterize_model(model)
    path = str(tmp_path / "vit.onnx")
    known = inspect.signature(onnx_export).parameters
    kwargs = {"use_dynamo": dynamo} if "use_dynamo" in known else {}
    onnx_export(
        model,
        path,
        opset=None,
        dynamic_size=False,
        aten_fallback=False,
        keep_initializers=None,
        check_forward=True,
        training=False,
        verbose=False,
        input_size=(3, 64, 64),
        batch_size=2,
        **kwargs,
    )
    images = torch.randn(2, 3, 64, 64)
    found = onnx_forward(path, images)
    with torch.no_grad():
        assert np.abs(found - model(images).numpy()).max() < 1e-4
        assert np.abs(found - model.backbone(images).numpy()).max() > 1e-2


def test_the_default_keep_ratio_of_a_name_is_said() -> None:
    assert create_model(NAME, depth=1).keep_ratio == 0.5
    assert isinstance(create_model(NAME, depth=1), ltrp_timm.LTRPModel)
