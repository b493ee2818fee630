"""What does dropping patches cost a fine-tuned classifier?

Claim. A small ViT that was trained on all patches and fine-tuned on half of them classifies digits
in clutter nearly as well (within 3 points). The choice of patches matters: a random quarter is at
least 10 points worse than the best quarter by `contrast`.

Arithmetic. Scenes of 64 px are 64 patches of 8; a digit covers a quarter of the scene, 16 to 25
patches, so a quarter of the patches can just hold it. What is saved: benchmarks/training_speed.py
times the training of a model of a real size.

Data: real handwritten digits (scikit-learn's) among textured blobs; held-out scenes show other
handwriting. One plain ViT (sin-cos position embedding to begin with) is trained on all patches, and
every row continues from its weights for the same number of epochs, with the layer decay that
fine-tuning has by default; all else is equal:
    full       all patches
    contrast   the weight-free ranker
    learned    the shipped conv ranker, frozen, on pictures of twice the size (its patches are 16
               pixels wide); it was trained without labels on scenes of this kind
    random     one random set of patches for all images
    gate       a conv ranker, untrained at first, that learns with the model through the
               straight-through gate: it sees labels, unlike a ranker from `train-ranker`
`top1` is that of the last epoch on held-out scenes, not the best one. One seed; twice the binomial
standard error of 1000 images at 80 % is 2.5 points.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import tables
import timm
import torch
from common import WIDTH, Row, device_parser, load_pyplot, set_up
from PIL import Image
from safetensors.torch import save_file
from tables import Goal, nice
from timm.layers import build_sincos2d_pos_embed
from torch.utils.data import Dataset

from ltrp_timm import create_ranker
from ltrp_timm.commands._flags import not_negative, positive
from ltrp_timm.train import finetune
from ltrp_timm.train.folder import LOG_NAME, read_log
from ltrp_timm.visualize import show_images
from studies.scenes import make_digit_scenes

NAME = "finetune_digits"
TITLE = "A small ViT fine-tuned on digits in clutter, on all patches and on fewer"
MODEL, SIDE = "vit_tiny_patch16_224", 64
GATE = {"ranker": "conv", "train_ranker": True, "gate": "straight-through"}
METHODS: list[tuple[str, float, dict[str, Any]]] = [
    ("full", 1.0, {}),
    ("contrast", 0.5, {"ranker": "contrast"}),
    ("learned", 0.5, {"ranker": "conv"}),
    ("random", 0.5, {"ranker": "random"}),
    ("gate", 0.5, GATE),
    ("contrast", 0.25, {"ranker": "contrast"}),
    ("learned", 0.25, {"ranker": "conv"}),
    ("random", 0.25, {"ranker": "random"}),
    ("gate", 0.25, GATE),
]


def goals() -> list[Goal]:
    """What the claim says."""
    half, quarter = (
        {"method": "contrast", "keep_ratio": ratio, "img_size": SIDE} for ratio in (0.5, 0.25)
    )
    return [
        Goal("top-1 − that of all patches, keep 0.5", half, "over_full", ">=", -0.03),
        Goal("top-1 − that of random patches, keep 0.25", quarter, "over_random", ">=", 0.1),
    ]


class Scenes(Dataset[tuple[Image.Image, int]]):
    """Digits in clutter with their class numbers, in memory."""

    def __init__(self, count: int, seed: int, held_out: bool) -> None:
        images, labels = make_digit_scenes(count, seed, SIDE, held_out)
        self.pictures, self.targets = show_images(images), labels.tolist()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index], self.targets[index]


def sizes(args: argparse.Namespace) -> Row:
    """Arguments of the small ViT."""
    depth = args.depth or 3
    small: Row = {"patch_size": 8, "embed_dim": 96, "depth": depth, "num_heads": 3}
    return {**small, "class_token": False, "global_pool": "avg"}


def write_start(args: argparse.Namespace, path: Path) -> None:
    """Weights to begin with; a sin-cos embedding holds the places of patches."""
    torch.manual_seed(args.seed)
    vit = timm.create_model(MODEL, img_size=SIDE, num_classes=10, **sizes(args))
    positions = build_sincos2d_pos_embed([SIDE // 8, SIDE // 8], vit.embed_dim)
    with torch.no_grad():
        vit.pos_embed.copy_(positions)
    save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, path)


def common_options(args: argparse.Namespace, held_out: Scenes) -> Row:
    """Options of ``finetune`` that all trainings share."""
    common: Row = {"num_classes": 10, "val_data": held_out, "num_workers": 0, "seed": args.seed}
    common |= {"img_size": SIDE, "model_kwargs": sizes(args), "device": args.device}
    common |= {"batch_size": 32, "tensorboard": False, "clip_grad": 1.0}
    common |= {"aa": "none", "reprob": 0.0, "hflip": 0.0, "drop_path": 0.0, "smoothing": 0.0}
    common |= {"scale": (0.9, 1.0), "ratio": (1.0, 1.0), "resume": "auto"}
    return {**common, "opt_args": {"betas": (0.9, 0.95)}}


def run(args: argparse.Namespace, where: Row, folder: Path) -> list[Row]:
    """Train once on all patches, go on with each method; a row for each."""
    train, held = Scenes(args.scenes, 0, False), Scenes(args.held_out, 1, True)
    common = common_options(args, held)
    write_start(args, folder / "start.safetensors")
    start: Row = {"checkpoint": folder / "start.safetensors", "lr": args.lr}
    first: Row = {"epochs": args.first_epochs, "layer_decay": None}  # from random weights
    tune(train, folder / "first", **first, **start, **common)
    start = {"checkpoint": folder / "first" / "model.safetensors", "lr": args.lr / 3}
    learned = folder / "learned"
    ranker = create_ranker("conv", pretrained=True, img_size=2 * SIDE)
    ranker.save(learned, overwrite=True)
    rows: list[Row] = []
    for method, ratio, options in METHODS:
        output = folder / f"{method}_{ratio:g}"
        weights: Row = {"ranker_weights": learned} if method == "learned" else {}
        more = {**options, **weights, "keep_ratio": ratio, "epochs": args.epochs, **start, **common}
        tune(train, output, **more)
        log = read_log(output / LOG_NAME)
        row: Row = {"method": method, "keep_ratio": ratio, "img_size": SIDE}
        rows.append({**row, "top1": log[-1]["val_top1"], "top5": log[-1]["val_top5"]})
    fixed = {"scenes": args.scenes, "held_out": args.held_out, "epochs": args.epochs}
    fixed |= {"first_epochs": args.first_epochs, "lr": args.lr, "seed": args.seed, **where}
    return [{**row, **compared(row, rows), **fixed} for row in rows]


def tune(data: Scenes, output: Path, **options: Any) -> None:
    """Fine-tune, or go on with it.

    Raises:
        SystemExit: The training was stopped; its state is saved.
    """
    if finetune(MODEL, data, output, **options).stopped_by:
        raise SystemExit(f"{output} was stopped; started again with the same --runs, it goes on")


def compared(row: Row, rows: list[Row]) -> Row:
    """A row compared with all patches, and with an equal number of random patches."""
    full = rows[0]
    same = [r for r in rows if r["method"] == "random" and r["keep_ratio"] == row["keep_ratio"]]
    return {
        "over_full": round(row["top1"] - full["top1"], 5),
        "over_random": round(row["top1"] - same[0]["top1"], 5) if same else "",
    }


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "method": row["method"],
            "keep": row["keep_ratio"],
            "top-1": f"{row['top1']:.1%}",
            "− full": f"{100 * row['over_full']:+.1f}",
            "− random": "–" if row["over_random"] == "" else f"{100 * row['over_random']:+.1f}",
        }
        for row in rows
    ]


def plot(rows: list[Row]) -> Any:
    """Accuracy against the share of patches."""
    figure, ax = load_pyplot().subplots(figsize=(WIDTH, 4.2))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        kept, top1 = ([row[name] for row in own] for name in ("keep_ratio", "top1"))
        if method == "full":
            ax.axhline(top1[0], color="k", ls=":", label="all patches")
        else:
            ax.plot(kept, top1, "-o", ms=4, label=nice(method))
    ax.set_xlabel("share of patches kept")
    ax.set_ylabel("held-out top-1")
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


def digits_parser(doc: str) -> argparse.ArgumentParser:
    """Options of a study that fine-tunes on digits."""
    parser = device_parser(doc.splitlines()[0])
    add = parser.add_argument
    add("--scenes", type=positive, default=3000, help="to train on")
    add("--held-out", type=positive, default=1000, help="to measure on")
    add("--first-epochs", type=positive, default=16, help="on all patches, before the methods")
    add("--lr", type=float, default=1.5e-3, help="on all patches; a third of it afterwards")
    add("--runs", type=Path, help="folder for weights and logs; a second run continues there")
    return parser


def run_in_folder(run: Callable[..., list[Row]], args: argparse.Namespace) -> list[Row]:
    """Run a study in the folder of its options, or in a temporary one."""
    where = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        folder = args.runs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        return run(args, where, folder)


def main() -> None:
    """Train, write CSV, PNG and Markdown, check the goals."""
    parser = digits_parser(__doc__ or "")
    parser.add_argument("--epochs", type=positive, default=4, help="of each method")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the training")
    args = parser.parse_args()
    rows = run_in_folder(run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
