"""What all rankers share."""

import warnings
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ltrp_timm.layers.sizes import to_img_size, to_pair
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
