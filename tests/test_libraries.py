"""Pruned models in other libraries, a promise each: `pytest -m elsewhere`, with that extra.

The table in docs/guides/libraries.md has the versions that this ran with.
"""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from train_setup import make_photos, run

from ltrp_timm import LTRPModel, drop_patches, save_pretrained
from ltrp_timm.models.open_model import open_model
from ltrp_timm.slots import find_adapter

pytestmark = [
    pytest.mark.elsewhere,
    pytest.mark.filterwarnings("default"),  # the other libraries' own
]
TINY: dict[str, Any] = {"depth": 2, "img_size": 64, "num_classes": 5}
KEEP = torch.tensor([[0, 3, 9], [1, 2, 15]])


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("ltrp_vit_tiny", **{**TINY, **changes})


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 8)


# open_clip


@pytest.mark.parametrize(
    ("trunk", "pool", "size"),
    [("vit_base_patch32_siglip_256", "map", 256), ("vit_pe_core_tiny_patch16_384", "map", 384)],
)
@torch.no_grad()
def test_open_clip_with_a_timm_trunk(trunk: str, pool: str, size: int) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"timm_model_name": trunk, "timm_pool": pool, "timm_proj": "none", "image_size": size}
    width = timm.create_model(trunk, num_classes=0).num_features
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1}
    clip = open_clip.CustomTextCLIP(width, vision, text).eval()
    pictures, words = torch.randn(2, 3, size, size), torch.randint(50, (2, 8))
    full = clip(pictures, words)
    clip.visual.trunk = drop_patches(clip.visual.trunk, keep_ratio=0.5)
    trunk_model = clip.visual.trunk
    features = clip.encode_image(pictures)
    assert torch.equal(features, clip.visual.head(trunk_model(pictures)))
    assert not torch.allclose(clip(pictures, words)[0], full[0], atol=1e-4)
    found = clip.forward_intermediates(pictures, image_indices=1)["image_intermediates"]
    assert found[0].shape[-2:] == trunk_model.patch_grid
    trunk_model.keep_ratio = 1.0
    assert torch.equal(clip(pictures, words)[0], full[0])
    clip.visual.trunk = trunk_model.restore()
    assert torch.equal(clip(pictures, words)[0], full[0])


def test_open_clip_says_what_to_use_instead() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(32, vision, text)
    own = r"VisionTransformer of open_clip\.transformer: .*a timm ViT as visual\.trunk.*from timm"
    with pytest.raises(TypeError, match=own):
        drop_patches(clip.visual)
    with pytest.raises(TypeError, match=r"clip\.visual\.trunk = drop_patches"):
        drop_patches(clip)
    for name in ("ViT-B-16-SigLIP2", "PE-Core-B-16"):  # what the sentence names
        trunk = open_clip.get_model_config(name)["vision_cfg"]["timm_model_name"]
        find_adapter(timm.create_model(trunk, depth=1))


# segmentation_models_pytorch


@torch.no_grad()
def test_segmentation_with_dpt() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    build = {"encoder_weights": None, "classes": 3, "dynamic_img_size": True}
    model = smp.DPT("tu-ltrp_vit_tiny", **build, keep_ratio=0.5, ranker="contrast").eval()
    encoder = model.encoder.model
    assert isinstance(encoder, LTRPModel)
    assert encoder.keep_ratio == 0.5
    lengths: list[int] = []
    encoder.backbone.blocks[0].register_forward_hook(
        lambda _, args, out: lengths.append(out.shape[1])
    )
    for size in ((224, 224), (256, 192)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 3, *size)
    assert lengths == [1 + 98, 1 + 96]
    plain = smp.DPT("tu-vit_tiny_patch16_224", **build).eval()
    names = {name.replace("model.backbone.", "model."): w for name, w in model.state_dict().items()}
    plain.load_state_dict(names)
    pictures = torch.randn(1, 3, 224, 224)
    assert not torch.allclose(plain(pictures), model(pictures), atol=1e-3)
    encoder.keep_ratio = 1.0
    assert torch.equal(plain(pictures), model(pictures))


# PEFT


def test_lora_on_qkv(images: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny(keep_ratio=0.5).eval()
    expected = plain(images)
    config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"])
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    assert torch.equal(model.eval()(images), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 4])).backward()
    optimizer.step()
    found = model.eval()(images, keep_indices=KEEP)
    assert not torch.allclose(found, plain(images, keep_indices=KEEP), atol=1e-4)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert torch.equal(again(images, keep_indices=KEEP), found)
    merged = model.merge_and_unload()
    assert isinstance(merged, LTRPModel)
    assert (merged(images, keep_indices=KEEP) - found).abs().max() <= 1e-5


def test_lora_leaves_a_learned_ranker_alone(images: Tensor) -> None:
    """It has a qkv too: name the backbone's."""
    peft = pytest.importorskip("peft")
    model = tiny(ranker="vit_tiny", ranker_args={"depth": 1, "img_size": 64})
    model.ranker.trained = True
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r"backbone\..*qkv"))
    model(images).sum().backward()
    assert not [
        name for name, p in model.named_parameters() if "ranker" in name and p.requires_grad
    ]


