from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import FAMILIES
from timm.layers import PatchEmbed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ltrp_timm import create_ranker, drop_patches
from ltrp_timm._timm import backbone_filter
from ltrp_timm.measure.payoff import (
    FULL,
    GIVEN,
    IDEAL,
    SMALLER,
    Payoff,
    break_even,
    by_ranker,
    ideal,
    measure_payoff,
    on_grid,
    pays_up_to,
    recommend,
    smaller_grid,
    twin,
)
from ltrp_timm.measure.throughput import Ratio, Timing

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def small(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Any:
    model = timm.create_model(name, img_size=64, depth=2, **kwargs).eval()
    for key, parameter in model.named_parameters():
        if "gamma" in key:  # near 0 when new, any code would pass
            nn.init.ones_(parameter)
    return model


def line(method: str, keep_ratio: float, speedup: float, spread: float = 0.01) -> Payoff:
    found = Ratio(speedup, speedup - spread, speedup + spread)
    return Payoff(method, keep_ratio, 1, (64, 64), Timing(method, (1.0,)), found)


@pytest.mark.filterwarnings("ignore:.*no trained weights")  # only its time counts
def test_the_variants_of_a_model() -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rankers = {"contrast": create_ranker("contrast"), "conv": create_ranker("conv")}
    lines = measure_payoff(model, IMAGES, rankers, [0.25, 0.5, 0.5], repeats=3, memory=True)
    methods = (IDEAL, GIVEN, "contrast", "conv")
    expected = [(method, ratio) for ratio in (0.5, 0.25) for method in methods]
    assert [(each.method, each.keep_ratio) for each in lines] == [(FULL, 1.0), *expected]
    assert [each.num_kept for each in lines] == [16, *[8] * 4, *[4] * 4]
    for each in lines:
        assert len(each.timing.seconds) == 3
        assert each.timing.peak_memory is not None
        assert (each.ranking is None) is (each.method in (FULL, IDEAL, GIVEN))
        assert (each.achieved is None) is (each.method in (FULL, IDEAL))
        ratios = [a / b for a, b in zip(lines[0].timing.seconds, each.timing.seconds)]
        assert each.speedup.median == pytest.approx(sorted(ratios)[1])
    given, conv = (each.timing.seconds for each in (lines[2], lines[4]))
    shares = [(a - b) / c for a, b, c in zip(conv, given, lines[0].timing.seconds)]
    assert lines[4].ranking == pytest.approx(sorted(shares)[1])
    assert drop_patches(model) is not None  # nothing was put into it
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("vit_tiny_patch16_224", 9),
        ("deit_tiny_distilled_patch16_224", 10),
        ("vit_small_patch16_rope_mixed_224", 8),
        ("vit_small_patch16_dinov3", 13),
        ("cait_xxs24_224", 9),
    ],
)
def test_the_ideal_model_runs_on_k_patches(name: str, length: int) -> None:
    full = small(name)
    best = ideal(full, 8)
    with torch.inference_mode():
        prefix = full.forward_features(IMAGES).shape[1] - 16
        assert best.forward_features(IMAGES).shape[1] == 8 + prefix
        assert best(IMAGES).shape == full(IMAGES).shape
        every = ideal(full, 16)(IMAGES)
        torch.testing.assert_close(every, full(IMAGES), atol=1e-5, rtol=0)
        # the front-end, given the first patches, is that model
        keep = torch.arange(8).expand(2, -1)
        given = drop_patches(twin(full), "random")(IMAGES, keep_indices=keep)
        torch.testing.assert_close(best(IMAGES), given, atol=1e-5, rtol=0)
        assert (given - every).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_the_ideal_model_embeds_only_what_it_keeps(name: str) -> None:
    full = small(name)
    keep = torch.arange(8).expand(2, -1)
    given = drop_patches(twin(full), "random")

    def flops(model: Any, *inputs: Any) -> int:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(*inputs)
        return int(counter.get_total_flops())

    embed, best = full.patch_embed, ideal(full, 8).patch_embed
    assert flops(best, IMAGES) == flops(embed, IMAGES) // 2  # 8 of 16 patches
    assert flops(ideal(full, 8), IMAGES) == flops(given, IMAGES, keep)
    with torch.inference_mode():
        found, plain = best(IMAGES).flatten(1, -2), embed(IMAGES).flatten(1, -2)
    torch.testing.assert_close(found[:, :8], plain[:, :8], atol=1e-5, rtol=0)
    assert not found[:, 8:].any()
    assert type(full.patch_embed) is PatchEmbed  # the twin's alone was changed


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_families_without_an_ideal(name: str) -> None:
    full = small(name)
    assert ideal(full, 8) is None
    lines = measure_payoff(full, IMAGES, {"contrast": create_ranker("contrast")}, [0.5], repeats=1)
    assert [each.method for each in lines] == [FULL, GIVEN, "contrast"]
    assert lines[-1].achieved is None


