"""How much of the full model's work is left: classes, objects, and closeness of the features."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.selection import PatchSelector, gather_patches, scatter_patches

_BATCH = 16
_OBJECT = 0.25  # a patch is of an object if that share of it is
_NEIGHBOURS = 5
_EVERY = 7  # patches that train the probe of masks: every seventh


class Encoded:
    """Features of a set of pictures.

    Attributes:
        token: (B, D), what the model's head would get.
        dense: (B, h, w, D) patch features, dropped ones taken from the nearest kept, coarse ones
            from the token that covers them; or None.
        kept: (B, h, w) bool, places with features of their own; or None.
    """

    def __init__(
        self, token: Tensor, dense: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        self.token, self.dense, self.kept = token, dense, kept


def in_batches(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call with parts of the inputs, in inference mode; the results in one tensor."""
    with torch.inference_mode():
        parts = zip(*(tensor.split(_BATCH) for tensor in inputs))
        return torch.cat([call(*part) for part in parts])


def normalised(images: Tensor, model: Any) -> Tensor:
    """uint8 images as the model wants them."""
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def encode(model: Any, images: Tensor, keep: Tensor | None = None, dense: bool = False) -> Encoded:
    """Features of uint8 images by a plain model, or with given patches by a pruned one.

    With three scales, blocks stay coarsest by the model's own ranker.
    """
    grid = tuple(model.patch_embed.grid_size) if keep is None else model.patch_grid
    prefix = model.num_prefix_tokens

    def features(batch: Tensor, *kept: Tensor) -> Tensor:
        return model.forward_features(normalised(batch, model), *kept)

    tokens = in_batches(features, images, *([] if keep is None else [keep]))
    pooled = in_batches(lambda part: model.forward_head(part, pre_logits=True), tokens)
    if not dense:
        return Encoded(pooled)
    patches, kept = tokens[:, prefix:], None
    if keep is not None and model.rest == "coarse":
        owner = in_batches(
            lambda part, own: model.token_layout(normalised(part, model), own).token_of_patch(),
            images,
            keep,
        )
        patches = gather_patches(patches, owner)
    elif keep is not None:
        kept = torch.zeros(len(images), grid[0] * grid[1], dtype=torch.bool)
        kept = kept.scatter(1, keep, True).view(-1, *grid)
        patches = scatter_patches(patches, keep, grid, "nearest")
    return Encoded(pooled, patches.reshape(len(images), *grid, -1), kept)


def kept_by(scores: Tensor, selection: PatchSelector) -> Tensor:
    """The patches that a selection keeps by scores (B, N) of a square grid."""
    return selection(scores.unsqueeze(2), scores)[1]


def refined_by(model: Any, scores: Tensor, images: Tensor) -> Tensor:
    """The patches that a model with a coarse rest encodes finely by scores (B, N)."""
    return in_batches(
        lambda part, pixels: model.select(part, normalised(pixels, model)), scores, images
    )


