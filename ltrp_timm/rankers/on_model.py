"""What rankers share that run a timm model: how it is told, described, saved and built again."""

from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import timm
from torch import nn

from ltrp_timm.rankers.base import Ranker
from ltrp_timm.weights.files import PathLike


class ModelRanker(Ranker):
    """A ranker on a timm model, given by its name or as a module, which is copied.

    ``own_args`` are its arguments beside ``backbone`` and ``img_size``; ``not_recorded`` are those
    of ``timm.create_model`` that a saved ranker does not need.
    """

    learned = True
    has_published_weights = True
    follows_patch_size = False
    own_args: ClassVar[Tuple[str, ...]] = ()
    not_recorded: ClassVar[Tuple[str, ...]] = (
        "img_size",
        "in_chans",
        "checkpoint_path",
        "pretrained_cfg_overlay",
    )

    def describe(
        self: Any,
        given: Union[str, nn.Module],
        net: Any,
        pretrained: bool,
        kwargs: Mapping[str, Any],
        mean: Optional[Sequence[float]],
        std: Optional[Sequence[float]],
    ) -> None:
        """Note what ``net``, built of ``given`` and ``kwargs``, wants and how to build it again.

        A module counts as trained, and so does one with weights.
        """
        self.trained = bool(
            pretrained or isinstance(given, nn.Module) or "checkpoint_path" in kwargs
        )
        cfg = getattr(net, "pretrained_cfg", None) or {}
        self.in_chans = getattr(net, "in_chans", 3)
        self.mean: Optional[List[float]] = _floats(cfg.get("mean") if mean is None else mean)
        self.std: Optional[List[float]] = _floats(cfg.get("std") if std is None else std)
        recorded = {**kwargs, **getattr(net, "_model_args", {})}
        self._backbone_args = {n: recorded[n] for n in recorded if n not in self.not_recorded}

    def config(self: Any) -> Dict[str, Any]:
        """Arguments that rebuild this ranker; a backbone that timm has no name for stands there."""
        return {
            **self._backbone_args,
            "backbone": timm_name(self.backbone) or self.backbone,
            "img_size": None if self.img_size is None else list(self.img_size),
            **{name: getattr(self, name) for name in self.own_args},
        }

    def save(self: Any, directory: PathLike, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` for ``create_ranker(pretrained=…)``.

        Raises:
            FileExistsError: the folder holds a saved model already and ``overwrite`` is False.
            ValueError: timm has no name for the backbone, so that it could not be built again.
        """
        if timm_name(self.backbone) is None:
            kind = type(self.backbone).__name__
            raise ValueError(
                f"cannot save {_article(self.name)} ranker on a {kind} not made by timm."
            )
        super().save(directory, overwrite)


def check_backbone(backbone: Any, pretrained: bool, kwargs: Mapping[str, Any]) -> None:
    """Check that a backbone is a name, or a module and nothing is said about building it.

    Raises:
        TypeError: it is neither.
        ValueError: it is a module, and arguments of ``timm.create_model`` come with it.
    """
    if isinstance(backbone, nn.Module):
        if pretrained or kwargs:
            raise ValueError(
                "pretrained and arguments of timm.create_model go with a backbone's name; this "
                f"one is a {type(backbone).__name__}."
            )
    elif not isinstance(backbone, str):
        kind = type(backbone).__name__
        raise TypeError(f"backbone must be the name of a timm model or such a model, got {kind}.")


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def timm_name(backbone: Any) -> Optional[str]:
    """The name timm builds a model by, with its tag where timm publishes that."""
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    tagged = f"{name}.{cfg.get('tag')}"
    known = name is not None and timm.models.is_model_pretrained(tagged)
    return tagged if known else name


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def _floats(values: Optional[Sequence[float]]) -> Optional[List[float]]:
    return None if values is None else [float(value) for value in values]
