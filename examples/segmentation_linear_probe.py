"""Segmentation by linear heads on a frozen ViT: what is lost when it is pruned, by each fill."""

import sys
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltrp_timm

REAL = "--pretrained" in sys.argv[1:]  # timm's weights; else a small ViT learns for seconds
SIDE, CLASSES = 192 if REAL else 96, 4  # ground; a plain, a striped and a chequered disc
SMALL = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
LAST = {"indices": 1, "norm": True, "intermediates_only": True}  # one map (B, D, 12, 12)


def draw_scenes(count: int) -> tuple[Tensor, Tensor]:
    """Discs on soft ground: images (B, 3, SIDE, SIDE) in [-1, 1], their masks (B, SIDE, SIDE)."""
    x, masks = torch.arange(SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    ground = F.interpolate(torch.rand(count, 3, 7, 7), SIDE, mode="bicubic")
    images = 0.25 + 0.5 * ground
    for kind in range(1, CLASSES):  # its texture tells the class, its colour nothing
        row, col, size = torch.rand(3, count, 1, 1)
        dy, dx = x[:, None] - SIDE * (0.1 + 0.8 * row), x - SIDE * (0.1 + 0.8 * col)
        inside = dy**2 + dx**2 < (SIDE * (0.1 + 0.1 * size)) ** 2
        light = (0 * dx, (1.5 * dx).sin().sign(), (dx.sin() * dy.sin()).sign())[kind - 1]
        paint = torch.rand(count, 3, 1, 1) * (1 + 0.4 * light.unsqueeze(1))
        images = torch.where(inside.unsqueeze(1), paint, images)
        masks[inside] = kind
    return (images + 0.1 * torch.randn(images.shape)).clamp(0, 1) * 2 - 1, masks


def learn(
    vit: nn.Module, maps: Callable[[Tensor], Tensor], inputs: Tensor, masks: Tensor, lr: float
) -> nn.Module:
    """A linear head on ``maps(inputs)``, upsampled to pixels; the ViT learns too if not frozen."""
    classify = nn.Conv2d(vit.num_features, CLASSES, 1)
    head = nn.Sequential(classify, nn.Upsample(SIDE, mode="bilinear"))  # as upsampling first
    learners = [p for p in nn.ModuleList([head, vit]).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learners, lr)
    for _ in range(80):
        some = torch.randint(len(inputs), (16,))
        optimizer.zero_grad()
        F.cross_entropy(head(maps(inputs[some])), masks[some]).backward()
        optimizer.step()
    return head


def iou(classes: Tensor, masks: Tensor) -> float:
    """Intersection over union of each class over all pixels, their mean."""
    found, true = (F.one_hot(each.flatten(), CLASSES).bool() for each in (classes, masks))
    return ((found & true).sum(0) / (found | true).sum(0)).mean().item()


torch.manual_seed(0)
small = {"pretrained": True} if REAL else SMALL
vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIDE, **small)
if not REAL:
    learn(vit, lambda x: vit.forward_intermediates(x, **LAST)[0], *draw_scenes(512), 2e-3)
vit.eval().requires_grad_(False)
(images, masks), (new_images, new_masks) = draw_scenes(256), draw_scenes(128)

maps, new_maps = (vit.forward_intermediates(x, **LAST)[0] for x in (images, new_images))
full_head = learn(vit, nn.Identity(), maps, masks, 0.02)
ground, full = (iou(c, new_masks) for c in (0 * new_masks, full_head(new_maps).argmax(1)))
print(f"mIoU on new scenes: full {full:.3f}, all called ground {ground:.3f}; pruned, by a head of")
print("ranker    keep  fill     its own  the full ViT")  # which never saw a place without a token
own = {}
for ranker, args in {"contrast": {}, "random": {"generator": torch.Generator()}}.items():
    for ratio in (0.5, 0.25):
        model = ltrp_timm.drop_patches(vit, ranker, ratio, ranker_args=args)
        kept, new_kept = model.keep_indices(images), model.keep_indices(new_images)
        for fill in ("zeros", "nearest"):
            which = {"fill": fill, **LAST}
            maps = model.forward_intermediates(images, keep_indices=kept, **which)[0]
            new_maps = model.forward_intermediates(new_images, keep_indices=new_kept, **which)[0]
            heads = (learn(vit, nn.Identity(), maps, masks, 0.02), full_head)
            found = [iou(head(new_maps).argmax(1), new_masks) for head in heads]
            print(f"{ranker:9s} {ratio:<5g} {fill:8s} {found[0]:.3f}    {found[1]:.3f}")
            own[ranker, ratio, fill] = found[0]
        vit = model.restore()

if not REAL:  # what holds for the small one
    assert full > max(own.values()) >= min(own.values()) > ground + 0.05
    assert own["contrast", 0.25, "zeros"] > own["random", 0.25, "nearest"] + 0.05
    # an empty place says ground where the ranker left it out for a reason, and nothing by chance
    assert own["contrast", 0.25, "zeros"] > own["contrast", 0.25, "nearest"] + 0.1
    assert own["random", 0.25, "nearest"] > own["random", 0.25, "zeros"] + 0.02
