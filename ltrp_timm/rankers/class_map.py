"""Rankers trained with labels: the places that make a classifier choose its class.

LTRP is compared with them: a selector trained on some classes keeps what these classes need, and
may drop the rest.
"""

from abc import ABC, abstractmethod
from typing import Any, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers.bridge import set_image_size, to_pair
from ltrp_timm.rankers.base import ModelRanker, is_integer
from ltrp_timm.slots.base import alone


class ClassMapRanker(ModelRanker, ABC):
    """A timm classifier and the map of its highest classes.

    Args:
        backbone: see ``ModelRanker``; a classifier.
        top: how many of an image's highest classes count; their maps are combined by maximum.
        blur: average the map over 3 x 3 places, as some published comparisons do.
        **kwargs: further arguments of ``ModelRanker``; ``img_size=None`` accepts any size, unless
            the backbone has one size.
    """

    own_args = (*ModelRanker.own_args, "top", "blur")

    def __init__(
        self,
        backbone: Union[str, nn.Module] = "resnet50.a1_in1k",
        top: int = 1,
        blur: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.backbone.eval().requires_grad_(False)
        self.check_map()
        classes = self.backbone.num_classes
        if not is_integer(top) or not 1 <= top <= classes:
            raise ValueError(f"top must lie in 1 … {classes}, got {top!r}.")
        self.top, self.blur = top, bool(blur)

    def check(self, net: Any) -> None:
        """Raise TypeError if the backbone is not a classifier of timm's form."""
        for name in ("forward_features", "forward_head", "get_classifier"):
            if not hasattr(net, name):
                raise self.refusal(net, f"it has no {name}, as timm's classifiers have")
        if not getattr(net, "num_classes", 0):
            raise self.refusal(net, "it has no classes (num_classes=0)")

    def check_map(self) -> None:
        """Raise TypeError if the backbone has no such map."""

    def refusal(self, net: Any, reason: str) -> TypeError:
        """An error with the reason why a model has no such map."""
        return TypeError(f"cannot rank by the {self.name} of {type(net).__name__}: {reason}.")

    def fit_size(self, net: Any, size: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
        """Set a backbone of one size to another; returns the ranker's ``img_size``."""
        embed = _embedding(net)
        strict = getattr(embed, "strict_img_size", True)
        fixed = getattr(embed, "img_size", None) if strict else None
        if fixed is None or size is None or to_pair(fixed) == size:
            return to_pair(fixed) if fixed is not None else size
        set_image_size(net, size)
        return size

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


class CamRanker(ClassMapRanker):
    """Class activation maps: the logit that each place alone would give to the highest class.

    For models that pool places and then apply one linear layer, such as ResNets. Negative values
    are not cut off at zero, so that places against the class come last without ties.
    Cost: one pass of the classifier.

    Source: Zhou et al., Learning Deep Features for Discriminative Localization (CVPR 2016).

    >>> CamRanker("resnet18")(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 2, 2])
    """

    name = "cam"

    def check_map(self) -> None:
        """Raise TypeError unless the logits are a linear layer on pooled places."""
        net = self.backbone
        classifier, parameter = net.get_classifier(), next(net.parameters())
        shape = (1, getattr(net, "in_chans", 3), *(self.img_size or (64, 64)))
        images = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
        linear = isinstance(classifier, nn.Linear) or (
            isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1)
        )
        with torch.no_grad():
            like = net.forward_features(images)
            features = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
            places = to_map(net, features, images).float().flatten(2)
            fits = linear and classifier.weight.shape[1] == places.shape[1]
            if fits and not places.is_meta:  # the pooled logits of random places are those
                logits = net.forward_head(features).float()
                logits = logits if classifier.bias is None else logits - classifier.bias.float()
                pools = (places.mean(2), places.amax(2), (places.mean(2) + places.amax(2)) / 2)
                weight = classifier.weight.flatten(1).float()
                errors = [float((pooled @ weight.T - logits).abs().max()) for pooled in pools]
                fits = min(errors) <= 1e-2 * float(logits.abs().max())
        if not fits:
            reason = "its logits are not a linear layer on pooled places; grad_cam takes it"
            raise self.refusal(net, reason)

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

    The features are those in front of the head; in a ViT that reads its class token, the input of
    the last block. As in ``cam``, negative values are not cut off.
    Cost: one pass of the classifier, and a backward pass to the features. It needs autograd, so it
    cannot be scripted, traced or exported.

    Source: Selvaraju et al., Grad-CAM (ICCV 2017).

    >>> GradCamRanker("vit_tiny_patch16_224")(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 14, 14])
    """

    name = "grad_cam"

    def class_maps(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, top, h, w) float32, the highest class first."""
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
        """Features that require a gradient, though nothing before them does, and the logits."""
        net = self.backbone
        # a ViT's head may read prefix tokens alone: patches then have no gradient at the end
        if not hasattr(net, "blocks") or getattr(net, "global_pool", None) not in ("token", ""):
            features = net.forward_features(images).detach().requires_grad_()
            return features, net.forward_head(features)
        caught = []

        def cut(_: nn.Module, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
            caught.append(args[0].detach().requires_grad_())
            return (caught[0], *args[1:])

        with alone(net, f"{self.name} ranker"):
            handle = net.blocks[-1].register_forward_pre_hook(cut)
            try:
                logits = net(images)
            finally:
                handle.remove()
        return caught[0], logits


def to_map(net: Any, features: Tensor, images: Tensor) -> Tensor:
    """Features of a timm model, in any layout -> (B, C, h, w), without prefix tokens."""
    if features.dim() == 4:
        nhwc = getattr(net, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if nhwc else features
    embed = _embedding(net)
    if features.dim() != 3 or embed is None:
        raise TypeError(
            f"{type(net).__name__} gives features {tuple(features.shape)} that are not on a grid."
        )
    if hasattr(embed, "dynamic_feat_size"):
        h, w = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    else:
        h, w = embed.grid_size
    patches = features[:, features.shape[1] - h * w :]
    return patches.transpose(1, 2).unflatten(2, (h, w))


def _embedding(net: Any) -> Any:
    """The patch embedding, which knows the grid; it is the stem of a mixer."""
    found = [getattr(net, name, None) for name in ("patch_embed", "stem")]
    return next((module for module in found if hasattr(module, "grid_size")), None)
