import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from common import host_syncs, operators
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ltrp_timm import create_ranker, drop_patches, list_rankers, save_pretrained
from ltrp_timm.layers.bridge import InputBridge, resize_score_map
from ltrp_timm.rankers import ContrastRanker, RandomRanker, StatisticRanker
from ltrp_timm.rankers.weight_free import border_contrast, centre_distance, patch_statistics
from ltrp_timm.selection.rules import mean_rank

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4}


def small(name: str, **changes: Any) -> Any:
    own_net = name in ("attention", "cam", "feature_contrast", "grad_cam") or name.startswith("vit")
    args = {**SMALL, **changes} if own_net else changes
    if name.endswith("cam"):
        args["backbone"] = "vit_base_patch16_gap_224"
    if name == "feature_contrast":
        args.update(backbone="vit_base_patch16_224", blocks=1)
    return create_ranker(name, **args).eval()


@pytest.mark.parametrize("name", list_rankers())
@torch.no_grad()
def test_every_ranker_maps_images_to_the_patch_grid(name: str) -> None:
    ranker = small(name)
    images = torch.rand(3, 3, 64, 64)
    scores = ranker(images)
    assert scores.shape == (3, 4, 4)
    assert scores.isfinite().all()
    if name not in ("random", "centre"):  # each image is ranked alone
        alone = torch.cat([ranker(image[None]) for image in images])
        assert (alone - scores).abs().max() <= 1e-5
        assert not torch.equal(scores[0], scores[1])
    assert torch.equal(ranker(images), scores)


@pytest.mark.parametrize("name", ["border", "contrast", "conv", "random", "gradient"])
@torch.no_grad()
def test_free_rankers_take_any_size(name: str) -> None:
    assert small(name, patch_size=14)(torch.rand(1, 3, 70, 100)).shape == (1, 5, 7)
    assert small(name, patch_size=(8, 16))(torch.rand(1, 3, 64, 64)).shape == (1, 8, 4)
    with (
        pytest.raises(ValueError, match="smaller than a patch")
        if name != "conv"
        else (pytest.raises(RuntimeError))
    ):
        small(name)(torch.rand(1, 3, 8, 8))


def test_conv_ranker_is_small() -> None:
    ranker = small("conv")
    assert sum(parameter.numel() for parameter in ranker.parameters()) <= 200_000
    with torch.no_grad():
        names = operators(lambda: ranker(torch.rand(1, 3, 224, 224)))
    assert len(names) <= 56, names


@torch.no_grad()
def test_conv_sees_what_is_unlike_the_border() -> None:
    """A change far away, on the border, reaches a patch that no block connects with it."""
    images = torch.rand(1, 3, 480, 480)
    changed = images.clone()
    changed[..., :16, :16] = images[..., 240:256, 240:256]  # the middle is like a corner now
    for count, reached in ((0, False), (8, True)):
        ranker = create_ranker("conv", border_distances=count, depth=1).eval()
        nn.init.normal_(ranker.stem.weight)
        if count:
            nn.init.normal_(ranker.border.describe.weight)
            nn.init.normal_(ranker.border.add.weight)
        before, after = (ranker.blocks[0](ranker.border(ranker.stem(x))) for x in (images, changed))
        moved = (before - after).abs().amax(1)[0, 15, 15] > 1e-3
        assert bool(moved) is reached


@torch.no_grad()
def test_border_distances_by_hand() -> None:
    part = create_ranker("conv", width=4, border_distances=1).border
    part.describe.weight.copy_(torch.eye(4).reshape(4, 4, 1, 1))
    part.add.weight.fill_(1.0)
    x = torch.randn(2, 4, 5, 7)
    spread = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    inside = torch.zeros(5, 7, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    pairs = torch.cdist(spread.flatten(2).mT, spread[:, :, ~inside].mT)
    nearest = pairs.min(2).values.square().log1p().reshape(2, 1, 5, 7)
    assert nearest[:, 0, ~inside].max() < 1e-4
    assert nearest[:, 0, inside].min() > 1e-2
    assert torch.allclose(part(x), x + nearest, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 3, 16, 16), (2, 3, 16, 48), (2, 3, 48, 16)])
