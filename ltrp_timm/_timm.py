"""Every private name of timm that this package uses, and what differs between timm's versions.

A new timm release is checked here: tests/test_timm_names.py has a test for each name.
"""

import importlib
import inspect
from typing import Any, Dict, Optional, Tuple, Type

import timm.models.eva
from timm.layers import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    pos_embed_sincos,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.models._features_fx import FeatureGraphNet
from timm.models._hub import save_config_for_hf
from timm.utils.distributed import init_distributed_device_so
from torch import nn

__all__ = [
    "FEATURE_WRAPPERS",
    "ROTARY_EMBEDDINGS",
    "FeatureGetterNet",
    "backbone_filter",
    "init_distributed_device_so",
    "make_rope_gather_a_leaf",
    "num_prefix_tokens",
    "recorded_args",
    "reset_to_tokens",
    "resolve_pretrained_cfg",
    "save_config_for_hf",
    "traits",
]

FEATURE_WRAPPERS: Tuple[Type[nn.Module], ...] = (
    FeatureGetterNet,
    FeatureListNet,
    FeatureHookNet,
    FeatureGraphNet,
)

# older versions of timm have no RotaryEmbeddingMRope
ROTARY_EMBEDDINGS: Tuple[Type[nn.Module], ...] = (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    *filter(None, [getattr(pos_embed_sincos, "RotaryEmbeddingMRope", None)]),
)


def recorded_args(model: Any) -> Dict[str, Any]:
    """The arguments that a model was built with; older versions of timm record none."""
    return dict(getattr(model, "_model_args", {}))


def traits(model: Any) -> Optional[Dict[str, Any]]:
    """What timm records of a model's input; None in older versions of timm."""
    found = getattr(model, "_traits", None)
    return None if found is None else dict(found)


def num_prefix_tokens(model: Any) -> int:
    """P of a ViT; older versions of timm do not set it for CaiT, which has a class token."""
    return int(getattr(model, "num_prefix_tokens", 1))


def reset_to_tokens(backbone: Any, num_classes: int) -> None:
    """Give a ViT a new classifier and no pooling; an older Eva keeps its attention pool."""
    backbone.reset_classifier(num_classes, "")
    if getattr(backbone, "attn_pool", None) is not None:
        backbone.attn_pool = None


def backbone_filter(
    state_dict: Dict[str, Any], backbone: nn.Module, antialias: bool = True
) -> Dict[str, Any]:
    """timm's ``checkpoint_filter_fn`` of a model's family: other layouts, other position tables.

    ``antialias`` is how tables are resized: True as timm does, False as MAE's authors do.
    """
    for kind in type(backbone).__mro__:
        fn = getattr(importlib.import_module(kind.__module__), "checkpoint_filter_fn", None)
        if fn is not None:
            # DeiT-3 files name LayerScale differently; the option changes no other names
            options = {"adapt_layer_scale": True, "antialias": antialias}
            known = inspect.signature(fn).parameters
            options = {name: value for name, value in options.items() if name in known}
            return fn(state_dict, backbone, **options)
    return state_dict


def make_rope_gather_a_leaf() -> None:
    """Let torch.fx call Eva's gather of rotary embeddings, which it cannot trace.

    ``torch.fx.wrap`` must be called at the top level of the module that holds the name, hence the
    ``exec``. It affects symbolic tracing only.
    """
    source = "__import__('torch').fx.wrap('apply_keep_indices_nlc')"
    code = compile(source, inspect.getfile(timm.models.eva), "exec")
    exec(code, vars(timm.models.eva))  # noqa: S102  # a constant string