def share_of_objects(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """masks (B, S, S) uint8 -> (B, N): the share of each patch that is object."""
    return F.adaptive_avg_pool2d(masks.float().unsqueeze(1) / 255, tuple(grid)).flatten(1)


def object_auc(scores: Tensor, share: Tensor) -> np.ndarray:
    """For each picture the chance that a patch of an object outranks one without; NaN for none."""
    from scipy.stats import rankdata

    found = []
    for line, part in zip(scores.numpy(), share.numpy()):
        object_patch = part > _OBJECT
        count, others = object_patch.sum(), (~object_patch).sum()
        if not count or not others:
            found.append(np.nan)
            continue
        total = rankdata(line)[object_patch].sum()
        found.append((total - count * (count + 1) / 2) / (count * others))
    return np.array(found)


def object_recall(keep: Tensor, share: Tensor) -> np.ndarray:
    """For each picture the share of the object's area in kept patches."""
    return (share.gather(1, keep).sum(1) / share.sum(1).clamp(min=1e-9)).numpy()


class Probes:
    """Classifiers on features of the full model, trained on other objects on other photos.

    Args:
        single: features and labels (B, classes) of pictures with one object.
        several: of pictures with several; None leaves out what needs them.
    """

    def __init__(self, single: tuple[Encoded, Tensor], several: tuple[Encoded, Tensor] | None):
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        self.known = F.normalize(single[0].token, dim=1)
        self.known_labels = single[1].int().argmax(1)
        self.mean = single[0].token.mean(0)
        self.std = single[0].token.std(0).clamp(min=1e-6)
        self.linear = LogisticRegression(C=0.01, max_iter=300)
        self.linear.fit(self._scaled(single[0]), self.known_labels.numpy())
        self.several: Any = None
        if several is not None:
            self.several = OneVsRestClassifier(LogisticRegression(C=0.01, max_iter=300))
            self.several.fit(self._scaled(several[0]), several[1].int().numpy())

    def _scaled(self, encoded: Encoded) -> np.ndarray:
        return ((encoded.token - self.mean) / self.std).numpy()

    def classes_right(self, encoded: Encoded, labels: Tensor) -> np.ndarray:
        """Whether each picture's class is found by the linear probe."""
        found = self.linear.predict(self._scaled(encoded))
        return (found == labels.int().argmax(1).numpy()).astype(float)

    def neighbours_right(self, encoded: Encoded, labels: Tensor) -> np.ndarray:
        """Whether the nearest pictures of the training set vote for its class."""
        close = (F.normalize(encoded.token, dim=1) @ self.known.T).topk(_NEIGHBOURS, dim=1)
        votes = torch.zeros(len(labels), labels.shape[1])
        votes.scatter_add_(1, self.known_labels[close.indices], close.values.exp())
        return (votes.argmax(1) == labels.int().argmax(1)).double().numpy()

    def accuracies(self, encoded: Encoded, pictures: Any) -> dict[str, np.ndarray]:
        """What is right of each picture with one object, by measure."""
        return {
            "linear": self.classes_right(encoded, pictures.labels),
            "neighbours": self.neighbours_right(encoded, pictures.labels),
            "retrieval": retrieved(encoded, pictures.objects),
        }

    def precision(self, encoded: Encoded, labels: Tensor) -> np.ndarray:
        """For each picture with several objects the average precision of its ranked classes."""
        from sklearn.metrics import average_precision_score

        scores = self.several.predict_proba(self._scaled(encoded))
        return np.array([average_precision_score(y, s) for y, s in zip(labels.numpy(), scores)])


class MaskProbe:
    """A linear classifier of patches, object or not, on feature maps of the full model.

    Args:
        known: features with maps, of other objects on other photos.
        share: (B, N), the share of each patch that is object.
    """

    def __init__(self, known: Encoded, share: Tensor) -> None:
        from sklearn.linear_model import LogisticRegression

        assert known.dense is not None
        features = known.dense.flatten(0, 2)[::_EVERY]
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        self.linear = LogisticRegression(C=0.01, max_iter=200)
        self.linear.fit(self._scaled(features), (share.flatten() > 0.5).numpy()[::_EVERY])

    def _scaled(self, features: Tensor) -> np.ndarray:
        return ((features - self.mean) / self.std).numpy()

    def overlap(self, encoded: Encoded, share: Tensor, fill: str = "nearest") -> np.ndarray:
        """For each picture, intersection over union of the found patches and the object's.

        ``fill="zeros"`` gives places without features of their own zeros.
        """
        assert encoded.dense is not None
        dense = encoded.dense
        if dense[0, :, :, 0].numel() != share.shape[1]:
            side = round(share.shape[1] ** 0.5)
            dense = F.interpolate(dense.permute(0, 3, 1, 2), (side, side), mode="bilinear")
            dense = dense.permute(0, 2, 3, 1)
        if fill == "zeros" and encoded.kept is not None:
            dense = dense * encoded.kept.unsqueeze(-1)
        found = self.linear.predict(self._scaled(dense.flatten(0, 2))).reshape(share.shape)
        true = (share > 0.5).numpy()
        union = (found | true).sum(1)
        return (found & true).sum(1) / np.maximum(union, 1)


def retrieved(encoded: Encoded, objects: Tensor) -> np.ndarray:
    """Whether the nearest other picture shows the same object."""
    unit = F.normalize(encoded.token, dim=1)
    close = (unit @ unit.T).fill_diagonal_(-2.0).argmax(1)
    return (objects[close] == objects).double().numpy()


def token_error(encoded: Encoded, full: Encoded) -> np.ndarray:
    """1 - cosine to the full model's pooled feature, of each picture."""
    return (1 - F.cosine_similarity(encoded.token, full.token, dim=1)).numpy()


def dense_error(encoded: Encoded, full: Encoded) -> np.ndarray:
    """1 - cosine to the full model's feature map, of each picture; the map is resized to it."""
    assert encoded.dense is not None
    assert full.dense is not None
    found = encoded.dense
    if found.shape[1:3] != full.dense.shape[1:3]:
        size = list(full.dense.shape[1:3])
        found = F.interpolate(found.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)
    return (1 - F.cosine_similarity(found, full.dense, dim=3)).mean((1, 2)).numpy()


def interval(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over pictures and its 95 % interval, resampled by groups (objects or photos)."""
    usable = ~np.isnan(values)
    values, groups = values[usable], groups[usable]
    names, places = np.unique(groups, return_inverse=True)
    sums = np.bincount(places, values, len(names))
    counts = np.bincount(places, minlength=len(names))
    draws = np.random.default_rng(seed).integers(0, len(names), (2000, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def columns(name: str, values: tuple[float, float, float] | None) -> dict[str, Any]:
    """A figure and its interval as columns of a row; empty for None."""
    figures = ("", "", "") if values is None else tuple(round(float(v), 4) for v in values)
    return dict(zip((name, f"{name}_low", f"{name}_high"), figures))
