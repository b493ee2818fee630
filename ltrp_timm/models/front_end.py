"""One line for any timm ViT: ``drop_patches``."""

from typing import Any, Dict, Mapping, Optional, Tuple, Union

from torch import nn

from ltrp_timm.layers.ml_decoder import make_head
from ltrp_timm.models.coarse import coarse_rest
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers import DEFAULT_RANKER, create_ranker, ranker_class
from ltrp_timm.selection import AdaptiveBudget
from ltrp_timm.slots import find_adapter
from ltrp_timm.weights.files import PathLike


def drop_patches(
    model: nn.Module,
    ranker: Union[str, nn.Module] = DEFAULT_RANKER,
    keep_ratio: Optional[float] = None,
    selection: str = "top",
    validate: bool = False,
    fill: str = "zeros",
    ranker_weights: Union[bool, PathLike, None] = None,
    ranker_args: Optional[Dict[str, Any]] = None,
    selection_args: Optional[Mapping[str, Any]] = None,
    cache_dir: Optional[PathLike] = None,
    head: Optional[str] = None,
    head_args: Optional[Mapping[str, Any]] = None,
    budget: Optional[AdaptiveBudget] = None,
    rest: str = "drop",
    scales: Optional[Tuple[int, ...]] = None,
    size_bias: Optional[float] = None,
) -> LTRPModel:
    """Put an LTRP front-end on a timm ViT: rank its patches, drop the weak ones, encode the rest.

    Works in place and copies no weights; ``model.restore()`` returns the backbone.

    Args:
        model: a timm ViT (ViT, DeiT, DINOv2, CLIP, SigLIP, FlexiViT, hybrids, AIMv2, EVA-02,
            DINOv3, RoPE ViTs, BEiT, CaiT, ViT-RelPos, NaFlexVit; see the guide to backbones).
        ranker: a name of ``list_rankers()``, or any module images -> (B, h, w).
        keep_ratio: share of patch tokens to encode, in (0, 1] (default: 0.5, or the budget's mean).
        selection: "top" keeps the best patches, "dithered" many where scores are high and few
            where they are low; others are "mixed", "stratified" and "random".
        validate: also check the values of given ``keep_indices`` and that scores are finite (eager
            only; reads from the device).
        fill: what dropped places of dense features hold: "zeros" or "nearest".
        ranker_weights: weights of the ranker: a folder, a file, ``hf-hub:owner/name[@revision]``,
            or True for published ones, as ``pretrained`` of ``create_ranker``; those of conv find
            objects no better than the weight-free border. ``pretrained=True`` of a model does not
            load them.
        ranker_args: further arguments of ``create_ranker``; ``in_chans`` is the backbone's.
        selection_args: options of the selection, such as ``{"cell": 3}`` of "stratified".
        cache_dir: folder for downloaded weights of the ranker; as in huggingface_hub.
        head: None keeps the classifier; "ml_decoder" replaces it by a new one for multi-label
            images, which attends to all encoded tokens. It stays on the backbone.
        head_args: options of that head (see ``MLDecoder``), such as ``{"embed_dim": 384}``.
        budget: how many patches each image keeps, instead of ``keep_ratio`` of each (see
            ``LTRPModel.calibrate``).
        rest: what happens to the other patches: "drop", or "coarse": where a cell of 2 x 2 patches
            is not worth four tokens, it gets one, of the image at half size.
        scales: (1, 2), or (1, 2, 4) to give blocks of 4 x 4 patches one token too (default: (1, 2);
            with ``rest="coarse"`` only).
        size_bias: how much more attention a token gets that covers more patches (default: 0.5; see
            ``CoarseRest``; with ``rest="coarse"`` only).

    Returns:
        An LTRPModel around the same backbone object.

    Raises:
        TypeError: Patches cannot be dropped from this model; the message says why. Nothing was
            changed.
        ValueError: An argument is out of range.
        OSError: The weights of the ranker do not exist, or the Hub does not return them.

    >>> import timm
    >>> model = drop_patches(timm.create_model("vit_tiny_patch16_224"), keep_ratio=0.25)
    """
    coarse_rest(rest, scales, size_bias)
    find_adapter(model, rest)
    if ranker_args is not None and not isinstance(ranker_args, Mapping):
        raise TypeError(f"ranker_args must be a mapping, got {type(ranker_args).__name__}.")
    if isinstance(ranker, str):
        ranker = make_ranker(ranker, model, ranker_weights, ranker_args, cache_dir)
    elif ranker_weights is not None or ranker_args is not None:
        raise ValueError(
            "ranker_weights and ranker_args go with a ranker's name; this ranker is a module."
        )
    if head_args and head is None:
        raise ValueError("head_args go with a head: head='ml_decoder'.")
    classifier = None if head is None else make_head(head, model, head_args)
    settings = (keep_ratio, selection, validate, fill, selection_args, budget)
    pruned = LTRPModel(ranker, model, *settings, rest, scales, size_bias)
    if classifier is not None:
        pruned.set_classifier(classifier)
    return pruned


def make_ranker(
    name: str,
    backbone: Any,
    weights: Union[bool, PathLike, None] = None,
    args: Optional[Dict[str, Any]] = None,
    cache_dir: Optional[PathLike] = None,
) -> nn.Module:
    """Create a ranker that matches a backbone: its channels, patch size, device and dtype."""
    kind = ranker_class(name)
    defaults: Dict[str, Any] = {}
    weights = False if weights is None else weights
    if weights is False and kind.follows_patch_size:
        defaults["patch_size"] = find_adapter(backbone).patch_pixels(backbone)
    channels = {"in_chans": getattr(backbone, "in_chans", 3)} if kind.learned else {}
    if channels and (args or {}).get("in_chans", channels["in_chans"]) != channels["in_chans"]:
        raise ValueError(
            f"in_chans of the ranker must be {channels['in_chans']}, as the model's, got "
            f"{(args or {})['in_chans']}: leave it out."
        )
    parameter = next(backbone.parameters())
    args = {**defaults, **(args or {}), **channels}
    ranker: nn.Module = create_ranker(name, weights, cache_dir=cache_dir, **args)
    if not (parameter.is_meta and any(each.is_meta for each in ranker.parameters())):
        ranker.to(parameter.device)  # accelerate's empty models have buffers: they stay
    return ranker.to(parameter.dtype)
