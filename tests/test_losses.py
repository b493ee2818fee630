"""Ranking losses against values derived by hand, reference vectors, and their own gradients."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_teacher
from finetune_setup import small_vit
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import gradcheck

from ltrp_timm import losses
from ltrp_timm.losses import (
    MULTI_LABEL_LOSSES,
    focused_rank,
    lambda_rank,
    list_mle,
    list_net,
    multi_label_loss,
    pointwise_mse,
    rank_net,
)
from ltrp_timm.metrics import ndcg
from ltrp_timm.train import Augmentation
from ltrp_timm.train.distill import Distillation
from ltrp_timm.train.ranker import LOSSES as RANKING_LOSSES

VECTORS = load_file(Path(__file__).parent / "data" / "b_losses.safetensors")
Loss = Callable[..., Tensor]
Pair = tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor]]]  # a shape; ours and plain
LOSSES: dict[str, Loss] = {
    "list_mle": list_mle,
    "list_net": list_net,
    "list_net_sum": partial(list_net, average_items=False),
    "rank_net": rank_net,
    "focused_rank": partial(focused_rank, k=3),
    "pointwise_mse": pointwise_mse,
    "lambda_rank": lambda_rank,
    "lambda_rank_top": partial(lambda_rank, k=2, sigma=2.0),
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def some_items(pred: Tensor, target: Tensor, case: str, k: int) -> Tensor:
    """ListMLE on a published subset: columns with replacement, or up to k items of each list."""
    draw = VECTORS[f"rand_{case}"]
    if draw.dim() == 1:
        items = (pred.shape[1] * draw).long().expand(len(pred), -1)
    else:
        items = draw.argsort(dim=1)[:, :k]
    return list_mle(pred.gather(1, items), target.gather(1, items))


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("list_mle", list_mle),
        ("list_mleEx", list_mle),
        ("list_mle_k7", partial(some_items, case="list_mle_k7", k=7)),
        ("list_mleEx_k7", partial(some_items, case="list_mleEx_k7", k=7)),
        ("list_mleEx_k20", partial(some_items, case="list_mleEx_k20", k=20)),
        ("list_net", list_net),
        ("rank_net_t0.001_s1", rank_net),
        ("rank_net_t0.01_s2", partial(rank_net, threshold=0.01, sigma=2.0)),
        ("focused_rank_k5", partial(focused_rank, k=5)),
        ("focused_rank_k10", focused_rank),
        ("point_wise", pointwise_mse),
    ],
)
def test_reference_vectors(case: str, loss: Loss) -> None:
    pred = VECTORS["y_pred"].clone().requires_grad_()
    value = loss(pred, VECTORS["y_true"])
    value.backward()
    assert (value - VECTORS[f"loss_{case}"]).abs().max() <= 1e-5
    assert (pred.grad - VECTORS[f"grad_{case}"]).abs().max() <= 1e-6
    other = loss(VECTORS["y_pred"].flip(1), VECTORS["y_true"])  # another order, another loss
    assert (other - VECTORS[f"loss_{case}"]).abs().max() > 1e-4


def test_list_mle_by_hand() -> None:
    # order by target: items 2, 0, 1 with scores 0, ln 2, ln 3, that is weights 1, 2, 3
    pred = torch.tensor([[math.log(2), math.log(3), 0.0]])
    target = torch.tensor([[5.0, 1.0, 9.0]])
    probability = (1 / 6) * (2 / 5)
    assert list_mle(pred, target).item() == pytest.approx(-math.log(probability), abs=1e-6)


def test_chance_of_list_mle() -> None:
    chance = math.lgamma(19 + 1)
    assert list_mle(torch.full((2, 19), 3.0), torch.rand(2, 19)).item() == pytest.approx(chance)
    assert chance == pytest.approx(39.34, abs=5e-3)


def test_list_net_by_hand() -> None:
    # softmax of the target (1/4, 3/4), of the scores (1/3, 2/3)
    pred = torch.tensor([[0.0, math.log(2)]])
    target = torch.tensor([[0.0, math.log(3)]])
    entropy = 0.25 * math.log(3) + 0.75 * math.log(1.5)
    assert list_net(pred, target, average_items=False).item() == pytest.approx(entropy)
    assert list_net(pred, target).item() == pytest.approx(entropy / 2)


def test_rank_net_by_hand() -> None:
    # two items, logits ± ln 3: sigmoid 3/4; four ordered pairs, two of them an item with itself
    pred = torch.tensor([[math.log(3), 0.0]])
    right, tied = -2 * math.log(0.75), -math.log(0.75) - math.log(0.25)
    for gap, pairs in ((0.5, right), (-0.5, -2 * math.log(0.25)), (0.0009, tied), (0.0, tied)):
        value = rank_net(pred, torch.tensor([[gap, 0.0]]))
        assert value.item() == pytest.approx((pairs + 2 * math.log(2)) / 8), gap


def test_focused_rank_by_hand() -> None:
    # top 2 are items 1 and 2 with weights 3 and 1; the rest is item 0 with weight 2
    pred = torch.tensor([[math.log(2), math.log(3), 0.0]])
    target = torch.tensor([[1.0, 9.0, 5.0]])
    pairs = -(math.log(3 / 5) + math.log(1 / 3)) / 2
    value = focused_rank(pred, target, k=2)
    assert value.item() == pytest.approx(-math.log(3 / 4) + pairs / 2)
    assert focused_rank(pred, target, k=3).item() == pytest.approx(list_mle(pred, target).item())
    # the order among the rest does not count
    pred, target = torch.randn(1, 6), torch.arange(6.0).unsqueeze(0)
    moved = target[:, [1, 2, 0, 3, 4, 5]]
    assert torch.equal(focused_rank(pred, target, k=3), focused_rank(pred, moved, k=3))
    assert not torch.equal(focused_rank(pred, target, k=4), focused_rank(pred, moved, k=4))


def test_lambda_rank_by_hand() -> None:
    # gains 2, 1, 0; the order now is items 1, 0, 2; discounts 1, 1 / log2 3, 1 / 2
    second = 1 / math.log2(3)
    best = 2 + second
    pred = torch.tensor([[math.log(2), math.log(3), 0.0]])
    expected = (1 - second) * math.log(1 + 3 / 2)  # items 0 and 1: weights 2 and 3
    expected += 2 * (second - 0.5) * math.log(1 + 1 / 2)  # items 0 and 2
    expected += (1 - 0.5) * math.log(1 + 1 / 3)  # items 1 and 2
    value = lambda_rank(pred, torch.tensor([[2.0, 1.0, 0.0]]))
    assert value.item() == pytest.approx(expected / best, rel=1e-5)
    shifted = lambda_rank(pred, torch.tensor([[-28.0, -29.0, -30.0]]))  # as with -PSNR
    assert shifted.item() == pytest.approx(expected / best, rel=1e-5)
    assert lambda_rank(pred, torch.ones(1, 3)).item() == 0.0


def test_lambda_rank_cuts_at_k() -> None:
    # with k = 1 the pair (1, 2) at places 1 and 2 cannot change anything
    pred, target = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    expected = (0.5 * math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) * 1.0
    assert lambda_rank(pred, target, k=1).item() == pytest.approx(expected, rel=1e-5)


def test_lambda_rank_raises_ndcg() -> None:
    target = torch.rand(4, 12)
    pred = torch.zeros(4, 12).normal_().requires_grad_()
    before = ndcg(pred.detach(), target, k=3)
    optimiser = torch.optim.SGD([pred], lr=1.0)
    for _ in range(100):
        optimiser.zero_grad()
        lambda_rank(pred, target, k=3, reduction="sum").backward()
        optimiser.step()
    assert before < 0.9
    assert ndcg(pred.detach(), target, k=3) > 0.99


@every_loss
def test_gradients(name: str) -> None:
    pred = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 7, dtype=torch.float64)
    assert gradcheck(lambda scores: LOSSES[name](scores, target), (pred,))
    assert gradcheck(lambda scores: LOSSES[name](scores, target, reduction="none"), (pred,))


def plain_list_mle(pred: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    orders = target.argsort(dim=1, descending=True)[:, :k].tolist()
    return sum(
        row[order[i:]].exp().sum().log() - row[order[i]]
        for row, order in zip(pred, orders)
        for i in range(len(order))
    ) / len(pred)


def plain_pairs(pred: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """Half the mean over pairs: all of them, or each of the top k with each of the rest."""
    pairs = []
    for s, t, order in zip(pred, target, target.argsort(dim=1, descending=True).tolist()):
        for i in order[:k]:
            for j in order if k is None else order[k:]:
                label = 0.5 * (1 + torch.sign(t[i] - t[j])) if (t[i] - t[j]).abs() > 1e-3 else 0.5
                p = 1 / (1 + (s[j] - s[i]).exp())
                pairs.append(-label * p.log() - (1 - label) * (1 - p).log())
    return torch.stack(pairs).mean() / 2


def plain_lambda_rank(pred: Tensor, target: Tensor, k: int = 7, sigma: float = 1.0) -> Tensor:
    total = torch.zeros(())
    for s, t in zip(pred, target):
        discount = [1 / math.log2(2 + place) if place < k else 0.0 for place in range(len(t))]
        gain = (t - t.min()).tolist()
        best = sum(g * d for g, d in zip(sorted(gain, reverse=True), discount))
        place = s.argsort(descending=True).argsort().tolist()
        for i in range(len(t)):
            for j in range(len(t)):
                if t[i] > t[j]:
                    swap = (gain[i] - gain[j]) * abs(discount[place[i]] - discount[place[j]]) / best
                    total = total + swap * (1 + (-sigma * (s[i] - s[j])).exp()).log()
    return total / len(pred)


def plain_asymmetric(logits: Tensor, targets: Tensor) -> Tensor:
    p = 1 / (1 + (-logits).exp())
    shifted = (p - 0.05).clamp(min=0)
    focus = shifted.detach() ** 4  # the published loss holds its weights constant
    costs = torch.where(targets > 0, -p.log(), -focus * (1 - shifted).log())
    return costs.sum() / len(logits)


def plain_bce(logits: Tensor, targets: Tensor) -> Tensor:
    p = 1 / (1 + (-logits).exp())
    return torch.where(targets > 0, -p.log(), -(1 - p).log()).mean()


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Against shares (B, C) of the classes."""
    return -(targets * (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).log()).sum(1).mean()


