"""The benchmarks' peers do what their papers say, and nothing where they have nothing to do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from flops import plain_tokens, vit_flops
from peers import (
    drop_at_random,
    fuse_inattentive,
    fuse_tokens,
    merge_schedule,
    merge_similar,
    merge_tokens,
)
from peers.attention import mix, split_heads
from peers.fuse import FusingBlocks, reorganise
from peers.merge import ATTENTION, MergingBlocks, match_flops
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ltrp_timm.measure.payoff import ideal, twin


@pytest.fixture(scope="module")
def built() -> Any:
    """A narrow ViT of 12 blocks on 36 patches, with weights that are not near zero."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, embed_dim=64, num_heads=2, num_classes=7
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture
def vit(built: Any) -> Any:
    return copy.deepcopy(built)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 96, 96)


PEERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    **{
        name: (
            lambda model, name=name: merge_similar(model, 0, name),
            lambda model, name=name: merge_similar(model, 2, name),
        )
        for name in ATTENTION
    },
    "fusing": (lambda model: fuse_inattentive(model, 1.0), lambda m: fuse_inattentive(m, 0.7)),
    "random": (lambda model: drop_at_random(model, 36), lambda model: drop_at_random(model, 20)),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_with_nothing_to_do_is_the_plain_model(name: str, vit: Any, images: Tensor) -> None:
    idle, busy = PEERS[name]
    expected = vit(images)
    assert (idle(twin(vit))(images) - expected).abs().max() <= 1e-5
    assert (busy(twin(vit))(images) - expected).abs().max() > 1e-3
    assert torch.equal(vit(images), expected)  # a twin is a model of its own


def seen_tokens(model: Any, images: Tensor) -> list[tuple[int, int]]:
    """Lengths before attention and MLP of each block."""
    lengths: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(("attn.qkv", "mlp.fc1")):
            module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(images)
    return list(zip(lengths[::2], lengths[1::2]))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("r", [0, 1, 3, 16])
def test_merging_follows_its_schedule(attention: str, r: int, vit: Any, images: Tensor) -> None:
    model = merge_similar(twin(vit), r, attention)
    assert seen_tokens(model, images) == merge_schedule(37, r, 12)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.7, 0.3, 0.01])
def test_fusing_follows_its_schedule(keep_ratio: float, vit: Any, images: Tensor) -> None:
    model = fuse_inattentive(twin(vit), keep_ratio)
    assert seen_tokens(model, images) == fuse_tokens(37, keep_ratio, 12)


def test_schedules_of_the_papers() -> None:
    assert merge_schedule(197, 8, 12)[-1] == (109, 101)
    assert merge_schedule(197, 16, 12)[-2:] == [(37, 21), (21, 11)]  # half of 20 patches at most
    assert merge_schedule(197, 98, 2) == [(197, 99), (99, 50)]  # never more than half
    assert merge_schedule(2, 5, 2) == [(2, 2), (2, 2)]
    fused = fuse_tokens(197, 0.7, 12)
    # ceil(0.7 · 196) = 138, ceil(0.7 · 139) = 98, ceil(0.7 · 99) = 70; each with class and fused
    assert [fused[i] for i in (2, 3, 4, 6, 9, 11)] == [
        (197, 197),
        (197, 140),
        (140, 140),
        (140, 100),
        (100, 72),
        (72, 72),
    ]


def merged_by_hand(
    x: Tensor, size: Tensor, metric: Tensor, r: int
) -> tuple[list[Tensor], list[float]]:
    """One image (L, D), pair by pair."""
    length = x.shape[0]
    a, b = list(range(0, length, 2)), list(range(1, length, 2))
    edges = []
    for i in a[1:]:  # not the class token
        cosines = [float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in b]
        best = max(range(len(b)), key=lambda n: cosines[n])
        edges.append((cosines[best], i, b[best]))
    gone = {i: j for _, i, j in sorted(edges, reverse=True)[:r]}
    tokens, sizes = [], []
    for i in [*(i for i in a if i not in gone), *b]:
        group = [i, *(source for source, target in gone.items() if target == i)]
        weight = torch.stack([size[n] for n in group])
        tokens.append((torch.stack([x[n] for n in group]) * weight).sum(0) / weight.sum())
        sizes.append(float(weight.sum()))
    return tokens, sizes


@pytest.mark.parametrize(("length", "r"), [(9, 1), (9, 4), (10, 3), (37, 12)])
def test_merging_by_hand(length: int, r: int) -> None:
    x, metric = torch.randn(2, length, 5), torch.randn(2, length, 4)
    size = torch.randint(1, 5, (2, length, 1)).float()
    out, sizes = merge_tokens(x, size, metric, r)
    for image in range(2):
        tokens, weights = merged_by_hand(x[image], size[image], metric[image], r)
        assert torch.allclose(out[image], torch.stack(tokens), atol=1e-5)
        assert sizes[image, :, 0].tolist() == pytest.approx(weights)
        assert torch.allclose(out[image, 0], x[image, 0])  # the class token, alone
        assert sizes[image, 0] == size[image, 0]
    assert torch.allclose(sizes.sum(1), size.sum(1))


