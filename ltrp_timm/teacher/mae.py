"""The masked autoencoder, made of timm's blocks, and the choice of visible patches.

Axes: B images, N patches, V visible and M = N - V masked ones, C = p * q * channels pixel values of
a patch, D widths. Sequences are [class token, visible patches, mask tokens]: attention ignores the
order, and each token carries its position.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ltrp_timm.layers.bridge import fit_channels, sincos_pos_embed, to_pair
from ltrp_timm.selection.coverage import patch_pixels
from ltrp_timm.selection.rules import (
    check_keep_indices,
    gather_patches,
    select_top,
    validate_keep_indices,
)
from ltrp_timm.weights.files import PathLike, save_weights

Generators = torch.Generator | Sequence[torch.Generator]


class PatchTeacher:
    """A mixin of teachers that see some patches of an image.

    Attributes:
        img_size: (H, W) of its images.
        in_chans: their channels.
        mean: their normalisation, for pixels in [0, 1].
        std: see ``mean``.
        patch_size: (height, width) of a patch in pixels.
        grid_size: (h, w) in patches.
        num_patches: N = h * w.
    """

    img_size: tuple[int, int]
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_patches: int

    def check_visible(self, visible_indices: Tensor, batch_size: int) -> None:
        """Raise an error unless indices are (B, V) int64, in range, different; reads the device."""
        check_keep_indices(visible_indices, batch_size, self.num_patches, "visible_indices")
        validate_keep_indices(visible_indices, self.num_patches, "visible_indices")

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images are (B, channels, H, W), at least one, of its size."""
        expected = (self.in_chans, *self.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or images.shape[0] < 1:
            raise ValueError(
                f"this teacher takes images (B, {', '.join(map(str, expected))}), "
                f"got {list(images.shape)}."
            )


class MAETeacher(PatchTeacher, nn.Module):
    """A masked autoencoder: sees V patches and predicts the others.

    Its state dict has the plain names of the authors' files (``blocks.0.attn.qkv.weight``,
    ``decoder_blocks.0…``, ``mask_token``). As a teacher it is frozen: its parameters take no
    gradient, and it stays in eval mode after ``.train()``. Images are normalised by its ``mean``
    and ``std``.

    Args:
        img_size: side of an image in pixels, or (height, width): a multiple of the patch size.
        patch_size: side of a patch in pixels, or (height, width).
        embed_dim: width of the encoder, a multiple of 4 and of ``num_heads``.
        depth: number of blocks of the encoder.
        num_heads: attention heads of the encoder.
        decoder_embed_dim: width of the decoder.
        decoder_depth: number of blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        mlp_ratio: hidden width of the encoder's MLPs over ``embed_dim``.
        decoder_mlp_ratio: the same for the decoder.
        qkv_bias: whether query, key and value have a bias.
        in_chans: channels of an image.
        norm_eps: eps of the LayerNorms.
        norm_pix_loss: predict each patch normalised by its mean and standard deviation.
        mean: normalisation of the images, in units of pixels in [0, 1].
        std: the same.
        frozen: False makes it an ordinary module that can be trained.

    Raises:
        ValueError: sizes do not divide; also in its methods, where images or indices do not fit.

    Source: He et al. (2022), Masked autoencoders are scalable vision learners.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor
    blocks: Any
    decoder_blocks: Any

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        decoder_mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        in_chans: int = 3,
        norm_eps: float = 1e-6,
        norm_pix_loss: bool = False,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        frozen: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_pair(img_size), to_pair(patch_size)
        (height, width), (p, q) = self.img_size, self.patch_size
        if height % p or width % q:
            raise ValueError(
                f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}."
            )
        self.grid_size = (height // p, width // q)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans, self.norm_eps, self.norm_pix_loss = in_chans, norm_eps, bool(norm_pix_loss)
        self.mean, self.std = fit_channels(mean, in_chans), fit_channels(std, in_chans)
        self.frozen = frozen
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.decoder_embed_dim, self.decoder_depth = decoder_embed_dim, decoder_depth
        self.decoder_num_heads, self.qkv_bias = decoder_num_heads, qkv_bias
        self.mlp_ratio, self.decoder_mlp_ratio = mlp_ratio, decoder_mlp_ratio
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(LayerNorm, eps=norm_eps, **dd)
        self.patch_embed = PatchEmbed(self.img_size, self.patch_size, in_chans, embed_dim, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.register_buffer("pos_embed", sincos_pos_embed(embed_dim, self.grid_size).to(**dd))
        self.blocks = self._blocks(embed_dim, depth, num_heads, mlp_ratio, dd)
        self.norm = norm(embed_dim)
        width, values = decoder_embed_dim, p * q * in_chans
        self.decoder_embed = nn.Linear(embed_dim, width, **dd)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width, **dd))
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(width, self.grid_size).to(**dd))
        self.decoder_blocks = self._blocks(
            width, decoder_depth, decoder_num_heads, decoder_mlp_ratio, dd
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, values, **dd)
        self._init_weights()
        if frozen:
            self.requires_grad_(False).eval()

    def _blocks(
        self, width: int, depth: int, num_heads: int, mlp_ratio: float, dd: dict[str, Any]
    ) -> nn.ModuleList:
        if depth < 1 or num_heads < 1 or width % num_heads:
            raise ValueError(
                "an MAE needs at least one block, and a width that its heads divide; got "
                f"{depth} blocks of width {width} with {num_heads} heads."
            )
        norm_layer = partial(LayerNorm, eps=self.norm_eps)
        args = {"mlp_ratio": mlp_ratio, "qkv_bias": self.qkv_bias, "norm_layer": norm_layer, **dd}
        return nn.ModuleList([Block(width, num_heads, **args) for _ in range(depth)])

    def _init_weights(self) -> None:
        """Initialise as the paper does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.cls_token.shape[-1], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def train(self, mode: bool = True) -> "MAETeacher":
        """Set training mode; a frozen teacher stays in eval."""
        super().train(mode and not self.frozen)
        return self

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this teacher, as values that JSON can hold."""
        sizes = {"img_size": list(self.img_size), "patch_size": list(self.patch_size)}
        return {**{name: getattr(self, name) for name in SAVED_ARGS}, **sizes}

    def save(self, directory: PathLike, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` for ``create_teacher``.

        Raises:
            FileExistsError: the folder holds a saved model already and ``overwrite`` is False.
        """
        config = {"teacher": "mae", "args": self.config()}
        save_weights(directory, config, self.state_dict(), overwrite=overwrite)

    def patchify(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) -> (B, N, C), a patch by rows, columns, channels."""
        self.check_images(images)
        return patch_pixels(images, self.grid_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """patches (B, N, C) -> images (B, channels, H, W), the inverse of ``patchify``."""
        (h, w), (p, q) = self.grid_size, self.patch_size
        expected = (h * w, p * q * self.in_chans)
        if patches.dim() != 3 or tuple(patches.shape[1:]) != expected:
            raise ValueError(
                f"patches must be (B, {expected[0]}, {expected[1]}), got {list(patches.shape)}."
            )
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)

    def embed(self, images: Tensor, visible_indices: Tensor | None = None) -> Tensor:
        """images (B, channels, H, W), visible_indices (B, V) -> tokens with positions (B, V, D)."""
        self.check_images(images)
        tokens: Tensor = self.patch_embed(images) + self.pos_embed[:, 1:]
        return tokens if visible_indices is None else gather_patches(tokens, visible_indices)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens with positions (B, V, D) -> latents (B, 1 + V, D), the class token first."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, images: Tensor, visible_indices: Tensor | None = None) -> Tensor:
        """Encode the visible patches; the others are absent.

        Args:
            images: (B, channels, H, W).
            visible_indices: (B, V) int64, without duplicates; None for all patches.

        Returns:
            Latents (B, 1 + V, D), the class token first, patches in the order of the indices.

        Raises:
            ValueError: the images have another size, or the indices do not fit them.
        """
        if visible_indices is not None:
            self.check_visible(visible_indices, images.shape[0])
        return self.encode_tokens(self.embed(images, visible_indices))

    def place(self, latents: Tensor, visible_indices: Tensor) -> Tensor:
        """Latents (B, 1 + V, D) at their places (B, V) -> the decoder's tokens (B, 1 + V, D')."""
        x = self.decoder_embed(latents)
        with_class = torch.cat([torch.zeros_like(visible_indices[:, :1]), visible_indices + 1], 1)
        return x + self.decoder_pos_embed[0][with_class]

    def mask_tokens(self, indices: Tensor) -> Tensor:
        """Mask tokens for places (B, M) -> (B, M, D')."""
        return self.mask_token + self.decoder_pos_embed[0][indices + 1]

    def predict(self, tokens: Tensor, num_predicted: int) -> Tensor:
        """The decoder's tokens (B, L, D') -> predictions (B, M, C) for the last M of them."""
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens[:, -num_predicted:]))

    def decode(self, latents: Tensor, visible_indices: Tensor) -> Tensor:
        """Predict all patches.

        Args:
            latents: (B, 1 + V, D) from ``encode``.
            visible_indices: (B, V), the places of the latents.

        Returns:
            Predictions (B, N, C), in the order of the grid.

        Raises:
            ValueError: the indices do not fit the latents.
        """
        self.check_visible(visible_indices, latents.shape[0])
        if latents.shape[1] != 1 + visible_indices.shape[1]:
            raise ValueError(
                f"{visible_indices.shape[1]} visible_indices need one more latent, "
                f"got {latents.shape[1]} tokens."
            )
        tokens = self.place(latents, visible_indices)
        places = visible_indices
        if visible_indices.shape[1] < self.num_patches:
            masked = masked_indices(visible_indices, self.num_patches)
            places = torch.cat([places, masked], dim=1)
            tokens = torch.cat([tokens, self.mask_tokens(masked).to(tokens.dtype)], dim=1)
        return gather_patches(self.predict(tokens, self.num_patches), places.argsort(dim=1))

    def forward(
        self,
        images: Tensor,
        visible_indices: Tensor | None = None,
        mask_ratio: float = 0.75,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict all patches of images from their visible ones.

        Args:
            images: (B, channels, H, W).
            visible_indices: (B, V); when None they are drawn.
            mask_ratio: share of patches to mask when indices are drawn.
            generator: draws the indices: one, or one per image; None is torch's global state.

        Returns:
            Predictions (B, N, C) and visible_indices (B, V).

        Raises:
            ValueError: the images have another size, or indices or ratio do not fit them.
        """
        if visible_indices is None:
            visible_indices = random_visible_indices(
                images.shape[0], self.num_patches, mask_ratio, generator, images.device
            )
        return self.decode(self.encode(images, visible_indices), visible_indices), visible_indices

    def reconstruction_loss(
        self, images: Tensor, predictions: Tensor, visible_indices: Tensor
    ) -> Tensor:
        """Mean squared error of predictions (B, N, C) over the masked patches, MAE's loss.

        With ``norm_pix_loss`` each true patch is normalised by its mean and standard deviation.
        """
        target = self.patchify(images).float()
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (predictions.float() - target).square().mean(dim=2)
        return error.gather(1, masked_indices(visible_indices, self.num_patches)).mean()

    def to_pixels(self, predictions: Tensor, patches: Tensor) -> Tensor:
        """Predictions (…, C) -> pixel values (…, C), about in [0, 1].

        The true ``patches`` at these places are used with ``norm_pix_loss`` only.
        """
        if self.norm_pix_loss:
            mean, std = patch_statistics(patches)
            predictions = predictions * std + mean
        return self.denormalise(predictions)

    def denormalise(self, patches: Tensor) -> Tensor:
        """Patches (…, C) normalised by ``mean`` and ``std`` -> pixel values."""
        repeats = patches.shape[-1] // self.in_chans  # channels come last in a patch
        scale, shift = (patches.new_tensor(v).repeat(repeats) for v in (self.std, self.mean))
        return patches * scale + shift


SAVED_ARGS = tuple(
    name
    for name in inspect.signature(MAETeacher).parameters
    if name not in ("frozen", "device", "dtype")
)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """patches (…, C) -> mean and standard deviation (…, 1), as MAE normalises its targets."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches at a mask ratio, ``int(N * (1 - mask_ratio))``.

    Raises:
        ValueError: ``mask_ratio`` is not in (0, 1), or leaves no patch visible or none masked.

    >>> num_visible(196, 0.9)
    19
    """
    number = isinstance(mask_ratio, (int, float)) and not isinstance(mask_ratio, bool)
    if not number or not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in (0, 1), got {mask_ratio}.")
    visible = int(num_patches * (1 - mask_ratio))
    if visible < 1 or visible == num_patches:
        raise ValueError(f"mask_ratio = {mask_ratio} leaves {visible} of {num_patches} visible.")
    return visible


def draw_uniform(
    batch_size: int, num_items: int, generator: Generators | None, device: Any = None
) -> Tensor:
    """Uniform numbers (B, n) in [0, 1) on a device.

    There is one generator for the batch, or one per image, so that an image's numbers do not depend
    on its place in the batch; None is torch's global state.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.rand(batch_size, num_items, generator=generator, device=where).to(device)
    if len(generator) != batch_size:
        raise ValueError(f"{batch_size} images need {batch_size} generators, got {len(generator)}.")
    rows = [torch.rand(num_items, generator=g, device=g.device).to(device) for g in generator]
    return torch.stack(rows)


def random_visible_indices(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    generator: Generators | None = None,
    device: Any = None,
) -> Tensor:
    """Draw the visible patches of each image, those with the V smallest of N random numbers.

    Returns:
        (B, V) int64, ascending.

    Raises:
        ValueError: as for ``num_visible`` and ``draw_uniform``.
    """
    visible = num_visible(num_patches, mask_ratio)
    return select_top(-draw_uniform(batch_size, num_patches, generator, device), visible)


def masked_indices(visible_indices: Tensor, num_patches: int) -> Tensor:
    """visible_indices (B, V), without duplicates -> the other indices (B, M), ascending."""
    batch, visible = visible_indices.shape
    masked = torch.ones(batch, num_patches, device=visible_indices.device)
    return select_top(masked.scatter(1, visible_indices, 0.0), num_patches - visible)
