"""Selections by name, with options: what models and layers call."""

from typing import Any, Dict, Mapping, Optional, Tuple

from torch import Tensor, nn

from ltrp_timm.selection.coverage import patch_pixels, select_mixed, select_stratified
from ltrp_timm.selection.rules import check_keep_ratio, num_keep, select_random, select_top
from ltrp_timm.selection.tokens import check_keep_indices, keep_tokens

# name -> its options and their defaults
SELECTIONS: Dict[str, Dict[str, float]] = {
    "top": {},
    "random": {"seed": 0},
    "mixed": {"ratio": 0.7, "neighbours": 5, "pixels": 0},
    "stratified": {"cell": 2},
    "adaptive": {"mass": 0.75, "threshold": 0.0, "buckets": 8},
}

# the lowest and the highest value of each option, and whether it is a whole number
_RANGES: Dict[str, Tuple[float, float, bool]] = {
    "seed": (0, 2**31 - 1, True),
    "ratio": (0, 1, False),
    "neighbours": (1, 2**31 - 1, True),
    "pixels": (0, 2**31 - 1, True),
    "cell": (1, 2**31 - 1, True),
    "mass": (0, 1, False),
    "threshold": (-3e38, 3e38, False),
    "buckets": (1, 2**31 - 1, True),
}


