"""Selections by name and their options. A new rule needs an entry here and a line in ``select``."""

from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from ltrp_timm.selection.coverage import (
    patch_pixels,
    select_dithered,
    select_mixed,
    select_stratified,
)
from ltrp_timm.selection.rules import (
    check_keep_ratio,
    keep_tokens,
    num_keep,
    select_random,
    select_top,
)


class Option(NamedTuple):
    """A number that a selection takes: its default, range, and whether it is whole."""

    default: float
    low: float
    high: float = 2**31 - 1
    whole: bool = True


class Selection(NamedTuple):
    """What the package must know about a selection.

    Attributes:
        options: its options by name.
        reads_scores: whether scores decide; if not, the model does not run its ranker.
    """

    options: Dict[str, Option] = {}  # noqa: RUF012  # never changed
    reads_scores: bool = True


SELECTIONS: Dict[str, Selection] = {
    "top": Selection(),
    "random": Selection({"seed": Option(0, 0)}, reads_scores=False),
    "mixed": Selection(
        {"ratio": Option(0.7, 0, 1, False), "neighbours": Option(5, 1), "pixels": Option(0, 0)}
    ),
    "stratified": Selection({"cell": Option(2, 1)}),
    "dithered": Selection({"strength": Option(0.5, 0, 16, False)}),
}


def select(
    scores: Tensor,
    k: int,
    selection: str,
    args: Dict[str, float],
    grid_size: Tuple[int, int],
    source: Tensor,
) -> Tensor:
    """Scores (B, N) -> (B, K) int64, ascending: the patches that a selection of that name keeps.

    ``args`` are options as ``check_selection_args`` returns them. "mixed" clusters ``source``:
    tokens (B, N, C), or images (B, C, H, W) for the pixels of their patches.
    """
    if selection == "top":
        return select_top(scores, k)
    if selection == "random":
        return select_random(scores, k, seed=int(args["seed"]))
    if selection == "mixed":
        if source.dim() == 4:
            source = patch_pixels(source.detach(), grid_size, int(args["pixels"]))
        return select_mixed(scores, k, source, args["ratio"], int(args["neighbours"]))
    if selection == "stratified":
        return select_stratified(scores, k, grid_size, int(args["cell"]))
    if selection == "dithered":
        return select_dithered(scores, k, grid_size, args["strength"])
    raise ValueError("selection must be a name of SELECTIONS, got " + selection + ".")


def check_selection(selection: str) -> str:
    """Return ``selection``, or raise ValueError if it is not a name of ``SELECTIONS``."""
    if selection == "adaptive":
        raise ValueError(
            "selection 'adaptive' needs a budget: call model.calibrate(images, mean_keep_ratio=…) "
            "on a trained model, or pass budget=AdaptiveBudget(…) instead."
        )
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
    return selection


def check_selection_args(selection: str, args: Optional[Mapping[str, Any]]) -> Dict[str, float]:
    """Options for ``select``: those of ``args``, and defaults for all others.

    The options of all selections, as floats: TorchScript needs one type and a dict with entries.
    TypeError or ValueError if the selection has no such options, or a value is out of range.
    """
    if args is not None and not isinstance(args, Mapping):
        raise TypeError(f"selection_args must be a mapping, got {type(args).__name__}.")
    own = SELECTIONS[check_selection(selection)].options
    options = {
        name: float(option.default)
        for other in SELECTIONS.values()
        for name, option in other.options.items()
    }
    for name, value in (args or {}).items():
        if name not in own:
            known = ", ".join(own) or "no options"
            raise ValueError(f"selection_args of {selection!r} are {known}, got {name!r}.")
        _, low, high, whole = own[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name} must be {kind} from {low} to {high}, got {value!r}.")
        options[name] = float(value)
    return options


class SelectionSettings:
    """A mixin for modules that choose patches: settings that may change between calls."""

    # torch.jit.script compiles properties by default; scripted code reads the plain attributes
    __jit_unused_properties__: Tuple[str, ...] = ("keep_ratio", "selection", "selection_args")

    _keep_ratio: float
    _selection: str
    _selection_args: Dict[str, float]
    _reads_scores: bool

    def _set_selection(self, selection: str, args: Optional[Mapping[str, Any]]) -> None:
        self._selection_args = check_selection_args(selection, args)
        self._selection, self._reads_scores = selection, SELECTIONS[selection].reads_scores

    @property
    def keep_ratio(self) -> float:
        """Share of patches to keep, in (0, 1]. ``torch.compile`` makes one graph for each K."""
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        self._keep_ratio = check_keep_ratio(value)

    @property
    def selection(self) -> str:
        """How scores become keep indices: a name of ``SELECTIONS``."""
        return self._selection

    @selection.setter
    def selection(self, value: str) -> None:
        if check_selection(value) != self._selection:
            self._set_selection(value, None)

    @property
    def selection_args(self) -> Dict[str, float]:
        """A copy of the selection's options; another selection starts with its defaults."""
        args, options = self._selection_args, SELECTIONS[self._selection].options
        return {name: int(args[name]) if options[name].whole else args[name] for name in options}

    @selection_args.setter
    def selection_args(self, value: Mapping[str, Any]) -> None:
        self._set_selection(self._selection, value)


class PatchSelector(SelectionSettings, nn.Module):
    """The selection as a layer, for a ViT of your own; put it after the position embedding.

    Args:
        keep_ratio: share of patches to keep, in (0, 1].
        num_prefix_tokens: P, tokens at the front (class, registers) that always stay.
        selection: a name of ``SELECTIONS``; "mixed" clusters the given tokens.
        selection_args: options of the selection.

    Raises:
        ValueError: An argument is out of range.

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
        self.num_prefix_tokens = num_prefix_tokens
        self._keep_ratio = check_keep_ratio(keep_ratio)
        self._set_selection(selection, selection_args)

    def forward(
        self, tokens: Tensor, scores: Tensor, grid_size: Optional[Tuple[int, int]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Tokens (B, P + N, D), scores (B, N) -> tokens (B, P + K, D), keep_indices (B, K).

        Some selections need the ``grid_size`` (h, w), N = h * w, where that is not a square.

        Raises:
            ValueError: The shapes of tokens, scores and grid do not match.
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
        k = num_keep(n, self._keep_ratio)
        patches = tokens[:, self.num_prefix_tokens :]
        keep = select(scores, k, self._selection, self._selection_args, grid, patches)
        return keep_tokens(tokens, keep, self.num_prefix_tokens), keep

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return (
            f"keep_ratio={self.keep_ratio}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"selection={self.selection!r}, selection_args={self.selection_args}"
        )
