"""All selectors of the comparison behind one interface: rankers, ours and those of labels."""

from typing import Any

import torch

import ltrp_timm
from studies.fairness.networks import MEAN, STD
from studies.fairness.scenes import PATCH
from studies.fairness.stages import Trained

WEIGHT_FREE = ("random", "centre", "pixel_std", "gradient", "colour", "contrast", "dpc_knn")
CAM = "cam, blurred"
OF_CNN = ("cam", "grad_cam")
WITH_LABELS = (*OF_CNN, "attention")
TOP = 2  # the maps of that many classes count: a scene has 2 to 4 digits, half of them with labels


def label_free(trained: Trained) -> dict[str, Any]:
    """Rankers that saw no label, by name."""
    found = {name: ltrp_timm.create_ranker(name, patch_size=PATCH) for name in WEIGHT_FREE}
    found["random"].generator = torch.Generator().manual_seed(0)  # each scene its own order
    return {name: ranker.eval() for name, ranker in (found | trained.rankers).items()}


def with_labels(trained: Trained, half: str) -> dict[str, Any]:
    """Rankers that saw the labels of one half of the digits, by name."""
    shared: dict[str, Any] = {"mean": MEAN, "std": STD}
    maps = {"top": TOP, "backbone": trained.cnns[half], **shared}
    found = {
        "cam": ltrp_timm.create_ranker("cam", **maps),
        CAM: ltrp_timm.create_ranker("cam", blur=True, **maps),
        "grad_cam": ltrp_timm.create_ranker("grad_cam", **maps),
    }
    if half in trained.vits:
        found["attention"] = ltrp_timm.create_ranker(
            "attention", backbone=trained.vits[half], **shared
        )
    return {name: ranker.eval() for name, ranker in found.items()}


def labels_of(method: str) -> str:
    """What a selector has seen beside the images."""
    if method in ("ink", "all patches"):
        return "the truth" if method == "ink" else "–"
    return "of five digits" if method.startswith(WITH_LABELS) else "none"
