import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

from ltrp_timm import LTRPModel, drop_patches, num_keep
from ltrp_timm._text import printable
from ltrp_timm.visualize import (
    keeping,
    kept_patches,
    load_image,
    overview,
    score_map,
    stack_rows,
    to_image,
    to_tensor,
)

SIZE = (60, 40)  # width, height


def photo() -> Image.Image:
    """Upper left red, then smooth ramps: every turn and every mode shows."""
    y, x = np.mgrid[0:40, 0:60].astype(float)
    pixels = np.stack([255 - 3 * y - x, 2 * x + y, 4 * y], axis=-1).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def mean(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float).mean((0, 1))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand: what its header says need not be true."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def model() -> LTRPModel:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=64)
    return drop_patches(vit.eval(), keep_ratio=0.5)


# Files that simply work.


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [
        ("RGB", "a.png", 0),
        ("RGB", "a.jpg", 3),
        ("CMYK", "a.jpg", 3),
        ("CMYK", "a.tif", 0),
        ("P", "a.png", 6),
        ("P", "a.gif", 6),
        ("YCbCr", "a.tif", 2),
    ],
)
def test_colours_survive_every_mode(tmp_path: Path, mode: str, name: str, tolerance: float) -> None:
    file = tmp_path / name
    # Pillow 12.3 cannot read the uncompressed YCbCr that it writes
    photo().convert(mode).save(
        file, **({"compression": "tiff_lzw"} if file.suffix == ".tif" else {})
    )
    image = load_image(file)
    assert image.mode == "RGB"
    assert image.size == SIZE
    assert np.abs(mean(image) - mean(photo())).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_keeps_its_brightness(tmp_path: Path, mode: str) -> None:
    photo().convert(mode).save(tmp_path / "grey.png")
    image = load_image(tmp_path / "grey.png")
    channels = np.asarray(image)
    assert image.mode == "RGB"
    assert (channels == channels[..., :1]).all()
    assert np.abs(mean(image) - mean(photo().convert("L").convert("RGB"))).max() <= 3


def wide_grey(scale: float, dtype: type) -> np.ndarray:
    return (np.asarray(photo().convert("L")).astype(np.float64) * scale).astype(dtype)


@pytest.mark.parametrize(
    ("scale", "dtype", "name"),
    [
        (257, np.uint16, "sixteen.png"),
        (257, np.uint16, "sixteen.tif"),
        (257, np.int32, "int.tif"),
        (1, np.int32, "small_int.tif"),
        (1 / 255, np.float32, "unit.tif"),
        (1, np.float32, "bytes.tif"),
    ],
)
def test_many_bits_are_scaled_not_clipped(
    tmp_path: Path, scale: float, dtype: type, name: str
) -> None:
    values = wide_grey(scale, dtype)
    Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(load_image(tmp_path / name))[..., 0].astype(int)
    assert np.abs(found - np.asarray(photo().convert("L"))).max() <= 1


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / "dark.png")
    assert mean(load_image(tmp_path / "dark.png")).max() <= 1


def test_values_of_no_known_range_go_from_the_lowest_to_the_highest(tmp_path: Path) -> None:
    values = wide_grey(1e6, np.float32) - np.float32(5e7)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "any.tif")
    found = np.asarray(load_image(tmp_path / "any.tif"))
    assert found.min() == 0
    assert found.max() == 255


def test_a_sixteen_bit_pgm(tmp_path: Path) -> None:
    body = wide_grey(257, np.uint16).astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 60 40 65535\n" + body)
    found = np.asarray(load_image(tmp_path / "a.pgm"))[..., 0].astype(int)
    assert np.abs(found - np.asarray(photo().convert("L"))).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_stands_on_white(tmp_path: Path, mode: str) -> None:
    image = photo().convert(mode)
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (0, 0, 30, 40))
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    found = np.asarray(load_image(tmp_path / "a.png"))
    opaque = np.asarray(photo().convert(mode).convert("RGB"))
    assert (found[:, :30] == 255).all()
    assert (found[:, 30:] == opaque[:, 30:]).all()


def test_a_transparent_palette_colour_stands_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (2, 0, 4, 2))
    image.save(tmp_path / "p.png", transparency=0)
    found = np.asarray(load_image(tmp_path / "p.png"))
    assert (found[:, :2] == 255).all()
    assert (found[:, 2:] == (200, 100, 50)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / name, exif=exif)
    image = load_image(tmp_path / name)
    assert image.size == (SIZE if orientation < 5 else SIZE[::-1])
    with Image.open(tmp_path / name) as opened:
        expected = ImageOps.exif_transpose(opened)
    assert image.tobytes() == expected.tobytes()


