"""Selections that cover the image, against the reference vectors and against plain loops."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ltrp_timm import dpc_knn, select_dithered, select_mixed, select_stratified, select_top
from ltrp_timm.selection import coverage
from ltrp_timm.selection.coverage import patch_pixels, squared_distances

DATA = load_file(Path(__file__).parent / "data" / "d_select_small.safetensors")


def pixels() -> Tensor:
    return patch_pixels(DATA["images"], (8, 8))


def test_patch_pixels_by_hand() -> None:
    images = torch.randn(2, 3, 35, 50)
    tokens = patch_pixels(images, (2, 3))
    patch = images[1, :, 17:34, 32:48]
    assert tokens.shape == (2, 6, 17 * 16 * 3)
    assert torch.equal(tokens[1, 5].sort().values, patch.flatten().sort().values)


def test_distances_by_hand() -> None:
    tokens = torch.randn(2, 10, 12) + 50.0
    exact = (tokens[:, :, None].double() - tokens[:, None].double()).square().mean(3)
    assert torch.allclose(squared_distances(tokens).double(), exact, atol=1e-4)
    assert (squared_distances(tokens).diagonal(dim1=1, dim2=2) == 0).all()
    published = DATA["dist_matrix"]  # its own diagonal is rounding, up to 2e-3
    assert torch.allclose(squared_distances(pixels()).sqrt(), published, atol=2e-3)
    off = ~torch.eye(64, dtype=torch.bool)
    assert torch.allclose(squared_distances(pixels()).sqrt()[:, off], published[:, off], atol=2e-5)


@pytest.mark.parametrize("k", [16, 32, 48])
def test_clusters_are_those_of_the_published_method(k: int) -> None:
    labels, centres = dpc_knn(pixels(), k)
    reference = DATA[f"k{k}_cluster"]
    same = labels.unsqueeze(2) == labels.unsqueeze(1)
    assert torch.equal(same, reference.unsqueeze(2) == reference.unsqueeze(1))
    sizes = torch.stack([row.bincount(minlength=k) for row in labels])
    assert torch.equal(sizes.sort().values, DATA[f"k{k}_cluster_size"].sort().values)
    assert torch.equal(labels.gather(1, centres), torch.arange(k).expand_as(centres))


@pytest.mark.parametrize("k", [16, 32, 48])
def test_mixed_keeps_the_published_ranked_part_and_the_largest_clusters(k: int) -> None:
    scores = DATA["scores"]
    keep = select_mixed(scores, k, pixels())
    labels, centres = dpc_knn(pixels(), k)
    for row in range(len(scores)):
        ranked = set(DATA[f"k{k}_ranked_part"][row].tolist())
        kept = set(keep[row].tolist())
        assert ranked <= kept
        assert len(kept) == k
        # plain Python over what is left: largest first, ties to the lower patch
        sizes = labels[row].bincount(minlength=k).tolist()
        left = [(-sizes[i], int(c)) for i, c in enumerate(centres[row]) if int(c) not in ranked]
        assert kept - ranked == {patch for _, patch in sorted(left)[: k - len(ranked)]}


@pytest.mark.parametrize("k", [16, 32, 48])
def test_mixed_is_the_published_selection_with_its_random_members(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random member of each cluster in place of our centre gives its patches."""
    labels, members = DATA[f"k{k}_cluster"], DATA[f"k{k}_representative"]
    for row in range(len(labels)):  # the member with the largest noise
        noise = DATA[f"k{k}_noise"][row]
        found = [noise.masked_fill(labels[row] != c, -1).argmax() for c in range(k)]
        assert torch.equal(torch.stack(found), members[row])
    monkeypatch.setattr(coverage, "dpc_knn", lambda *_: (labels, members))
    keep = select_mixed(DATA["scores"], k, pixels())
    sizes = DATA[f"k{k}_cluster_size"]
    for row in range(len(keep)):
        ranked = set(DATA[f"k{k}_ranked_part"][row].tolist())
        published = set(DATA[f"k{k}_cluster_part"][row].tolist())
        assert sorted(ranked | published) == DATA[f"k{k}_keep_sorted"][row].tolist()
        assert ranked | published == set(DATA[f"k{k}_keep"][row].tolist())
        chosen = set(keep[row].tolist()) - ranked
        of = {int(patch): int(size) for patch, size in zip(members[row], sizes[row])}
        assert sorted(of[patch] for patch in chosen) == sorted(of[patch] for patch in published)
        least = min(of[patch] for patch in chosen)  # equal sizes may be chosen otherwise
        assert {p for p in chosen if of[p] > least} == {p for p in published if of[p] > least}


def test_mixed_limits() -> None:
    scores, tokens = torch.rand(3, 20), torch.randn(3, 20, 6)
    assert select_mixed(scores, 1, tokens).shape == (3, 1)
    assert torch.equal(select_mixed(scores, 20, tokens), torch.arange(20).expand(3, -1))
    assert torch.equal(select_mixed(scores, 7, tokens, ratio=1.0), select_top(scores, 7))
    assert torch.equal(select_mixed(scores, 7, tokens, ratio=0.0), dpc_knn(tokens, 7)[1])
    assert torch.equal(select_mixed(scores, 9, tokens), select_mixed(scores, 9, tokens))
    flat = select_mixed(torch.zeros(1, 20), 5, torch.zeros(1, 20, 6))
    assert len(set(flat[0].tolist())) == 5
    for bad in ({"k": 0}, {"k": 21}, {"k": 5, "ratio": 1.1}, {"k": 5, "neighbours": 0}):
        with pytest.raises(ValueError, match=r"k = |ratio must be|k must be"):
            select_mixed(scores, tokens=tokens, **bad)