def test_conv_takes_the_smallest_grids(shape: tuple[int, ...]) -> None:
    ranker = create_ranker("conv")
    scores = ranker(torch.zeros(shape))
    assert scores.isfinite().all()
    scores.sum().backward()
    assert all(part.grad.isfinite().all() for part in ranker.parameters())


@torch.no_grad()
def test_conv_of_an_older_version_loads(tmp_path: Path) -> None:
    """It has no distances to the border, and its configuration does not name them."""
    older = create_ranker("conv", border_distances=0).eval()
    model = drop_patches(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64), older)
    model.ranker.trained = True
    older.save(tmp_path / "ranker")
    save_pretrained(model, tmp_path / "model")
    for file in (tmp_path / "ranker" / "config.json", tmp_path / "model" / "config.json"):
        text = file.read_text(encoding="utf-8")
        assert '"border_distances": 0,' in text
        file.write_text(text.replace('"border_distances": 0,', ""), encoding="utf-8")
    images = torch.rand(2, 3, 64, 64)
    (tmp_path / "ranker" / "model.safetensors").write_bytes(
        safetensors.torch.save(older.state_dict(), {"format": "pt"})
    )
    for source in (tmp_path / "ranker", tmp_path / "ranker" / "model.safetensors"):
        loaded = create_ranker("conv", pretrained=source).eval()
        assert torch.equal(loaded(images), older(images))
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(again.patch_scores(images), model.eval().patch_scores(images))


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(ValueError, match=r"ranker must be one of attention, .*got 'best'"):
        create_ranker("best")
    with pytest.raises(TypeError, match="not_an_argument"):
        create_ranker("conv", not_an_argument=1)
    with pytest.raises(ValueError, match="parts must be some of"):
        create_ranker("contrast", parts=("edges",))
    for weights in ({"std": 0.0}, {"std": float("nan")}, {"std": float("inf")}):
        with pytest.raises(ValueError, match="must be finite and not all 0"):
            create_ranker("contrast", parts=weights)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        create_ranker("conv", kernel_size=4)
    with pytest.raises(ValueError, match="border_distances must be at least 0, got -1"):
        create_ranker("conv", border_distances=-1)
    with pytest.raises(ValueError, match="expected a positive size"):
        create_ranker("contrast", patch_size=0)
    with pytest.raises(ValueError, match="the contrast ranker has no weights"):
        create_ranker("contrast", pretrained=True)
    with pytest.raises(ValueError, match="no published weights exist for the vit_small ranker"):
        create_ranker("vit_small", pretrained=True)


