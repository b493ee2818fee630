import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltrp_timm import (
    PatchSelector,
    gather_patches,
    num_keep,
    scatter_patches,
    select_dithered,
    select_mixed,
    select_random,
    select_stratified,
    select_top,
)
from ltrp_timm.selection.registry import SELECTIONS
from ltrp_timm.selection.rules import (
    check_keep_indices,
    check_keep_ratio,
    keep_tokens,
    seeded_scores,
    validate_keep_indices,
)


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [
        (196, 0.5, 98),
        (196, 0.25, 49),
        (196, 0.75, 147),
        (196, 1.0, 196),
        (196, 0.001, 1),
        (5, 0.5, 3),
    ],
)
def test_num_keep(n: int, ratio: float, k: int) -> None:
    assert num_keep(n, ratio) == k


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, math.nan, math.inf, "0.5", None, True])
def test_keep_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got"):
        check_keep_ratio(ratio)


def test_select_top_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [3.0, 1.0, 2.0, 0.0]])
    assert select_top(scores, 1).tolist() == [[1], [0]]  # the tie goes to the lower index
    assert select_top(scores, 2).tolist() == [[1, 3], [0, 2]]
    assert select_top(scores, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_select_top_takes_nan_last_and_infinity_first() -> None:
    scores = torch.tensor([[math.nan, -math.inf, -1e38, math.inf, math.nan]])
    assert select_top(scores, 2).tolist() == [[2, 3]]
    assert select_top(scores, 3).tolist() == [[0, 2, 3]]  # NaN ties with -inf, lower index first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_select_top_dtypes(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0]], dtype=dtype)
    assert select_top(scores, 2).tolist() == [[1, 2]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 2**31), st.data())
def test_select_top_is_a_stable_sort(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (3, n), generator=generator).float()  # many ties
    expected = [
        sorted(sorted(range(n), key=lambda i, row=row: (-row[i], i))[:k]) for row in scores.tolist()
    ]
    assert select_top(scores, k).tolist() == expected


@pytest.mark.parametrize("k", [0, 5, -1])
def test_select_top_refuses_k(k: int) -> None:
    with pytest.raises(ValueError, match="expected scores"):
        select_top(torch.zeros(2, 4), k)


def test_select_random_is_a_function_of_seed_and_n() -> None:
    scores = torch.zeros(3, 50)
    first = select_random(scores, 20)
    assert torch.equal(first, select_random(torch.rand(3, 50), 20))
    assert (first == first[:1]).all()
    assert not torch.equal(first, select_random(scores, 20, seed=1))
    assert not torch.equal(first[:, :10], select_random(torch.zeros(3, 49), 20)[:, :10])


def test_select_random_with_a_generator_is_fresh_and_repeatable() -> None:
    scores = torch.zeros(3, 50)
    generator = torch.Generator().manual_seed(5)
    one, two = (select_random(scores, 20, generator) for _ in range(2))
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(one, select_random(scores, 20, torch.Generator().manual_seed(5)))


def test_seeded_scores_look_uniform() -> None:
    rows = torch.cat([seeded_scores(1, 196, seed, torch.device("cpu")) for seed in range(300)])
    assert rows.min() >= 0
    assert rows.max() < 1
    assert (rows.mean(0) - 0.5).abs().max() < 0.1  # no place is favoured over seeds
    assert (rows.mean(1) - 0.5).abs().max() < 0.1
    correlation = torch.corrcoef(rows.T)
    assert (correlation - torch.eye(196)).abs().mean() < 0.07  # 0.046 for independent draws
    assert all(len(row.unique()) == 196 for row in rows)