@pytest.mark.parametrize(
    ("grid", "kept", "expected"),
    [
        ((14, 14), 98, (10, 10)),  # 100 is nearer to 98 than 81
        ((14, 14), 49, (7, 7)),
        ((14, 14), 90, (9, 9)),  # 81 is nearer than 100
        ((14, 14), 1, (1, 1)),
        ((14, 14), 195, (14, 14)),
        ((14, 28), 98, (7, 14)),
        ((28, 14), 98, (14, 7)),
        ((6, 9), 27, (4, 6)),  # 24 and 30 (5x6) are as near; 4x6 has the proportions
        ((1, 8), 3, (1, 3)),
    ],
)
def test_the_size_of_a_smaller_image(
    grid: tuple[int, int], kept: int, expected: tuple[int, int]
) -> None:
    assert smaller_grid(grid, kept) == expected


def test_a_smaller_image_is_a_row_of_each_keep_ratio() -> None:
    shapes: list[tuple[int, ...]] = []
    model = small(num_classes=5)
    model.patch_embed.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    rankers, ratios = {"contrast": create_ranker("contrast")}, [0.25, 0.5]
    lines = measure_payoff(model, IMAGES, rankers, ratios, repeats=2, warmup=0, smaller_image=True)
    methods = (IDEAL, GIVEN, "contrast", SMALLER)
    expected = [(method, ratio) for ratio in (0.5, 0.25) for method in methods]
    assert [(each.method, each.keep_ratio) for each in lines] == [(FULL, 1.0), *expected]
    rivals = [each for each in lines if each.method == SMALLER]
    assert [(each.img_size, each.num_kept) for each in rivals] == [((48, 48), 9), ((32, 32), 4)]
    assert {each.img_size for each in lines if each.method != SMALLER} == {(64, 64)}
    sides = [64, 64, 64, 64, 48, 64, 64, 64, 32]  # twins keep the hook
    assert [shape[-1] for shape in shapes] == sides * 2  # in turns, at their size
    for each in rivals:
        assert each.ranking is None
        assert len(each.timing.seconds) == 2
    assert list(by_ranker(lines)) == ["contrast"]
    assert model.pos_embed.shape[1] == 17  # the given model stays as it was


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "cait"])
def test_the_plain_model_of_a_smaller_image_is_timms(
    family: str, backbone_of: Callable[..., Any]
) -> None:
    """Also not square: the same logits as a model that timm builds at that size."""
    full, images = backbone_of(family)
    if "naflex" not in family and not hasattr(full, "set_input_size"):
        pytest.skip(f"timm {timm.__version__} cannot resample it")
    before, grid = full(images), (2, 3)
    plain, size = on_grid(drop_patches(twin(full), "random"), grid)
    patch = [side // count for side, count in zip(size, grid)]
    assert [side * count for side, count in zip(patch, grid)] == list(size)
    name, changes, side = FAMILIES[family]
    built = {} if "naflex" in family else {"img_size": size}  # one size resamples any image
    kwargs: dict[str, Any] = {
        "num_classes": full.num_classes,
        "img_size": side,
        "depth": len(full.blocks),
    }
    other = timm.create_model(name, **{**kwargs, **changes, **built}).eval()
    state = {key: value.clone() for key, value in full.state_dict().items()}
    other.load_state_dict(backbone_filter(state, other))
    smaller = torch.randn(2, 3, *size)
    assert plain.forward_features(smaller).shape == other.forward_features(smaller).shape
    torch.testing.assert_close(plain(smaller), other(smaller), atol=1e-6, rtol=0)
    torch.testing.assert_close(full(images), before, atol=0, rtol=0)  # it was not changed
    assert next(plain.blocks.parameters()) is next(full.blocks.parameters())


def test_a_model_of_one_size_has_no_smaller_image() -> None:
    text = "a Cait takes images of one size: timm gives it no set_input_size for 48x48 pixels"
    with pytest.raises(ValueError, match=text):
        on_grid(small("cait_xxs24_224"), (3, 3))
    with pytest.raises(TypeError, match="cannot drop patches from SwinTransformer: "):
        on_grid(timm.create_model("swin_tiny_patch4_window7_224"), (3, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no trained weights")
def test_compiled_variants_each_have_their_graph() -> None:
    rankers = {"contrast": create_ranker("contrast"), "conv": create_ranker("conv")}
    shares = [0.9, 0.75, 0.5, 0.25]  # 17 variants: more than torch recompiles by itself
    lines = measure_payoff(
        small(), IMAGES, rankers, shares, repeats=2, warmup=0, compile_mode="freezing"
    )
    assert len(lines) == 17
    assert max(max(each.timing.seconds) for each in lines) < 1.0  # none compiles while timed


def test_twins_share_weights_only() -> None:
    full = small()
    other = twin(full)
    assert other is not full
    assert other.blocks[0] is not full.blocks[0]
    assert other.blocks[0].attn.qkv.weight is full.blocks[0].attn.qkv.weight


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([0.3, 0.6, 0.9], 0.9),  # pays everywhere it was measured
        ([1.1, 1.2, 1.3], 0.0),  # nowhere
        ([0.4, 0.9, 1.1], 0.7),  # half way between 0.5 and 0.9
        ([0.9, 1.1, 0.95], 0.9),  # noise in between: the largest one that pays
        ([0.5, 1.0, 1.5], 0.5),
    ],
)
def test_break_even_by_hand(costs: list[float], expected: float) -> None:
    assert break_even([0.25, 0.5, 0.9], costs) == pytest.approx(expected)
    lines = [line("conv", ratio, 1 / cost) for ratio, cost in zip((0.25, 0.5, 0.9), costs)]
    assert pays_up_to(lines) == pytest.approx(expected)


def test_the_last_crossing_counts() -> None:
    assert break_even([0.2, 0.4, 0.6, 0.8], [0.9, 1.1, 0.9, 1.1]) == pytest.approx(0.7)


def test_recommendations() -> None:
    contrast = [
        line("contrast", 0.25, 3.0),
        line("contrast", 0.5, 1.9),
        line("contrast", 0.75, 1.3),
    ]
    conv = [line("conv", 0.25, 2.0), line("conv", 0.5, 1.4), line("conv", 0.75, 0.9)]
    small = [
        line("vit_small", 0.25, 0.7),
        line("vit_small", 0.5, 0.6),
        line("vit_small", 0.75, 0.5),
    ]
    rest = [line(FULL, 1.0, 1.0), line(IDEAL, 0.5, 2.0), line(GIVEN, 0.5, 2.0)]
    assert recommend([*rest, *small, *conv, *contrast]) == (
        "use contrast (1.90x at keep 0.5); conv pays up to keep 0.68; vit_small loses time"
    )
    assert recommend([*rest, *small]) == "the full model is the fastest; vit_small loses time"
    unsure = [line("conv", 0.5, 1.005)]
    assert recommend(unsure) == "the full model is the fastest; conv saves no time"
    late = [line("conv", 0.25, 1.2), line("conv", 0.5, 0.9)]
    assert recommend(late).startswith("use conv (1.20x at keep 0.25)")


@pytest.mark.parametrize(
    ("rankers", "ratios", "mode", "text"),
    [
        ([], [0.5], None, "needs at least one ranker"),
        (["contrast"], [], None, "and one keep ratio"),
        (["contrast"], [1.0], None, r"in \(0, 1\), got 1.0"),
        (["full"], [0.5], None, "'full' is reserved"),
        (["smaller image"], [0.5], None, "'smaller image' is reserved"),
        (["contrast"], [0.5], "fast", "got 'fast'"),
    ],
)
def test_wrong_arguments(rankers: list[str], ratios: list[float], mode: Any, text: str) -> None:
    found = {name: create_ranker("contrast") for name in rankers}
    with pytest.raises(ValueError, match=text):
        measure_payoff(small(), IMAGES, found, ratios, compile_mode=mode)


def test_what_cannot_drop_patches_is_refused() -> None:
    rankers = {"contrast": create_ranker("contrast")}
    with pytest.raises(TypeError, match="ResNet"):
        measure_payoff(timm.create_model("resnet18"), IMAGES, rankers, [0.5])
