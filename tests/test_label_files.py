"""Label files: COCO's annotations and CSV tables, right and wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ltrp_timm.data.multi_label import read_labels, read_names

# ids with gaps, out of order; a crowd; an image without labels
COCO: dict[str, Any] = {
    "info": {},
    "images": [
        {"id": 9, "file_name": "a.png", "height": 40},
        {"id": 3, "file_name": "sub/b.png"},
        {"id": 5, "file_name": "c.png"},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "iscrowd": 1, "bbox": [0, 0, 1, 1]},
        {"id": 2, "image_id": 9, "category_id": 2},
        {"id": 3, "image_id": 9, "category_id": 90},
        {"id": 4, "image_id": 9, "category_id": 2},
    ],
    "categories": [
        {"id": 90, "name": "toothbrush"},
        {"id": 2, "name": "bicycle", "supercategory": "vehicle"},
        {"id": 11, "name": "fire hydrant"},
    ],
}


def coco(folder: Path, **changes: Any) -> Path:
    path = folder / "labels.json"
    path.write_text(json.dumps({**COCO, **changes}), encoding="utf-8")
    return path


def table(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_coco(tmp_path: Path) -> None:
    found = read_labels(coco(tmp_path))
    assert found.names == ("a.png", "sub/b.png", "c.png")
    assert found.classes == ("bicycle", "fire hydrant", "toothbrush")  # in the order of their ids
    assert found.targets.dtype == torch.bool
    assert found.targets.int().tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
    marked = coco(tmp_path).read_text(encoding="utf-8").encode("utf-8-sig")
    (tmp_path / "marked.JSON").write_bytes(marked)
    assert read_labels(tmp_path / "marked.JSON").names == found.names


def test_csv_with_a_column_of_labels(tmp_path: Path) -> None:
    text = '\ufeffimage,labels\na.png, dog ;cat\n\nb.png,class10;class9\n"c, d.png",\n'
    found = read_labels(table(tmp_path, text))
    assert found.names == ("a.png", "b.png", "c, d.png")
    assert found.classes == ("cat", "class9", "class10", "dog")
    assert found.targets.int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_csv_with_a_column_for_each_class(tmp_path: Path) -> None:
    found = read_labels(table(tmp_path, "file,dog,cat\r\na.png,0,1\r\nb.png, 1 ,1\r\n"))
    assert found.classes == ("dog", "cat")  # in the order of the header
    assert found.targets.int().tolist() == [[0, 1], [1, 1]]
    one = read_labels(table(tmp_path, "file,dog\na.png,0\nb.png,1\n"))
    assert one.classes == ("dog",)
    assert one.targets.int().tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"images": None}, "there is no list 'images'"),
        ({"annotations": {}}, "there is no list 'annotations'"),
        ({"categories": []}, "it has no categories"),
        ({"images": []}, "refers to the unknown image 3"),
        ({"images": [], "annotations": []}, "it names no image"),
        ({"images": [{"id": 1}]}, "entry 0 of 'images' has no 'file_name'"),
        ({"images": ["a.png"]}, "entry 0 of 'images' has no 'id'"),
        ({"images": [{"id": 1, "file_name": 7}]}, "entry 0 of 'images' has 'file_name' = 7"),
        ({"images": [{"id": [], "file_name": "a"}]}, r"entry 0 of 'images' has 'id' = \[\]"),
        ({"images": [{"id": 9, "file_name": n} for n in "ab"]}, "it has an image id twice: 9"),
        (
            {"images": [{"id": n, "file_name": "a.png"} for n in (9, 3)]},
            "it names an image twice: a.png",
        ),
        (
            {"images": [{"id": 9, "file_name": "./a.png"}, {"id": 3, "file_name": "a.png"}]},
            "it names an image twice: a.png",
        ),
        ({"images": [{"id": 9, "file_name": "../a.png"}]}, "unknown image 3"),
        (
            {"images": [{"id": 9, "file_name": "../a.png"}], "annotations": []},
            r"images must lie below their folder, got \.\./a\.png",
        ),
        ({"images": [{"id": 9, "file_name": "/a.png"}], "annotations": []}, "must lie below"),
        ({"categories": [{"id": 2, "name": "x"}]}, "the unknown category 90"),
        ({"categories": [{"id": 2, "name": n} for n in "xy"]}, "it has a category id twice: 2"),
        ({"categories": [{"id": n, "name": "x"} for n in (2, 90)]}, "names a category twice: x"),
    ],
)
def test_wrong_coco(changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    path = coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=wanted) as caught:
        read_labels(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "it is empty"),
        ("image\na.png\n", r"its header must be image,labels or image,CLASS,…, got \['image'\]"),
        ("image,labels\n", "no image has a label"),
        ("image,cat,dog\n", "it names no image"),
        ("image,labels\na.png,\n", "no image has a label"),
        ("image,labels\na.png,cat,dog\n", "line 2 has 3 columns, the header 2"),
        ("image,labels\na.png,cat\n,dog\n", "line 3 names no image"),
        ("image,labels\na.png,cat\na.png,dog\n", "line 3 names an image twice: a.png, as line 2"),
        (
            "image,labels\n./a.png,cat\n\na.png,dog\n",
            "line 4 names an image twice: a.png, as line 2",
        ),
        (
            "image,cat\nb//a.png,1\nb/./a.png,0\n",
            "line 3 names an image twice: b/./a.png, as line 2",
        ),
        ("a.jpg,1,0\nb.jpg,0,1\n", "line 1 must be a header, image,labels or .* got a.jpg,1,0"),
        ("1.heic,cat,2\n2.heic,0,1\n", "line 1 must be a header, .* got 1.heic,cat,2"),
        ("0001,1,0\n0002,0,1\n", "line 1 must be a header, .* got 0001,1,0"),
        ("a.PNG,cat\n", "line 1 must be a header"),
        (
            "image,labels\na.png,cat\nb.png,cat|dog\n",
            r"line 3 has the labels 'cat\|dog': join .* ';'",
        ),
        ('image,labels\na.png,"cat,dog"\n', "line 2 has the labels 'cat,dog': join labels by ';'"),
        ("image,labels\na.png,cat\tdog\n", "line 2 has the labels .*dog': join labels by ';'"),
        ("image,cat,dog\na.png,1,2\n", "line 2 has '2' for 'dog', expected 0 or 1"),
        ("image,tags\na.png,cat\n", r"line 2 has 'cat' for 'tags', .*one column, labels"),
        ("image,cat,cat\na.png,1,0\n", "it names a class twice: cat"),
        ("image,cat,\na.png,1,0\n", "a column without a name"),
        ('image,labels\n"a.png,cat\n', "unexpected end of data"),
    ],
)
def test_wrong_csv(text: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wanted) as caught:
        read_labels(table(tmp_path, text))
    assert "labels.csv: " in str(caught.value)


def test_files_that_are_no_label_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        read_labels(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"labels must be a \.json or \.csv file"):
        read_labels(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"broken\.json: Expecting value"):
        read_labels(broken)
    broken.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"broken\.json: "):
        read_labels(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.json is not UTF-8 text"):
        read_labels(broken)


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "seen.txt"
    path.write_text("fire hydrant\n\n  dog\n")
    assert read_names(path) == ("fire hydrant", "dog")
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"seen\.txt: it names no class"):
        read_names(path)
    path.write_text("dog\ncat\ndog\n")
    with pytest.raises(ValueError, match=r"names a class twice: dog"):
        read_names(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_names(tmp_path / "none.txt")