def check_selection(selection: str) -> str:
    """Return ``selection``.

    Raises:
        ValueError: it names no selection rule.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
    return selection


def check_selection_args(selection: str, args: Optional[Mapping[str, Any]]) -> Dict[str, float]:
    """The options of all rules, those of ``args`` in place of this one's defaults.

    As floats, and never an empty dict: TorchScript needs one type, and to see it.

    Raises:
        TypeError: ``args`` is no mapping.
        ValueError: the rule has no such option, or its value is out of range.
    """
    if args is not None and not isinstance(args, Mapping):
        raise TypeError(f"selection_args must be a mapping, got {type(args).__name__}.")
    own = SELECTIONS[check_selection(selection)]
    options = {name: float(rule[name]) for rule in SELECTIONS.values() for name in rule}
    for name, value in (args or {}).items():
        if name not in own:
            known = ", ".join(own) or "no options"
            raise ValueError(f"selection_args of {selection!r} are {known}, got {name!r}.")
        low, high, whole = _RANGES[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name} must be {kind} from {low} to {high}, got {value!r}.")
        options[name] = float(value)
    return options


def select_patches(
    scores: Tensor,
    k: int,
    selection: str,
    args: Dict[str, float],
    grid_size: Tuple[int, int],
    tokens: Optional[Tensor] = None,
) -> Tensor:
    """Scores to keep indices by the rule of that name.

    Args:
        scores: (B, N), higher = keep first.
        k: number of patches to keep, 1 <= k <= N.
        selection: a name of ``SELECTIONS``.
        args: the options, as ``check_selection_args`` gives them.
        grid_size: (h, w), N = h * w.
        tokens: (B, N, C) what "mixed" clusters.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: an argument is out of its range, or "mixed" without tokens.
    """
    if selection == "adaptive":
        raise ValueError("'adaptive' keeps another number of patches of each image, in eager mode.")
    if selection == "random":
        return select_random(scores, k, seed=int(args["seed"]))
    if selection == "mixed":
        if tokens is None:
            raise ValueError("the selection 'mixed' needs tokens (B, N, C) to cluster.")
        return select_mixed(scores, k, tokens, args["ratio"], int(args["neighbours"]))
    if selection == "stratified":
        return select_stratified(scores, k, grid_size, int(args["cell"]))
    return select_top(scores, k)


def choose_keep_indices(
    scores: Tensor,
    keep_indices: Optional[Tensor],
    keep_ratio: float,
    selection: str,
    args: Dict[str, float],
    grid_size: Tuple[int, int],
    images: Tensor,
) -> Tensor:
    """Given or chosen keep indices.

    Args:
        scores: (B, N), higher = keep first.
        keep_indices: (B, K) the caller's; None lets scores choose.
        keep_ratio: share of patches to keep when scores choose.
        selection: a name of ``SELECTIONS``.
        args: the options, as ``check_selection_args`` gives them.
        grid_size: (h, w), N = h * w.
        images: (B, C, H, W); "mixed" clusters the pixels of their patches.

    Returns:
        (B, K) int64 indices.

    Raises:
        ValueError: as ``check_keep_indices`` and ``select_patches``.
        TypeError: as ``check_keep_indices``.
    """
    if keep_indices is not None:
        check_keep_indices(keep_indices, scores.shape[0], scores.shape[1])
        return keep_indices
    tokens: Optional[Tensor] = None
    if selection == "mixed":
        tokens = patch_pixels(images.detach(), grid_size, int(args["pixels"]))
    k = num_keep(scores.shape[1], keep_ratio)
    return select_patches(scores, k, selection, args, grid_size, tokens)


class SelectsPatches:
    """A mixin for modules that choose patches; what chooses may be set between calls."""

    # torch.jit.script would compile properties; the plain attributes behind them serve it
    __jit_unused_properties__: Tuple[str, ...] = ("keep_ratio", "selection", "selection_args")

    _keep_ratio: float
    _selection: str
    _selection_args: Dict[str, float]

    @property
    def keep_ratio(self) -> float:
        """Share of patches to keep, in (0, 1]. Each K is one graph to ``torch.compile``."""
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        value = check_keep_ratio(value)
        if self._selection == "adaptive":
            if self._keep_ratio < 1.0:
                self._adaptive_ratio = self._keep_ratio  # to come back to from 1.0
            if value not in (1.0, getattr(self, "_adaptive_ratio", 1.0)):
                raise ValueError(
                    f"an adaptive budget has no keep_ratio to set, got {value}: call "
                    "calibrate(images, mean_keep_ratio=…), or choose another selection first."
                )
        self._keep_ratio = value

    @property
    def selection(self) -> str:
        """How scores become keep indices: a name of ``SELECTIONS``."""
        return self._selection

    @selection.setter
    def selection(self, value: str) -> None:
        if check_selection(value) != getattr(self, "_selection", None):
            self._selection, self._selection_args = value, check_selection_args(value, None)

    @property
    def selection_args(self) -> Dict[str, float]:
        """All options of the selection, as a copy; another selection brings its defaults."""
        own, args = SELECTIONS[self._selection], self._selection_args
        return {name: int(args[name]) if _RANGES[name][2] else args[name] for name in own}

    @selection_args.setter
    def selection_args(self, value: Mapping[str, Any]) -> None:
        self._selection_args = check_selection_args(self._selection, value)


class PatchSelector(SelectsPatches, nn.Module):
    """The bare layer for a ViT of your own: put it after the position embedding.

    Args:
        keep_ratio: share of patches to keep, in (0, 1].
        num_prefix_tokens: P, tokens at the front (class, registers) that always stay.
        selection: "top", "random", "mixed" (clusters the tokens it is given) or "stratified".
        selection_args: options of the selection.

    Raises:
        ValueError: an argument is out of its range.

    >>> tokens, keep = PatchSelector(0.5)(torch.zeros(2, 1 + 196, 8), torch.rand(2, 196))
    >>> tokens.shape, keep.shape
    (torch.Size([2, 99, 8]), torch.Size([2, 98]))
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        num_prefix_tokens: int = 1,
        selection: str = "top",
        selection_args: Optional[Mapping[str, Any]] = None,
    ) -> None:
        super().__init__()
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be >= 0, got {num_prefix_tokens}.")
        self._keep_ratio = check_keep_ratio(keep_ratio)
        self.num_prefix_tokens = num_prefix_tokens
        if selection == "adaptive":
            raise ValueError("selection 'adaptive' is for whole models: a layer keeps one number.")
        self._selection = check_selection(selection)
        self._selection_args = check_selection_args(selection, selection_args)

    def forward(
        self, tokens: Tensor, scores: Tensor, grid_size: Optional[Tuple[int, int]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Keep the prefix tokens and the chosen patch tokens.

        Args:
            tokens: (B, P + N, D).
            scores: (B, N), higher = keep first.
            grid_size: (h, w), N = h * w, for "stratified"; None takes a square.

        Returns:
            tokens (B, P + K, D), keep_indices (B, K).

        Raises:
            ValueError: tokens, scores and grid do not belong together.
        """
        n = tokens.shape[1] - self.num_prefix_tokens
        if scores.dim() != 2 or scores.shape[0] != tokens.shape[0] or scores.shape[1] != n:
            raise ValueError(
                f"scores must be (B, N) = {[tokens.shape[0], n]} for tokens "
                f"{list(tokens.shape)} with {self.num_prefix_tokens} prefix tokens, "
                f"got {list(scores.shape)}."
            )
        side = int(n**0.5 + 0.5)
        grid = (side, side) if grid_size is None else grid_size
        keep = select_patches(
            scores,
            num_keep(n, self._keep_ratio),
            self._selection,
            self._selection_args,
            grid,
            tokens[:, self.num_prefix_tokens :],
        )
        return keep_tokens(tokens, keep, self.num_prefix_tokens), keep

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        args = f", selection_args={self.selection_args}" if self.selection_args else ""
        prefix = f"num_prefix_tokens={self.num_prefix_tokens}"
        return f"keep_ratio={self.keep_ratio}, {prefix}, selection={self.selection!r}{args}"
