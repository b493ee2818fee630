"""Orders of an index cache in place of a ranker: read with an image, moved as the image is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ltrp_timm._text import printable
from ltrp_timm.data.images import Images
from ltrp_timm.data.keyed import Transform
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.scoring import FollowedTransform, IndexCache, Step, trace
from ltrp_timm.scoring.ids import image_ids
from ltrp_timm.selection import check_selection_args, choose_keep_indices

_VIEW = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def open_cache(folder: Any, model: LTRPModel) -> IndexCache:
    """An index cache that fits a model.

    Args:
        folder: that ``ltrp-timm rank --cache`` has written.
        model: its ranker need not run any more.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: it is of another ranker or another size, or the selection needs more than an
            order.

    >>> cache = open_cache("orders", model)  # doctest: +SKIP
    """
    cache = IndexCache(folder)
    if model.selection in ("random", "adaptive"):
        reason = "looks at no scores" if model.selection == "random" else "needs scores, not orders"
        raise ValueError(f"an index cache does not go with selection {model.selection}: {reason}.")
    size = model.data_config()["input_size"][-2:]
    grid = model.grid_size(torch.empty(1, model.in_chans, *size, device="meta"))
    cache.check(model.ranker, size, grid)
    return cache


def cached_transform(folder: Any, model: Any, images: Any, transform: Transform) -> Transform:
    """A training transform that brings cached scores.

    Args:
        folder: see ``open_cache``.
        model: that is trained.
        images: to train on.
        transform: of timm's ``create_transform``.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: it does not fit, the model ranks nothing, or the images are a stream.
    """
    if not isinstance(model, LTRPModel):
        raise ValueError("an index cache goes with a pruned model: give a ranker or a keep_ratio.")
    if not isinstance(images, Images):
        raise ValueError(f"an index cache is of images by number, {images} is a stream.")
    return CachedTransform(open_cache(folder, model), images, transform)


def select_cached(model: LTRPModel, scores: Tensor, images: Tensor) -> Tensor:
    """Keep indices as the model would choose them by these scores, at its keep ratio.

    Args:
        model: says selection and keep ratio.
        scores: (B, N), of ``CachedTransform``.
        images: (B, C, H, W); "mixed" looks at their pixels.

    Returns:
        (B, K) int64 indices, for ``model(images, keep_indices=…)``.
    """
    args = check_selection_args(model.selection, model.selection_args)
    grid = model.grid_size(images)
    return choose_keep_indices(scores, None, model.keep_ratio, model.selection, args, grid, images)


class CachedTransform:
    """A transform that brings the scores of an image's patches with it.

    Where it is the transform of the cache itself, scores are the cached order: the model keeps what
    it keeps with its ranker at work. Any other transform shows another part of the picture, and
    needs a cache of whole pictures (``--crop-mode squash``): then the score of a patch is the
    cached place of what its middle shows, linear between the middles of cached patches, through
    crops, flips, and what RandAugment turns, shears and shifts. A patch whose middle shows nothing
    of the picture comes last. The ranker itself would see the crop instead: the order is like its
    own, not the same.

    Args:
        cache: see ``open_cache``.
        images: whose indices will be asked for.
        transform: of timm's ``create_transform``.

    Raises:
        ValueError: the cache lacks some of the images, or the transform cannot be followed.
    """

    def __init__(self, cache: IndexCache, images: Images, transform: Transform) -> None:
        self.cache, self.transform = cache, transform
        self.rows = cache.rows(image_ids(images))
        own = cache.settings
        self.exact = _view(transform) == _view(_own_transform(own))
        self.follow: FollowedTransform | None = None
        if not self.exact:
            self._check_whole()
            self.follow = FollowedTransform(transform)
        self.blank = torch.zeros(cache.grid_size[0] * cache.grid_size[1])
        height, width = (float(side) for side in own["input_size"])
        rows, cols = own["patch_size"]
        h, w = cache.grid_size
        self._size, self._patch = (width, height), (float(cols), float(rows))
        x, y = np.meshgrid((np.arange(w) + 0.5) * cols, (np.arange(h) + 0.5) * rows)
        self._middles = np.stack([x.ravel(), y.ravel()], axis=1)

    def _check_whole(self) -> None:
        own = self.cache.settings
        if own["crop_mode"] != "squash" or own["crop_pct"] != 1.0:
            raise ValueError(
                f"{printable(self.cache.folder)} has orders of the images as they are evaluated: "
                "other crops need those of whole images, by rank --cache --crop-mode squash."
            )

    def __call__(self, picture: Image.Image) -> Tensor:
        """The transformed picture alone."""
        return self.transform(picture)

    def check(self, index: int, name: str) -> None:
        """Look whether there is an order of an image.

        Raises:
            ValueError: it could not be read when the cache was made.
        """
        if self.rows[index] < 0:
            raise ValueError(f"{name}: the index cache has no order of it.")

    def with_scores(self, picture: Image.Image, index: int) -> tuple[Tensor, Tensor]:
        """The transformed picture (3, H, W), and scores (N,) float32 of its patches.

        Raises:
            ValueError: the cache has no order of it, or is damaged.
        """
        ranks = self.cache.ranks(self.rows[index])
        if self.follow is None:
            return self.transform(picture), torch.from_numpy(-ranks.astype(np.float32))
        image, steps = self.follow(picture)
        return image, self._sampled(ranks, steps, picture.size)

    def _sampled(self, ranks: Any, steps: Sequence[Step], size: tuple[int, int]) -> Tensor:
        """Places at the middles of the patches as they are now."""
        h, w = self.cache.grid_size
        places = trace(steps, self._middles)
        hidden = np.isnan(places[:, 0])
        # in the cached picture, which was squashed; in patches, from the middle of the first
        x, y = (
            np.nan_to_num(places[:, axis]) * self._size[axis] / size[axis] / self._patch[axis] - 0.5
            for axis in (0, 1)
        )
        x, y = x.clip(0.0, w - 1.0), y.clip(0.0, h - 1.0)
        left, top = np.floor(x).astype(int), np.floor(y).astype(int)
        right, below = np.minimum(left + 1, w - 1), np.minimum(top + 1, h - 1)
        grid = ranks.reshape(h, w).astype(np.float64)
        upper = grid[top, left] * (1 - x + left) + grid[top, right] * (x - left)
        lower = grid[below, left] * (1 - x + left) + grid[below, right] * (x - left)
        out = upper * (1 - y + top) + lower * (y - top)
        out[hidden] = float(h * w)
        return torch.from_numpy(-out.astype(np.float32))


def _own_transform(settings: dict[str, Any]) -> Any:
    config = {name: settings[name] for name in _VIEW}
    config["input_size"] = (3, *config["input_size"])
    return create_transform(**config, is_training=False)


def _view(transform: Any) -> list[str]:
    """The steps that choose what a picture shows, in words; colours are the model's business."""
    steps = (repr(step) for step in getattr(transform, "transforms", [transform]))
    return [text for text in steps if not text.startswith(("Normalize", "MaybeToTensor"))]