def test_proportional_attention_is_attention_to_the_copies(vit: Any) -> None:
    attn, x = vit.blocks[0].attn, torch.randn(1, 6, 64)
    size = torch.tensor([1, 3, 1, 2, 1, 4])
    q, k, v = split_heads(attn, x)
    copies = [tensor.repeat_interleave(size, dim=2) for tensor in (k, v)]
    expected = mix(attn, q, *copies)
    bias = size.float().log().view(1, 1, 1, -1)
    for fused in (True, False):
        assert torch.allclose(mix(attn, q, k, v, bias, fused), expected, atol=1e-5)
        assert not torch.allclose(mix(attn, q, k, v, None, fused), expected, atol=1e-3)


def test_fused_and_plain_softmax_agree(vit: Any, images: Tensor) -> None:
    outs = {name: merge_similar(twin(vit), 2, name)(images) for name in ATTENTION}
    by_hand, fused, sizeless = (outs[name] for name in ATTENTION)
    assert (by_hand - fused).abs().max() <= 1e-4
    assert (by_hand - sizeless).abs().max() > 1e-3


def test_fusing_by_hand() -> None:
    x, attention = torch.randn(2, 7, 5), torch.rand(2, 6)
    out = reorganise(x, attention, 2)
    for image in range(2):
        order = sorted(range(6), key=lambda n: -float(attention[image, n]))
        assert torch.equal(out[image, 0], x[image, 0])
        assert torch.equal(out[image, 1:3], x[image, [1 + n for n in order[:2]]])
        rest = sum(attention[image, n] * x[image, 1 + n] for n in order[2:])
        assert torch.allclose(out[image, 3], rest, atol=1e-6)
    assert out.shape == (2, 4, 5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_later_blocks_attend_in_proportion_to_size(attention: str, vit: Any) -> None:
    x, size = torch.randn(1, 9, 64), torch.ones(1, 9, 1)
    out = MergingBlocks(vit.blocks[:2], 2, attention)(x)
    for block in vit.blocks[:2]:
        q, k, v = split_heads(block.attn, block.norm1(x))
        copies = size[0, :, 0].long() if attention != "plain_fused" else torch.ones(1).long()
        x = x + mix(block.attn, q, *(tensor.repeat_interleave(copies, dim=2) for tensor in (k, v)))
        x, size = merge_tokens(x, size, k.mean(dim=1), 2)
        x = x + block.mlp(block.norm2(x))
    assert size.max() > 1
    assert torch.allclose(out, x, atol=1e-4)


def test_the_class_token_says_which_patches_stay(vit: Any) -> None:
    x = torch.randn(2, 9, 64)
    out = FusingBlocks(vit.blocks[:2], 0.5)(x)
    x, block = vit.blocks[0](x), vit.blocks[1]
    q, k, _ = split_heads(block.attn, block.norm1(x))
    matrix = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)
    assert torch.allclose(matrix.sum(dim=2), torch.ones(2, 9))
    x = reorganise(x + block.attn(block.norm1(x)), matrix[:, 0, 1:], 4)
    assert torch.allclose(out, x + block.mlp(block.norm2(x)), atol=1e-4)


@pytest.mark.parametrize("kept", range(1, 37))
def test_random_drop_keeps_as_many_as_asked(kept: int, vit: Any, images: Tensor) -> None:
    model = drop_at_random(twin(vit), kept)
    assert model.forward_features(images[:1]).shape[1] == 1 + kept


def test_random_drop_draws_anew(vit: Any, images: Tensor) -> None:
    model = drop_at_random(vit, 18)
    assert not torch.equal(model(images), model(images))


def counted(model: Any, images: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops())


def test_flops_are_those_of_the_counter(vit: Any, images: Tensor) -> None:
    for attn in (block.attn for block in vit.blocks):
        attn.fused_attn = False  # the counter knows matrix products on every device
    image = images[:1]
    assert counted(vit, image) == vit_flops(vit, plain_tokens(vit, 36))
    dropped = vit_flops(vit, plain_tokens(vit, 18))
    assert counted(drop_at_random(twin(vit), 18), image) == dropped
    pixels, width = vit.patch_embed.proj.weight[0].numel(), vit.embed_dim
    assert counted(ideal(vit, 18), image) == dropped - 2 * 18 * pixels * width  # never embedded
    for r in (0, 2, 16):
        expected = vit_flops(vit, merge_schedule(37, r, 12)) + match_flops(vit, r)
        assert counted(merge_similar(twin(vit), r, "proportional"), image) == expected
    with pytest.raises(ValueError, match="12 blocks need one pair each, got 1"):
        vit_flops(vit, [(37, 37)])


def test_peers_refuse_what_they_would_get_wrong(vit: Any) -> None:
    with pytest.raises(ValueError, match=r"attention must be one of .*got 'other'"):
        merge_similar(vit, 2, "other")
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got 0"):
        fuse_inattentive(vit, 0)
    with pytest.raises(ValueError, match=r"kept must be in 1 … 36, got 37"):
        drop_at_random(vit, 37)
    registers = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=56, depth=1, embed_dim=64, num_heads=2
    )
    for change in (lambda model: merge_similar(model, 1), lambda m: fuse_inattentive(m, 0.5)):
        with pytest.raises(TypeError, match="peers are for plain ViTs with one class token"):
            change(registers)
