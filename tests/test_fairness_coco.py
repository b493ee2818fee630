"""Rankers judged by COCO's annotations: exact shares on a tiny folder, means, intervals, errors."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables
import torch
from PIL import Image
from studies.fairness import coco, coco_objects, coco_report
from test_evaluate_multi_label import saved_model
from timm.data import ImageNetInfo

from ltrp_timm.commands import main as command

SIDE = 64  # 4 x 4 patches of 16; `centre` keeps the four in the middle, 16 to 48
NAMES = {18: "dog", 17: "cat", 25: "giraffe", 34: "frisbee"}  # the first two are seen
SMALL = ["--img-size", "64", "--patch-size", "16", "--workers", "0", "--device", "cpu"]
SMALL += ["--resamples", "50"]


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def rle(left: int, top: int, right: int, bottom: int) -> dict[str, Any]:
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    inside[top:bottom, left:right] = True
    flat = inside.T.flatten().tolist()
    counts, last = [0], False
    for value in flat:
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": [SIDE, SIDE], "counts": counts}


# image, category, segmentation, whether it is a crowd, share of its area from 16 to 48
OBJECTS: list[tuple[int, int, Any, int, float]] = [
    (1, 18, box(8, 8, 32, 32), 0, 256 / 576),
    (1, 25, box(48, 48, 60, 60), 0, 0.0),
    (2, 18, box(20, 20, 30, 44), 0, 1.0),
    (2, 17, [[0, 0, 32, 0, 32, 16, 0, 16], [16, 16, 48, 16, 48, 32, 16, 32]], 0, 0.5),
    (2, 25, rle(0, 16, 64, 24), 0, 0.5),
    (3, 34, box(0, 0, 32, 32), 0, 0.25),
    (3, 18, rle(0, 0, 16, 16), 1, 0.0),
]
# dog (256 / 576 + 1) / 2, cat 0.5; giraffe 0.25, frisbee 0.25
SEEN, UNSEEN = ((256 / 576 + 1) / 2 + 0.5) / 2, 0.25


def make_coco(folder: Path, objects: Sequence[Any] = tuple(OBJECTS), **changes: Any) -> Path:
    """Bright objects on a dark ground, and an image that shows nothing."""
    (folder / "images").mkdir(parents=True)
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in (1, 2, 3, 4)]
    annotations = []
    for image in images:
        pixels = np.full((SIDE, SIDE, 3), 20, dtype=np.uint8)
        for number, category, segmentation, crowd, _ in objects:
            if number == image["id"]:
                name = {"image_id": number, "category_id": category, "id": len(annotations)}
                annotations.append({**name, "segmentation": segmentation, "iscrowd": crowd})
                pixels[coco_objects.draw_mask(segmentation, (SIDE, SIDE)) > 0] = (250, 200, 90)
        Image.fromarray(pixels).save(folder / "images" / f"{image['id']}.png")
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories, **changes}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def run(folder: Path, *flags: str) -> int:
    paths = [str(folder / "images"), str(folder / "instances.json"), "--output"]
    return coco.main([*paths, str(folder / "out"), *SMALL, *flags])


def rows_of(folder: Path, file: str = "coco") -> list[dict[str, str]]:
    with open(folder / "out" / f"{file}.csv", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_started_by_its_path_it_finds_the_shares_that_were_drawn(tmp_path: Path) -> None:
    folder = make_coco(tmp_path / "set")
    script = Path(coco.__file__)
    flags = ["--output", "out", *SMALL, "--rankers", "centre", "--keep-ratios", "0.25", "1"]
    done = subprocess.run(
        [sys.executable, str(script), "images", "instances.json", *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(script.parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr  # of the progress: image 4 shows no object
    quarter, whole, *others = rows_of(folder)
    assert [row["method"] for row in others] == ["random", "random"]
    assert (quarter["method"], quarter["patches_kept"], quarter["patches"]) == ("centre", "4", "16")
    assert float(quarter["seen"]) == pytest.approx(SEEN, abs=1e-5)
    assert float(quarter["unseen"]) == pytest.approx(UNSEEN, abs=1e-5)
    assert float(quarter["gap"]) == pytest.approx(SEEN - UNSEEN, abs=1e-5)
    assert [float(whole[name]) for name in ("seen", "unseen", "gap")] == [1.0, 1.0, 0.0]
    for row in (quarter, whole, *others):
        assert (row["images"], row["crowds_left_out"], row["boxes_left_out"]) == ("3", "1", "0")
        assert (row["seen_objects"], row["seen_categories"]) == ("3", "2")
        assert (row["unseen_objects"], row["unseen_categories"]) == ("3", "2")
        assert all(row.values()), row
    expected = {"cat": 0.5, "dog": (256 / 576 + 1) / 2, "giraffe": 0.25, "frisbee": 0.25}
    lines = rows_of(folder, "coco_categories")
    assert {line["category"]: float(line["centre@0.25"]) for line in lines} == pytest.approx(
        expected, abs=1e-5
    )
    assert [line["seen"] for line in lines] == ["1", "1", "0", "0"]  # in the order of their ids
    text = (folder / "out" / "coco.md").read_text()
    assert f"| 0.25 (4 of 16) | centre | {SEEN:.3f} (" in text
    assert done.stdout.strip() in text
    assert (folder / "out" / "coco_seen.txt").read_text() == "cat\ndog\n"
    assert (folder / "out" / "coco.png").read_bytes().startswith(b"\x89PNG")


def test_bright_objects_are_kept_and_random_patches_keep_their_share(tmp_path: Path) -> None:
    places = np.random.default_rng(0).integers(0, 7, (16, 2)) * 8
    objects = [
        (1 + number // 4, list(NAMES)[number % 4], box(x, y, x + 12, y + 12), 0, 0.0)
        for number, (x, y) in enumerate(places.tolist())
    ]
    folder = make_coco(tmp_path, objects)
    flags = ["--patch-size", "8", "--keep-ratios", "0.5"]
    assert run(folder, "--rankers", "contrast", "random", *flags) == 0
    contrast, chance = rows_of(folder)
    for part in ("seen", "unseen"):
        assert float(contrast[part]) > 0.8
        assert float(contrast[part]) > float(chance[part]) + 0.2
        for row in (contrast, chance):
            assert float(row[f"{part}_low"]) <= float(row[part]) <= float(row[f"{part}_high"])
    assert float(chance["gap_low"]) < float(chance["gap"]) < float(chance["gap_high"])


def test_random_draws_anew_for_every_image_and_the_same_at_every_run(tmp_path: Path) -> None:
    objects = [(n, c, box(0, 0, 16, 16), 0, 0.0) for n in (1, 2, 3, 4) for c in (18, 25)]
    folder, found = make_coco(tmp_path, objects), []
    for seed in ("0", "0", "1"):
        flags = ["--rankers", "random", "--seed", seed, "--overwrite", "--batch-size", "4"]
        assert run(folder, *flags, "--keep-ratios", "0.25", "0.5", "0.75") == 0
        found.append([row["seen"] for row in rows_of(folder)])
    assert found[0] == found[1] != found[2]
    assert not {float(value) for value in found[0] + found[2]} <= {0.0, 1.0}


@pytest.mark.parametrize(("mode", "share"), [("center", 1.0), ("squash", 0.5)])
def test_masks_go_where_the_picture_goes(mode: str, share: float, tmp_path: Path) -> None:
    folder = make_coco(tmp_path)
    objects = [(18, box(48, 16, 80, 48)), (25, box(40, 24, 64, 40)), (34, box(0, 0, 9, 64))]
    if mode == "squash":  # twice as wide as the picture: half of it lies beside the middle
        objects = [(18, box(0, 16, 64, 48)), (25, box(64, 16, 128, 48)), (34, box(0, 0, 9, 64))]
    images = [{"id": 1, "file_name": "1.png", "width": 128, "height": 64}]
    annotations = [
        {"image_id": 1, "category_id": category, "segmentation": segmentation}
        for category, segmentation in objects
    ]
    content = json.loads((folder / "instances.json").read_text())
    content.update(images=images, annotations=annotations)
    (folder / "instances.json").write_text(json.dumps(content))
    Image.new("RGB", (128, 64)).save(folder / "images" / "1.png")
    flags = ["--rankers", "centre", "--keep-ratios", "0.25", "--crop-mode", mode]
    assert run(folder, *flags) == 0
    row = rows_of(folder)[0]
    assert (float(row["seen"]), row["crop_mode"]) == (share, mode)
    # the frisbee lies in what the middle square leaves out
    hidden = 1 if mode == "center" else 0
    assert row["objects_hidden"] == str(hidden)
    assert row["unseen_categories"] == str(2 - hidden)


def test_crowds_count_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = make_coco(tmp_path)
    assert run(folder, "--rankers", "centre", "--keep-ratios", "0.25", "--crowds") == 0
    row, dog = rows_of(folder)[0], rows_of(folder, "coco_categories")[1]
    assert (row["crowds_left_out"], dog["category"], dog["objects"]) == ("0", "dog", "3")
    assert float(dog["centre@0.25"]) == pytest.approx((256 / 576 + 1) / 3, abs=1e-5)


def test_a_box_is_no_object(tmp_path: Path) -> None:
    box_alone = [{"image_id": 1, "category_id": 34, "bbox": [0, 0, 9, 9], "segmentation": []}]
    folder = make_coco(tmp_path)
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"] += box_alone
    (folder / "instances.json").write_text(json.dumps(content))
    assert run(folder, "--rankers", "centre", "--keep-ratios", "0.25") == 0
    row = rows_of(folder)[0]
    assert (row["boxes_left_out"], row["unseen_objects"]) == ("1", "3")
    assert "1 objects without a segmentation" in (folder / "out" / "coco.md").read_text()


def test_other_categories_may_be_named_as_seen(tmp_path: Path) -> None:
    folder = make_coco(tmp_path)
    (folder / "seen.txt").write_text("giraffe\n")
    flags = ["--rankers", "centre", "--keep-ratios", "0.25"]
    assert run(folder, *flags, "--seen-classes", str(folder / "seen.txt")) == 0
    row = rows_of(folder)[0]
    assert float(row["seen"]) == pytest.approx(0.25, abs=1e-5)
    assert float(row["unseen"]) == pytest.approx((2 * SEEN + 0.25) / 3, abs=1e-5)
    assert (folder / "out" / "coco_seen.txt").read_text() == "giraffe\n"


def test_the_seen_categories_are_those_of_evaluate(tmp_path: Path) -> None:
    folder = make_coco(tmp_path / "set")
    assert run(folder, "--rankers", "centre", "--keep-ratios", "0.25") == 0
    model = saved_model(tmp_path / "model", tuple(NAMES.values()))
    flags = ["--multi-label", "--data", str(folder / "images"), "--keep-ratio", "0.5"]
    flags += ["--labels", str(folder / "instances.json"), "--output", str(tmp_path / "evaluated")]
    flags += ["--seen-classes", str(folder / "out" / "coco_seen.txt"), "--device", "cpu"]
    assert command(["evaluate", model, *flags, "--num-workers", "0"]) == 0
    result = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["results"][0]
    assert result["map"] == pytest.approx((result["map_seen"] + result["map_unseen"]) / 2)


def test_trained_rankers_and_arguments_by_name(tmp_path: Path) -> None:
    folder = make_coco(tmp_path)
    flags = ["--rankers", "conv", "pixel_std", "contrast", "--pretrained", "--keep-ratios", "0.25"]
    assert run(folder, *flags, "--ranker-args", '{"contrast": {"img_size": 32}}') == 0
    methods = ["conv", "pixel_std", "contrast", "random"]
    rows = rows_of(folder)
    assert [row["method"] for row in rows] == methods
    assert len({row["seen"] for row in rows[:3]}) > 1


def test_what_cannot_be_used_is_named_and_the_rest_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_coco(tmp_path)
    (folder / "images" / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 60)).save(folder / "images" / "3.png")
    flags = ["--rankers", "centre", "--keep-ratios", "0.25", "--batch-size", "1"]
    assert run(folder, *flags) == 2
    said = capsys.readouterr().err
    assert "1.png: is not an image" in said
    assert "3.png: is of size (60, 64), its annotations of (64, 64)." in said
    row = rows_of(folder)[0]
    assert (row["images"], row["images_unreadable"]) == ("1", "2")
    assert float(row["seen"]) == pytest.approx(0.75)
    assert float(row["unseen"]) == pytest.approx(0.5)


def test_a_picture_that_exif_turns_has_no_objects_to_trust(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_coco(tmp_path)
    path = folder / "images" / "3.png"
    with Image.open(path) as stored:
        turned = stored.getexif()
        turned[0x0112] = 3  # by 180 degrees: its size stays
        stored.save(path, exif=turned)
    assert run(folder, "--rankers", "centre", "--keep-ratios", "0.25") == 2
    assert "3.png: is turned by its EXIF data" in capsys.readouterr().err
    assert rows_of(folder)[0]["images_unreadable"] == "1"


def image_entries(*names: str) -> list[dict[str, Any]]:
    return [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]


def annotation(segmentation: Any, **changes: Any) -> list[dict[str, Any]]:
    entry = {"image_id": 1, "category_id": 18, "id": 7, "segmentation": segmentation}
    return [{**entry, **changes}]


SQUARE = box(0, 0, 9, 9)


@pytest.mark.parametrize(
    ("changes", "flags", "wanted"),
    [
        ({"annotations": None}, [], "there is no list 'annotations'"),
        ({"annotations": []}, [], "no object has a segmentation (0 crowds and 0 without"),
        ({"annotations": annotation(None)}, [], "no object has a segmentation (0 crowds and 1"),
        ({"annotations": annotation(SQUARE, iscrowd=1)}, [], "(1 crowds and 0 without"),
        (
            {"annotations": annotation([[1, 2, 3, 4]])},
            [],
            "annotation 7 has a polygon of 4 numbers",
        ),
        ({"annotations": annotation([1, 2, 3, 4, 5, 6])}, [], "that is no list of polygons"),
        ({"annotations": annotation([["1"] * 6])}, [], "that is no list of polygons"),
        ({"annotations": annotation([[float("nan")] * 6])}, [], "that is no list of polygons"),
        ({"annotations": annotation({"counts": "abc", "size": [1, 1]})}, [], "a compressed RLE"),
        ({"annotations": annotation({"counts": [1], "size": [2]})}, [], "lists of whole numbers"),
        ({"annotations": annotation({"counts": [-1, 5], "size": [2, 2]})}, [], "whole numbers"),
        ({"annotations": annotation({"counts": [3], "size": [2, 2]})}, [], "do not add up to"),
        ({"annotations": annotation(SQUARE)}, [], "no object of unseen categories"),
        ({"annotations": annotation(SQUARE, category_id=25)}, [], "no object of seen categories"),
        ({"images": image_entries("1.png", "2.png", "no.png")}, [], "1 of 3 annotated images"),
        (
            {"categories": [{"id": i, "name": f"my {n}"} for i, n in NAMES.items()]},
            [],
            "4 categories are not in coco_imagenet.csv: my cat, my dog, my giraffe, my frisbee; "
            "--seen-classes FILE",
        ),
        ({}, ["--seen-classes", "{}/other.txt"], "other.txt: 1 seen classes are not classes: bird"),
        ({}, ["--seen-classes", "{}/none.txt"], "none.txt does not exist"),
        ({}, ["--rankers", "contrasts"], "got 'contrasts'"),
        ({}, ["--rankers", "conv"], "the conv ranker is not trained"),
        ({}, ["--rankers", "conv="], "--rankers conv= names no weights"),
        ({}, ["--rankers", "conv={}/none"], "/none"),
        ({}, ["--ranker-args", "{{"], "--ranker-args is not JSON"),
        ({}, ["--ranker-args", "[]"], "--ranker-args must be a JSON object"),
        ({}, ["--ranker-args", '{{"conv": {{}}}}'], "for none of the --rankers: conv"),
        ({}, ["--img-size", "8"], "smaller than a patch"),
        ({}, ["--output", "{}/other.txt"], "other.txt cannot be written: File exists."),
        ({}, ["--model", "vit_tiny_patch16_224"], "--patch-size does not go with --model"),
    ],
)
def test_one_line_on_what_is_wrong(
    changes: dict[str, Any],
    flags: list[str],
    wanted: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_coco(tmp_path / "set", **changes)
    (tmp_path / "other.txt").write_text("bird\n")
    assert run(folder, *[flag.format(tmp_path) for flag in flags]) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert said.startswith("coco.py: ")
    assert said.count("\n") == 1
    assert not (folder / "out").exists()


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_coco(tmp_path)
    assert coco.main([str(folder / "images"), str(folder / "none.json"), *SMALL]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
    assert coco.main([str(folder / "none"), str(folder / "instances.json"), *SMALL]) == 2
    assert "none is no folder of images" in capsys.readouterr().err


def test_results_are_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_coco(tmp_path)
    (folder / "out").mkdir()
    (folder / "out" / "coco.md").write_text("mine")
    flags = ["--rankers", "centre", "--keep-ratios", "0.25"]
    assert run(folder, *flags) == 2
    assert "holds coco.md already: --overwrite replaces it." in capsys.readouterr().err
    assert (folder / "out" / "coco.md").read_text() == "mine"
    assert run(folder, *flags, "--overwrite") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(coco_report.FILES)


def test_masks_by_hand() -> None:
    # down the columns: one outside, two inside, and so on
    mask = coco_objects.decode_rle([1, 2, 2, 1], (3, 2))
    assert (mask // 255).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert coco_objects.decode_rle([0, 6], (3, 2)).min() == 255
    square = coco_objects.draw_mask(box(1, 0, 3, 2), (3, 4))
    assert (square // 255).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    triangle = coco_objects.draw_mask([[0, 0, 4.5, 0, 0, 4.5]], (5, 5)) // 255
    assert triangle.tolist() == [[1] * (4 - row) + [0] * (row + 1) for row in range(4)] + [[0] * 5]
    # beyond the border, and over another part: each pixel once
    parts = coco_objects.draw_mask([*box(-5, -5, 2, 2), *box(1, 1, 9, 9)], (3, 3)) // 255
    assert parts.tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    with pytest.raises(ValueError, match=r"an RLE is of size \[3, 2\], the image of \[2, 3\]"):
        coco_objects.draw_mask({"counts": [6], "size": [3, 2]}, (2, 3))


def test_areas_by_patch() -> None:
    mask = torch.zeros(5, 7, dtype=torch.uint8)
    mask[0:3, 1:7] = 255
    mask[4] = 255  # below the last whole patch
    areas = coco_objects.patch_areas(mask, (2, 3), (2, 2))
    assert areas.tolist() == [2, 4, 4, 1, 2, 2]


def test_means_and_intervals_by_hand() -> None:
    recall = torch.tensor([[1.0], [0.5], [0.5], [0.0], [0.5]])
    category = torch.tensor([0, 2, 2, 0, 1])
    means = coco_report.category_means(recall, category, torch.tensor([3, 1, 0, 1, 2]), 4)
    assert means[:3, 0].tolist() == [0.75, 0.5, 0.5]
    assert bool(means[3].isnan().all())
    seen = torch.tensor([True, False, True, False])
    assert coco_report.seen_unseen_gap(means, seen)[:, 0].tolist() == [0.625, 0.5, 0.125]
    found = coco_report.Measured(
        image=torch.tensor([5, 5, 9, 9]),
        category=torch.tensor([0, 1, 0, 1]),
        share=torch.ones(4),
        recall=torch.tensor([[1.0, 0.3], [0.5, 0.2], [0.0, 0.3], [0.5, 0.2]]),
        columns=[("a", 0.5), ("b", 0.5)],
        categories=("dog", "giraffe"),
        seen=torch.tensor([True, False]),
    )
    low, high = coco_report.intervals(found, resamples=200)
    assert low[:, 0].tolist() == [0.0, 0.5, -0.5]  # of two images each may be drawn twice
    assert high[:, 0].tolist() == [1.0, 0.5, 0.5]
    assert low[:, 1].tolist() == pytest.approx([0.3, 0.2, 0.1])
    assert high[:, 1].tolist() == pytest.approx([0.3, 0.2, 0.1])


def test_the_list_of_categories_speaks_of_imagenet() -> None:
    info = ImageNetInfo("imagenet-1k")
    first = {info.index_to_description(number).split(",")[0] for number in range(1000)}
    rows = tables.read_csv(coco.DEFAULT_SEEN)
    listed = {row["category"]: row["imagenet_class"] for row in rows}
    assert len(rows) == len(listed) == 80
    named = {name for name in listed.values() if name}
    assert named <= first
    assert len(named) == 64
    assert "kite" in first  # the bird
    assert listed["kite"] == listed["giraffe"] == ""
