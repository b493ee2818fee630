"""What all rankers share."""

from typing import Any, Dict, List, Mapping, Optional, Tuple

from timm.models import adapt_input_conv
from torch import Tensor

from ltrp_timm.layers.sizes import to_pair
from ltrp_timm.weights.files import PathLike, save_weights


class Ranker:
    """A mixin for modules images (B, C, H, W) -> score map (B, h, w), higher = keep first.

    A ranker needs none of this: any ``nn.Module`` with that mapping will do. What it declares is
    used: ``mean`` and ``std`` of the pixels it wants (None: as the backbone gets them), and
    ``img_size`` when it looks at one size only: images are resized to it, its map to the grid.
    ``trained`` says that its weights mean something: set when weights are loaded, and by whoever
    trains it. ``has_published_weights`` says that ``create_ranker`` takes ``pretrained=True``, and
    ``brings_weights`` that they lie in this package; ``origin`` is where its weights are from, in
    words for a model card, where that is known.
    """

    name: str = ""
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
        return {}

    def sizes(self: Any) -> Dict[str, Any]:
        """Patch and image size for ``config``."""
        size = None if self.img_size is None else list(self.img_size)
        return {"patch_size": list(self.patch_size), "img_size": size}

    def save(self: Any, directory: PathLike, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` for ``create_ranker(pretrained=…)``.

        Raises:
            FileExistsError: the folder holds a saved model already and ``overwrite`` is False.
        """
        config = {"ranker": self.name, "args": self.config()}
        save_weights(directory, config, self.state_dict(), overwrite=overwrite)

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Follow a backbone to another image or patch size; a ranker with a fixed grid stays."""


class PatchSizeRanker(Ranker):
    """A ranker without weights on a grid of its own: it follows the backbone's patch size."""

    patch_size: Tuple[int, int]

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Take over the patch size; any image size is taken as it comes."""
        if patch_size is not None:
            self.patch_size = to_pair(patch_size)


def adapt_channels(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Fit a first convolution for RGB to images of ``own``'s channels, as timm does for a ViT's."""
    out = dict(state_dict)
    for name, tensor in own.items():
        found = out.get(name)
        if found is None or found.dim() != 4 or tensor.dim() != 4 or found.shape[1] != 3:
            continue
        same = found.shape[0] == tensor.shape[0] and found.shape[2:] == tensor.shape[2:]
        if same and found.shape[1] != tensor.shape[1]:
            out[name] = adapt_input_conv(tensor.shape[1], found)
    return out
