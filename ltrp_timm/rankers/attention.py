"""The ranker that takes a ViT's word for it: what its class token attends to."""

import copy
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from ltrp_timm.layers.sizes import to_pair
from ltrp_timm.rankers.class_token import ClassTokenAttention, check_class_token
from ltrp_timm.rankers.on_model import ModelRanker, check_backbone, is_integer


class AttentionRanker(ModelRanker, nn.Module):
    """The class token's attention to the patches in one block of a ViT, averaged over heads.

    The blocks in front of the chosen one run as they are. Of that block only the norm and the
    projections of q and k are left; what lies behind is not stored. It takes one image size: other
    images, and the maps, are resized.

    Args:
        backbone: name of a timm ViT with a class token (``VisionTransformer`` or ``Eva``), with a
            tag or a source as in timm; or such a model, of which the needed part is copied.
        block: which block, from 0, or from -1 backwards.
        heads: the heads to average, one or several, from 0; None takes all.
        img_size: the one image size it takes; None is the backbone's own.
        in_chans: channels of an image; None is the backbone's own.
        mean: normalisation that the images come in, in units of pixels in [0, 1]; None takes that
            of the backbone's ``pretrained_cfg``.
        std: likewise.
        pretrained: load the backbone's weights, through timm's own loader. A backbone that comes as
            a module counts as trained.
        device: as in ``timm.create_model``.
        dtype: likewise.
        **kwargs: further arguments of ``timm.create_model`` for the backbone.

    Raises:
        TypeError: the backbone has no class token, or one whose attention is not known here; the
            message says why.
        ValueError: an argument is out of its range.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (ICCV 2021).

    >>> AttentionRanker("vit_tiny_patch16_224", img_size=64)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 4, 4])
    """

    name = "attention"
    own_args = ("block", "heads", "in_chans", "mean", "std")
    not_recorded = (*ModelRanker.not_recorded, "num_classes")  # the backbone ends before its head

    def __init__(
        self,
        backbone: Union[str, nn.Module] = "vit_small_patch16_224.dino",
        block: int = -1,
        heads: Union[int, Sequence[int], None] = None,
        img_size: Union[int, Sequence[int], None] = None,
        in_chans: Optional[int] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        pretrained: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        size = None if img_size is None else to_pair(img_size)
        check_backbone(backbone, pretrained, kwargs)
        if isinstance(backbone, nn.Module):
            net = _copy_up_to(backbone, block, size, in_chans).to(device=device, dtype=dtype)
        else:
            given = {"img_size": size, "in_chans": in_chans, "device": device, "dtype": dtype}
            net = _build(backbone, pretrained, {"num_classes": 0, **given, **kwargs})
        self.block = _block_index(block, len(net.blocks))
        self.heads = _head_indices(heads, net.blocks[self.block])
        self.img_size: Optional[Tuple[int, int]] = to_pair(net.patch_embed.img_size)
        self.describe(backbone, net, pretrained, kwargs, mean, std)
        self.backbone = _cut(net, self.block, self.heads or ())

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) of ``img_size`` -> score map (B, h, w) float32, its sum below 1."""
        h, w = self.backbone.patch_embed.grid_size
        return self.backbone.forward_features(images).reshape(-1, h, w)

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return f"block={self.block}, heads={self.heads}, img_size={self.img_size}"


def _build(name: str, pretrained: bool, kwargs: Dict[str, Any]) -> Any:
    """A backbone by name, checked."""
    try:
        net = timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError:  # a model that knows no img_size is refused for what it is
        with torch.device("meta"):
            check_class_token(timm.create_model(name))
        raise
    check_class_token(net)
    return net


def _copy_up_to(
    backbone: Any, block: int, size: Optional[Tuple[int, int]], in_chans: Optional[int]
) -> Any:
    """A copy of a model for its own use; blocks behind the chosen one are not copied."""
    check_class_token(backbone)
    if in_chans is not None and in_chans != backbone.in_chans:
        raise ValueError(
            f"the ranker's backbone takes {backbone.in_chans} channels, the images have {in_chans}."
        )
    behind = backbone.blocks[_block_index(block, len(backbone.blocks)) + 1 :]
    net = copy.deepcopy(backbone, {id(module): nn.Identity() for module in behind})
    net.patch_drop = None if isinstance(net, Eva) else nn.Identity()  # may be somebody's slot
    net.set_grad_checkpointing(False)
    if size is not None and size != to_pair(net.patch_embed.img_size):
        net.set_input_size(img_size=size)
    return net


def _cut(backbone: Any, block: int, heads: Sequence[int]) -> Any:
    """End a model at a block: its ``forward_features`` gives the class token's attention there."""
    end = ClassTokenAttention(backbone.blocks[block], backbone.num_prefix_tokens, heads)
    backbone.blocks = backbone.blocks[: block + 1]
    backbone.blocks[block] = end.train(backbone.training)
    for name in ("norm", "fc_norm", "head", "head_dist"):
        if getattr(backbone, name, None) is not None:
            setattr(backbone, name, nn.Identity())
    backbone.attn_pool = None
    return backbone


def _block_index(block: int, depth: int) -> int:
    if not is_integer(block) or not -depth <= block < depth:
        raise ValueError(f"block must lie in {-depth} … {depth - 1}, got {block!r}.")
    return block % depth


def _head_indices(heads: Union[int, Sequence[int], None], block: Any) -> Optional[List[int]]:
    if heads is None:
        return None
    count = getattr(block, "attn", block).num_heads
    listed = list(heads) if isinstance(heads, Sequence) else [heads]
    inside = [is_integer(head) and 0 <= head < count for head in listed]
    if not listed or not all(inside) or len(set(listed)) < len(listed):
        raise ValueError(f"heads must be different ones of 0 … {count - 1}, got {heads!r}.")
    return listed