def test_a_damaged_exif_block_is_no_reason_to_refuse(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    start = data.index(b"Exif\0\0") + 10
    (tmp_path / "a.jpg").write_bytes(data[:start] + b"\xff" * 12 + data[start + 12 :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "a.jpg").mode == "RGB"


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    photo().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", SIZE, "blue")])
    assert np.abs(mean(load_image(tmp_path / name)) - mean(photo())).max() <= 8


# Files that cannot be shown: one line with the name and the reason.


def half(name: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format=name)
    return file.getvalue()[: file.tell() // 2]


BAD_FILES = {
    "empty.jpg": (b"", "empty"),
    "text.png": (b"this is text\n", "not an image"),
    "cut.jpg": (half("JPEG"), "truncated"),
    "cut.png": (half("PNG"), "truncated"),
    "cut.gif": (half("GIF"), "truncated"),
    "cut.bmp": (half("BMP"), "truncated"),
    "header.png": (png(9, 9, 8, 2, b"")[:20], "cannot be read"),
    "bomb.png": (png(60000, 60000, 8, 2, b"\0" * 99), "decompression bomb"),
    "half_a_bomb.png": (png(10000, 10000, 8, 2, b"\0" * 99), "decompression bomb"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_value_error_of_one_line(tmp_path: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_image(tmp_path / name)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / name}: ")
    assert len(text.splitlines()) == 1


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a directory"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match=r"missing\.png: No such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="No such file"):
        load_image(tmp_path / "dangling.png")
    with pytest.raises(ValueError, match="not a regular file"):  # and it does not wait for a writer
        load_image(tmp_path / "pipe")
    with pytest.raises(ValueError, match="null byte"):
        load_image("a\0.png")


def test_a_name_of_two_lines_is_shown_on_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two\\nlines\.png: No such file"):
        load_image(tmp_path / "two\nlines.png")
    assert printable(os.fsdecode(b"\xff.png")) == r"\udcff.png"


# To the model and back.


def test_what_is_shown_is_what_the_model_sees(model: LTRPModel, tmp_path: Path) -> None:
    x = to_tensor(photo(), model)
    photo().save(tmp_path / "photo.png")
    assert torch.equal(to_tensor(tmp_path / "photo.png", model), x)
    assert x.shape == (1, 3, 64, 64)  # img_size=64, though the cfg says 224
    assert x.dtype == torch.float32
    mean_, std = (model.pretrained_cfg[key] for key in ("mean", "std"))
    assert x.min() >= -mean_[0] / std[0] - 1e-6
    shown = to_image(x, model)
    assert shown.size == (64, 64)
    again = torch.from_numpy(np.asarray(shown).copy()).permute(2, 0, 1) / 255.0
    again = (again - torch.tensor(mean_).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(again, x[0], atol=1e-6)


def test_normalisation_is_that_of_the_model() -> None:
    clip = timm.create_model("vit_base_patch16_clip_224", depth=1, embed_dim=24, num_heads=2)
    other = drop_patches(clip)
    white = Image.new("RGB", (300, 300), "white")
    x = to_tensor(white, other)
    expected = [
        (1 - m) / s for m, s in zip(clip.pretrained_cfg["mean"], clip.pretrained_cfg["std"])
    ]
    assert torch.allclose(x.amax((0, 2, 3)), torch.tensor(expected), atol=1e-4)
    assert np.asarray(to_image(x, other)).min() == 255


def test_pictures_that_cannot_go_to_the_model(model: LTRPModel) -> None:
    with pytest.raises(ValueError, match="1x5000 pixels, over 50 times longer than wide"):
        to_tensor(Image.new("RGB", (1, 5000)), model)
    grey = drop_patches(
        timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, in_chans=1)
    )
    with pytest.raises(ValueError, match=r"pictures have 3 channels, the model takes 1\."):
        to_tensor(photo(), grey)
    with pytest.raises(ValueError, match=r"expected one image \(1, 3, H, W\), got \[2, 3, 8, 8\]"):
        to_image(torch.zeros(2, 3, 8, 8), model)


def test_any_other_size_or_mode_of_picture_goes(model: LTRPModel) -> None:
    assert to_tensor(Image.new("RGB", (1, 1)), model).shape == (1, 3, 64, 64)
    assert to_tensor(Image.new("L", (1, 50)), model).shape == (1, 3, 64, 64)


# Pictures.


def cells(image: Image.Image, h: int, w: int) -> np.ndarray:
    """(h * w, pixels of a cell, 3), as integers."""
    pixels = np.asarray(image).astype(int)
    rows, cols = image.height // h, image.width // w
    return pixels.reshape(h, rows, w, cols, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, -1, 3)


def test_the_brightest_patch_has_the_highest_score() -> None:
    image = Image.new("RGB", (48, 32), (90, 90, 90))
    scores = torch.tensor([3.0, -7.0, 1e9, 0.5, 2.0, 4.0])
    brightness = cells(score_map(image, scores, (2, 3)), 2, 3).mean((1, 2))
    assert brightness.argsort().tolist() == scores.argsort().tolist()
    assert len(np.unique(brightness)) == 6  # ranks: the outlier does not flatten the others


def test_score_map_takes_every_shape_and_ties_share_a_colour() -> None:
    image = Image.new("RGB", (32, 32), "white")
    scores = torch.tensor([1.0, 2.0, 2.0, float("nan")])
    flat = score_map(image, scores, (2, 2))
    assert flat.size == image.size
    for shape in ((1, 4), (2, 2), (1, 2, 2)):
        assert score_map(image, scores.reshape(shape), (2, 2)).tobytes() == flat.tobytes()
    found = cells(flat, 2, 2).mean((1, 2))
    assert found[1] == found[2]
    assert found[3] < found[0] < found[1]
    constant = cells(score_map(image, torch.ones(4), (2, 2)), 2, 2)
    assert (constant == constant[0]).all()


def test_kept_patches_dims_exactly_the_dropped_ones() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    before, after = (
        cells(image, 2, 3),
        cells(kept_patches(image, torch.tensor([[1, 5]]), (2, 3)), 2, 3),
    )
    for patch in range(6):
        if patch in (1, 5):
            assert (after[patch] == before[patch]).all()
        else:
            assert (after[patch] == after[patch][:, :1]).all()  # grey
            assert after[patch].max() <= 100  # dark
            assert after[patch].min() > 0  # but never black
    everything = kept_patches(image, torch.arange(6), (2, 3))
    assert everything.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda im: score_map(im, torch.ones(5), (2, 2)), r"grid of 2x2 needs 4 scores, got \[5\]"),
        (lambda im: score_map(im, torch.ones(8).view(2, 4), (2, 2)), "needs 4 scores"),
        (lambda im: score_map(im, torch.ones(9), (3, 3)), "32x32 .* does not divide into 3x3"),
        (lambda im: score_map(im, torch.ones(0), (0, 2)), "does not divide into 0x2"),
        (lambda im: kept_patches(im, torch.tensor([4]), (2, 2)), r"in 0 … 3 .* got 4 … 4"),
        (lambda im: kept_patches(im, torch.tensor([-1, 0]), (2, 2)), r"got -1 … 0"),
        (lambda im: kept_patches(im, torch.tensor([0.5]), (2, 2)), "expected integers"),
        (lambda im: kept_patches(im, torch.zeros(2, 2, dtype=torch.long), (2, 2)), "expected int"),
        (lambda im: kept_patches(im, torch.tensor([0]), (3, 2)), "does not divide into 3x2"),
        (lambda im: stack_rows([]), "at least one"),
    ],
)
def test_sizes_that_do_not_match(call: Callable[[Image.Image], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(Image.new("RGB", (32, 32)))


def test_overview_shows_what_forward_encodes(model: LTRPModel) -> None:
    ratios = (0.75, 0.25)
    row = overview(photo(), model, ratios, captions=False)
    assert row.size == (4 * 224 + 3 * 8, 224)
    assert model.keep_ratio == 0.5
    x = to_tensor(photo(), model)
    seen = to_image(x, model)
    expected = [seen, score_map(seen, model.patch_scores(x), (4, 4))]
    for ratio in ratios:
        with keeping(model, ratio):
            keep = model.keep_indices(x)
        assert keep.shape == (1, num_keep(16, ratio))
        expected.append(kept_patches(seen, keep, (4, 4)))
    for i, picture in enumerate(expected):
        panel = row.crop((232 * i, 0, 232 * i + 224, 224))
        assert panel.tobytes() == picture.resize((224, 224), Image.Resampling.NEAREST).tobytes()


def test_overview_has_captions_and_a_width_for_a_page(model: LTRPModel) -> None:
    plain, captioned = (overview(photo(), model, captions=flag) for flag in (False, True))
    assert captioned.width == plain.width <= 1400
    strip = captioned.crop((0, 0, captioned.width, captioned.height - plain.height))
    assert strip.height > 10
    for i in range(5):  # there is ink above each picture
        assert np.asarray(strip.crop((232 * i, 0, 232 * i + 224, strip.height))).min() < 80


def test_overview_of_a_size_that_patches_do_not_divide() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=(70, 300)
    )
    row = overview(photo(), drop_patches(vit), (0.5,), captions=False)
    assert row.size == (3 * 264 + 2 * 8, round(64 * 264 / 288))


def test_overview_puts_the_ratio_back_when_it_is_wrong(model: LTRPModel) -> None:
    with pytest.raises(ValueError, match="keep_ratio must be in"):
        overview(photo(), model, (0.3, 2.0))
    assert model.keep_ratio == 0.5


def test_rows_are_stacked() -> None:
    rows = [Image.new("RGB", (10, 4), "red"), Image.new("RGB", (6, 3), "blue")]
    out = stack_rows(rows)
    assert out.size == (10, 4 + 8 + 3)
    assert out.getpixel((0, 0)) == (255, 0, 0)
    assert out.getpixel((0, 12)) == (0, 0, 255)
    assert out.getpixel((9, 14)) == (255, 255, 255)
