"""What tests of images with several classes share: a tiny set in COCO's layout, and as a CSV."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128,) * 3}
NAMES = ("red", "green", "blue", "yellow", "grey")  # by their ids; nothing is yellow
IDS = (3, 7, 20, 41, 90)


def make_tagged(folder: Path, count: int = 24) -> Path:
    """Boxes of some colours on noise, with COCO's annotations, a CSV, and names of seen classes."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    annotations, rows, images = [], [], []
    for number in range(count):
        pixels = draw.integers(0, 60, (48, 48, 3)).astype(np.uint8)
        has = [name for name in COLOURS if draw.random() < 0.5]
        for name in has:
            y, x = draw.integers(0, 32, 2)
            pixels[y : y + 16, x : x + 16] = COLOURS[name]
            category = IDS[NAMES.index(name)]
            annotations.append({"image_id": 100 + number, "category_id": category})
        file = f"{number:02d}.png"
        Image.fromarray(pixels).save(folder / "images" / file)
        images.append({"id": 100 + number, "file_name": file})
        rows.append(f"{file},{';'.join(has)}")
    categories = [{"id": i, "name": name} for i, name in reversed(list(zip(IDS, NAMES)))]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    coco["categories"] = [c for c in categories if c["name"] != "yellow"]
    (folder / "full.json").write_text(json.dumps(coco))  # without the class that no image has
    (folder / "labels.csv").write_text("\n".join(["image,labels", *rows, ""]))
    (folder / "seen.txt").write_text("red\nblue\n")
    return folder
