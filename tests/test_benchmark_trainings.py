"""The benchmarks of what is learned and kept, and their scenes, judges and runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tables
import torch
from benchmark_setup import PNG_MAGIC, Done, load, verdicts
from studies import judging, scenes, small_run

from ltrp_timm.teacher import MAETeacher
from ltrp_timm.train import Summary


def test_coverage_by_hand() -> None:
    module = load("coverage")
    scores = torch.arange(196.0).expand(1, -1)
    keep = torch.tensor([[0, 195]])
    pixels = torch.zeros(1, 196, 1)
    pixels[0, 0] = 1.0
    found = module.cover(keep, scores, pixels)
    assert found["empty_cells"].item() == pytest.approx(1 - 2 / 49)
    assert found["farthest"].item() == pytest.approx(13.0)
    assert found["unlike"].item() == pytest.approx(0.0, abs=1e-3)  # all others are like the last
    assert found["score"].item() == pytest.approx((0.5 + 195.5) / (194.5 + 195.5))
    alone = module.cover(keep[:, :1], scores, pixels)
    assert alone["unlike"].item() == pytest.approx(255 * 195 / 196, rel=1e-4)


def test_coverage(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("coverage", "--keep-ratios", "0.25")
    assert done.files == ["coverage.csv", "coverage.md", "coverage.png"]
    assert done.png.startswith(PNG_MAGIC)
    rows = {row["method"]: row for row in done.rows}
    assert float(rows["stratified"]["empty_cells"]) == 0.0
    assert float(rows["mixed"]["unlike"]) < float(rows["top"]["unlike"])
    assert float(rows["top"]["score"]) == 1.0 > float(rows["mixed"]["score"])


def test_digits(run_benchmark: Callable[..., Done]) -> None:
    options = (
        "--depth",
        "1",
        "--scenes",
        "64",
        "--held-out",
        "20",
        "--first-epochs",
        "1",
        "--epochs",
        "1",
    )
    done = run_benchmark("finetune_digits", *options)
    assert done.files == [f"finetune_digits.{kind}" for kind in ("csv", "md", "png")]
    assert done.png.startswith(PNG_MAGIC)
    assert "No goal applies to these settings." in done.text  # nor may it: the model is cut
    cases = [(m, r) for r in ("0.5", "0.25") for m in ("contrast", "learned", "random", "gate")]
    assert done.cells("method", "keep_ratio") == [("full", "1.0"), *cases]
    rows = {(row["method"], row["keep_ratio"]): row for row in done.rows}
    for (method, ratio), row in rows.items():
        gap = float(row["top1"]) - float(rows["full", "1.0"]["top1"])
        assert float(row["over_full"]) == pytest.approx(gap, abs=1e-4)
        if method != "full":
            gap = float(row["top1"]) - float(rows["random", ratio]["top1"])
            assert float(row["over_random"]) == pytest.approx(gap, abs=1e-4)


def test_goals_of_digits() -> None:
    quarter = {"method": "contrast", "keep_ratio": 0.25, "img_size": 64}
    assert verdicts("finetune_digits", {**quarter, "over_random": 0.1}) == ["met"]
    assert verdicts("finetune_digits", {**quarter, "over_random": 0.09}) == ["not met"]
    half = {"method": "contrast", "keep_ratio": 0.5, "img_size": 64}
    assert verdicts("finetune_digits", {**half, "over_full": -0.03}) == ["met"]
    assert verdicts("finetune_digits", {**half, "over_full": -0.04}) == ["not met"]


def test_digits_in_clutter() -> None:
    images, labels = scenes.make_digit_scenes(30, seed=3, side=64)
    assert images.shape == (30, 3, 64, 64)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert len(set(labels.tolist())) > 6
    again, _ = scenes.make_digit_scenes(30, seed=3, side=64)
    assert torch.equal(images, again)
    held, _ = scenes.make_digit_scenes(30, seed=3, side=64, held_out=True)
    assert not torch.equal(images, held)
    white = (images.amin(dim=1) > 0.8).flatten(1).float().mean(1)
    assert (white > 0.01).all()  # there is a digit in each


LEARNING = (
    "--depth",
    "1",
    "--scenes",
    "20",
    "--crops",
    "12",
    "--held-out",
    "4",
    "--draws",
    "2",
    "--seeds",
    "5",
)
LEARNING += ("--teacher-epochs", "2", "--ranker-epochs", "1", "--aggregates", "mean", "max")


def test_learning(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("learning", *LEARNING)
    assert done.files == ["learning.csv", "learning.md", "learning.png", "learning_maps.png"]
    assert done.png.startswith(PNG_MAGIC)
    assert "No goal applies to these settings." in done.text  # nor may it: the teacher is cut
    rows = {(row["images"], row["px"], row["aggregate"], row["method"]): row for row in done.rows}
    assert len(rows) == len(done.rows)
    free = ["contrast", "pixel_std", "gradient", "colour", "centre", "random"]
    inked = [("scenes", "128"), ("digits on photos", "128"), ("scenes", "224")]
    inked.append(("digits on photos", "224"))
    for aggregate in ("mean", "max"):
        own = f"conv, {aggregate}"
        for place in (*inked, ("photos", "128"), ("all", "")):
            names = [own, *free]
            names = ["teacher", *names] if place[1] == "128" else names
            names = names if place[0] == "photos" else [*names, "ink"]
            assert [key[3] for key in rows if key[:3] == (*place, aggregate)] == names
            measure = "object_auc" if place[0] != "photos" else "spearman"
            figures = {name: float(rows[(*place, aggregate, name)][measure]) for name in names}
            best = max(figures[name] for name in free)
            gain = float(rows[(*place, aggregate, own)][f"{measure}_gain"])
            assert gain == pytest.approx(figures[own] - best, abs=1e-4)
            if place[1] == "128":
                agreement = {n: float(rows[(*place, aggregate, n)]["spearman"]) for n in names}
                assert max(agreement, key=lambda name: agreement[name]) == "teacher"
        assert float(rows["all", "", aggregate, "ink"]["object_auc"]) == 1.0
        mean = sum(float(rows[(*place, aggregate, own)]["ink_kept"]) for place in inked) / 4
        assert float(rows["all", "", aggregate, own]["ink_kept"]) == pytest.approx(mean, abs=1e-4)
        assert rows["photos", "128", aggregate, "contrast"]["object_auc"] == ""
        assert rows["scenes", "224", aggregate, own]["spearman"] == ""
        above = [float(rows[(*place, aggregate, own)]["above_random"]) for place in inked]
        assert float(rows["all", "", aggregate, own]["above_random"]) == min(above)
    # the two teachers are not one: aggregates differ in what a score without weights is worth
    pair = [rows["scenes", "128", aggregate, "contrast"] for aggregate in ("mean", "max")]
    assert len({row["spearman"] for row in pair}) == 2
    assert len({row["ink_kept"] for row in pair}) == 1
    assert len({row["weights_sha256"] for row in done.rows}) == 3  # two rankers, and none


def test_goals_of_learning() -> None:
    conv = {"method": "conv, max", "images": "scenes", "px": 128, "map_spearman": 0.5}
    for gain, verdict in ((0.1, "met"), (0.09, "not met")):
        for images in ("scenes", "photos", "digits on photos"):
            row = {**conv, "images": images, "map_spearman_gain": gain}
            assert verdicts("learning", row) == [verdict]
    assert verdicts("learning", {**conv, "px": 224}) == []
    every = {"method": "conv, mean", "images": "all", "px": ""}
    good = {"above_random": 0.05, "object_auc_gain": 0.0, "ink_kept_gain": 0.0}
    assert verdicts("learning", {**every, **good}) == ["met"] * 3
    bad = {"above_random": 0.04, "object_auc_gain": -0.01, "ink_kept_gain": -0.01}
    assert verdicts("learning", {**every, **bad}) == ["not met"] * 3
    assert verdicts("learning", {**every, **good, "method": "contrast"}) == []


def test_judging_by_hand() -> None:
    ink = torch.tensor([[0.5, 0.1, 0.0, 0.0]])
    for scores, auc in (([4, 3, 2, 1], 1.0), ([1, 2, 3, 4], 0.0), ([4, 1, 2, 3], 0.5)):
        assert judging.object_auc(torch.tensor([scores]).float(), ink).item() == pytest.approx(auc)
    assert judging.object_auc(torch.zeros(1, 4), ink).item() == pytest.approx(0.5)
    assert judging.ink_kept(torch.tensor([[4.0, 1, 2, 3]]), ink, 0.5).item() == pytest.approx(5 / 6)
    lists = [(torch.tensor([[5.0, 7.0]]), torch.tensor([[3, 0]]))]
    lists += [(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 2]]))]
    found = judging.mean_map(lists, 4)
    assert found.tolist() == [[0.75, 0.75, 0.25, 0.25]]
    twice = judging.mean_map([*lists, (torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1]]))], 4)
    assert twice.tolist() == [[0.5, 0.75, 0.25, 0.25]]
    assert judging.agreement(found, lists).item() == pytest.approx(1.0)
    assert judging.agreement(torch.tensor([[0.0, 1, 0, 1]]), lists).item() == pytest.approx(0.0)


def test_what_is_found_and_how_it_is_ordered() -> None:
    ink = torch.tensor([[0.5, 0.2, 0.3, 0.05], [0.5, 0.2, 0.0, 0.0]])
    scores = torch.tensor([[3.0, 1, 2, 4], [1.0, 2, 3, 4]])
    assert judging.inked_among_kept(scores, ink, 0.5).tolist() == [0.5, 0.0]
    assert judging.ink_order(scores, ink).tolist() == [1.0]  # of the second two have ink: no order
    assert judging.ink_order(-scores, ink).tolist() == [-1.0]


def test_lists_of_a_draw_are_parts_of_the_grid() -> None:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16}
    teacher = MAETeacher(32, 8, **small, decoder_depth=1, decoder_num_heads=2)
    lists = judging.teacher_lists(teacher, torch.rand(2, 3, 32, 32), 0.75, "mean", draws=2, seed=0)
    assert [tuple(scores.shape) for scores, _ in lists] == [(2, 4)] * 8
    for draw in (lists[:4], lists[4:]):
        every = torch.cat([indices for _, indices in draw], dim=1).sort(dim=1).values
        assert torch.equal(every, torch.arange(16).expand(2, -1))
    assert not torch.equal(lists[0][1], lists[4][1])


def test_runs_of_other_images_are_refused(tmp_path: Path) -> None:
    small_run.write_images(torch.rand(3, 3, 8, 8), tmp_path, "scene")
    small_run.write_images(torch.rand(3, 3, 8, 8), tmp_path, "scene")
    with pytest.raises(SystemExit, match="has 1 images of another run"):
        small_run.write_images(torch.rand(2, 3, 8, 8), tmp_path, "scene")


def test_seconds_of_a_run_are_those_of_its_log(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "images_per_second": 20.0}, {"epoch": 2, "images_per_second": 5.0}]
    tables.write_csv(rows, tmp_path / "log.csv")
    done = Summary(tmp_path, 2, 8, {}, [], None)
    assert small_run._seconds(done, 10) == pytest.approx(2.5)
    with pytest.raises(SystemExit, match="was stopped; started again with the same --runs"):
        small_run._seconds(dataclasses.replace(done, stopped_by=15), 10)


def test_scenes_by_hand() -> None:
    images, ink = scenes.make_cluttered_scenes(40, seed=3, side=64)
    other = scenes.make_cluttered_scenes(40, seed=3, side=64, part=scenes.NEW_DIGITS)
    assert not torch.equal(ink, other[1])  # the same scenes, drawn of other digits
    assert images.shape == (40, 3, 64, 64)
    assert 0.0 <= float(images.min()) < 0.1 < 0.9 < float(images.max()) <= 1.0
    assert set(ink.unique().tolist()) == {0.0, 1.0}
    assert bool((ink.sum(dim=(1, 2)) > 0).all())
    again = scenes.make_cluttered_scenes(40, seed=3, side=64)
    assert torch.equal(images, again[0])
    assert not torch.equal(images, scenes.make_cluttered_scenes(40, seed=4, side=64)[0])
    # digits are cut by the border: no ranker is right for liking the middle
    border = torch.cat([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]])
    assert float(border.mean()) > 0.5 * float(ink.mean())
    # ink is of one colour in an image, texture is not
    inked = ink.unsqueeze(1).expand(-1, 3, -1, -1) > 0
    spread = [float(image[mask].std()) for image, mask in zip(images[:, :1], inked[:, :1])]
    assert sum(spread) / len(spread) < 0.5 * float(images[:, 0].flatten(1).std(dim=1).mean())
    crops = scenes.random_crops(("coins", "chelsea"), 4, seed=0, side=48)
    assert crops.shape == (4, 3, 48, 48)
    grey = [bool((crop[0] - crop[1]).abs().max() < 1e-6) for crop in crops]
    assert grey == [True, False, True, False]  # in turns


@pytest.mark.benchmarks
def test_one_epoch_with_a_coarse_rest(run_benchmark: Callable[..., Done]) -> None:
    short = ("--scenes", "64", "--held-out", "20", "--first-epochs", "1", "--seeds", "0", "1")
    done = run_benchmark("coarse_digits", "--depth", "1", *short)
    methods = ["full", "drop", "dithered", "coarse", "smaller image"]
    seeds = [seed for seed in ("0", "1", "mean") for _ in methods]
    assert done.cells("method", "seed") == list(zip(methods * 3, seeds))
    rows = {(row["method"], row["seed"]): float(row["top1"]) for row in done.rows}
    assert rows["coarse", "mean"] == pytest.approx((rows["coarse", "0"] + rows["coarse", "1"]) / 2)
    coarse = next(row for row in done.rows if (row["method"], row["seed"]) == ("coarse", "1"))
    gap = rows["coarse", "1"] - rows["drop", "1"]
    assert float(coarse["over_drop"]) == pytest.approx(gap, abs=1e-4)