@pytest.mark.parametrize("name", ["conv", "vit_small"])
@torch.no_grad()
def test_save_and_load(name: str, tmp_path: Path) -> None:
    ranker, images = small(name), torch.rand(2, 3, 64, 64)
    ranker.save(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded = create_ranker(name, pretrained=source).eval()
        assert torch.equal(loaded(images), ranker(images))
        assert loaded.config() == ranker.config()
        assert loaded.trained
    assert not torch.equal(small(name)(images), ranker(images))  # other weights, other scores
    with pytest.raises(FileExistsError, match=r"already holds config\.json and model\.safetensors"):
        ranker.save(tmp_path)
    ranker.save(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    other = "vit_small" if name == "conv" else "conv"
    with pytest.raises(ValueError, match=f"holds a '{name}' ranker, not '{other}'"):
        create_ranker(other, pretrained=tmp_path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    ranker = small("conv")
    weights = ranker.state_dict()
    weights["extra"] = weights.pop("head.bias")
    weights["head.weight"] = torch.zeros(2, 64, 1, 1)
    broken = small("conv")
    broken.state_dict = lambda: weights
    broken.save(tmp_path)
    with pytest.raises(RuntimeError) as error:
        create_ranker("conv", pretrained=tmp_path)
    for line in (
        "missing     head.bias",
        "unexpected  extra",
        "mismatched  head.weight: [2, 64, 1, 1]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_unreadable_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        create_ranker("conv", pretrained=path)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        create_ranker("conv", pretrained=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        create_ranker("conv", pretrained=tmp_path / "nowhere.safetensors")
    small("conv").save(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_bytes(content or b"[]")
    with pytest.raises(ValueError, match="the configuration in"):
        create_ranker("conv", pretrained=tmp_path / "good")


def test_mean_rank_shares_ties() -> None:
    ranks = mean_rank(torch.tensor([[3.0, 1.0, 3.0, 7.0]]))
    assert torch.allclose(ranks, torch.tensor([[4.0, 1.0, 4.0, 7.0]]) / 8)


def test_patch_statistics_by_hand() -> None:
    images = torch.rand(2, 3, 33, 50)
    mean, variance = patch_statistics(images, (16, 16), 2, 3)
    patch = images[1, :, 16:32, 32:48]
    assert torch.allclose(mean[1, :, 1, 2], patch.mean((1, 2)))
    assert torch.allclose(variance[1, :, 1, 2], patch.var((1, 2), unbiased=False))


def test_border_contrast_by_hand() -> None:
    mean = torch.zeros(1, 3, 3, 3)
    mean[0, :, 1, 1] = torch.tensor([3.0, 4.0, 0.0])
    expected = torch.tensor([[[0, 0, 0], [0, 5.0, 0], [0, 0, 0]]])
    assert torch.allclose(border_contrast(mean), expected)
    mean = torch.rand(2, 3, 4, 5)
    ring = torch.ones(4, 5, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    border = mean[:, :, ring].mean(2)[:, :, None, None]
    assert torch.allclose(border_contrast(mean), (mean - border).norm(dim=1), atol=1e-6)
    assert border_contrast(mean[:, :, :1]).isfinite().all()  # a single row is all border


@pytest.mark.parametrize(("h", "w"), [(14, 14), (7, 5), (1, 9)])
def test_centre_is_symmetric_and_central(h: int, w: int) -> None:
    distance = centre_distance(h, w, torch.device("cpu"))[0]
    assert torch.equal(distance, distance.flip(0))
    assert torch.equal(distance, distance.flip(1))
    assert distance.argmin() in ((h // 2) * w + w // 2, ((h - 1) // 2) * w + (w - 1) // 2)


@pytest.mark.parametrize(("rows", "cols", "size"), [(3, 5, 7), (9, 4, 6), (12, 15, 8)])
def test_border_is_what_its_docstring_says(rows: int, cols: int, size: int) -> None:
    """Patch by patch and neighbour by neighbour."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, rows * size, cols * size, generator=generator)
    pixels, side = image[0], size
    if size == 8:  # seen in half size
        pixels = pixels.unflatten(2, (-1, 2)).mean(3).unflatten(1, (-1, 2)).mean(2)
        side = 4
    around = torch.nn.functional.unfold(pixels.mean(0)[None, None], 3, padding=1)
    near = torch.nn.functional.unfold(torch.ones(1, 1, *pixels.shape[1:]), 3, padding=1)
    blurred = (around.sum(1) / near.sum(1)).view(pixels.shape[1:])
    detail = (pixels.mean(0) - blurred).abs()
    described = {}
    for row, col in itertools.product(range(rows), range(cols)):
        place = (slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side))
        patch = pixels[:, place[0], place[1]].flatten(1)
        mean, spread = patch.mean(1), patch.var(1, correction=0).mean().sqrt()
        values = [mean.mean()[None], mean - mean.mean(), spread[None], detail[place].mean()[None]]
        described[row, col] = torch.cat(values)
    spread = torch.stack(list(described.values())).std(0, correction=0)
    described = {place: values / spread for place, values in described.items()}
    border = [v for (r, c), v in described.items() if r in (0, rows - 1) or c in (0, cols - 1)]
    nearest, to_mean = torch.zeros(2, rows, cols)
    for place, values in described.items():
        nearest[place] = sum(sorted(float((values - one).norm()) for one in border)[:3]) / 3
        to_mean[place] = (values - torch.stack(border).mean(0)).norm()
    weight = min(1.0, max(0.0, (min(rows, cols) - 8) / 6))
    around = torch.zeros(rows, cols)
    for row, col in described:
        around[row, col] = nearest[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2].mean()
    nearest += weight * (around - nearest)
    parts = ((nearest, 1.0), (to_mean, 0.4), (centre_distance(rows, cols, image.device)[0], -0.4))
    expected = sum(mean_rank(part.reshape(1, -1)) * weight for part, weight in parts)
    found = create_ranker("border", patch_size=size)(image).flatten(1)
    assert (found - expected).abs().max() <= 2.0 / (rows * cols)  # a few near-ties


def test_border_finds_what_no_part_of_the_border_is_like() -> None:
    """Sky above, grass below: the border's mean colour is that of the object."""
    images = torch.rand(1, 3, 112, 112) * 0.02
    images[:, 2, :56] += 0.9
    images[:, 1, 56:] += 0.9
    images[:, 1:, 48:80, 32:64] = 0.45  # rows 3-4, columns 2-3 of a 7x7 grid
    best = {
        name: sorted(create_ranker(name)(images).flatten(1).topk(4).indices[0].tolist())
        for name in ("border", "contrast")
    }
    assert best["border"] == [23, 24, 30, 31]
    assert best["contrast"] != best["border"]


def test_border_ties_on_flat_patches() -> None:
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    scores = create_ranker("border")(0.5 + 1e-6 * noise)
    assert torch.equal(scores, scores.flip(1))
    assert torch.equal(scores, scores.flip(2))
    assert create_ranker("border")(noise.fill_(torch.nan)).isfinite().all()


@pytest.mark.filterwarnings("ignore:std\\(\\)")  # of no images
def test_border_takes_an_empty_batch_on_a_fine_grid() -> None:
    assert create_ranker("border", patch_size=8)(torch.rand(0, 3, 96, 96)).shape == (0, 12, 12)


def test_contrast_finds_the_object() -> None:
    images = torch.full((1, 3, 112, 112), 0.7)
    images[:, :, 32:64, 48:80] = torch.rand(1, 3, 32, 32)  # rows 2-3, columns 3-4 of a 7x7 grid
    for parts in (("std",), ("colour",), ("std", "colour", "centre")):
        scores = create_ranker("contrast", parts=parts)(images).flatten(1)
        assert sorted(scores.topk(4).indices[0].tolist()) == [17, 18, 24, 25]


@pytest.mark.parametrize("grey", [0.0, 0.1, 0.37, 0.733, 1.0])
def test_flat_patches_tie(grey: float) -> None:
    """Noise of rounding must not rank a flat background from top left to bottom right."""
    images = ((torch.full((2, 3, 96, 96), grey) - 0.456) / 0.224) * 0.224 + 0.456
    scores = create_ranker("contrast", parts=("std", "colour"))(images)
    assert (scores == scores[0, 0, 0]).all()
    centred = create_ranker("contrast")(images)
    assert torch.equal(centred, centred.flip(1))
    assert torch.equal(centred, centred.flip(2))


def test_contrast_parts_are_weighted() -> None:
    images = torch.rand(2, 3, 64, 64)
    one, two, three = (
        create_ranker("contrast", parts={part: 1.0})(images) for part in ("std", "colour", "centre")
    )
    assert torch.allclose(create_ranker("contrast")(images), one + two + 0.7 * three, atol=1e-6)


def test_contrast_survives_nan_and_half_precision() -> None:
    images = torch.rand(1, 3, 64, 64)
    expected = ContrastRanker()(images)
    assert (ContrastRanker()(images.bfloat16()) - expected).abs().mean() < 0.1
    images[0, 0, 0, 0] = torch.nan
    scores = ContrastRanker(parts=("std",))(images)
    assert scores.isfinite().all()
    assert scores.argmin() == 0


def test_random_ranker() -> None:
    images = torch.rand(2, 3, 64, 64)
    ranker = RandomRanker()
    assert torch.equal(ranker(images)[0], ranker(images)[1])
    assert not torch.equal(ranker(images), RandomRanker(seed=1)(images))
    ranker.generator = torch.Generator().manual_seed(0)
    assert not torch.equal(ranker(images), ranker(images))


def test_bridge_converts_normalisation_and_size() -> None:
    pixels = torch.rand(2, 3, 48, 48)
    source = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    target = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in source)
    new_mean, new_std = (torch.tensor(values).view(1, 3, 1, 1) for values in target)
    out = InputBridge(source, target)((pixels - mean) / std)
    assert torch.allclose(out, (pixels - new_mean) / new_std, atol=1e-5)
    assert InputBridge(source, target, img_size=(32, 64))(pixels).shape == (2, 3, 32, 64)
    assert not list(InputBridge(source, target).state_dict())


def test_bridge_refuses_statistics_of_another_length() -> None:
    with pytest.raises(ValueError, match="mean and std need 1, 3 or 5 values, got 2"):
        InputBridge(((0.5, 0.5), (0.5,)), ((0.0,), (1.0,)), in_chans=5)


def test_visible_patches_are_forgotten_after_an_error() -> None:
    ranker, images = small("vit_tiny"), torch.rand(1, 3, 64, 64)
    expected = ranker.forward_features(images)
    with pytest.raises(AssertionError):
        ranker(torch.rand(1, 3, 32, 64), visible_indices=torch.tensor([[0, 1]]))
    assert torch.equal(ranker.forward_features(images), expected)


def test_bridge_leaves_the_meta_device() -> None:
    with torch.device("meta"):
        bridge = InputBridge(((0.5,), (0.5,)), ((0.0,), (1.0,)))
    bridge = bridge.to_empty(device="cpu")
    bridge.init_non_persistent_buffers()
    assert torch.allclose(bridge(torch.zeros(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 0.5))


def test_score_maps_shrink_with_antialias() -> None:
    scores = torch.zeros(1, 8, 8)
    scores[0, 0, 0] = 1.0  # without antialias bilinear sampling at a quarter of the size skips it
    small = resize_score_map(scores, 2, 2)
    wanted = nn.functional.interpolate(scores[None], (2, 2), mode="bilinear", antialias=True)
    assert torch.equal(small, wanted[0].flatten(1))
    assert small[0, 0] > 0.0


def test_flat_patches_tie_whatever_the_rounding_noise() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = 0.5 + 1e-6 * noise
    scores = create_ranker("contrast", parts=("std", "colour"))(flat)
    assert len(scores.unique()) == 1
    textured = create_ranker("contrast", parts=("std", "colour"))(0.5 + 0.1 * noise)
    assert len(textured.unique()) > 1


def test_score_map_is_resized_to_the_grid() -> None:
    scores = torch.arange(16.0).reshape(1, 4, 4)
    assert torch.equal(resize_score_map(scores, 4, 4), scores.flatten(1))
    small_map = resize_score_map(scores, 2, 2)
    assert small_map.shape == (1, 4)
    assert small_map[0].argsort().tolist() == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"must return a score map \(B, h, w\), got shape \[1, 16\]"
    ):
        resize_score_map(scores.flatten(1), 4, 4)


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "deit"])
def test_scores_do_not_depend_on_the_backbones_normalisation(
    backbone_of: Callable[..., Any], family: str
) -> None:
    backbone, _ = backbone_of(family)
    pixels = torch.rand(2, 3, 96, 96)
    mean, std = (
        torch.tensor(backbone.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std")
    )
    images = (pixels - mean) / std
    model = drop_patches(backbone, "contrast")
    assert torch.allclose(
        model.patch_scores(images), ContrastRanker()(pixels).flatten(1), atol=0.05
    )
    ranker = create_ranker("conv", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    ranker.trained = True
    model = drop_patches(model.restore(), ranker=ranker)
    wanted = (pixels - torch.tensor(ranker.mean).view(1, 3, 1, 1)) / torch.tensor(ranker.std).view(
        1, 3, 1, 1
    )
    assert torch.allclose(model.patch_scores(images), ranker(wanted).flatten(1), atol=1e-4)


@torch.no_grad()
def test_a_ranker_of_another_size_and_grid(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("dinov3")  # 96 px, 6x6
    ranker = small("vit_tiny")  # 64 px, 4x4
    ranker.trained = True
    seen: list[Tensor] = []
    ranker.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scores = drop_patches(backbone, ranker=ranker).patch_scores(images)
    assert seen[0].shape == (3, 3, 64, 64)
    assert scores.shape == (3, 36)


@pytest.mark.parametrize("name", ["contrast", "conv"])
@torch.no_grad()
def test_a_ranker_may_look_at_a_size_of_its_own(
    backbone_of: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    backbone, images = backbone_of("dinov3")  # 96 px, 6x6
    model = drop_patches(backbone, ranker=name, ranker_args={"img_size": (32, 64)}, keep_ratio=0.5)
    model.ranker.trained = True
    seen: list[Tensor] = []
    model.ranker.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scores = model.patch_scores(images)
    assert seen[0].shape == (3, 3, 32, 64)
    # resizing and normalising change places: each keeps a constant image constant
    cfg = backbone.pretrained_cfg
    mean, std = (torch.tensor(cfg[part]).view(1, 3, 1, 1) for part in ("mean", "std"))
    pixels = nn.functional.interpolate(
        images * std + mean, (32, 64), mode="bilinear", antialias=True
    )
    if name == "conv":
        mean, std = (
            torch.tensor(part).view(1, 3, 1, 1)
            for part in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        pixels = (pixels - mean) / std
    assert torch.allclose(seen[0], pixels, atol=1e-5)
    expected = resize_score_map(model.ranker(seen[0]), 6, 6)
    assert torch.equal(scores, expected)
    assert model(images).isfinite().all()
    model.set_input_size(img_size=128)
    assert model.patch_scores(torch.randn(1, 3, 128, 128)).shape == (1, 64)
    assert seen[-1].shape == (1, 3, 32, 64)
    args = model._model_args["ranker_args"]
    assert args == json.loads(json.dumps(args))
    assert create_ranker(name, **args).img_size == (32, 64)
    if name == "conv":
        model.ranker.save(tmp_path)
        assert create_ranker(name, pretrained=tmp_path).img_size == (32, 64)


@pytest.mark.parametrize("name", ["contrast", "conv"])
def test_a_size_that_holds_no_patch_is_refused(name: str) -> None:
    assert create_ranker(name, img_size=224).img_size == (224, 224)
    assert create_ranker(name).img_size is None
    with pytest.raises(ValueError, match=r"img_size must hold a patch of \(16, 16\), got 8"):
        create_ranker(name, img_size=8)
    with pytest.raises(ValueError, match="expected a positive size"):
        create_ranker(name, img_size=(224, 224, 3))


class Brightness(nn.Module):
    """A ranker of somebody else's: it declares nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16).squeeze(1)


def test_any_module_is_a_ranker(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, ranker=Brightness())
    expected = Brightness()(images).flatten(1).topk(18).indices.sort(1).values
    assert torch.equal(model.keep_indices(images), expected)
    for output in (
        lambda x: x,
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.flatten(1),
        lambda x: (x[:, 0], x[:, 1]),
        lambda x: x[:, 0].numpy(),
        lambda x: x[:, 0].cfloat(),
        lambda x: x[:, 0, :0],
    ):
        wrong = nn.Module()
        wrong.forward = output
        model = drop_patches(model.restore(), ranker=wrong)
        with pytest.raises(ValueError, match=r"a ranker must return a score map \(B, h, w\)"):
            model(images)
    wrong = nn.Module()
    wrong.forward = lambda x: x[:1, 0]
    with pytest.raises(ValueError, match="1 score maps for 3 images"):
        drop_patches(model.restore(), ranker=wrong)(images)


def test_an_untrained_ranker_warns_once(backbone_of: Callable[..., Any], tmp_path: Path) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, ranker="conv")
    with pytest.warns(UserWarning, match="conv ranker has no trained weights"):
        model(images)
    model(images)  # the second time would be an error here
    model.ranker.save(tmp_path)
    model = drop_patches(model.restore(), ranker="conv", ranker_weights=tmp_path)
    model(images)  # warnings are errors here
    with pytest.raises(ValueError, match="go with a ranker's name"):
        drop_patches(model.restore(), ranker=model.ranker, ranker_weights=tmp_path)


@pytest.mark.parametrize("ranker", ["border", "contrast", "conv", "random"])
def test_operators_of_a_pruned_forward(ranker: str) -> None:
    """At most 1.30 times those of the plain ViT-B, more by distances to the border; no waits."""
    backbone = timm.create_model("vit_base_patch16_224", embed_dim=48, num_heads=2).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        plain = operators(lambda: backbone(images))
        model = drop_patches(backbone, ranker=ranker)
        model.ranker.trained = True
        pruned = operators(lambda: model(images))
        assert len(pruned) <= {"border": 1.36, "conv": 1.38}.get(ranker, 1.30) * len(plain)
        assert not host_syncs(pruned)
        assert host_syncs(operators(lambda: bool(images.sum() > 0)))  # it would be seen
    assert "aten.sort.stable" in pruned  # it did select


def test_statistics_by_hand() -> None:
    images = torch.rand(2, 3, 34, 50)  # the rest at the border does not count
    patches = images[:, :, :32, :48].reshape(2, 3, 2, 16, 3, 16)
    std = patches.var((3, 5), unbiased=False).mean(1).sqrt()
    assert torch.allclose(create_ranker("pixel_std")(images), std, atol=1e-6)
    cells = images[:, :, :32, :32].reshape(2, 3, -1).var(2, unbiased=False).mean(1).sqrt()
    found = create_ranker("cell_std")(images)
    assert torch.allclose(found[:, :, :2], cells[:, None, None].expand(2, 2, 2), atol=1e-6)
    edge = images[:, :, :32, 32:48].reshape(2, 3, -1).var(2, unbiased=False).mean(1).sqrt()
    assert torch.allclose(found[:, :, 2], edge[:, None].expand(2, 2), atol=1e-6)
    colour = border_contrast(patches.mean((3, 5)))
    assert torch.allclose(create_ranker("colour")(images), colour, atol=1e-6)
    steps = torch.zeros(1, 1, 16, 32)
    steps[:, :, :8, 3] = 0.5  # 2 x 8 steps to the right, one of them down too, one down alone
    lengths = 0.5 * (2 * 8 - 1 + 2**0.5) / 256
    assert create_ranker("gradient")(steps).flatten().tolist() == pytest.approx([lengths, 0.0])
    centre = create_ranker("centre", patch_size=8)(images)
    rows, cols = torch.tensor([-3.0, -1, 1, 3]) / 4, torch.tensor([-5.0, -3, -1, 1, 3, 5]) / 6
    away = rows.square().view(4, 1) + cols.square()
    assert torch.allclose(centre, -away.expand(2, -1, -1), atol=1e-6)
    assert torch.equal(centre_distance(4, 6, images.device)[0], (away * 24**2).round())
    with pytest.raises(ValueError, match=r"statistic must be one of pixel_std.*got 'edges'"):
        StatisticRanker("edges")


@pytest.mark.parametrize("name", ["pixel_std", "cell_std", "gradient", "colour"])
def test_statistics_compare_between_images(name: str) -> None:
    """Twice the contrast is twice the score; ranks within an image would not tell."""
    images = torch.rand(1, 3, 64, 64) * 0.5
    ranker = create_ranker(name)
    assert torch.allclose(ranker(2 * images), 2 * ranker(images), atol=1e-6)
    assert ranker(torch.full((1, 3, 64, 64), 0.3)).abs().max() <= 1e-6