def test_gather_equals_indexing_and_torch_gather() -> None:
    tokens = torch.randn(3, 10, 4, requires_grad=True)
    keep = torch.stack([torch.randperm(10)[:6] for _ in range(3)])
    expected = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, 4))
    assert torch.equal(gather_patches(tokens, keep), expected)
    (weight,) = torch.autograd.grad(gather_patches(tokens, keep).square().sum(), tokens)
    (reference,) = torch.autograd.grad(expected.square().sum(), tokens)
    assert torch.equal(weight, reference)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_keep_tokens_keeps_the_prefix(prefix: int) -> None:
    tokens = torch.randn(2, prefix + 9, 4)
    keep = torch.tensor([[0, 3, 8], [1, 2, 5]])
    out = keep_tokens(tokens, keep, prefix)
    assert torch.equal(out[:, :prefix], tokens[:, :prefix])
    for row in range(2):
        assert torch.equal(out[row, prefix:], tokens[row, prefix + keep[row]])


def test_scatter_inverts_gather() -> None:
    tokens = torch.randn(2, 12, 4)
    keep = torch.tensor([[0, 5, 11], [2, 3, 4]])
    dense = scatter_patches(gather_patches(tokens, keep), keep, (3, 4))
    mask = torch.zeros(2, 12, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(dense[mask], tokens[mask])
    assert (dense[~mask] == 0).all()


def test_scatter_nearest_against_a_plain_loop() -> None:
    h, w = 4, 5
    keep = torch.tensor([[0, 7, 13, 19], [2, 3, 10, 11]])
    tokens = torch.randn(2, 4, 3)
    dense = scatter_patches(tokens, keep, (h, w), fill="nearest")
    for b in range(2):
        for place in range(h * w):
            y, x = divmod(place, w)
            distances = [(y - int(i) // w) ** 2 + (x - int(i) % w) ** 2 for i in keep[b]]
            assert torch.equal(dense[b, place], tokens[b, distances.index(min(distances))])


def test_scatter_refuses_an_unknown_fill() -> None:
    with pytest.raises(ValueError, match="fill must be one of zeros, nearest, got 'mean'"):
        scatter_patches(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), (1, 1), "mean")


def test_check_keep_indices() -> None:
    good = torch.zeros(2, 3, dtype=torch.long)
    check_keep_indices(good, 2, 4)
    with pytest.raises(TypeError, match=r"must be int64, got torch\.int32"):
        check_keep_indices(good.int(), 2, 4)
    for bad in (good[:1], good[0], torch.zeros(2, 5).long(), torch.zeros(2, 0).long()):
        with pytest.raises(ValueError, match=r"keep_indices must be \(B, K\)"):
            check_keep_indices(bad, 2, 4)


def test_validate_keep_indices() -> None:
    validate_keep_indices(torch.tensor([[0, 3], [3, 0]]), 4)
    with pytest.raises(ValueError, match="must lie in 0 … 3, got 0 … 4"):
        validate_keep_indices(torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match="must lie in"):
        validate_keep_indices(torch.tensor([[-1, 2]]), 4)
    with pytest.raises(ValueError, match="same patch twice"):
        validate_keep_indices(torch.tensor([[0, 1], [2, 2]]), 4)


def test_patch_selector() -> None:
    tokens, scores = torch.randn(2, 2 + 16, 8), torch.rand(2, 16)
    out, keep = PatchSelector(0.25, num_prefix_tokens=2)(tokens, scores)
    assert out.shape == (2, 2 + 4, 8)
    assert torch.equal(keep, select_top(scores, 4))
    assert torch.equal(out, keep_tokens(tokens, keep, 2))


def test_patch_selector_scripts() -> None:
    tokens, scores = torch.randn(2, 17, 8), torch.rand(2, 16)
    for selection in ("top", "random"):
        module = PatchSelector(0.5, selection=selection)
        assert torch.equal(torch.jit.script(module)(tokens, scores)[1], module(tokens, scores)[1])


def test_gather_refuses_another_batch() -> None:
    with pytest.raises(ValueError, match="must be of one batch"):
        gather_patches(torch.zeros(1, 16, 3), torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(IndexError):
        gather_patches(torch.zeros(2, 16, 3), torch.tensor([[15], [16]]))


def test_an_empty_batch() -> None:
    keep = select_top(torch.zeros(0, 16), 4)
    assert keep_tokens(torch.zeros(0, 17, 3), keep, 1).shape == (0, 5, 3)
    validate_keep_indices(keep, 16)


def test_patch_selector_bad_input() -> None:
    selector = PatchSelector(0.5)
    for bad in (-1.0, 7.0, math.nan):
        with pytest.raises(ValueError, match="keep_ratio must be in"):
            selector.keep_ratio = bad
        with pytest.raises(ValueError, match="keep_ratio must be in"):
            num_keep(16, bad)
    assert selector.keep_ratio == 0.5
    with pytest.raises(ValueError, match="scores must be"):
        PatchSelector()(torch.zeros(2, 17, 8), torch.zeros(2, 17))
    with pytest.raises(ValueError, match="num_prefix_tokens"):
        PatchSelector(num_prefix_tokens=-1)
    with pytest.raises(ValueError, match="selection must be one of"):
        PatchSelector(selection="best")


def test_selections_by_name_are_the_functions() -> None:
    scores, tokens = torch.rand(3, 20), torch.randn(3, 20, 6)
    by_hand = {
        "top": (None, select_top(scores, 10)),
        "random": ({"seed": 4}, select_random(scores, 10, seed=4)),
        "mixed": ({"ratio": 0.3}, select_mixed(scores, 10, tokens, 0.3)),
        "stratified": ({"cell": 3}, select_stratified(scores, 10, (4, 5), 3)),
        "dithered": ({"strength": 1}, select_dithered(scores, 10, (4, 5), 1.0)),
    }
    assert set(by_hand) == set(SELECTIONS)
    for name, (args, keep) in by_hand.items():
        layer = PatchSelector(0.5, 2, name, args)
        prefix = torch.randn(3, 2, 6)
        kept, found = layer(torch.cat([prefix, tokens], 1), scores, (4, 5))
        assert torch.equal(found, keep)
        assert torch.equal(kept[:, 2:], gather_patches(tokens, keep))
    assert len({tuple(keep.flatten().tolist()) for _, keep in by_hand.values()}) == 5


def test_options_of_a_selection() -> None:
    layer = PatchSelector(selection="mixed", selection_args={"ratio": 1})
    assert layer.selection_args == {"ratio": 1.0, "neighbours": 5, "pixels": 0}
    layer.selection_args = {"neighbours": 3}
    assert layer.selection_args == {"ratio": 0.7, "neighbours": 3, "pixels": 0}
    layer.selection = "mixed"  # the same one keeps its options
    assert layer.selection_args["neighbours"] == 3
    layer.selection = "stratified"
    assert layer.selection_args == {"cell": 2}
    assert "selection='stratified', selection_args={'cell': 2}" in repr(layer)
    with pytest.raises(TypeError, match="selection_args must be a mapping, got list"):
        layer.selection_args = [2]
    for name, args, words in (
        ("top", {"cell": 2}, "selection_args of 'top' are no options, got 'cell'"),
        ("mixed", {"cell": 2}, "are ratio, neighbours, pixels, got 'cell'"),
        ("mixed", {"ratio": 1.5}, "ratio must be a number from 0 to 1, got 1.5"),
        ("mixed", {"ratio": math.nan}, "ratio must be a number from 0 to 1, got nan"),
        ("stratified", {"cell": 0}, "cell must be a whole number from 1 to"),
        ("stratified", {"cell": 2.5}, "cell must be a whole number"),
        ("dithered", {"strength": -1}, "strength must be a number from 0 to 16, got -1"),
        ("random", {"seed": "a"}, "seed must be a whole number"),
        (
            "best",
            {},
            "selection must be one of top, random, mixed, stratified, dithered, got 'best'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            PatchSelector(selection=name, selection_args=args)
