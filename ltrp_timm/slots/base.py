"""The slot, a module that drops tokens, and the adapter that puts slots into a backbone.

A slot stands where timm drops patches, right after the position embedding. It holds keep indices
only while its model runs: the model fills it, and the slot empties itself when it is used. An empty
slot is the identity. So one thread at a time may run a model; another one gets an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from threading import get_ident
from types import FunctionType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    Optional,
    Tuple,
    Type,
    Union,
)

import torch
import torch.nn.functional as F
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from ltrp_timm.selection.rules import keep_tokens

torch.fx.wrap("keep_tokens")

_BUSY = (
    "this {} is running already, in another thread or around this call: give each thread its own "
    "model (copy.deepcopy), or use a lock."
)
_running: Dict[int, Tuple[int]] = {}  # id of a module -> the thread that runs it


@contextmanager
def alone(module: nn.Module, kind: str) -> Iterator[None]:
    """Run a module that holds state while it runs; RuntimeError if it is running already."""
    call = (get_ident(),)
    if _running.setdefault(id(module), call) is not call:  # atomic
        raise RuntimeError(_BUSY.format(kind))
    try:
        yield
    finally:
        del _running[id(module)]


class TokenSlot(nn.Module):
    """Stands at ``patch_drop`` of a ViT with P prefix tokens."""

    keep_indices: Optional[Tensor]

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_indices = None

    def take(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Tokens (B, P + N, D) -> the kept tokens and the indices; the slot is empty afterwards."""
        if not torch.jit.is_scripting():
            self._check_thread()
        keep = self.keep_indices
        if keep is None:
            return x, None
        self.keep_indices = None
        return keep_tokens(x, keep, self.num_prefix_tokens), keep

    @torch.jit.unused
    def _check_thread(self) -> None:
        """Raise RuntimeError where a plain backbone runs beside its model."""
        if not torch.compiler.is_compiling():
            if _running.get(id(self), (get_ident(),)) != (get_ident(),):
                raise RuntimeError(_BUSY.format("backbone"))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return self.take(x)[0]


class TokenSlotWithDropout(TokenSlot):
    """Stands at ``pos_drop`` of models without a ``patch_drop``: their dropout, then the slot."""

    def __init__(self, num_prefix_tokens: int, p: float) -> None:
        super().__init__(num_prefix_tokens)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return self.take(F.dropout(x, self.p, self.training))[0]


def renamed(function: Any, name: str) -> Any:
    """The same function under another name; TorchScript compiles methods by the function's name."""
    code, scope = function.__code__, function.__globals__
    twin = FunctionType(code, scope, name, function.__defaults__, function.__closure__)
    twin.__annotations__ = function.__annotations__
    return twin


def as_kind(module: nn.Module, kind: Type[nn.Module]) -> Any:
    """A twin of a module: an object of a subclass with the same parameters, submodules, flags."""
    twin: nn.Module = kind.__new__(kind)
    twin.__dict__ = module.__dict__
    return twin


def as_slot(module: nn.Module, kind: Type[nn.Module]) -> Any:
    """``as_kind`` for a subclass that holds keep indices; it is empty."""
    slot = as_kind(module, kind)
    slot.keep_indices = None
    return slot


def slots_in(module: Optional[nn.Module]) -> List[Any]:
    """A slot, or those in a wrapper around it: wrappers read attributes through, but keep new ones.

    A wrapper that trains a copy has both; only one of them runs.
    """
    inside = () if module is None else module.modules()
    return [each for each in inside if "keep_indices" in each.__dict__]


def named_twins(mixin: type, kinds: Iterable[Any], scope: Dict[str, Any]) -> Dict[Any, Any]:
    """For each class a subclass with a mixin, named in a module's ``scope`` so that it pickles."""
    twins = {}
    for kind in kinds:
        name = f"{kind.__name__}{mixin.__name__.removeprefix('Rope')}"
        twins[kind] = type(name, (mixin, kind), {"__module__": scope["__name__"]})
        scope[name] = twins[kind]
    return twins


_SLOT_STATE = ("keep_indices", "num_prefix_tokens")  # what a twin has and its original has not

Swaps = Dict[str, Tuple[Optional[nn.Module], nn.Module]]  # place -> what stood there, what stands


def swap_in(backbone: nn.Module, modules: Dict[str, nn.Module]) -> Swaps:
    """Put modules at places of a backbone; returns what ``swap_back`` needs."""
    swaps: Swaps = {}
    for place, module in modules.items():
        original = attrgetter(place)(backbone)
        if original is None or module.__dict__ is not original.__dict__:  # a twin keeps its flags
            module.train((backbone if original is None else original).training)
        _put(backbone, place, module)
        swaps[place] = (original, module)
    return swaps


def swap_back(backbone: nn.Module, swaps: Swaps) -> None:
    """Put the original modules back, in their present state, where nobody else changed them."""
    for place, (original, module) in reversed(swaps.items()):
        if attrgetter(place)(backbone) is not module:
            continue
        if original is not None and isinstance(module, type(original)):  # a twin
            state = module.__dict__.items()
            original.__dict__ = {name: value for name, value in state if name not in _SLOT_STATE}
        elif original is not None:
            original.train(module.training)
        _put(backbone, place, original)


