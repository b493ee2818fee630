"""Metrics of ranking against values derived by hand and against other libraries."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor

from ltrp_timm.metrics import average_precision, kendall, ndcg, spearman, top_k_overlap

METRICS: dict[str, Callable[..., Tensor]] = {
    "spearman": spearman,
    "kendall": kendall,
    "ndcg": ndcg,
    "ndcg_top": partial(ndcg, k=3),
    "top_k_overlap": partial(top_k_overlap, k=3),
}
every_metric = pytest.mark.parametrize("name", list(METRICS))


def lists(ties: bool = False) -> tuple[Tensor, Tensor]:
    pred, target = torch.randn(6, 19), torch.rand(6, 19)
    return ((pred * 2).round(), (target * 6).round()) if ties else (pred, target)


def test_by_hand() -> None:
    pred = torch.tensor([[1.0, 3.0, 2.0, 4.0]])
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert spearman(pred, target).item() == pytest.approx(1 - 6 * 2 / (4 * 15))  # Σ d² = 2
    assert kendall(pred, target).item() == pytest.approx((5 - 1) / 6)  # one pair of six
    # gains above the least: 0, 1, 2, 3; pred puts them in the order 3, 1, 2, 0
    found = 3 + 1 / math.log2(3) + 2 / 2
    best = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg(pred, target).item() == pytest.approx(found / best)
    assert ndcg(pred, target, k=1).item() == 1.0
    assert top_k_overlap(pred, target, k=2).item() == 0.5  # items 1 and 3 against 2 and 3


@pytest.mark.parametrize("ties", [False, True])
def test_against_scipy(ties: bool) -> None:
    pred, target = lists(ties)
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        values = ours(pred, target, reduction="none")
        expected = [theirs(p.numpy(), t.numpy()).statistic for p, t in zip(pred, target)]
        assert (values - torch.tensor(expected)).abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 5, 19, None])
def test_ndcg_against_sklearn(k: int | None) -> None:
    pred, target = lists()
    target = target - target.amin(dim=1, keepdim=True)  # there the gain is the target itself
    expected = ndcg_score(target.numpy(), pred.numpy(), k=k)
    assert ndcg(pred, target, k=k).item() == pytest.approx(expected, abs=1e-6)


@every_metric
def test_ends_of_the_scale(name: str) -> None:
    metric, (pred, target) = METRICS[name], lists()
    assert metric(target, target).item() == pytest.approx(1.0)
    assert metric(100 * target - 7, target).item() == pytest.approx(1.0)  # only the order counts
    assert metric(-target, target) < metric(pred, target) < 1.0


def test_opposite_orders() -> None:
    _, target = lists()
    assert spearman(-target, target).item() == pytest.approx(-1.0)
    assert kendall(-target, target).item() == pytest.approx(-1.0)
    assert top_k_overlap(-target, target, k=9).item() == 0.0


def test_lists_without_an_order() -> None:
    flat, some = torch.ones(2, 5), torch.rand(2, 5)
    for metric in (spearman, kendall):
        assert metric(flat, some).item() == 0.0
        assert metric(some, flat).item() == 0.0
    assert ndcg(some, flat).item() == 1.0
    assert ndcg(torch.zeros(1, 1), torch.zeros(1, 1)).item() == 1.0


@every_metric
def test_each_list_is_judged_alone(name: str) -> None:
    metric, (pred, target) = METRICS[name], lists(ties=True)
    each = metric(pred, target, reduction="none")
    alone = torch.stack([metric(p[None], t[None]) for p, t in zip(pred, target)])
    assert each.shape == (6,)
    assert (each - alone).abs().max() <= 1e-6
    assert torch.allclose(metric(pred, target), each.mean())
    assert torch.allclose(metric(pred, target, reduction="sum"), each.sum())


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    pred, target = (values.to(dtype) for values in lists(ties=True))
    value = METRICS[name](pred, target)
    assert (value - METRICS[name](pred.float(), target.float())).abs() <= 1e-6


@every_metric
def test_wrong_arguments(name: str) -> None:
    metric = METRICS[name]
    with pytest.raises(ValueError, match=r"must both be \(B, V\), got \[2, 5\] and \[2, 4\]"):
        metric(torch.rand(2, 5), torch.rand(2, 4))
    with pytest.raises(ValueError, match="must both be"):
        metric(torch.rand(0, 5), torch.rand(0, 5))
    with pytest.raises(ValueError, match="reduction must be one of"):
        metric(torch.rand(2, 5), torch.rand(2, 5), reduction="median")
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k must be in 1 … 5, .* got {k}"):
            top_k_overlap(torch.rand(2, 5), torch.rand(2, 5), k=k)


def judged_by_sklearn(scores: Tensor, targets: Tensor) -> list[float]:
    columns = zip(scores.T.numpy(), targets.T.numpy())
    return [average_precision_score(target, score) for score, target in columns]


def test_ndcg_of_targets_that_are_not_finite() -> None:
    target = torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 0.0]])
    found = ndcg(torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0]]), target, reduction="none")
    assert found[0].isnan()
    assert found[1] == 1


@pytest.mark.parametrize("case", ["random", "ties", "bool", "rare", "half"])
def test_average_precision_against_sklearn(case: str) -> None:
    scores, targets = torch.randn(301, 17), torch.rand(301, 17) < 0.2
    if case == "ties":
        scores = (scores * 2).round()
    if case == "rare":
        targets = torch.zeros(301, 17, dtype=torch.bool)
        targets[torch.randint(301, (17,)), torch.arange(17)] = True  # one positive each
    if case == "half":
        scores = scores.half()
    given = targets if case == "bool" else targets.long()
    found = average_precision(scores, given)
    assert found.dtype == torch.float64
    expected = torch.tensor(judged_by_sklearn(scores.double(), targets), dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-12
    # batch by batch is something else
    parts = [average_precision(s, t) for s, t in zip(scores.split(43), given.split(43))]
    assert (torch.stack(parts).nanmean(dim=0) - expected).abs().max() > 1e-2


def test_average_precision_of_degenerate_classes() -> None:
    scores = torch.tensor([[0.1], [0.1], [0.1], [0.1]])
    some = torch.tensor([[1], [0], [0], [1]])
    every, none = torch.ones(4, 1), torch.zeros(4, 1)
    assert average_precision(scores, some).item() == 0.5  # a constant gets the share of positives
    assert average_precision(torch.arange(4.0)[:, None], some).item() == pytest.approx(0.75)
    assert average_precision(torch.randn(4, 1), every).item() == 1.0
    assert average_precision(scores, none).isnan().all()
    wide = torch.tensor([[torch.inf], [-torch.inf], [0.0], [-0.0]])
    assert average_precision(wide, some).item() == pytest.approx(0.5 + 0.5 * 2 / 3)
    single = average_precision(torch.zeros(1, 2), torch.tensor([[1, 0]]))
    assert single[0] == 1.0
    assert single[1].isnan()
    both = torch.cat([scores, scores], 1), torch.cat([some, none], 1)
    assert average_precision(*both).nanmean().item() == 0.5  # an absent class counts nowhere


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_average_precision_whatever_the_order(rows: list[Any], shuffle: Any) -> None:
    if not any(positive for _, positive in rows):
        rows.append((0, True))
    values = []
    for _ in range(2):
        scores = torch.tensor([[float(score)] for score, _ in rows])
        targets = torch.tensor([[positive] for _, positive in rows])
        values.append(average_precision(scores, targets).item())
        assert values[-1] == pytest.approx(judged_by_sklearn(scores, targets)[0], abs=1e-12)
        shuffle.shuffle(rows)
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_average_precision_refuses() -> None:
    with pytest.raises(ValueError, match=r"both be \(N, C\), got \[2, 5\] and \[2, 4\]"):
        average_precision(torch.rand(2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"got \[0, 5\]"):
        average_precision(torch.rand(0, 5), torch.ones(0, 5))
    with pytest.raises(ValueError, match="got NaN"):
        average_precision(torch.full((2, 1), float("nan")), torch.ones(2, 1))
    with pytest.raises(ValueError, match="targets must be 0 or 1"):
        average_precision(torch.rand(2, 1), torch.tensor([[1], [2]]))
