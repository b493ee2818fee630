"""The adaptive budget: each image keeps as many patches as its scores ask for."""

from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ltrp_timm.selection import check_keep_ratio, check_selection_args, select_top
from ltrp_timm.selection.adaptive import RULES, asked_for, bucket_sizes, level_for, snapped

EAGER_ONLY = (
    "the selection 'adaptive' looks at scores to know how many patches to encode: it runs in eager "
    "mode only. Choose another selection, or give keep_indices."
)


class AdaptiveBudget:
    """A mixin for a model whose ``selection`` may be "adaptive".

    A batch is sorted into buckets of images that keep equally many patches; each bucket runs with
    static shapes, without padding and masks, and the results return in the order of the images.
    Reading how large the buckets are waits for the device once a call.
    """

    if TYPE_CHECKING:  # torch.jit.script would take these for attributes of its own types
        selection: str
        selection_args: Dict[str, float]
        _keep_ratio: float
        _selection: str
        patch_scores: Any

    @torch.jit.unused
    def _is_adaptive(self, keep_indices: Optional[Tensor]) -> bool:
        """Whether images may keep different numbers of patches in this call."""
        return self._selection == "adaptive" and keep_indices is None and self._keep_ratio < 1.0

    @torch.jit.unused
    def keep_counts(self, x: Tensor) -> Tensor:
        """How many patches each image keeps.

        Args:
            x: images (B, C, H, W), normalised for the backbone.

        Returns:
            (B,) int64.

        Raises:
            ValueError: the selection is not "adaptive", or the images are of a wrong shape.
        """
        return self._counts(self.patch_scores(x))

    def _counts(self, scores: Tensor) -> Tensor:
        if self._selection != "adaptive":
            raise ValueError(f"only 'adaptive' counts by image, not {self.selection!r}.")
        n, args = scores.shape[1], self.selection_args
        if self._keep_ratio == 1.0:
            return torch.full((scores.shape[0],), n, device=scores.device)
        rule = "mass" if args["mass"] > 0 else "threshold"
        return snapped(asked_for(scores, rule, args[rule]), bucket_sizes(n, int(args["buckets"])))

    @torch.jit.unused
    def calibrate(
        self,
        images: Union[Tensor, Iterable[Tensor]],
        mean_keep_ratio: float,
        rule: str = "threshold",
        buckets: int = 8,
    ) -> float:
        """Choose "adaptive" with the level that keeps a given share of patches on average.

        Args:
            images: (B, C, H, W), or batches of them, like those that the model will see.
            mean_keep_ratio: share of patches to keep, averaged over the images, in (0, 1).
            rule: "threshold" keeps patches with a score of at least the level: for rankers whose
                scores compare between images, as those of ``contrast`` do not. "mass" keeps as few
                as hold a share of each image's own score mass.
            buckets: how many sizes there are: the multiples of N / buckets.

        Returns:
            The mean share that these images keep, at most ``mean_keep_ratio`` where the sizes
            allow.

        Raises:
            ValueError: an argument is out of its range, or there are no images.
        """
        target = check_keep_ratio(mean_keep_ratio)
        check_selection_args("adaptive", {"buckets": buckets})
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}.")
        batches = [images] if isinstance(images, Tensor) else images
        scores: List[Tensor] = [self.patch_scores(batch).cpu() for batch in batches]
        if target == 1.0 or not scores or not sum(len(part) for part in scores):
            raise ValueError(
                f"calibrate needs images and mean_keep_ratio < 1, got {len(scores)} batches and "
                f"{mean_keep_ratio}."
            )
        level, reached = level_for(scores, rule, target, buckets)
        other = {"mass": "threshold", "threshold": "mass"}[rule]
        self.selection = "adaptive"
        self.selection_args = {rule: level, other: 0.0, "buckets": buckets}
        self._keep_ratio = target
        return reached

    @torch.jit.unused
    def _buckets(self, x: Tensor) -> Tuple[Tensor, List[Tuple[Tensor, Tensor]]]:
        """Where each image's result lies, and for each bucket its images' numbers and indices."""
        if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
            raise ValueError(EAGER_ONLY)
        scores = self.patch_scores(x)
        counts = self._counts(scores)
        buckets: List[Tuple[Tensor, Tensor]] = []
        for k in sorted(set(counts.tolist())):
            rows = (counts == k).nonzero().flatten()
            buckets.append((rows, select_top(scores[rows], k)))
        return counts.sort(stable=True)[1].sort()[1], buckets

    @torch.jit.unused
    def _by_bucket(self, call: Callable[..., Any], x: Tensor) -> Any:
        """Call with each bucket's images and ``keep_indices``; one batch in the images' order."""
        places, buckets = self._buckets(x)
        outs = [call(x[rows], keep_indices=keep) for rows, keep in buckets]
        return tree_map(lambda *parts: torch.cat(parts)[places], *outs)

    @torch.jit.unused
    def _one_bucket(self, x: Tensor) -> Tensor:
        """Keep indices (B, K) of images that keep equally many patches.

        Raises:
            ValueError: they do not.
        """
        _, buckets = self._buckets(x)
        if len(buckets) > 1:
            counts = ", ".join(str(keep.shape[1]) for _, keep in buckets)
            raise ValueError(
                f"the images of this batch keep different numbers of patches ({counts}): call the "
                "model itself, forward_intermediates(intermediates_only=True), or give one image."
            )
        return buckets[0][1]
