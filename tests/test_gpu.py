"""What must hold on a GPU too; the CPU runs the same tests, so that they are known to work.

Run those of the GPU by ``pytest -m gpu``, or by ``benchmarks/gpu.py`` where pytest-xdist is not
installed.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from benchmark_setup import load
from conftest import awaken, records_arguments, small_teacher
from gpu.parts import graphed
from gpu.record import NotHereError
from test_slots import masked_reference
from torch import Tensor
from train_setup import distance, make_photos, run, weights

from ltrp_timm import drop_patches, gather_patches, semantic_density
from ltrp_timm.measure.throughput import peak_memory
from ltrp_timm.teacher import random_visible_indices
from ltrp_timm.teacher.density import REMOVALS
from ltrp_timm.train.folder import read_state
from ltrp_timm.train.loop import Trainer

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# relative to the size of what is compared; bfloat16 has 8 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of float32 in float32: by default cuDNN takes TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def off(found: Tensor, expected: Tensor) -> float:
    """Size of the difference, relative to that of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def on(device: str, dtype: torch.dtype, model: Any, images: Tensor) -> tuple[Any, Tensor]:
    return model.to(device=device, dtype=dtype), images.to(device=device, dtype=dtype)


@every_device
@every_dtype
@pytest.mark.parametrize("family", ["vit", "registers", "dinov3", "cait"])
@torch.no_grad()
def test_drop_equals_mask(
    backbone_of: Callable[..., Any], family: str, dtype: torch.dtype, device: str
) -> None:
    backbone, images = on(device, dtype, *backbone_of(family))
    keep = torch.stack([torch.randperm(36)[:12].sort().values for _ in images]).to(device)
    full_tokens, full = backbone.forward_features(images), backbone(images)
    tokens, logits = masked_reference(backbone, images, keep)
    model = drop_patches(backbone)
    prefix = model.num_prefix_tokens
    dropped = model.forward_features(images, keep_indices=keep)
    assert dropped.device.type == device
    assert off(dropped, tokens) <= TOLERANCE[dtype]
    assert off(model(images, keep_indices=keep), logits) <= TOLERANCE[dtype]
    # the proof that this test can fail
    plain = torch.cat([full_tokens[:, :prefix], gather_patches(full_tokens[:, prefix:], keep)], 1)
    assert off(dropped, plain) > 2 * TOLERANCE[dtype]
    assert off(full, logits) > 2 * TOLERANCE[dtype]


@every_device
@every_dtype
@pytest.mark.parametrize("ranker", ["border", "contrast", "conv"])
@pytest.mark.filterwarnings("ignore:.*no trained weights")
@torch.no_grad()
def test_keeping_all_is_the_plain_model(
    backbone_of: Callable[..., Any], ranker: str, dtype: torch.dtype, device: str
) -> None:
    backbone, images = on(device, dtype, *backbone_of("vit"))
    full = backbone(images)
    model = drop_patches(backbone, ranker, keep_ratio=1.0)
    assert torch.equal(model(images), full)
    model.keep_ratio = 0.5
    assert off(model(images), full) > 1e-3


@every_device
@pytest.mark.parametrize("ranker", ["border", "contrast", "conv", "pixel_std", "gradient"])
@pytest.mark.filterwarnings("ignore:.*no trained weights")
@torch.no_grad()
def test_scores_are_those_of_the_cpu(
    backbone_of: Callable[..., Any], ranker: str, device: str
) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, ranker, keep_ratio=0.5)
    expected = model.patch_scores(images)
    model, images = on(device, torch.float32, model, images)
    found = model.patch_scores(images)
    assert found.device.type == device
    assert off(found.cpu(), expected) <= 1e-4
    assert expected.std(dim=1).min() > 1e-3 * expected.abs().max()  # there is an order


@every_device
@every_dtype
@pytest.mark.parametrize("family", ["vit", "registers", "dinov3"])
@torch.no_grad()
def test_coarse_ends_are_the_plain_model(
    backbone_of: Callable[..., Any], family: str, dtype: torch.dtype, device: str
) -> None:
    backbone, images = on(device, dtype, *backbone_of(family))
    full = backbone(images)
    model = drop_patches(backbone, keep_ratio=1.0, rest="coarse")
    assert torch.equal(model(images), full)
    model.keep_ratio = 0.5
    cpu, where = copy.deepcopy(model).cpu().float(), images.cpu().float()
    keep = model.keep_indices(images)
    expected = cpu(where, keep_indices=keep.cpu())
    assert off(model(images, keep_indices=keep).cpu(), expected) <= TOLERANCE[dtype]
    assert off(full.cpu(), expected) > 2 * TOLERANCE[dtype]


