"""What is trained, stage by stage; a stage that lies in the folder of the run is not repeated."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import add_ranker_options, base_parser
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

import ltrp_timm
from ltrp_timm.commands._flags import positive, whole_from
from ltrp_timm.train import train_ranker, train_teacher
from ltrp_timm.weights.files import write_atomically, write_text
from studies.fairness.networks import fit, make_cnn, make_judge, make_vit, masked
from studies.fairness.scenes import CLASSES, PATCH, SIDE, Scenes

HALVES = {"0-4": list(range(5)), "5-9": list(range(5, CLASSES))}  # the digits with labels
LTRP = ("full mean", "full max", "decoder mean", "decoder max")
TEACHER = {"patch_size": PATCH, "embed_dim": 128, "depth": 3, "num_heads": 4}
TEACHER |= {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4}
NO_BORDER = {"border_distances": 0}


class Trained(NamedTuple):
    """All that a seed trained.

    Attributes:
        teacher: the MAE.
        rankers: LTRP's, by removal and aggregate.
        cnns: by the half of the digits that had labels.
        vits: the same.
        judge: of kept patches.
        seconds: of the training of each, by its name.
    """

    teacher: Any
    rankers: dict[str, Any]
    cnns: dict[str, Any]
    vits: dict[str, Any]
    judge: Any
    seconds: dict[str, float]


class Pictures(Dataset[Image.Image]):
    """The images of scenes, without their labels."""

    def __init__(self, scenes: Scenes) -> None:
        self.pixels = scenes.images.permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        """A scene as a picture."""
        return Image.fromarray(self.pixels[index])


class Run:
    """The folder of a seed, and how long each stage took.

    Args:
        folder: of the seed.
        seed: of all that is drawn.
        args: of the benchmark: epochs, learning rates; and its name.
        settings: what must be as it was when the folder was begun.

    Raises:
        SystemExit: it is not.
    """

    def __init__(
        self, folder: Path, seed: int, args: argparse.Namespace, settings: dict[str, Any]
    ) -> None:
        self.folder, self.seed, self.args = folder, seed, args
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{args.name}_settings.json"
        own = json.loads(json.dumps(settings))  # tuples as JSON has them
        if not path.exists():
            write_text(path, json.dumps(own))
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in own if found.get(name) != own[name]]
        if other:
            texts = [f"{name} ({found.get(name)} there, {own[name]} here)" for name in other]
            raise SystemExit(f"{folder} is of other settings: {', '.join(texts)}")

    def common(self, epochs: int, batch_size: int, lr: float) -> dict[str, Any]:
        """Settings of the library's trainings."""
        return {
            **{"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": self.seed},
            **{"num_workers": 0, "device": "cpu", "precision": "fp32", "holdout": 0.02},
            **{
                "tensorboard": False,
                "progress": False,
                "resume": "auto",
                "clip_grad": 1.0,
                "scale": self.args.scale,
            },
        }

    def teacher(self, scenes: Callable[[], Scenes]) -> Any:
        """The MAE, trained by ``train_teacher``."""
        path, args = self.folder / "teacher", self.args
        settings = self.common(args.teacher_epochs, 64, args.teacher_lr)
        settings |= {"output": path, "img_size": SIDE, "teacher_args": TEACHER}
        self.timed("teacher", partial(_train_on, partial(train_teacher, **settings), scenes))
        return ltrp_timm.create_teacher(path)

    def ranker(self, name: str, scenes: Callable[[], Scenes], **options: Any) -> Any:
        """A ranker, trained by ``train_ranker``; ``options`` are that function's.

        Args:
            name: of its folders, one for each cycle of the learning rate.
            scenes: makes those to train on.
            **options: removal, aggregate, loss …; ``ranker``, ``teacher`` too.
        """
        args, kind = self.args, options.get("ranker", "conv")
        if kind == "conv":  # what is compared is learned from the teacher alone
            options["ranker_args"] = {**NO_BORDER, **options.get("ranker_args", {})}
        options.setdefault("teacher", self.folder / "teacher")
        options.setdefault("mask_ratio", args.mask_ratio)
        options.setdefault("list_size", args.list_size)
        before: Path | None = None
        for cycle, epochs in enumerate(options.pop("epochs", args.ranker_epochs), 1):
            stage = f"{name}, cycle {cycle}"
            path = self.folder / file_name(stage)
            settings = self.common(epochs, 32, args.ranker_lr)
            settings |= {**options, "init_from": before, "seed": self.seed + 1000 * (cycle - 1)}
            train = partial(train_ranker, output=path, **settings)
            self.timed(stage, partial(_train_on, train, scenes))
            before = path
        return ltrp_timm.create_ranker(kind, pretrained=before)

    def network(
        self, name: str, make: Callable[[], Any], train: Callable[..., Any], epochs: Sequence[int]
    ) -> Any:
        """A network with labels, trained in cycles of the learning rate, each in a file."""
        torch.manual_seed(self.seed)
        net = make()
        for cycle, count in enumerate(epochs, 1):
            stage = f"{name}, cycle {cycle}"
            path = self.folder / f"{file_name(stage)}.safetensors"
            seed = self.seed + 1000 * (cycle - 1)
            self.timed(stage, partial(_train_and_write, train, net, path, count, seed))
            net.load_state_dict(load_file(path))
        return _to_judge(net)

    def timed(self, name: str, train: Callable[[], None]) -> None:
        """Train what is not there; note the seconds beside it."""
        note = self.folder / f"{file_name(name)}.json"
        if not note.exists():
            start = time.perf_counter()
            train()
            seconds = time.perf_counter() - start
            write_text(note, json.dumps({"seconds": round(seconds, 1)}))
            print(f"seed {self.seed}: {name} in {seconds:.0f} s", flush=True)
        self.seconds[name] = json.loads(note.read_text(encoding="utf-8"))["seconds"]


