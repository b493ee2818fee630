"""Dense features of a pruned model: kept tokens put back at their places of the grid."""

from functools import partial
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

from torch import Tensor

from ltrp_timm.selection import check_fill, scatter_patches


class DenseFeatures:
    """A mixin for a model that chooses keep indices and runs its backbone with them."""

    if TYPE_CHECKING:  # torch.jit.script would take these for attributes of its own types
        num_prefix_tokens: int
        _fill: str
        _adapter: Any
        _by_bucket: Any
        _is_adaptive: Any
        _choose: Any
        _run: Any
        grid_size: Any

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        keep_indices: Optional[Tensor] = None,
        fill: Optional[str] = None,
    ) -> Any:
        """Features of intermediate blocks, kept tokens put back at their places of the grid.

        Args:
            x: images (B, C, H, W).
            indices: last n blocks if int, all if None, else these blocks.
            return_prefix_tokens: also return prefix tokens (B, P, D) with each feature.
            norm: apply the final norm to every feature.
            stop_early: stop after the last block asked for.
            output_fmt: "NCHW" for (B, D, h, w), "NLC" for (B, N, D).
            intermediates_only: return the list of features alone.
            output_dict: return a dict with timm's names instead.
            keep_indices: (B, K) int64 patches to encode instead of the ranked ones.
            fill: "zeros" or "nearest" at dropped places; None takes ``self.fill``.

        Returns:
            As timm: (final tokens (B, P + K, D), features), features, or a dict.

        Raises:
            ValueError: ``output_fmt`` or ``fill`` is none of the above.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}.")
        fill = self._fill if fill is None else check_fill(fill)
        if intermediates_only and self._is_adaptive(keep_indices):
            again = partial(
                self.forward_intermediates,
                indices=indices,
                return_prefix_tokens=return_prefix_tokens,
                norm=norm,
                stop_early=stop_early,
                output_fmt=output_fmt,
                intermediates_only=True,
                output_dict=output_dict,
                fill=fill,
            )
            return self._by_bucket(again, x)
        keep = self._choose(x, keep_indices)
        with_prefix = self.num_prefix_tokens > 0 and self._adapter.prefix_in_blocks
        kwargs: Dict[str, Any] = {
            "indices": indices,
            "norm": norm,
            "stop_early": stop_early,
            "output_fmt": "NLC",
            "intermediates_only": intermediates_only,
        }
        if with_prefix:
            kwargs["return_prefix_tokens"] = True
        out = self._run("forward_intermediates", x, keep, kwargs)
        final, raw = (None, out) if intermediates_only else out
        prefix = [pair[1] for pair in raw] if with_prefix else None
        features = [pair[0] for pair in raw] if with_prefix else list(raw)
        grid = self.grid_size(x)
        if keep is not None:
            features = [scatter_patches(feature, keep, grid, fill) for feature in features]
        if output_fmt == "NCHW":
            features = [_to_nchw(feature, grid) for feature in features]
        prefix = prefix if return_prefix_tokens else None
        if output_dict:
            return _feature_dict(final, features, prefix)
        pairs = features if prefix is None else list(zip(features, prefix))
        return pairs if intermediates_only else (final, pairs)


def _to_nchw(feature: Tensor, grid: Tuple[int, int]) -> Tensor:
    return feature.reshape(feature.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous()


def _feature_dict(
    final: Optional[Tensor], features: List[Tensor], prefix: Optional[List[Tensor]]
) -> Dict[str, Any]:
    out: Dict[str, Any] = {"image_intermediates": features}
    if prefix is not None:
        out["image_intermediates_prefix"] = prefix
    if final is not None:
        out["image_features"] = final
    return out
