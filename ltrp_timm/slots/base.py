"""The slot, a module that drops tokens, and the adapter that puts slots into a backbone.

A slot stands where timm drops patches, right after the position embedding. It holds keep indices
only while its model runs: the model fills it, and the slot empties itself when it is used. An empty
slot is the identity. So one thread at a time may run a model; another one gets an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter, index
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
from timm.layers import Format, PatchDropout, PatchDropoutWithIndices, PatchEmbed
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


def embed_kept(
    images: Tensor, keep_indices: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """Images (B, C, H, W), keep_indices (B, K) -> (B, h, w, D), zeros at dropped places.

    weight (D, C, p, q) is that of a convolution with stride = kernel size, bias (D,) or None. timm
    adds position embeddings to a full grid; the tokens' slot takes the kept rows out again.
    """
    rows, cols = weight.shape[-2:]
    h, w = images.shape[2] // rows, images.shape[3] // cols
    if images.shape[2] != h * rows or images.shape[3] != w * cols:
        size = f"{images.shape[2]}x{images.shape[3]}"
        raise ValueError(f"images must divide into patches of {rows}x{cols}, got {size}.")
    cut = images.reshape(images.shape[0], images.shape[1], h, rows, w, cols)
    cut = cut.permute(0, 2, 4, 1, 3, 5)
    batch = torch.arange(images.shape[0], device=images.device).unsqueeze(1)
    row, col = keep_indices // w, keep_indices % w
    tokens = F.linear(cut[batch, row, col].flatten(2), weight.flatten(1), bias)
    dense = tokens.new_zeros(images.shape[0], h, w, weight.shape[0])
    return dense.index_put((batch, row, col), tokens)


torch.fx.wrap("embed_kept")


class KeptPatchEmbed(PatchEmbed):
    """timm's patch embedding; with keep indices in it, it embeds kept patches only."""

    keep_indices: Optional[Tensor]
    output_fmt: Format  # TorchScript reads annotations of the class itself only
    dynamic_img_pad: torch.jit.Final[bool]  # type: ignore[misc]  # timm sets it
    _timm_forward = renamed(PatchEmbed.forward, "_timm_forward")

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> timm's output, with zeros for dropped patches."""
        keep = self.keep_indices
        if keep is None:
            return self._timm_forward(x)
        self.keep_indices = None
        if not torch.jit.is_scripting():
            if not _is_plain(self.proj):  # an adapter or a hook inside must run
                return self._timm_forward(x)
            compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            if compiling and torch.is_grad_enabled():
                # for one image size, as timm's convolution is: the gradient of a resized position
                # table cannot be compiled for several
                for side in x.shape[2:]:
                    index(side)
        elif self.strict_img_size and self.img_size is not None:
            if x.shape[2] != self.img_size[0] or x.shape[3] != self.img_size[1]:
                raise ValueError("images must have the size that the model was made for.")
        if self.dynamic_img_pad:
            h, w = self.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            rows, cols = self.patch_size
            x = F.pad(x, (0, w * cols - x.shape[-1], 0, h * rows - x.shape[-2]))
        x = self.norm(embed_kept(x, keep, self.proj.weight, self.proj.bias))
        return x.flatten(1, 2) if self.flatten else x


def _is_plain(proj: nn.Module) -> bool:
    hooks = proj._forward_hooks or proj._forward_pre_hooks
    return type(proj) is nn.Conv2d and "forward" not in proj.__dict__ and not hooks


def can_embed_kept(patch_embed: Any) -> bool:
    """Whether a patch embedding is one projection of each patch, then at most a LayerNorm."""
    if type(patch_embed) is not PatchEmbed:
        return False
    if not patch_embed.flatten and patch_embed.output_fmt != "NHWC":
        return False
    proj, norm = patch_embed.proj, patch_embed.norm
    if not _is_plain(proj) or not isinstance(norm, (nn.Identity, nn.LayerNorm)):
        return False
    patch = tuple(patch_embed.patch_size)
    plain = proj.kernel_size == patch and proj.stride == patch and proj.padding == (0, 0)
    return plain and proj.groups == 1 and proj.dilation == (1, 1)


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
    if isinstance(module, TokenSlot):
        raise TypeError(
            f"this {kind} drops patches already: use the model that drop_patches returned, or call "
            "its restore() first."
        )
    if module is not None and type(module) is not nn.Identity:
        raise TypeError(
            f"cannot drop patches from {kind}: its {place} is already in use "
            f"({type(module).__name__})."
        )


def check_known(family: str, what: str, module: Any, kinds: Dict[Any, Any]) -> None:
    """Raise TypeError if a module is not of a class that has a twin among ``kinds``."""
    if type(module) not in kinds:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"cannot drop patches from {family}: its {what} is a {type(module).__name__}, not one "
            f"of {known}."
        )


class SlotAdapter(ABC):
    """How one timm family drops tokens.

    Attributes:
        family: the name in errors and tables.
        host: the class in timm.
        places: attributes of the backbone where slots stand, the tokens' slot first.
        patch_embed: attribute of the module that cuts images into patches.
        prefix_in_blocks: whether the sequence has prefix tokens while the blocks run.
        coarse: how the family takes tokens of several scales: an adapter, or why it cannot.
    """

    family: str
    host: Type[nn.Module]
    places: Tuple[str, ...]
    patch_embed: str = "patch_embed"
    prefix_in_blocks: bool = True
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
