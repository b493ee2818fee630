"""Drop patches at random: timm's own PatchDropout, at inference too.

Source: Liu et al., "PatchDropout", WACV 2023, arXiv 2208.07220; Li et al., "FLIP", CVPR 2023, arXiv
2212.00794. timm has it as ``patch_drop_rate``, active in training only.
"""

from typing import Any

from timm.layers import PatchDropout


def drop_at_random(model: Any, kept: int) -> Any:
    """Have a timm ViT encode ``kept`` random patches of each image; in place, returns the model.

    Raises:
        ValueError: ``kept`` is not in 1 … N.
    """
    patches = model.patch_embed.num_patches
    if not 1 <= kept <= patches:
        raise ValueError(f"kept must be in 1 … {patches}, got {kept}.")
    # timm keeps int(N * (1 - prob)): the half keeps rounding from losing one
    rate = 0.0 if kept == patches else 1.0 - (kept + 0.5) / patches
    model.patch_drop = PatchDropout(rate, num_prefix_tokens=model.num_prefix_tokens).train()
    return model