@every_device
@pytest.mark.parametrize("rest", ["drop", "coarse"])
@torch.no_grad()
def test_nothing_waits_for_the_device(
    backbone_of: Callable[..., Any], rest: str, device: str
) -> None:
    backbone, images = on(device, torch.float32, *backbone_of("vit"))
    model = drop_patches(backbone, keep_ratio=0.5, rest=rest).eval()
    model(images)  # what is made once may wait
    if device == "cpu":
        pytest.skip("a CPU waits for nothing")
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images)
        with pytest.raises(RuntimeError, match="synchroniz"):
            model(images).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_device
@pytest.mark.parametrize("removal", REMOVALS)
def test_pseudo_scores_are_those_of_the_cpu(removal: str, device: str) -> None:
    teacher = small_teacher()
    images = torch.randn(2, teacher.in_chans, *teacher.img_size)
    visible = random_visible_indices(2, teacher.num_patches, 0.6)
    expected, _ = semantic_density(teacher, images, visible, removal=removal, chunk=1)
    found, indices = semantic_density(
        teacher.to(device), images.to(device), visible.to(device), removal=removal
    )
    assert found.device.type == device
    assert torch.equal(indices.cpu(), visible)
    assert (found.cpu() - expected).abs().max() <= 1e-3 * expected.std()
    assert expected.std(dim=1).min() > 1e-3  # there is an order


@every_device
@torch.no_grad()
def test_a_pruned_forward_needs_less_memory(device: str) -> None:
    full = timm.create_model("vit_base_patch16_224", depth=2).eval().to(device)
    images = torch.randn(8, 3, 224, 224, device=device)
    pruned = drop_patches(timm.create_model("vit_base_patch16_224", depth=2), keep_ratio=0.25)
    pruned = pruned.eval().to(device)
    peaks = {}
    with load("memory").only_what_is_alive():
        for name, model in {"full": full, "pruned": pruned}.items():
            model(images)
            peaks[name] = peak_memory(lambda model=model: model(images), device)
    if peaks["full"] is None:
        pytest.skip("peak memory is not known here")
    assert 0 < peaks["pruned"] < 0.6 * peaks["full"]


class CrashError(Exception):
    pass


@every_device
@records_arguments
def test_a_run_that_broke_off_goes_on(tmp_path: Path, device: str) -> None:
    """On a GPU to rounding: sums may be taken in another order in each run."""
    photos = make_photos(tmp_path / "photos", 20)

    def crash(self: Any, *args: Any) -> Any:
        if self.progress.step == 4:
            raise CrashError
        return original(self, *args)

    steps = run(photos, tmp_path / "whole", device=device).steps
    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", crash)
        with pytest.raises(CrashError):
            run(photos, tmp_path / "cut", device=device, checkpoint_steps=1)
    path = tmp_path / "cut" / "checkpoint.pt"
    before = read_state(path)["model"]
    assert run(photos, tmp_path / "cut", device=device, resume="auto").steps == steps
    tolerance = 0.0 if device == "cpu" else 1e-3
    assert distance(weights(tmp_path / "cut"), weights(tmp_path / "whole")) <= tolerance
    after = read_state(path)["model"]
    assert max(float((before[name] - after[name]).abs().max()) for name in after) > 3e-3


@every_device
@every_dtype
@torch.no_grad()
def test_a_captured_graph_follows_its_images(
    backbone_of: Callable[..., Any], dtype: torch.dtype, device: str
) -> None:
    backbone, images = on(device, dtype, *backbone_of("vit"))
    model = drop_patches(backbone, keep_ratio=0.5).eval()
    if device == "cpu":
        with pytest.raises(NotHereError, match="needs CUDA"):
            graphed(model, images)
        return
    replay = graphed(model, images)
    first = replay().clone()
    assert off(first, model(images)) <= TOLERANCE[dtype]
    images.copy_(images.flip(0))
    assert off(replay(), model(images)) <= TOLERANCE[dtype]
    assert off(first, model(images)) > 2 * TOLERANCE[dtype]


@every_device
@torch.no_grad()
def test_compiled_in_one_graph(backbone_of: Callable[..., Any], device: str) -> None:
    """With the same patches, by the ranks of the default ranker."""
    backbone, images = on(device, torch.float32, *backbone_of("vit"))
    full = backbone(images)
    model = drop_patches(awaken(backbone), keep_ratio=0.5).eval()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    assert off(compiled(images), model(images)) <= 1e-4
    assert off(compiled(images), full) > 1e-2