def _put(backbone: nn.Module, place: str, module: Optional[nn.Module]) -> None:
    parent, _, name = place.rpartition(".")
    setattr(attrgetter(parent)(backbone) if parent else backbone, name, module)


def run_with_slots(
    slots: List[Any],
    keep: Optional[Tensor],
    call: Callable[..., Any],
    *args: Any,
    coarse: Optional[Callable[[], Any]] = None,
    within: Callable[[], ContextManager[None]] = nullcontext,
    **kwargs: Any,
) -> Any:
    """Run a model with keep indices (B, K) in its slots; they are empty afterwards in any case.

    ``coarse`` makes the tokens that the first slot appends. ``within`` makes the context of the
    call; only one thread at a time is in it.
    """
    kind = type(getattr(call, "__self__", call)).__name__
    with nullcontext() if torch.compiler.is_compiling() else alone(slots[0], kind):
        try:
            if coarse is not None:
                slots[0].coarse = coarse()
            for slot in slots:
                slot.keep_indices = keep
            with within():
                out = call(*args, **kwargs)
            if slots[0].keep_indices is not None:  # without the others, shapes do not match
                raise RuntimeError(f"{kind} ran without visiting the place that drops patches.")
        finally:
            for slot in slots:
                slot.keep_indices = None
            if coarse is not None:
                slots[0].coarse = None
    return out


def check_free(backbone: Any, place: str) -> None:
    """Raise TypeError if a module is active where a slot would stand."""
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
    """How one timm family drops tokens.

    Attributes:
        family: the name in errors and tables.
        host: the class in timm.
        places: attributes of the backbone where slots stand, the tokens' slot first.
        patch_embed: attribute of the module that cuts images into patches.
        prefix_in_blocks: whether the sequence has prefix tokens while the blocks run.
        first_kind: a module for ``places[0]`` that keeps the prefix and the first K patches, for
            timing; None where dropping patches changes more than the tokens.
        coarse: how the family takes tokens of several scales: an adapter, or why it cannot.
    """

    family: str
    host: Type[nn.Module]
    places: Tuple[str, ...]
    patch_embed: str = "patch_embed"
    prefix_in_blocks: bool = True
    first_kind: Optional[Callable[[int, int], nn.Module]] = None
    coarse: Union["SlotAdapter", str] = "its position bias has one entry for each pair of patches"

    @abstractmethod
    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """What to put into a backbone, by place: the tokens' slot, and what must follow it."""

    def check(self, backbone: Any) -> None:  # noqa: B027  # most families have nothing to check
        """Raise TypeError if this particular model cannot drop tokens."""

    def embed_of(self, backbone: Any) -> Any:
        """The module that cuts images into patches."""
        return getattr(backbone, self.patch_embed)

    def patch_pixels(self, backbone: Any) -> Tuple[int, int]:
        """(height, width) of a patch, including a convolutional stem in front (hybrids)."""
        rows, cols = self.embed_of(backbone).feat_ratio(as_scalar=False)
        return int(rows), int(cols)

    def slots(self, backbone: Any) -> List[Any]:
        """The modules that hold keep indices while the backbone runs, the tokens' slot first."""
        found = [slots_in(attrgetter(place)(backbone)) for place in self.places]
        if not found[0]:
            raise RuntimeError(
                "this LTRPModel gave its backbone back (restore), or its patch_drop was changed."
            )
        embed = self.embed_of(backbone)
        # a wrapper may run the embedding again, when its slot is empty: inside, it embeds all
        own = [embed] if "keep_indices" in embed.__dict__ else []
        return [slot for slots in (*found, own) for slot in slots]


class ScriptedSlots:
    """A mixin for scripted modules with a ``backbone``: the slots of all families in one method.

    TorchScript reaches a module only through the attributes of its parents, resolved at compile
    time. A second registered reference to a slot would become a copy, which the backbone never
    reads.
    """

    if TYPE_CHECKING:  # torch.jit.script would read the annotation as a TorchScript type
        backbone: Any

    def _fill_slots(self, keep: Optional[Tensor]) -> None:
        """Put keep indices (B, K), or None, into the backbone's slots."""
        if hasattr(self.backbone, "patch_drop"):
            self.backbone.patch_drop.keep_indices = keep
        elif hasattr(self.backbone, "shared_rel_pos"):
            self.backbone.patch_embed.norm.keep_indices = keep
            self.backbone.shared_rel_pos.keep_indices = keep
        else:
            self.backbone.pos_drop.keep_indices = keep
            if hasattr(self.backbone, "rel_pos_bias"):
                if self.backbone.rel_pos_bias is not None:
                    self.backbone.rel_pos_bias.keep_indices = keep
        if hasattr(self.backbone.patch_embed, "keep_indices"):
            self.backbone.patch_embed.keep_indices = keep