# FSDP2


def _shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model.backbone.patch_embed, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = _shard(tiny(keep_ratio=0.5, ranker="contrast"))
        images = torch.load(f"{folder}/images.pt", weights_only=True)[rank : rank + 1]
        logits = model(images)
        nn.functional.cross_entropy(logits, torch.tensor([rank])).backward()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        torch.save({"logits": logits.detach(), "grads": grads}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_fsdp2_on_blocks_patch_embedding_and_root(tmp_path: Path, images: Tensor) -> None:
    torch.save(images, tmp_path / "images.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_fsdp, args=(port, str(tmp_path)), nprocs=2)
    model = tiny(keep_ratio=0.5, ranker="contrast")
    logits = model(images)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert (torch.cat([each["logits"] for each in found]) - logits).abs().max() <= 1e-5
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[0]["grads"].keys() == grads.keys()
    for name, grad in grads.items():
        assert (found[0]["grads"][name] - grad).abs().max() <= 1e-5, name


# accelerate


def test_accelerate_prepares_and_trains(images: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, plain = tiny(keep_ratio=0.5), tiny(keep_ratio=0.5)
    optimizer = torch.optim.SGD(model.backbone.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(images).square().mean())
    optimizer.step()
    plain(images).square().mean().backward()
    torch.optim.SGD(plain.backbone.parameters(), 0.1).step()
    own = accelerator.unwrap_model(model)
    assert isinstance(own, LTRPModel)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), plain.parameters()))


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("ranker", ["contrast", "conv"])
@torch.no_grad()
def test_accelerate_offloads(images: Tensor, tmp_path: Path, ranker: str, to_disk: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny(keep_ratio=0.5, ranker=ranker).eval()
    model.ranker.trained = True
    expected = model(images), model(images, keep_indices=KEEP)
    if to_disk:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
        assert all(parameter.is_meta for parameter in model.backbone.blocks.parameters())
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    # a hooked patch embedding embeds all patches by its convolution: another rounding
    assert (model(images) - expected[0]).abs().max() <= 1e-5
    assert (model(images, keep_indices=KEEP) - expected[1]).abs().max() <= 1e-5


@torch.no_grad()
def test_accelerate_fills_an_empty_model(images: Tensor, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny(keep_ratio=0.5).eval()
    save_pretrained(model, tmp_path)
    with accelerate.init_empty_weights():
        empty = tiny(keep_ratio=0.5).eval()
    file = str(tmp_path / "model.safetensors")
    filled = accelerate.load_checkpoint_and_dispatch(empty, file, device_map={"": "cpu"})
    assert torch.equal(filled(images), model(images))


# transformers


def test_the_trainer_of_transformers(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    hf = pytest.importorskip("transformers", "5")
    config = hf.TimmWrapperConfig(
        architecture="ltrp_vit_tiny",
        num_labels=5,
        model_args={"depth": 2, "img_size": 64, "ranker": "conv"},
    )
    model = hf.TimmWrapperForImageClassification(config)
    model.timm_model.ranker.trained = True
    before = copy.deepcopy(model.state_dict())
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, (0, 4))]
    options = {"max_steps": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    options |= {"disable_tqdm": True, "save_steps": 1}
    arguments = hf.TrainingArguments(str(tmp_path / "run"), **options)
    trainer = hf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert "timm_model.backbone.blocks.0.attn.qkv.weight" in changed
    assert not [name for name in changed if ".ranker." in name]
    again = hf.TimmWrapperForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(images).logits, model.eval()(images).logits)
    trainer = hf.Trainer(copy.deepcopy(again), arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert (trainer.model.eval()(images).logits - again(images).logits).abs().max() <= 1e-5


# Lightning


def test_lightning_trains_saves_and_opens(images: Tensor, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny(keep_ratio=0.5)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.backbone.parameters(), 1e-2)

    module = Classifier()
    before = copy.deepcopy(module.model).eval()
    data = torch.utils.data.TensorDataset(images, torch.tensor([0, 4]))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, 2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trained = module.model.eval()
    assert not torch.allclose(trained(images), before(images))
    again, _ = open_model("ltrp_vit_tiny", checkpoint=tmp_path / "last.ckpt", **TINY)
    assert torch.equal(again.eval()(images), trained(images))


# trackio and wandb


def test_a_training_reports_to_trackio(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    # trackio reads its folder when it is imported, and serves it from a thread: another process
    source = """
import pathlib, sys, train_setup
from trackio.sqlite_storage import SQLiteStorage
photos, out = map(pathlib.Path, sys.argv[1:])
summary = train_setup.run(photos, out, report_to="trackio")
rows = SQLiteStorage.get_logs("ltrp_timm", "out")
assert max(row["step"] for row in rows) == summary.steps
assert sum("train/loss" in row for row in rows) == summary.steps
print("reported")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", source, str(photos), str(tmp_path / "out")],
        **{"capture_output": True, "text": True, "env": environment, "check": False},
    )
    assert "reported" in done.stdout, done.stderr


def test_a_training_reports_to_wandb_offline(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(photos, tmp_path / "out", report_to="wandb")
    assert wandb.run is None
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in written.read_bytes()
