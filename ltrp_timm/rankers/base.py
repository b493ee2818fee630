"""What rankers share: how they are described, saved and rebuilt; those on a timm model."""

import copy
import warnings
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import adapt_input_conv
from timm.models.eva import Eva
from torch import Tensor, nn

from ltrp_timm import _timm
from ltrp_timm.layers.bridge import to_img_size, to_pair
from ltrp_timm.weights.files import PathLike, save_weights


class Ranker:
    """A mixin for modules images (B, C, H, W) -> score map (B, h, w), higher = keep first.

    Any ``nn.Module`` with that mapping is a ranker; this class is optional. Attributes that are
    used where they exist:

    Attributes:
        learned: whether it has weights to train.
        has_published_weights: whether ``create_ranker`` accepts ``pretrained=True``.
        brings_weights: whether those weights are part of this package.
        follows_patch_size: whether it follows the backbone's patch size.
        scores_are_ranks: whether its scores are ranks within an image, which say nothing about
            other images.
        mean: normalisation of its images; None keeps the backbone's.
        std: see ``mean``.
        img_size: its only image size; images and its map are resized. None accepts any size.
        trained: whether its weights are trained; loading weights and training set it.
        origin: where its weights are from, in words for a model card.
        older_args: arguments that older versions did not save, as those versions had them.
    """

    name: str = ""
    own_args: ClassVar[Tuple[str, ...]] = ()  # attributes that rebuild it, for ``config``
    older_args: ClassVar[Dict[str, Any]] = {}
    learned: bool = False
    has_published_weights: bool = False
    brings_weights: bool = False
    follows_patch_size: bool = True
    scores_are_ranks: bool = False

    mean: Optional[List[float]] = None
    std: Optional[List[float]] = None
    img_size: Optional[Tuple[int, int]] = None
    trained: bool = False
    origin: str = ""

    def config(self) -> Dict[str, Any]:
        """Arguments of ``create_ranker`` that rebuild this ranker, as JSON can hold them."""
        values = {name: getattr(self, name) for name in self.own_args}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def save(self: Any, directory: PathLike, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` for ``create_ranker(pretrained=…)``.

        Raises:
            FileExistsError: The folder holds a saved model and ``overwrite`` is False.
        """
        config = {"ranker": self.name, "args": self.config()}
        save_weights(directory, config, self.state_dict(), overwrite=overwrite)

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Follow a backbone to another size; a ranker with a fixed grid does nothing."""

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.own_args)


class PatchSizeRanker(Ranker, nn.Module):
    """A ranker without weights that follows the backbone's patch size; pixels are in [0, 1].

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        img_size: its image size, (H, W) or one side; None accepts any size.

    Raises:
        ValueError: `img_size` is smaller than a patch, or another argument is out of range.
    """

    own_args: ClassVar[Tuple[str, ...]] = ("patch_size", "img_size")

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_pair(patch_size)
        self.img_size = to_img_size(img_size, self.patch_size)
        self.mean, self.std = [0.0], [1.0]

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Take over the patch size; it accepts any image size."""
        if patch_size is not None:
            self.patch_size = to_pair(patch_size)


class ModelRanker(Ranker, nn.Module):
    """A ranker on a timm model.

    Args:
        backbone: name of a timm model, with a tag or a source as in timm; or such a model, which is
            copied.
        img_size: its image size, (H, W) or one side (default: the backbone's own).
        in_chans: channels of an image (default: the backbone's own).
        mean: normalisation of its images, for pixels in [0, 1] (default: that of the backbone's
            ``pretrained_cfg``).
        std: see ``mean``.
        pretrained: load the backbone's weights through timm. A model counts as trained.
        **kwargs: further arguments of ``timm.create_model``, as ``device`` and ``dtype`` are.

    Raises:
        TypeError: This ranker cannot use the backbone; the message says why.
        ValueError: An argument is out of range.
    """

    learned = True
    has_published_weights = True
    follows_patch_size = False
    own_args: ClassVar[Tuple[str, ...]] = ("img_size", "in_chans", "mean", "std")
    # arguments of timm.create_model that a saved ranker does not need
    not_recorded: ClassVar[Tuple[str, ...]] = (
        *("img_size", "in_chans", "checkpoint_path", "pretrained_cfg_overlay"),
    )

    def __init__(
        self,
        backbone: Union[str, nn.Module],
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
        if isinstance(backbone, nn.Module):
            if pretrained or kwargs:
                raise ValueError(
                    "pretrained and arguments of timm.create_model go with a backbone's name; this "
                    f"one is a {type(backbone).__name__}."
                )
            own = getattr(backbone, "in_chans", in_chans)
            if in_chans not in (None, own):
                raise ValueError(
                    f"the ranker's backbone takes {own} channels, the images have {in_chans}."
                )
            net: Any = copy.deepcopy(backbone).to(device=device, dtype=dtype)
        elif isinstance(backbone, str):
            given = {"in_chans": in_chans, "device": device, "dtype": dtype}
            given = {name: value for name, value in given.items() if value is not None}
            net = self.create(backbone, pretrained, size, {**given, **kwargs})
        else:
            kind = type(backbone).__name__
            raise TypeError(
                f"backbone must be the name of a timm model or such a model, got {kind}."
            )
        self.check(net)
        self.img_size = self.fit_size(net, size)
        self.in_chans: int = getattr(net, "in_chans", 3)
        cfg = getattr(net, "pretrained_cfg", None) or {}
        self.mean = _floats(cfg.get("mean") if mean is None else mean)
        self.std = _floats(cfg.get("std") if std is None else std)
        named = isinstance(backbone, str)
        self.trained = bool(pretrained or not named or "checkpoint_path" in kwargs)
        recorded: Mapping[str, Any] = {**kwargs, **_timm.recorded_args(net)}
        self._backbone_args = {n: recorded[n] for n in recorded if n not in self.not_recorded}
        self.backbone: Any = net

    def create(
        self, name: str, pretrained: bool, size: Optional[Tuple[int, int]], kwargs: Dict[str, Any]
    ) -> Any:
        """A backbone by its name; ``fit_size`` sets its size."""
        return timm.create_model(name, pretrained=pretrained, **kwargs)

    def check(self, net: Any) -> None:
        """Raise TypeError if this ranker cannot use the backbone."""

    def fit_size(self, net: Any, size: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
        """Set the backbone to a size; returns the ranker's ``img_size``."""
        return size

    def config(self) -> Dict[str, Any]:
        """Arguments that rebuild this ranker; a backbone without a name in timm is there itself."""
        return {
            **self._backbone_args,
            "backbone": timm_name(self.backbone) or self.backbone,
            **super().config(),
        }

    def save(self, directory: PathLike, overwrite: bool = False) -> None:
        """As in ``Ranker``.

        Raises:
            ValueError: timm has no name for the backbone, so it could not be rebuilt.
        """
        if timm_name(self.backbone) is None:
            article = "an" if self.name[:1] in "aeiou" else "a"
            kind = type(self.backbone).__name__
            raise ValueError(f"cannot save {article} {self.name} ranker on a {kind} not from timm.")
        super().save(directory, overwrite)


class SizedRanker(ModelRanker):
    """A ranker on a ViT of one image size that ends before its head."""

    not_recorded = (*ModelRanker.not_recorded, "num_classes")

    def create(
        self, name: str, pretrained: bool, size: Optional[Tuple[int, int]], kwargs: Dict[str, Any]
    ) -> Any:
        """A backbone by its name, of that size and without a head."""
        kwargs = {"num_classes": 0, "img_size": size, **kwargs}
        if "checkpoint_path" in kwargs:  # read as published weights are: head and positions fitted
            pretrained = True
            kwargs["pretrained_cfg_overlay"] = {"file": kwargs.pop("checkpoint_path")}
        try:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        except TypeError:  # a model without img_size: its refusal is the better message
            with torch.device("meta"):
                self.check(timm.create_model(name))
            raise

    def fit_size(self, net: Any, size: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
        """Set the backbone to a size; returns the one size that it takes."""
        if size is not None and size != to_pair(net.patch_embed.img_size):
            net.set_input_size(img_size=size)
        return to_pair(net.patch_embed.img_size)

    def end_before_head(self) -> None:
        """Leave out what follows the blocks; all patches stay, whatever the backbone dropped."""
        net = self.backbone
        net.patch_drop = None if isinstance(net, Eva) else nn.Identity()  # may be a slot
        net.set_grad_checkpointing(False)
        for name in ("norm", "fc_norm", "head", "head_dist"):
            if getattr(net, name, None) is not None:
                setattr(net, name, nn.Identity())
        net.attn_pool = None


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def timm_name(backbone: Any) -> Optional[str]:
    """timm's name of a model, with its tag where timm publishes that."""
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    tagged = f"{name}.{cfg.get('tag')}"
    known = name is not None and timm.models.is_model_pretrained(tagged)
    return tagged if known else name


def _floats(values: Optional[Sequence[float]]) -> Optional[List[float]]:
    return None if values is None else [float(value) for value in values]


def adapt_channels(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Fit a first convolution for RGB to the number of channels in ``own``, as timm does."""
    out = dict(state_dict)
    for name, tensor in own.items():
        found = out.get(name)
        if found is None or found.dim() != 4 or tensor.dim() != 4 or found.shape[1] != 3:
            continue
        same = found.shape[0] == tensor.shape[0] and found.shape[2:] == tensor.shape[2:]
        if same and found.shape[1] != tensor.shape[1]:
            out[name] = adapt_input_conv(tensor.shape[1], found)
    return out


def warn_of_untrained(ranker: Any) -> None:
    """Warn that the scores of a learned ranker mean nothing before it is trained."""
    brings = getattr(ranker, "brings_weights", False)
    own = "True (experimental weights of this package), " if brings else ""
    warnings.warn(
        f"the {getattr(ranker, 'name', '')} ranker has no trained weights: its choice means "
        f"nothing. Pass ranker_weights={own}<folder, file or hf-hub:owner/name>, or use "
        "ranker='border'.",
        stacklevel=2,
    )
