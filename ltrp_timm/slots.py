"""How each timm family lets go of tokens: a slot module, and one small adapter per family.

A slot sits where timm drops patches, right after the position embedding. It holds keep indices only
while its model runs: whoever runs the model puts them in, the slot hands them out once. An empty
slot is the identity.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple, Type

import timm.models.eva
import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models import FeatureGraphNet
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
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


def run_with_slot(
    slot: TokenSlot, keep: Optional[Tensor], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a model with keep indices (B, K) in its slot, which is empty afterwards, come what may.

    Raises:
        RuntimeError: the model ran without visiting its slot.
    """
    slot.keep_indices = keep
    try:
        out = call(*args, **kwargs)
        if slot.keep_indices is not None:
            kind = type(getattr(call, "__self__", call)).__name__
            raise RuntimeError(f"{kind} ran without visiting its patch_drop.")
    finally:
        slot.keep_indices = None
    return out


@dataclass(frozen=True)
class SlotAdapter:
    """One family: its class in timm, and the slot that fits its ``patch_drop``."""

    family: str
    host: Type[nn.Module]
    slot: Type[nn.Module]

    def install(self, backbone: Any) -> Optional[nn.Module]:
        """Put an empty slot in; returns what stood there (an Identity, or None)."""
        original: Optional[nn.Module] = backbone.patch_drop
        if self.host is Eva:
            _make_rope_gather_a_leaf()
        backbone.patch_drop = self.slot(backbone.num_prefix_tokens).train(backbone.training)
        return original

    def restore(self, backbone: Any, original: Optional[nn.Module]) -> None:
        """Put back what ``install`` returned."""
        backbone.patch_drop = original


ADAPTERS = (
    SlotAdapter("VisionTransformer", VisionTransformer, TokenSlot),
    SlotAdapter("Eva", Eva, TokenSlotWithIndices),
)

_LATER = "needs an adapter that this version does not have yet"
_WINDOWS = "it attends inside fixed windows of the full patch grid"
_POOLS = "it pools the patch grid between its stages"
_CONVOLVES = "it mixes neighbouring patches with convolutions over the full grid"
_MIXES = "its token-mixing weights have one entry for each patch position"

REFUSED: Dict[str, str] = {
    "LTRPModel": "it drops patches already; set its keep_ratio instead",
    "OptimizedModule": "it is compiled; drop patches first, then compile",
    "DataParallel": "it is a wrapper; drop patches from the model inside, then wrap",
    "DistributedDataParallel": "it is a wrapper; drop patches from the model inside, then wrap",
    "RecursiveScriptModule": "it is scripted; drop patches first, then script",
    "Beit": _LATER,
    "Cait": _LATER,
    "VisionTransformerRelPos": _LATER,
    "NaFlexVit": _LATER,
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "VisionTransformerSAM": _WINDOWS,
    "Twins": _WINDOWS,
    "MaxxVit": _WINDOWS,
    "Hiera": _POOLS,
    "HieraDet": _POOLS,
    "PoolingVisionTransformer": _POOLS,
    "MultiScaleVit": _POOLS,
    "Nest": _POOLS,
    "Xcit": _CONVOLVES,
    "CoaT": _CONVOLVES,
    "Levit": _CONVOLVES,
    "VOLO": _CONVOLVES,
    "MlpMixer": _MIXES,
    "ConVit": "its attention positions are laid out for the full patch grid",
    "TNT": "it carries a second, pixel-level token stream",
    "CrossVit": "it carries two token streams of different patch sizes",
}


def find_adapter(backbone: object) -> SlotAdapter:
    """The adapter for a timm ViT.

    Raises:
        TypeError: patches cannot be dropped from this model; the message says why. Nothing was
            changed.
    """
    kind = type(backbone).__name__
    for adapter in ADAPTERS:
        if isinstance(backbone, adapter.host):
            _check_slot_is_free(backbone)
            return adapter
    if isinstance(backbone, (FeatureGetterNet, FeatureListNet, FeatureHookNet, FeatureGraphNet)):
        raise TypeError(
            f"cannot drop patches from a features_only wrapper ({kind}): drop first, then wrap."
        )
    if isinstance(backbone, torch.fx.GraphModule):
        raise TypeError("cannot drop patches from a traced graph: drop first, then trace.")
    if kind in REFUSED:
        raise TypeError(f"cannot drop patches from {kind}: {REFUSED[kind]}.")
    names = ", ".join(adapter.family for adapter in ADAPTERS)
    raise TypeError(
        f"cannot drop patches from {kind}: it is none of the timm families that can ({names})."
    )


def _check_slot_is_free(backbone: Any) -> None:
    slot = backbone.patch_drop
    if isinstance(slot, (PatchDropout, PatchDropoutWithIndices)):
        raise TypeError(
            f"cannot drop patches from {type(backbone).__name__}: its patch_drop is a live "
            f"{type(slot).__name__}; create the model without patch_drop_rate."
        )
    if slot is not None and type(slot) is not nn.Identity:
        raise TypeError(
            f"cannot drop patches from {type(backbone).__name__}: its patch_drop is already in use "
            f"({type(slot).__name__})."
        )


def _make_rope_gather_a_leaf() -> None:
    """Make timm's gather of rotary embeddings a leaf of torch.fx: it can be called, not traced.

    ``torch.fx.wrap`` must be called at the top level of the module whose name it wraps, hence the
    ``exec``. It changes symbolic tracing only.
    """
    source = "__import__('torch').fx.wrap('apply_keep_indices_nlc')"
    code = compile(source, inspect.getfile(timm.models.eva), "exec")
    exec(code, vars(timm.models.eva))  # noqa: S102  # a constant string
