"""Rankers that have seen labels: where a classifier finds what it takes an image for.

They are what LTRP is compared with: a selector trained on some classes keeps what these classes
need, and may drop the rest.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers.sizes import to_pair
from ltrp_timm.rankers.on_model import ModelRanker, check_backbone, is_integer


class ClassMapRanker(ModelRanker, nn.Module, ABC):
    """A classifier of timm and the map of its highest classes; see the two kinds of it.

    Args:
        backbone: name of a timm classifier, with a tag or a source as in timm; or such a model,
            which is copied.
        top: how many of an image's highest classes count; their maps are combined by maximum.
        blur: average the map over 3 x 3 places, as some published comparisons do.
        img_size: the size it looks at, (H, W) or one side; None takes images as they come, or the
            one size of a model that has one.
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
        TypeError: no such map is known of this model; the message says why.
        ValueError: an argument is out of its range.
    """

    own_args = ("top", "blur", "in_chans", "mean", "std")

    def __init__(
        self,
        backbone: Union[str, nn.Module] = "resnet50.a1_in1k",
        top: int = 1,
        blur: bool = False,
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
        check_backbone(backbone, pretrained, kwargs)
        size = None if img_size is None else to_pair(img_size)
        if isinstance(backbone, nn.Module):
            net: Any = _copy(backbone, in_chans).to(device=device, dtype=dtype)
        else:
            given = {"in_chans": in_chans, "device": device, "dtype": dtype}
            given = {name: value for name, value in given.items() if value is not None}
            net = timm.create_model(backbone, pretrained=pretrained, **given, **kwargs)
        self.img_size = _fit_size(net, size)
        self._check(net)
        if not is_integer(top) or not 1 <= top <= net.num_classes:
            raise ValueError(f"top must lie in 1 … {net.num_classes}, got {top!r}.")
        self.top, self.blur = top, bool(blur)
        self.describe(backbone, net, pretrained, kwargs, mean, std)
        self.backbone = net.eval().requires_grad_(False)

    def _check(self, net: Any) -> None:
        """Raise TypeError where there is no such map."""
        for name in ("forward_features", "forward_head", "get_classifier"):
            if not hasattr(net, name):
                raise _refusal(self.name, net, f"it has no {name}, as timm's classifiers have")
        if not getattr(net, "num_classes", 0):
            raise _refusal(self.name, net, "it has no classes (num_classes=0)")

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w) float32, on the grid of the features."""
        scores = self.class_maps(images).amax(dim=1)
        if not self.blur:
            return scores
        scores = F.avg_pool2d(scores.unsqueeze(1), 3, 1, padding=1, count_include_pad=False)
        return scores.squeeze(1)

    @abstractmethod
    def class_maps(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, top, h, w) float32, the highest class first."""

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return f"top={self.top}, blur={self.blur}, img_size={self.img_size}"


class CamRanker(ClassMapRanker):
    """Class activation maps: the logit that each place alone would give to the highest class.

    For models that pool places and then apply one linear layer (ResNets and their like). Places
    that speak against the class come last, they are not cut off at zero: there are no ties.
    Cost: one pass of the classifier.

    Source: Zhou et al., Learning Deep Features for Discriminative Localization (CVPR 2016).

    >>> CamRanker("resnet18")(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 2, 2])
    """

    name = "cam"

    def _check(self, net: Any) -> None:
        """Raise TypeError unless the logits are a linear layer on pooled places."""
        super()._check(net)
        classifier = net.get_classifier()
        images = torch.zeros(1, *_probe_size(net, self.img_size))
        parameter = next(net.parameters())
        images = images.to(device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            features = net.eval().forward_features(images)
        places = to_map(net, features, images)
        linear = isinstance(classifier, nn.Linear) or (
            isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1)
        )
        reason = "its logits are not a linear layer on pooled places; grad_cam takes it"
        if not linear or classifier.weight.shape[1] != places.shape[1]:
            raise _refusal(self.name, net, reason)
        if not places.is_meta and not _pools_places(net, features, images):
            raise _refusal(self.name, net, reason)

    def class_maps(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, top, h, w) float32, the highest class first."""
        features = self.backbone.forward_features(images)
        logits = self.backbone.forward_head(features)
        best = logits.topk(self.top, dim=1).indices
        weight = self.backbone.get_classifier().weight.flatten(1)
        places = to_map(self.backbone, features, images)
        return torch.einsum("btc,bchw->bthw", weight[best].float(), places.float())


