"""Networks trained with labels: classifiers for map-based selectors, and the judge of all."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from studies.fairness.scenes import CLASSES, PATCH, SIDE, Scenes

BATCH = 64
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_LEAST_KEPT = 8  # patches that the judge is shown while it learns, at least


class SmallCNN(nn.Module):
    """Convolutions with BatchNorm down to a place for each patch; it pools places by maximum.

    It has the methods of timm's classifiers that rankers need.

    Args:
        num_classes: logits.
        in_chans: channels of an image.
    """

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, 128
        widths = (in_chans, 32, 64, 128, 128, 128)
        layers: list[nn.Module] = []
        for number, (width, out) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
            layers.append(nn.ReLU(inplace=True))
            if number in (0, 1, 3):  # 64 pixels become 8 places
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, 128, H / 8, W / 8)."""
        return self.features(images)

    def forward_head(self, features: Tensor) -> Tensor:
        """features (B, 128, h, w) -> logits (B, num_classes)."""
        return self.fc(features.amax(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The linear layer on pooled places."""
        return self.fc


def make_cnn(num_classes: int, in_chans: int = 3) -> Any:
    """A classifier for ``cam`` and ``grad_cam``."""
    return with_normalisation(SmallCNN(num_classes, in_chans))


def make_vit(num_classes: int, teacher: Any = None) -> Any:
    """A ViT of the teacher's shape, with the weights of its encoder, that reads its class token."""
    net: Any = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=128,
        depth=3,
        num_heads=4,
        num_classes=num_classes,
    )
    if teacher is not None:
        own = set(net.state_dict()) - {"pos_embed", "head.weight", "head.bias"}
        weights = {name: value for name, value in teacher.state_dict().items() if name in own}
        places = teacher.pos_embed.reshape(1, -1, 128)[:, -teacher.num_patches :]
        weights["pos_embed"] = F.pad(places, (0, 0, 1, 0))  # the class token has no place
        missing = net.load_state_dict(weights, strict=False)
        if set(missing.missing_keys) != {"head.weight", "head.bias"}:
            raise ValueError(f"the teacher's encoder is another one: {missing}.")
    return with_normalisation(net)


def with_normalisation(net: Any) -> Any:
    """Say how the network's images are normalised, as timm's own models do."""
    net.pretrained_cfg = {"mean": MEAN, "std": STD}
    return net


def normalise(pixels: Tensor) -> Tensor:
    """pixels (B, 3, H, W) in [0, 1] -> what the networks take."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def only(images: Tensor, kept: Tensor) -> Tensor:
    """What the judge sees of normalised images when patches are dropped.

    Args:
        images: (B, 3, H, W).
        kept: (B, N) bool.

    Returns:
        (B, 4, H, W): zeros where a patch was dropped, and a plane that says which were kept.
    """
    h, w = images.shape[2] // PATCH, images.shape[3] // PATCH
    plane = kept.view(-1, 1, h, w).to(images.dtype)
    plane = F.interpolate(plane, scale_factor=PATCH, mode="nearest")
    return torch.cat([images * plane, plane], dim=1)


def neutral_masks(ink: Tensor, draw: torch.Generator) -> Tensor:
    """Masks that favour no selector: the order of the ink, mixed with a random one.

    Args:
        ink: (B, N), of all classes.
        draw: random numbers.

    Returns:
        (B, N) bool, 8 to N patches; the weight of the ink's order is uniform in [0, 1].
    """
    count = ink.shape[1]
    noise = torch.rand(ink.shape, generator=draw)
    order = (ink + 1e-3 * noise).argsort(dim=1).argsort(dim=1) / count
    weight = torch.rand(len(ink), 1, generator=draw)
    scores = weight * order + (1 - weight) * torch.rand(ink.shape, generator=draw)
    keep = torch.randint(_LEAST_KEPT, count + 1, (len(ink), 1), generator=draw)
    return scores.argsort(dim=1, descending=True).argsort(dim=1) < keep


def fit(
    net: Any,
    scenes: Callable[[], Scenes],
    classes: list[int],
    epochs: int,
    lr: float,
    seed: int,
    see: Callable[[Scenes, Tensor, torch.Generator], Tensor] | None = None,
) -> Any:
    """Train a classifier on the labels of some classes, by AdamW and a cosine, in bfloat16.

    Args:
        net: images -> logits, one for each of ``classes``.
        scenes: makes them, with labels of all classes; the others are not looked at.
        classes: the digits with labels.
        epochs: over the scenes.
        lr: learning rate.
        seed: of order and shifts.
        see: (scenes, normalised images, random numbers) -> what the network sees; None for the
            images.

    Returns:
        The network in eval.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(net, opt="adamw", lr=lr, weight_decay=0.05)
    shown = scenes()
    steps = epochs * (len(shown.images) // BATCH)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 7, t_in_epochs=False)
    net.train()
    for step, batch in enumerate(_batches(shown, epochs, draw)):
        schedule.step_update(step)
        images = normalise(batch.pixels())
        if see is not None:
            images = see(batch, images, draw)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        targets = batch.labels[:, classes].float()
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


def _batches(scenes: Scenes, epochs: int, draw: torch.Generator) -> Iterator[Scenes]:
    """Whole batches in a new order each epoch, moved by up to 4 pixels, round the edge."""
    for _ in range(epochs):
        order = torch.randperm(len(scenes.images), generator=draw)
        for part in order.split(BATCH):
            if len(part) == BATCH:
                shift = tuple(torch.randint(-4, 5, (2,), generator=draw).tolist())
                images, labels, classes = (tensor[part] for tensor in scenes)
                yield Scenes(images.roll(shift, (2, 3)), labels, classes.roll(shift, (1, 2)))


def masked(scenes: Scenes, images: Tensor, draw: torch.Generator) -> Tensor:
    """What the judge sees while it learns: see ``neutral_masks``."""
    return only(images, neutral_masks(scenes.ink().sum(dim=1), draw))


def logits_of(net: Any, scenes: Scenes, kept: Tensor | None = None) -> Tensor:
    """Logits (B, C) of all scenes, of the kept patches (B, N) bool alone where these are given."""
    found, start = [], 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for batch in scenes.batches(4 * BATCH):
            images = normalise(batch.pixels())
            if kept is not None:
                images = only(images, kept[start : start + len(images)])
            places = net.forward_features(images.contiguous(memory_format=torch.channels_last))
            with torch.autocast("cpu", enabled=False):  # else logits of 8 bits would tie
                found.append(net.forward_head(places.float()))
            start += len(images)
    return torch.cat(found)


def make_judge() -> Any:
    """A classifier of all ten digits that knows which patches it was shown."""
    return make_cnn(CLASSES, in_chans=4)
