"""Vision-language models: whole cells through the projector, as many placeholders as tokens."""

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import awaken
from timm.models.eva import Eva
from torch import Tensor, nn

from ltrp_timm import (
    drop_patches,
    drop_visual_tokens,
    num_visual_tokens,
    restore_visual_tokens,
    select_cells,
)
from ltrp_timm.selection.cells import cell_by_cell

transformers = pytest.importorskip("transformers", "5")

GRID, CELL, IMAGE_TOKEN = (8, 8), 2, 90


def perception_lm(pooling: int = CELL, class_token: bool = True, **text: Any) -> Any:
    """A random PerceptionLM with 8 x 8 patches."""
    tower = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 112, "global_pool": ""}
    tower["class_token"] = class_token
    config = transformers.PerceptionLMConfig(
        vision_config=transformers.TimmWrapperConfig(
            architecture="vit_pe_lang_large_patch14_448", model_args=tower, do_pooling=False
        ),
        text_config=transformers.LlamaConfig(
            **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"intermediate_size": 64, "vocab_size": 99, **text},
        ),
        vision_use_cls_token=class_token,
        projector_pooling_ratio=pooling,
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
    )
    torch.manual_seed(0)
    model = transformers.PerceptionLMForConditionalGeneration(config).eval()
    awaken(model.model.vision_tower.timm_model)
    for parameter in model.model.multi_modal_projector.parameters():
        nn.init.normal_(parameter, std=0.15)  # transformers' own would hide a wrong token
    return model


def prompt(placeholders: int, tiles: int = 1) -> Tensor:
    words = [5, *[IMAGE_TOKEN] * placeholders * tiles, 6, 7]
    return torch.tensor([words])


@pytest.fixture
def tiles() -> Tensor:
    return torch.randn(1, 2, 3, 112, 112)


def features(model: Any, tiles: Tensor, **kwargs: Any) -> Tensor:
    found: Tensor = model.model.get_image_features(tiles, **kwargs).pooler_output
    return found


