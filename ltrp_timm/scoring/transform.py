"""Scores of an index cache in place of a ranker: read with an image, moved as the image is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ltrp_timm._text import printable
from ltrp_timm.data.images import Images
from ltrp_timm.data.keyed import Transform
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.scoring.follow import FollowedTransform, Step, trace
from ltrp_timm.scoring.store import IndexCache, image_ids, ranks_of
from ltrp_timm.selection.registry import SELECTIONS

_VIEW = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def cached_transform(folder: Any, model: Any, images: Any, transform: Transform) -> Any:
    """A transform that also gives the scores of an index cache.

    Args:
        folder: that ``ltrp-timm rank`` has written.
        model: an LTRPModel; its ranker need not run any more.
        images: the data set.
        transform: of timm's ``create_transform``.

    Returns:
        A ``CachedTransform``.

    Raises:
        FileNotFoundError: the folder holds no finished scores.
        ValueError: the scores are of another ranker, size or data set; the model does not rank, or
            its selection uses no scores; the images are a stream.

    >>> transform = cached_transform("scores", model, images, transform)  # doctest: +SKIP
    """
    if not isinstance(model, LTRPModel):
        raise ValueError("an index cache needs a pruned model: give a ranker or a keep_ratio.")
    if not isinstance(images, Images):
        raise ValueError(f"an index cache needs images by number, {images} is a stream.")
    cache = IndexCache(folder)
    if not SELECTIONS[model.selection].reads_scores:
        raise ValueError(
            f"selection {model.selection!r} uses no scores; it does not go with an index cache."
        )
    if model.budget is not None:
        raise ValueError("an adaptive budget ranks images itself; use it without an index cache.")
    cache.check(model.ranker, model.data_config()["input_size"][-2:], model.patch_grid)
    return CachedTransform(cache, images, transform)


class CachedTransform:
    """A transform that also gives the scores of an image's patches.

    If it is the transform that the cache was made with, these are the cached scores, and the model
    keeps what it keeps with its ranker. Any other transform shows another part of the picture and
    needs a cache of whole pictures (``--crop-mode squash``). The score of a patch is then the
    negative rank of what its centre shows, interpolated between the centres of cached patches and
    followed through crops, flips, and the rotations, shears and shifts of RandAugment. A patch
    whose centre shows nothing of the picture comes last. The order is close to the ranker's own
    order of the crop, not equal to it.

    Args:
        cache: of the images.
        images: the data set.
        transform: of timm's ``create_transform``.

    Attributes:
        exact: whether the scores are the cached ones.
        blank: zeros (N,), for an image without scores.

    Raises:
        ValueError: the cache lacks an image, or the transform cannot be followed.
    """

    def __init__(self, cache: IndexCache, images: Images, transform: Transform) -> None:
        self.cache, self.transform = cache, transform
        self.rows = cache.rows(image_ids(images))
        own = cache.settings
        config = {name: own[name] for name in _VIEW}
        config["input_size"] = (3, *own["input_size"])
        self.exact = _view(transform) == _view(create_transform(**config, is_training=False))
        self.follow: FollowedTransform | None = None
        if not self.exact:
            if own["crop_mode"] != "squash" or own["crop_pct"] != 1.0:
                raise ValueError(
                    f"{printable(cache.folder)} has scores of images cropped for evaluation; other "
                    "crops need scores of whole images: ltrp-timm rank --crop-mode squash."
                )
            self.follow = FollowedTransform(transform)
        self.blank = torch.zeros(cache.grid_size[0] * cache.grid_size[1])
        sides, patch, grid = (
            np.array(own[n][::-1]) for n in ("input_size", "patch_size", "grid_size")
        )
        self._covered = sides / (patch * grid)  # sides of the picture, in those of the grid
        x, y = np.meshgrid(*((np.arange(n) + 0.5) * side for n, side in zip(grid, patch)))
        self._centres = np.stack([x.ravel(), y.ravel()], axis=1)

    def __call__(self, picture: Image.Image) -> Tensor:
        """The transformed picture alone."""
        return self.transform(picture)

    def check(self, index: int, name: str) -> None:
        """Check that an image has scores.

        Raises:
            ValueError: it was unreadable when the cache was made.
        """
        if self.rows[index] < 0:
            raise ValueError(f"{name}: the index cache has no scores of this image.")

    def with_scores(self, picture: Image.Image, index: int) -> tuple[Tensor, Tensor]:
        """The transformed picture (3, H, W), and scores (N,) float32 of its patches."""
        if self.follow is None:
            return self.transform(picture), self.cache.scores(self.rows[index])
        image, steps = self.follow(picture)
        ranks = ranks_of(self.cache.scores(self.rows[index])[None])
        return image, self._sampled(ranks, steps, picture.size)

    def _sampled(self, ranks: Tensor, steps: Sequence[Step], size: tuple[int, int]) -> Tensor:
        """Ranks (1, N) -> negative ranks (N,) at the centres of the transformed patches."""
        h, w = self.cache.grid_size
        places = torch.from_numpy(trace(steps, self._centres) * self._covered / size)
        at = (places * 2.0 - 1.0).nan_to_num().view(1, 1, h * w, 2)
        grid = ranks.view(1, 1, h, w).double()
        sampled = F.grid_sample(grid, at, padding_mode="border", align_corners=False).flatten()
        return -torch.where(places[:, 0].isnan(), float(h * w), sampled).float()


def _view(transform: Any) -> list[str]:
    """The steps that choose what a picture shows, as text; normalisation does not count."""
    steps = (repr(step) for step in getattr(transform, "transforms", [transform]))
    return [text for text in steps if not text.startswith(("Normalize", "MaybeToTensor"))]
