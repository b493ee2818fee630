"""The slot: a module that lets go of tokens, and the adapter that puts it into a backbone.

A slot sits where timm drops patches, right after the position embedding. It holds keep indices only
while its model runs: whoever runs the model puts them in, the slot hands them out once. An empty
slot is the identity.
"""

from abc import ABC, abstractmethod
from operator import attrgetter
from types import FunctionType
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from ltrp_timm.selection import keep_tokens

torch.fx.wrap("keep_tokens")


class TokenSlot(nn.Module):
    """Stands at ``patch_drop`` of a ViT: tokens (B, P + N, D) -> (B, P + K, D).

    Args:
        num_prefix_tokens: P.
    """

    keep_indices: Optional[Tensor]

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_indices = None

    def take(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Tokens (B, P + N, D) -> kept ones and the indices in the slot, empty afterwards."""
        keep = self.keep_indices
        if keep is None:
            return x, None
        self.keep_indices = None
        return keep_tokens(x, keep, self.num_prefix_tokens), keep

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return self.take(x)[0]


class TokenSlotWithIndices(TokenSlot):
    """Stands at ``patch_drop`` of an Eva, which gathers its rotary embedding by the indices."""

    def forward(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:  # type: ignore[override]
        """Tokens (B, P + N, D) -> (B, P + K, D), and the indices (B, K)."""
        return self.take(x)


class TokenSlotWithDropout(TokenSlot):
    """Stands at ``pos_drop`` of models without a ``patch_drop``: their dropout, then the slot.

    Args:
        num_prefix_tokens: P at this place.
        p: probability of the dropout that stood here.
    """

    def __init__(self, num_prefix_tokens: int, p: float) -> None:
        super().__init__(num_prefix_tokens)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return self.take(F.dropout(x, self.p, self.training))[0]


def renamed(function: Any, name: str) -> Any:
    """The same function by another name: TorchScript compiles methods under the function's own."""
    code, scope = function.__code__, function.__globals__
    twin = FunctionType(code, scope, name, function.__defaults__, function.__closure__)
    twin.__annotations__ = function.__annotations__
    return twin


def as_kind(module: nn.Module, kind: Type[nn.Module]) -> Any:
    """The same parameters, buffers, submodules and flags behind an object of a subclass."""
    twin: nn.Module = kind.__new__(kind)
    twin.__dict__ = module.__dict__
    return twin


def as_slot(module: nn.Module, kind: Type[nn.Module]) -> Any:
    """``as_kind`` for a subclass that holds keep indices; there are none in it yet."""
    slot = as_kind(module, kind)
    slot.keep_indices = None
    return slot


def undo_slot(original: nn.Module, slot: Any) -> nn.Module:
    """The module that ``as_slot`` was given, with everything as it is now."""
    original.__dict__ = slot.__dict__
    del original.keep_indices
    return original


def run_with_slots(
    slots: List[Any], keep: Optional[Tensor], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a model with keep indices (B, K) in its slots, which are empty afterwards, come what may.

    Raises:
        RuntimeError: the model ran without visiting one of them.
    """
    for slot in slots:
        slot.keep_indices = keep
    try:
        out = call(*args, **kwargs)
        if any(slot.keep_indices is not None for slot in slots):
            kind = type(getattr(call, "__self__", call)).__name__
            raise RuntimeError(f"{kind} ran without visiting the place where patches are dropped.")
    finally:
        for slot in slots:
            slot.keep_indices = None
    return out


def check_free(backbone: Any, place: str) -> None:
    """Raise TypeError when something is at work where a slot would stand, or at ``patch_drop``."""
    kind, module = type(backbone).__name__, attrgetter(place)(backbone)
    if isinstance(module, (PatchDropout, PatchDropoutWithIndices)):
        raise TypeError(
            f"cannot drop patches from {kind}: its {place} is a live {type(module).__name__}; "
            "create the model without patch_drop_rate."
        )
    if module is not None and type(module) is not nn.Identity:
        raise TypeError(
            f"cannot drop patches from {kind}: its {place} is already in use "
            f"({type(module).__name__})."
        )


class SlotAdapter(ABC):
    """How one timm family lets go of tokens.

    Attributes:
        family: the name that errors and tables use.
        host: the class in timm.
        places: attributes of the backbone where slots stand, that of the tokens first.
        patch_embed: attribute of the module that cuts images into patches.
        prefix_in_blocks: whether prefix tokens are in the sequence while the blocks run.
        how: where tokens go, in words for a table.
        examples: kinds of models of this class -> names of such.
    """

    family: str
    host: Type[nn.Module]
    places: Tuple[str, ...]
    patch_embed: str = "patch_embed"
    prefix_in_blocks: bool = True
    how: str
    examples: ClassVar[Dict[str, Tuple[str, ...]]]

    @abstractmethod
    def make_slot(self, backbone: Any) -> TokenSlot:
        """An empty slot for the first place."""

    def check(self, backbone: Any) -> None:  # noqa: B027  # most families have nothing to check
        """Raise TypeError when this very model cannot let go of tokens."""

    def install(self, backbone: Any) -> Any:
        """Put empty slots in; returns what ``restore`` needs: what stood there, or None."""
        original = attrgetter(self.places[0])(backbone)
        training = backbone.training if original is None else original.training
        self._put(backbone, self.make_slot(backbone).train(training))
        return original

    def restore(self, backbone: Any, original: Any) -> None:
        """Put back what stood there."""
        if original is not None:
            original.train(attrgetter(self.places[0])(backbone).training)
        self._put(backbone, original)

    def _put(self, backbone: Any, module: Optional[nn.Module]) -> None:
        parent, _, name = self.places[0].rpartition(".")
        setattr(attrgetter(parent)(backbone) if parent else backbone, name, module)

    def slots(self, backbone: Any) -> List[Any]:
        """The modules that hold keep indices while the backbone runs, that of the tokens first."""
        modules = [attrgetter(place)(backbone) for place in self.places]
        embed = getattr(backbone, self.patch_embed)
        modules += [embed] if hasattr(embed, "keep_indices") else []
        return [module for module in modules if module is not None]