def masked_features(model: Any, tiles: Tensor, keep: Tensor) -> Tensor:
    """The plain model, dropped patches masked as keys; the kept cells behind the projector."""
    tower, projector = model.model.vision_tower.timm_model, model.model.multi_modal_projector
    p, n = tower.num_prefix_tokens, GRID[0] * GRID[1]
    visible = torch.zeros(len(keep), n, dtype=torch.bool).scatter(1, keep, True)
    mask = F.pad(visible, (p, 0), value=True)[:, None, None]
    hooks = [
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
        )
        for block in tower.blocks
    ]
    tokens = tower.forward_features(tiles.flatten(0, 1))
    for hook in hooks:
        hook.remove()
    maps = projector(tokens[:, p:])
    cells = keep[:, :: CELL**2]
    place = (cells // GRID[1] // CELL) * (GRID[1] // CELL) + cells % GRID[1] // CELL
    return torch.stack([row[index] for row, index in zip(maps, place)])


@pytest.mark.parametrize("ratio", [0.5, 0.25])
@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_drop_equals_mask_through_the_projector(
    tiles: Tensor, ratio: float, class_token: bool
) -> None:
    model = perception_lm(class_token=class_token)
    full = features(model, tiles)
    plain = copy.deepcopy(model)
    tower = drop_visual_tokens(model, "contrast", keep_ratio=ratio)
    k = int(64 * ratio)
    keep = select_cells(tower.patch_scores(tiles.flatten(0, 1)), k, GRID, CELL)
    expected = masked_features(plain, tiles, keep)
    found = features(model, tiles)
    assert found.shape == expected.shape == (2, k // 4, 48)
    assert (found - expected).abs().max() <= 1e-5
    assert (features(model, tiles, keep_indices=keep.flip(1)) - expected).abs().max() <= 1e-5
    # the proof that this test can fail
    places = (keep[:, ::4] // 8 // 2) * 4 + keep[:, ::4] % 8 // 2
    whole = torch.stack([row[index] for row, index in zip(full, places)])
    assert (found - whole).abs().max() > 1e-3


@torch.no_grad()
def test_all_patches_are_the_plain_model_and_restore_gives_it_back(tiles: Tensor) -> None:
    model = perception_lm()
    backbone = model.model.vision_tower.timm_model
    names = list(model.state_dict())
    expected, logits = features(model, tiles), model(prompt(16, 2), tiles).logits
    tower = drop_visual_tokens(model, keep_ratio=0.5)
    assert not torch.equal(features(model, tiles)[:, :8], expected[:, :8])
    tower.keep_ratio = 1.0
    assert torch.equal(features(model, tiles), expected)
    assert torch.equal(model(prompt(16, 2), tiles).logits, logits)
    tower.keep_ratio = 0.25
    assert restore_visual_tokens(model) is backbone
    assert list(model.state_dict()) == names
    assert torch.equal(model(prompt(16, 2), tiles).logits, logits)
    with pytest.raises(TypeError, match="drops no visual tokens"):
        restore_visual_tokens(model)


@torch.no_grad()
def test_generate_reads_one_token_for_each_cell(tiles: Tensor) -> None:
    model = perception_lm()
    assert num_visual_tokens(model) == num_visual_tokens(model, 112) == 16
    tower = drop_visual_tokens(model, keep_ratio=0.5)
    each = num_visual_tokens(model, (112, 112))
    assert each == num_visual_tokens(model.model) == 8
    words = prompt(each, 2)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(input_ids=words, pixel_values=tiles, **options)
    assert out.shape == (1, words.shape[1] + 3)
    tower.keep_ratio = 0.25
    with pytest.raises(ValueError, match="do not match, tokens: 16, features: 8"):
        model.generate(input_ids=words, pixel_values=tiles, **options)
    restore_visual_tokens(model)
    assert model(prompt(16, 2), tiles).logits.shape[1] == 35


@pytest.mark.skipif(
    "attn_mask" not in inspect.signature(Eva.forward).parameters,
    reason=f"Eva of timm {timm.__version__} takes no attention mask",
)
@torch.no_grad()
def test_a_coarse_rest_fills_the_grid(tiles: Tensor) -> None:
    """The language model reads as many tokens as before; the tower encodes half as many."""
    model = perception_lm()
    plain = copy.deepcopy(model)
    tower = drop_visual_tokens(model, "contrast", keep_ratio=0.5, rest="coarse")
    assert num_visual_tokens(model) == 16
    lengths: list[int] = []
    tower.backbone.blocks[0].register_forward_hook(
        lambda _, args, out: lengths.append(out.shape[1])
    )
    found = features(model, tiles)
    layout = tower.token_layout(tiles.flatten(0, 1))
    assert lengths[0] == 1 + layout.num_tokens <= 1 + 32
    assert found.shape == features(plain, tiles).shape
    assert model(prompt(16, 2), tiles).logits.shape[1] == 35
    # a coarse cell is its one token behind the projector, a refined one the mean of its four
    tokens = tower.forward_features(tiles.flatten(0, 1))[:, 1:]
    projector = plain.model.multi_modal_projector
    projector.pooling = nn.Identity()
    each = layout.to_grid(projector(tokens)).unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    assert (found - each).abs().max() <= 1e-5


@torch.no_grad()
def test_a_projector_that_pools_nothing(tiles: Tensor) -> None:
    model = perception_lm(pooling=1)
    drop_visual_tokens(model, keep_ratio=0.3)
    assert num_visual_tokens(model) == 19
    assert features(model, tiles).shape == (2, 19, 48)


@torch.no_grad()
def test_a_pe_video_tower_takes_a_pruned_model() -> None:
    config = transformers.PeVideoEncoderConfig(
        vision_config=transformers.TimmWrapperConfig(
            architecture="vit_pe_core_large_patch14_336",
            num_labels=32,
            model_args={"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 112},
        ),
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "head_dim": 32},
    )
    model = transformers.AutoModel.from_config(config).eval()
    video = torch.randn(1, 4, 3, 112, 112)
    vision = model.embedder.vision_model
    full = model(video).last_hidden_state
    vision.timm_model = drop_patches(vision.timm_model, keep_ratio=0.5)
    assert model(video).last_hidden_state.shape == full.shape
    assert not torch.equal(model(video).last_hidden_state, full)
    vision.timm_model.keep_ratio = 1.0
    assert torch.equal(model(video).last_hidden_state, full)


def test_bad_input() -> None:
    model = perception_lm()
    backbone = model.model.vision_tower.timm_model
    with pytest.raises(
        ValueError, match=r"19 of 64 patches split a cell of 2x2: keep 16 or 20, .*0\.25"
    ):
        drop_visual_tokens(model, keep_ratio=0.3)
    assert model.model.vision_tower.timm_model is backbone
    assert backbone.patch_drop is None
    with pytest.raises(ValueError, match="selection='top', without a budget"):
        drop_visual_tokens(model, selection="random")
    with pytest.raises(TypeError, match="TimmWrapperModel has no vision_tower"):
        drop_visual_tokens(model.model.vision_tower)
    tower = drop_visual_tokens(model)
    with pytest.raises(TypeError, match="drops visual tokens already"):
        drop_visual_tokens(model)
    tiles, keep = torch.randn(1, 1, 3, 112, 112), torch.tensor([[0, 1, 8, 10]])
    with pytest.raises(ValueError, match="keep_indices must be whole cells of 2x2"):
        features(model, tiles, keep_indices=keep)
    tower.selection = "random"
    with pytest.raises(ValueError, match="selection='top', without a budget"):
        features(model, tiles)
    tower.selection, tower.keep_ratio = "top", 0.3
    with pytest.raises(ValueError, match="19 of 64 patches split a cell"):
        features(model, tiles)
    tower.keep_ratio = 1.0
    with pytest.raises(ValueError, match="keep_ratio below 1"):
        features(model, tiles, keep_indices=keep)


@pytest.mark.parametrize("cell", [1, 2, 3])
def test_cells_against_a_plain_loop(cell: int) -> None:
    h, w, cells = 2 * cell, 4 * cell, 3
    scores = torch.randn(2, h * w)
    scores[0, ::2] = 0.0
    found = select_cells(scores, cells * cell * cell, (h, w), cell)
    for row, keep in zip(scores.view(2, h, w), found):
        inside = {
            (y, x): row[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].mean().item()
            for y in range(2)
            for x in range(4)
        }
        best = sorted(sorted(inside, key=lambda place: -inside[place])[:cells])
        expected = [
            (y * cell + dy) * w + x * cell + dx
            for y, x in best
            for dy in range(cell)
            for dx in range(cell)
        ]
        assert keep.tolist() == expected
    shuffled = found[:, torch.randperm(found.shape[1])]
    assert torch.equal(cell_by_cell(shuffled, (h, w), cell), found)
    with pytest.raises(ValueError, match="whole cells"):
        select_cells(scores, 4, (h, w), 5)


def test_a_processor_that_counts_kept_tokens() -> None:
    """As the guide has it."""
    tokenizers, pil = pytest.importorskip("tokenizers"), pytest.importorskip("PIL.Image")

    class PrunedProcessor(transformers.PerceptionLMProcessor):  # type: ignore[misc, name-defined]
        model: Any = None

        def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
            tiles = image_inputs["pixel_values"][image_idx]
            count = num_visual_tokens(self.model, tuple(tiles.shape[-2:]))
            text: str = self.image_token * (len(tiles) * count)
            return text

    unknown = "?"
    vocabulary = {unknown: 0, "photo": 1, "<|image|>": IMAGE_TOKEN, "<|video|>": 91}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=unknown,
        pad_token=unknown,
        extra_special_tokens=special,
    )
    processor = PrunedProcessor(
        image_processor=transformers.PerceptionLMImageProcessor(tile_size=112),
        video_processor=transformers.PerceptionLMVideoProcessor(),
        tokenizer=tokenizer,
        patch_size=14,
    )
    processor.model = perception_lm()
    drop_visual_tokens(processor.model, keep_ratio=0.25)
    picture = pil.new("RGB", (224, 112))
    inputs = processor(images=[picture], text="<|image|> photo", return_tensors="pt")
    tiles = inputs["pixel_values"].shape[1]
    assert tiles > 1
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == 4 * tiles
    options = {"max_new_tokens": 1, "pad_token_id": 0}
    del inputs["attention_mask"]
    assert processor.model.generate(**inputs, **options).shape[0] == 1