def file_name(stage: str) -> str:
    """The name of a stage without blanks and commas."""
    return stage.replace(",", "").replace(" ", "_")


def _train_on(train: Callable[..., Any], scenes: Callable[[], Scenes]) -> None:
    """Train by the library, on pictures without labels."""
    summary = train(Pictures(scenes()))
    if summary.stopped_by:
        raise SystemExit(f"{summary.output} was stopped; with the same --runs it goes on")


def _train_and_write(
    train: Callable[..., Any], net: Any, path: Path, epochs: int, seed: int
) -> None:
    """Train by labels, and write the weights."""
    net.requires_grad_(True).to(memory_format=torch.channels_last)
    net = train(net, epochs=epochs, seed=seed)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)


def load_network(net: Any, folder: Path, name: str) -> Any:
    """A network with the weights of its last cycle in the folder of a seed."""
    path = max(folder.glob(f"{file_name(name)}_cycle_?.safetensors"))
    net.load_state_dict(load_file(path))
    return _to_judge(net)


def _to_judge(net: Any) -> Any:
    """As networks are measured: what they learn is over."""
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def train_all(run: Run, scenes: Callable[[], Scenes]) -> Trained:
    """Everything of one seed."""
    args = run.args
    cnns, vits = {}, {}
    for half, digits in HALVES.items():
        train = partial(fit, scenes=scenes, classes=digits, lr=args.cnn_lr)
        cnns[half] = run.network(f"cnn {half}", partial(make_cnn, 5), train, args.cnn_epochs)
    every = list(range(CLASSES))
    train = partial(fit, scenes=scenes, classes=every, lr=args.cnn_lr, see=masked)
    judge = run.network("judge", make_judge, train, args.judge_epochs)
    teacher = run.teacher(scenes)
    rankers = {
        name: run.ranker(f"ltrp {name}", scenes, removal=name.split()[0], aggregate=name.split()[1])
        for name in LTRP
    }
    for half, digits in HALVES.items():
        train = partial(fit, scenes=scenes, classes=digits, lr=args.vit_lr)
        make = partial(make_vit, 5, teacher)
        vits[half] = run.network(f"vit {half}", make, train, args.vit_epochs)
    return Trained(teacher, rankers, cnns, vits, judge, run.seconds)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark that trains rankers on scenes."""
    parser = base_parser(description)
    add = parser.add_argument
    add("--scenes", type=whole_from(64), default=20_000, help="to train on")
    add("--test-scenes", type=whole_from(50), default=2000, help="to measure on")
    add_epochs(parser, "--ranker-epochs", [1, 2], "of each ranker, batches of 32")
    add("--scale", type=float, nargs=2, default=(0.7, 1.0), help="of the crops that train them")
    add_ranker_options(parser, mask_ratio=0.75, seeds=[1, 2, 3])
    return parser


def add_epochs(parser: argparse.ArgumentParser, option: str, default: list[int], text: str) -> None:
    """An option with the epochs of each cycle of the learning rate."""
    text = f"{text}; of each cycle"
    parser.add_argument(option, type=positive, nargs="+", default=default, help=text)


def ship(trained: Trained, path: Path, settings: dict[str, Any]) -> None:
    """Write what the quick run needs, in half precision.

    That is teacher, rankers, the CNN of the first half of the digits, and the judge; ``settings``
    say how they were trained.
    """
    weights = {
        f"{name}.{key}": value.half() if value.is_floating_point() else value
        for name, net in _shipped(trained).items()
        for key, value in net.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {key: value.contiguous() for key, value in weights.items()}
    metadata = {"settings": json.dumps(settings)}
    write_atomically(path, lambda part: save_file(whole, part, metadata))


def _shipped(trained: Trained) -> dict[str, Any]:
    first = next(iter(HALVES))
    nets = {f"ltrp {name}": ranker for name, ranker in trained.rankers.items()}
    return {"teacher": trained.teacher, **nets, "cnn": trained.cnns[first], "judge": trained.judge}


def load_shipped(path: Path) -> tuple[Trained, dict[str, Any]]:
    """What ``ship`` wrote, and the settings of its training.

    There are no ViTs, and only the first half of the digits has a CNN.

    Raises:
        SystemExit: the file is not there.
    """
    if not path.exists():
        raise SystemExit(f"there is no {path}: write it by a run with --ship")
    rankers = {
        name: ltrp_timm.create_ranker("conv", patch_size=PATCH, **NO_BORDER) for name in LTRP
    }
    teacher = ltrp_timm.MAETeacher(img_size=SIDE, **TEACHER)
    trained = Trained(teacher, rankers, {next(iter(HALVES)): make_cnn(5)}, {}, make_judge(), {})
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    weights = load_file(path)
    for name, net in _shipped(trained).items():
        own = {
            key[len(name) + 1 :]: of for key, of in weights.items() if key.startswith(f"{name}.")
        }
        net.load_state_dict(own)
        net.eval().requires_grad_(False)
    return trained, settings
