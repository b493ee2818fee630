"""timm's own train.py on our models: the parts of the library that it calls, in its order.

The script is no part of timm's package; the line for it in the guide imports us by
``--device-modules ltrp_timm``, which timm hands to ``importlib.import_module``.
"""

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from finetune_setup import make_classes
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, ParseKwargs, update_summary

from ltrp_timm import LTRPModel

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "fine-tune.md").read_text(encoding="utf-8")
SMALL = ["img_size=32", "patch_size=8", "depth=2", "embed_dim=32", "num_heads=2"]


def parse(words: list[str]) -> Any:
    """The flags of the guide's line, as timm's script declares them."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    for name in ("data_dir", "model", "opt", "aa", "lr_base_scale"):
        add(f"--{name.replace('_', '-')}", dest=name)
    for name in ("epochs", "warmup_epochs", "num_classes"):
        add(f"--{name.replace('_', '-')}", dest=name, type=int)
    reals = ("lr_base", "weight_decay", "layer_decay", "min_lr", "drop_path", "smoothing", "reprob")
    for name in reals:
        add(f"--{name.replace('_', '-')}", dest=name, type=float)
    add("--device-modules", nargs="+")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    add("--pretrained", action="store_true")
    add("--warmup-prefix", action="store_true")
    parser.set_defaults(momentum=0.9, sched="cosine", sched_on_updates=False, opt_args={})
    return parser.parse_args(words)


def guide_line() -> list[str]:
    found = re.search(r"^python train\.py ((?:.*\\\n)*.*)$", PAGE, re.M)
    assert found is not None
    return found.group(1).replace("\\\n", " ").split()


def make_model(args: Any) -> Any:
    for module in args.device_modules:
        importlib.import_module(module)
    model = timm.create_model(
        args.model,
        pretrained=False,
        in_chans=3,
        num_classes=3,
        drop_rate=0.0,
        drop_path_rate=args.drop_path,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path="",
        cache_dir=None,
        **args.model_kwargs,
    )
    torch.nn.init.normal_(model.get_classifier().weight, std=0.1)
    return model


# timm's reader leaves the files of a folder to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_script_s_parts_take_our_models(tmp_path: Path) -> None:
    args = parse(guide_line())
    assert args.device_modules == ["ltrp_timm"]
    args.model_kwargs |= parse(["--model-kwargs", *SMALL]).model_kwargs
    model = make_model(args)
    assert isinstance(model, LTRPModel)
    assert model.keep_ratio == 0.5
    args.lr = 1e-3
    config = resolve_data_config({"img_size": 32}, model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) == 4  # embedding, two blocks, head
    assert max(scales) == 1.0
    assert min(scales) == pytest.approx(args.layer_decay**3)
    ema = ModelEmaV3(model, decay=0.5)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=3
    )
    assert epochs == args.epochs + args.warmup_epochs == 50  # the cosine follows the warm-up
    folder = make_classes(tmp_path / "data" / "train", 4).parent
    loader = create_loader(
        create_dataset("", root=str(folder), split="train", is_training=True),
        input_size=config["input_size"],
        batch_size=4,
        is_training=True,
        use_prefetcher=False,
        re_prob=args.reprob,
        num_workers=0,
        mean=config["mean"],
        std=config["std"],
        device=torch.device("cpu"),
    )
    scaler, loss_of = NativeScaler(device="cpu"), LabelSmoothingCrossEntropy(args.smoothing)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    scheduler.step(args.warmup_epochs)
    for step, (images, target) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = loss_of(model(images), target)
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        ema.update(model, step=step)
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert moved
    saver = CheckpointSaver(
        model=model,
        optimizer=optimizer,
        args=args,
        model_ema=ema,
        amp_scaler=scaler,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    final = float(loss.detach())
    saver.save_checkpoint(0, metric=final)
    update_summary(0, {"loss": final}, {"top1": 1.0}, str(tmp_path / "s.csv"), True)
    check_resumed(args, tmp_path / "last.pth.tar", model, optimizer, ema)


def check_resumed(args: Any, path: Path, model: Any, optimizer: Any, ema: Any) -> None:
    """Another model goes on from there; evaluation takes either weights."""
    images = torch.randn(2, 3, 32, 32)
    twin = make_model(args)
    again = create_optimizer_v2(twin, **optimizer_kwargs(cfg=args))
    assert resume_checkpoint(twin, str(path), optimizer=again) == 1
    saved = again.state_dict()["state"]
    assert all(
        torch.equal(saved[key]["exp_avg"], value["exp_avg"])
        for key, value in optimizer.state_dict()["state"].items()
    )
    with torch.no_grad():
        assert torch.equal(twin.eval()(images), model.eval()(images))
        load_checkpoint(twin, str(path), use_ema=True)
        assert torch.equal(twin(images), ema.module(images))
        assert not torch.equal(twin(images), model(images))


def test_ours_goes_on_from_what_the_script_saved(tmp_path: Path) -> None:
    args = parse(guide_line())
    args.model_kwargs |= parse(["--model-kwargs", *SMALL]).model_kwargs
    model = make_model(args)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0, 1.0)
    from ltrp_timm.weights.files import read_weights

    weights = read_weights(tmp_path / "last.pth.tar").tensors
    assert weights.keys() == model.state_dict().keys()