def smoothed(targets: Tensor) -> Tensor:
    return 0.9 * targets + 0.1 / targets.shape[1]


def distillation(logits: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Our loss, and the plain formula, of a student: logits (4, 3), tokens (4, 17, 32)."""
    teacher = small_vit()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = Distillation(teacher, teacher, temperature=2.0, features=0.0 if tokens is None else 3.0)
    with torch.no_grad():
        wanted, features = teacher(images), teacher.forward_features(images)
    p, q = (x.div(2.0).exp() / x.div(2.0).exp().sum(1, keepdim=True) for x in (wanted, logits))
    plain = 4.0 * (p * (p / q).log()).sum() / 4
    if tokens is not None:
        lengths = tokens.square().sum(2).sqrt() * features.square().sum(2).sqrt()
        plain = plain + 3.0 * (1 - (tokens * features).sum(2) / lengths).mean()
    return found.loss(images, logits, tokens, None), plain


def reconstruction(predictions: Tensor, norm_pix_loss: bool) -> tuple[Tensor, Tensor]:
    """Our loss, and the plain formula, of predictions (4, 16, 192)."""
    teacher = small_teacher(norm_pix_loss=norm_pix_loss)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[0, 5, 9], [1, 2, 3], [4, 8, 15], [0, 1, 14]])
    errors = []
    for image, row, predicted in zip(images, visible.tolist(), predictions):
        for patch in sorted(set(range(16)) - set(row)):
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            pixels = image[:, top : top + 8, left : left + 8].permute(1, 2, 0).flatten()
            if norm_pix_loss:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append((predicted[patch] - pixels).square().mean())
    return teacher.reconstruction_loss(images, predictions, visible), torch.stack(errors).mean()


def ranked(name: str, plain: Loss, **options: Any) -> Pair:
    """A ranking loss of lists (4, 7)."""
    target = torch.rand(4, 7, generator=torch.Generator().manual_seed(1))
    loss = getattr(losses, name)
    return (4, 7), lambda pred: (loss(pred, target, **options), plain(pred, target))


def labelled(loss: Loss, plain: Loss, numbers: bool = False) -> Pair:
    """A loss of logits (4, 3) against one class each, as numbers or as shares."""
    targets = torch.tensor([2, 0, 1, 1])
    shares = torch.eye(3)[targets]
    return (4, 3), lambda x: (loss(x, targets if numbers else shares), plain(x, shares))


GRADIENTS: dict[str, Pair] = {
    "list_mle": ranked("list_mle", plain_list_mle),
    "list_net": ranked(
        "list_net", lambda s, t: plain_cross_entropy(s, t.exp() / t.exp().sum(1, keepdim=True)) / 7
    ),
    "rank_net": ranked("rank_net", plain_pairs),
    "focused_rank": ranked(
        "focused_rank", lambda s, t: plain_list_mle(s, t, 3) + plain_pairs(s, t, 3), k=3
    ),
    "pointwise_mse": ranked("pointwise_mse", lambda s, t: ((s - t) ** 2).sum() / 28),
    "lambda_rank": ranked("lambda_rank", plain_lambda_rank),
    "lambda_rank, k": ranked(
        "lambda_rank", lambda s, t: plain_lambda_rank(s, t, 2, 2.0), k=2, sigma=2.0
    ),
    "asymmetric": labelled(multi_label_loss("asymmetric"), plain_asymmetric),
    "bce": labelled(multi_label_loss("bce"), plain_bce),
    "cross entropy": labelled(
        Augmentation(smoothing=0.0).loss_function(), plain_cross_entropy, numbers=True
    ),
    "smoothed": labelled(
        Augmentation().loss_function(),
        lambda x, t: plain_cross_entropy(x, smoothed(t)),
        numbers=True,
    ),
    "mixed": labelled(Augmentation(mixup=0.8).loss_function(), plain_cross_entropy),
    "bce_loss": labelled(Augmentation(bce_loss=True, smoothing=0.0).loss_function(), plain_bce),
    "distillation": ((4, 3), distillation),
    "distilled tokens": ((4, 17, 32), lambda tokens: distillation(tokens[:, 0, :3], tokens)),
    "reconstruction": ((4, 16, 192), partial(reconstruction, norm_pix_loss=False)),
    "normalised pixels": ((4, 16, 192), partial(reconstruction, norm_pix_loss=True)),
}


def test_every_loss_by_name_has_a_plain_formula() -> None:
    assert {*RANKING_LOSSES, *MULTI_LABEL_LOSSES} <= GRADIENTS.keys()


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_the_gradient_is_that_of_a_plain_formula(name: str) -> None:
    shape, both = GRADIENTS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, expected = both(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    slope, wanted = (torch.autograd.grad(value, x)[0] for value in (found, expected))
    assert wanted.abs().max() > 1e-5
    assert (slope - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@every_loss
def test_the_right_order_costs_less_than_the_wrong_one(name: str) -> None:
    target = torch.arange(7.0).repeat(2, 1)
    loss = LOSSES[name]
    assert loss(target, target) < loss(target.roll(1, dims=1), target)
    assert loss(target, target) < loss(-target, target)


@every_loss
def test_reduction_and_batch(name: str) -> None:
    pred, target = torch.randn(4, 6), torch.rand(4, 6)
    loss = LOSSES[name]
    alone = torch.stack([loss(p[None], t[None]) for p, t in zip(pred, target)])
    each = loss(pred, target, reduction="none")
    assert each.shape == (4,)
    assert (each - alone).abs().max() <= 1e-6
    assert torch.allclose(loss(pred, target), each.mean())
    assert torch.allclose(loss(pred, target, reduction="sum"), each.sum())
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'all'"):
        loss(pred, target, reduction="all")


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stable(name: str, dtype: torch.dtype) -> None:
    pred = (300 * torch.randn(3, 19)).to(dtype).requires_grad_()  # exp(300) overflows everywhere
    target = torch.rand(3, 19).to(dtype)
    value = LOSSES[name](pred, target)
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    wide = LOSSES[name](pred.detach().float(), target.float())
    assert torch.equal(value, wide)


@every_loss
def test_autocast_changes_nothing(name: str) -> None:
    pred, target = torch.randn(3, 9), torch.rand(3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name](pred, target)
    assert torch.equal(inside, LOSSES[name](pred, target))


@every_loss
def test_no_gradient_reaches_the_targets(name: str) -> None:
    pred = torch.randn(2, 5, requires_grad=True)
    target = torch.rand(2, 5, requires_grad=True)
    LOSSES[name](pred, target).backward()
    assert pred.grad is not None
    assert target.grad is None


@every_loss
@pytest.mark.parametrize("shape", [(5,), (2, 6), (2, 5, 1)])
def test_wrong_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \(B, V\), got \[2, 5\] and"):
        LOSSES[name](torch.rand(2, 5), torch.rand(shape))


def test_wrong_arguments() -> None:
    lists = (torch.rand(2, 5), torch.rand(2, 5))
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k must be in 1 … 5, .* got {k}"):
            focused_rank(*lists, k=k)
        with pytest.raises(ValueError, match=f"k must be in 1 … 5, .* got {k}"):
            lambda_rank(*lists, k=k)
    with pytest.raises(ValueError, match=r"threshold must be at least 0, got -0\.1"):
        rank_net(*lists, threshold=-0.1)
    with pytest.raises(ValueError, match="sigma must be above 0, got 0"):
        lambda_rank(*lists, sigma=0)