class GradCamRanker(ClassMapRanker):
    """Grad-CAM: features weighted by the mean gradient of the highest class, in any classifier.

    The features are those in front of the head; in a ViT that reads its class token, the tokens
    that enter the last block. As in ``cam``, places with a negative value are ordered, not cut off.
    Cost: one pass of the classifier, and a backward pass behind the features. It needs autograd, so
    that it cannot be scripted, traced or exported.

    Source: Selvaraju et al., Grad-CAM (ICCV 2017).

    >>> GradCamRanker("vit_tiny_patch16_224")(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 14, 14])
    """

    name = "grad_cam"

    def class_maps(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, top, h, w) float32, the highest class first.

        Raises:
            RuntimeError: it is being scripted, traced or exported.
        """
        traced = isinstance(images, torch.fx.Proxy) or torch.jit.is_tracing()
        if traced or torch.compiler.is_exporting():
            raise RuntimeError(
                "grad_cam takes a gradient at every call: it cannot be traced or exported; give "
                "keep_indices to a model that is."
            )
        return self._gradient_maps(images)

    @torch.compiler.disable
    def _gradient_maps(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            features, logits = self._features_and_logits(images.clone())
            weights = [
                torch.autograd.grad(values.sum(), features, retain_graph=True)[0]
                for values in logits.topk(self.top, dim=1).values.unbind(1)
            ]
            places = to_map(self.backbone, features.detach(), images)
            maps = [to_map(self.backbone, weight, images).mean((2, 3)) for weight in weights]
        return torch.einsum("btc,bchw->bthw", torch.stack(maps, 1).float(), places.float())

    def _features_and_logits(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """Features that need a gradient, though nothing in front of them does, and the logits."""
        if not _reads_prefix(self.backbone):
            features = self.backbone.forward_features(images).detach().requires_grad_()
            return features, self.backbone.forward_head(features)
        caught = []

        def cut(_: nn.Module, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
            caught.append(args[0].detach().requires_grad_())
            return (caught[0], *args[1:])

        handle = self.backbone.blocks[-1].register_forward_pre_hook(cut)
        try:
            logits = self.backbone(images)
        finally:
            handle.remove()
        return caught[0], logits


def to_map(net: Any, features: Tensor, images: Tensor) -> Tensor:
    """Features of a timm model, in whatever layout, -> (B, C, h, w); prefix tokens are left out.

    Raises:
        TypeError: they are on no grid.
    """
    if features.dim() == 4:
        nhwc = getattr(net, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if nhwc else features
    embed = _embedding(net)
    if features.dim() != 3 or embed is None:
        raise TypeError(
            f"{type(net).__name__} gives features {tuple(features.shape)} that are on no grid."
        )
    if hasattr(embed, "dynamic_feat_size"):
        h, w = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    else:
        h, w = embed.grid_size
    patches = features[:, features.shape[1] - h * w :]
    return patches.transpose(1, 2).reshape(features.shape[0], -1, h, w)


def _copy(backbone: nn.Module, in_chans: Optional[int]) -> nn.Module:
    own = getattr(backbone, "in_chans", in_chans)
    if in_chans is not None and in_chans != own:
        raise ValueError(f"the ranker's backbone takes {own} channels, the images have {in_chans}.")
    return copy.deepcopy(backbone)


def _embedding(net: Any) -> Any:
    """The patch embedding, which knows the grid; a mixer calls it its stem."""
    found = [getattr(net, name, None) for name in ("patch_embed", "stem")]
    return next((module for module in found if hasattr(module, "grid_size")), None)


def _fit_size(net: Any, size: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
    """The size that the ranker looks at; a model of one size is set to it."""
    embed = _embedding(net)
    fixed = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
    if fixed is None or size is None or to_pair(fixed) == size:
        return to_pair(fixed) if fixed is not None else size
    if not hasattr(net, "set_input_size"):
        kind = type(net).__name__
        raise ValueError(f"a {kind} takes images of {to_pair(fixed)}, got img_size={size}.")
    net.set_input_size(img_size=size)
    return size


def _probe_size(net: Any, size: Optional[Tuple[int, int]]) -> Tuple[int, int, int]:
    return (getattr(net, "in_chans", 3), *(size or (64, 64)))


def _pools_places(net: Any, like: Tensor, images: Tensor) -> bool:
    """Whether the logits are the pooled logits of the places, on features made up."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(like.shape, generator=generator).to(like)
    classifier = net.get_classifier()
    with torch.no_grad():
        logits = net.forward_head(features).float()
        places = to_map(net, features, images).float().flatten(2)
        weight, bias = classifier.weight.flatten(1).float(), classifier.bias
        logits = logits if bias is None else logits - bias.float()
        pools = (places.mean(2), places.amax(2), (places.mean(2) + places.amax(2)) / 2)
        errors = [float((pooled @ weight.T - logits).abs().max()) for pooled in pools]
        return min(errors) <= 1e-2 * float(logits.abs().max())


def _reads_prefix(net: Any) -> bool:
    """Whether the head of a ViT takes more than its patches: they have no gradient at the end."""
    return hasattr(net, "blocks") and getattr(net, "global_pool", None) in ("token", "")


def _refusal(ranker: str, net: Any, reason: str) -> TypeError:
    return TypeError(f"cannot rank by the {ranker} of {type(net).__name__}: {reason}.")