def test_each_image_is_clustered_alone() -> None:
    scores, tokens = DATA["scores"], pixels()
    together = select_mixed(scores, 20, tokens)
    alone = [select_mixed(s[None], 20, t[None]) for s, t in zip(scores, tokens)]
    assert torch.equal(together, torch.cat(alone))


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_stratified_against_a_plain_loop(
    h: int, w: int, cell: int, seed: int, data: st.DataObject
) -> None:
    n = h * w
    k = data.draw(st.integers(1, n))
    scores = torch.randint(0, 4, (2, n), generator=torch.Generator().manual_seed(seed)).float()
    for row, keep in zip(scores.tolist(), select_stratified(scores, k, (h, w), cell).tolist()):
        order = sorted(range(n), key=lambda i, row=row: (-row[i], i))
        best: dict[tuple[int, int], int] = {}
        for patch in order:
            best.setdefault((patch // w // cell, patch % w // cell), patch)
        first = sorted(best.values(), key=order.index)
        rest = [patch for patch in order if patch not in first]
        assert keep == sorted((first + rest)[:k])


def test_stratified_bad_input() -> None:
    with pytest.raises(ValueError, match="for a grid of 3x4"):
        select_stratified(torch.rand(1, 16), 4, (3, 4))
    with pytest.raises(ValueError, match="cell must be at least 1, got 0"):
        select_stratified(torch.rand(1, 12), 4, (3, 4), cell=0)


# Bayer's 4 x 4 matrix
PATTERN = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0, 0.25, 0.5, 2]),
    st.integers(0, 2**31),
    st.data(),
)
def test_dithered_against_a_plain_loop(
    h: int, w: int, strength: float, seed: int, data: st.DataObject
) -> None:
    n = h * w
    k = data.draw(st.integers(1, n))
    scores = torch.randint(0, 4, (2, n), generator=torch.Generator().manual_seed(seed)).float()
    for row, keep in zip(scores.tolist(), select_dithered(scores, k, (h, w), strength).tolist()):
        raised = []
        for i, score in enumerate(row):
            below, equal = sum(v < score for v in row), row.count(score)
            dots = round(strength * n * PATTERN[i // w % 4][i % w % 4] / 8)
            raised.append(2 * below + equal + dots)
        assert keep == sorted(sorted(range(n), key=lambda i: (-raised[i], i))[:k])


def test_dithered_thins_out_instead_of_ending_at_an_edge() -> None:
    ramp = torch.arange(16.0).repeat_interleave(16)[None]  # rows of a 16 x 16 grid
    kept = torch.zeros(256).index_fill(0, select_dithered(ramp, 128, (16, 16))[0], 1.0)
    in_bands = kept.view(4, 64).mean(dim=1)  # of four rows each
    assert in_bands.tolist() == [0.0, 0.25, 0.75, 1.0]  # the best 128 alone: 0, 0, 1, 1
    assert torch.equal(select_dithered(ramp, 128, (16, 16), 0.0), select_top(ramp, 128))
    # equal scores: an even pattern, not the upper half
    even = select_dithered(torch.zeros(1, 256), 64, (16, 16))[0]
    assert set((even // 16 % 2 * 2 + even % 2).tolist()) == {2}
    nothing = torch.tensor([[torch.nan, -torch.inf, 1.0, torch.inf]])
    assert select_dithered(nothing, 2, (1, 4), 0.0).tolist() == [[2, 3]]
    below_zero = torch.tensor([[torch.nan, -3.0, -2.0, -1.0]])
    assert select_dithered(below_zero, 3, (1, 4), 0.0).tolist() == [[1, 2, 3]]
    close = 1.0 + 1e-12 * torch.arange(4, dtype=torch.float64)  # equal in float32
    for scores in (close, (close * 1e12).long(), torch.arange(4.0).half()):
        assert select_dithered(scores[None], 2, (2, 2), 0.0).tolist() == [[2, 3]]


def test_dithered_bad_input() -> None:
    with pytest.raises(ValueError, match="for a grid of 3x4, got 16 scores"):
        select_dithered(torch.rand(1, 16), 4, (3, 4))
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength must be at least 0 and finite"):
            select_dithered(torch.rand(1, 12), 4, (3, 4), strength)


def test_they_cover_more_than_the_best_scores_do() -> None:
    """What they are for: fewer empty 2x2 cells than a plain top-K of clustered scores."""

    def empty_cells(keep: Tensor) -> float:
        cells = (keep // 8 // 2) * 4 + keep % 8 // 2
        return 16 - sum(len(set(row.tolist())) for row in cells) / len(cells)

    scores = torch.nn.functional.avg_pool2d(
        torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 5, 1, 2
    ).flatten(1)
    tokens = torch.randn(32, 64, 12, generator=torch.Generator().manual_seed(1))
    top = empty_cells(select_top(scores, 16))
    assert empty_cells(select_stratified(scores, 16, (8, 8))) == 0
    assert empty_cells(select_dithered(scores, 16, (8, 8))) < top
    assert empty_cells(select_mixed(scores, 16, tokens)) < top
