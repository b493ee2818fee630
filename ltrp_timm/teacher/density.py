"""Semantic density: how much a teacher's reconstruction, or its features, change without a patch.

Axes: B images, N patches, V visible, M = N - V masked, R removed one at a time, C pixel values of a
patch, n variants of a chunk. A variant is an image without one of its visible patches; all B * R of
them form one batch, cut into chunks that fit into memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ltrp_timm._text import optional_import
from ltrp_timm.selection import gather_patches, select_top
from ltrp_timm.selection.cells import patches_of
from ltrp_timm.teacher import (
    Generators,
    MAETeacher,
    PatchTeacher,
    draw_uniform,
    masked_indices,
    random_visible_indices,
)

Removal = Literal["full", "decoder", "encoder", "coarse"]
Aggregate = Literal["mean", "max"]
Metric = Literal["l1", "mse", "ssim", "psnr", "lpips"]
REMOVALS: tuple[str, ...] = get_args(Removal)[:-1]  # of single patches, by an MAE
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
METRICS: tuple[str, ...] = get_args(Metric)
# patches a and b (…, M, C), channels last, and their channels -> (…, M), larger = more change
PatchChange = Callable[[Tensor, Tensor, int], Tensor]
ImageChange = Callable[[Tensor, Tensor], Tensor]

# memory for the activations of a chunk: on a CPU they should stay in the caches
_CPU_BYTES = 32 * 2**20
_DEVICE_SHARE = 0.5


@torch.no_grad()
def semantic_density(
    teacher: Any,
    images: Tensor,
    visible_indices: Tensor | None = None,
    mask_ratio: float = 0.9,
    removal: str = "full",
    metric: str | ImageChange = "l1",
    aggregate: str = "mean",
    num_removed: int | None = None,
    chunk: int | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """Score visible patches by how much a teacher's output depends on each of them.

    An MAE predicts the M masked patches from the V visible ones, and again without each of these.
    The score of a patch is the change of the prediction: the paper's pseudo-label. A
    ``FeatureTeacher`` predicts nothing: the score is the change of its pooled feature.

    Args:
        teacher: an MAE, see ``create_teacher``, a ``FeatureTeacher``, or a ``CellTeacher``.
        images: (B, channels, H, W) of the teacher's size, normalised by its mean and std.
        visible_indices: (B, V) int64, without duplicates, 2 <= V < N; drawn when None.
        mask_ratio: share of patches to mask when they are drawn: V = int(N (1 - mask_ratio)). It
            must leave enough to see; at 64 patches 0.5 to 0.75 works and 0.9 does not.
        removal: "full": the patch is absent from the encoder, and a mask token stands at its place
            in the decoder. "decoder" (of the published code): the encoder sees all V, the token is
            deleted from the decoder's sequence; its neighbours' latents still hold it. "encoder"
            (published too): the token is isolated in every encoder block; the decoder gets it.
            "coarse": a cell of 2 x 2 patches is given as one token, by a ``FeatureTeacher`` with
            ``rest="coarse"`` or an MAE (see ``CellTeacher``); patches are these cells everywhere
            else.
        metric: "l1" or "mse" of the predicted values; "ssim" or "psnr" of the pixels of a
            patch; "lpips" of whole pictures; or a function of two batches of pictures
            (n, channels, H, W), pixels about in [0, 1], that returns their distances (n,). Of
            features: "l1" or "mse".
        aggregate: over the masked patches. "mean" is the paper's; "max", the strongest local
            change, rewards local information instead of a faint shift of the whole picture.
        num_removed: R, score only this many visible patches, drawn per image before anything is
            reconstructed: the cost is (R + 1) / (V + 1). None scores all.
        chunk: variants per forward pass; None fits them to the memory. The result does not depend
            on it.
        generator: draws patches: one, or one per image; None is torch's global state.

    Returns:
        Scores (B, R) float32, larger = more change = keep first, and their patches (B, R) int64,
        in the order of ``visible_indices``.

    Raises:
        ValueError: an argument is out of its range or does not fit the teacher.
        TypeError: `teacher` is something else.
        ImportError: metric="lpips" without torchmetrics.

    Source: LTRP (CVPR 2024, arXiv 2404.00680), semantic density.

    >>> small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16}
    >>> teacher = MAETeacher(64, 16, **small, decoder_depth=1, decoder_num_heads=2)
    >>> scores, indices = semantic_density(teacher, torch.rand(2, 3, 64, 64), mask_ratio=0.5)
    >>> scores.shape, indices.shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """
    if not isinstance(teacher, PatchTeacher):
        kind = type(teacher).__name__
        raise TypeError(f"teacher must be an MAE, or a ViT as FeatureTeacher(vit), got {kind}.")
    if removal == "coarse" and isinstance(teacher, MAETeacher):
        teacher = CellTeacher(teacher)
    _check_choices(teacher, removal, metric, aggregate, chunk)
    teacher.check_images(images)
    if visible_indices is None:
        batch, n = images.shape[0], teacher.num_patches
        visible_indices = random_visible_indices(batch, n, mask_ratio, generator, images.device)
    teacher.check_visible(visible_indices, images.shape[0])
    visible_indices = visible_indices.to(images.device)
    if not 2 <= visible_indices.shape[1] < teacher.num_patches:
        raise ValueError(
            f"{visible_indices.shape[1]} of {teacher.num_patches} patches are visible: at least 2 "
            "are needed, and one that is masked; choose another mask_ratio."
        )
    columns = _columns_to_remove(visible_indices, num_removed, generator)
    chosen = visible_indices.gather(1, columns)
    rows = torch.arange(images.shape[0], device=images.device).repeat_interleave(columns.shape[1])
    scores = []
    if not isinstance(teacher, MAETeacher):
        anchor = teacher.features(images, visible_indices).float()
        values = (visible_indices.shape[1] + 1) * 16 * anchor.shape[1] + images[0].numel()
        size = chunk or _even(len(rows), int(_memory(images.device) / (4 * values)))
        for row, column in zip(rows.split(size), columns.flatten().split(size)):
            found = teacher.without(images[row], visible_indices[row], column).float()
            scores.append(PREDICTION_CHANGES[str(metric)](found, anchor[row], 1))
        return torch.cat(scores).reshape(columns.shape), chosen
    variants = _Variants(teacher, images, visible_indices, removal)
    encoded, decoded = _chunks(teacher, visible_indices.shape[1], rows, chunk)
    for row, column in zip(rows.split(encoded), columns.flatten().split(encoded)):
        shown = variants.show(row, column)
        scores += [
            variants.change(variants.predict(tokens, image), image, metric, aggregate)
            for tokens, image in zip(shown.split(decoded), row.split(decoded))
        ]
    return torch.cat(scores).reshape(columns.shape), chosen


class CellTeacher(PatchTeacher, nn.Module):
    """An MAE that is given the visible cells of 2 x 2 patches finely, or one of them coarsely.

    A coarse token is a patch of the image at half size, with the position table resized to the half
    grid, as a ViT has it. Behind the encoder it fills the four places of its cell.

    It shares the MAE's weights; its patches are the cells.

    Raises:
        ValueError: the patch grid has an odd side.
    """

    rest = "coarse"

    def __init__(self, mae: MAETeacher) -> None:
        super().__init__()
        (h, w), (rows, cols) = mae.grid_size, mae.patch_size
        if h % 2 or w % 2:
            raise ValueError(
                f"removal 'coarse' needs whole cells of 2x2 patches, the teacher has {h}x{w} "
                "patches: use another img_size."
            )
        self.mae = mae
        self.img_size, self.in_chans = mae.img_size, mae.in_chans
        self.mean, self.std = mae.mean, mae.std
        self.patch_size, self.grid_size = (2 * rows, 2 * cols), (h // 2, w // 2)
        self.num_patches = h * w // 4

    def features(self, images: Tensor, visible_indices: Tensor) -> Tensor:
        """Images (n, C, H, W) of which cells (n, V) are visible -> masked patches (n, M * C)."""
        places = patches_of(visible_indices, self.mae.grid_size, 2)
        return self._predict(self.mae.encode_tokens(self.mae.embed(images, places)), places)

    def without(self, images: Tensor, visible_indices: Tensor, columns: Tensor) -> Tensor:
        """The same when the visible cell of each image at columns (n,) is one token."""
        gone = visible_indices.gather(1, columns.unsqueeze(1))
        fine = patches_of(all_but(visible_indices, columns), self.mae.grid_size, 2)
        tokens = [self.mae.embed(images, fine), self._coarse(images, gone)]
        latents = self.mae.encode_tokens(torch.cat(tokens, dim=1))
        latents = torch.cat([latents, latents[:, -1:].expand(-1, 3, -1)], dim=1)
        places = torch.cat([fine, patches_of(gone, self.mae.grid_size, 2)], dim=1)
        return self._predict(latents, places)

    def _coarse(self, images: Tensor, cells: Tensor) -> Tensor:
        """Tokens (n, V, D) of cells (n, V), with positions."""
        tokens = self.mae.patch_embed.proj(F.avg_pool2d(images, 2)).flatten(2).transpose(1, 2)
        table = resample_abs_pos_embed(
            self.mae.pos_embed, list(self.grid_size), list(self.mae.grid_size), num_prefix_tokens=1
        )
        return gather_patches(tokens + table[:, 1:], cells)

    def _predict(self, latents: Tensor, places: Tensor) -> Tensor:
        masked = masked_indices(places, self.mae.num_patches)
        tokens = self.mae.place(latents, places)
        tokens = torch.cat([tokens, self.mae.mask_tokens(masked).to(tokens.dtype)], dim=1)
        return self.mae.predict(tokens, masked.shape[1]).flatten(1)


def all_but(indices: Tensor, columns: Tensor) -> Tensor:
    """indices (n, V) without the one of each row at columns (n,) -> (n, V - 1)."""
    return indices.gather(1, _other_columns(indices.shape[1], columns))


def _other_columns(count: int, columns: Tensor) -> Tensor:
    """All columns but one of each row, (n, count - 1)."""
    kept = torch.arange(count - 1, device=columns.device)
    return kept + (kept >= columns.unsqueeze(1))


def _check_choices(
    teacher: Any, removal: str, metric: str | ImageChange, aggregate: str, chunk: int | None
) -> None:
    mae = isinstance(teacher, MAETeacher)
    fit = {"removal": get_args(Removal), "aggregate": AGGREGATES, "metric": METRICS}
    if not mae:
        fit = {"aggregate": ("mean",), "metric": tuple(PREDICTION_CHANGES)}
        fit["removal"] = ("full",) if teacher.rest == "drop" else ("coarse", "full")
    for name, value in {"removal": removal, "aggregate": aggregate, "metric": metric}.items():
        function = mae and name == "metric"
        known, end = "one of " + ", ".join(fit[name]), ", or a function" if function else ""
        if not mae:
            known, end = " or ".join(fit[name]), " for this teacher"
        if value not in fit[name] and not (function and callable(value)):
            raise ValueError(f"{name} must be {known}{end}, got {value!r}.")
    if (callable(metric) or metric == "lpips") and aggregate != "mean":
        raise ValueError(
            "a metric of whole pictures has one value, not one per patch: leave "
            f"aggregate='mean', got {aggregate!r}."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")


def _columns_to_remove(
    visible_indices: Tensor, num_removed: int | None, generator: Generators | None
) -> Tensor:
    """Which of the V columns to remove, (B, R), ascending."""
    batch, visible = visible_indices.shape
    if num_removed is None:
        return torch.arange(visible, device=visible_indices.device).expand(batch, -1)
    if not 1 <= num_removed <= visible:
        raise ValueError(f"num_removed must be in 1 … V = {visible}, got {num_removed}.")
    return select_top(draw_uniform(batch, visible, generator, visible_indices.device), num_removed)


def _chunks(teacher: MAETeacher, visible: int, rows: Tensor, chunk: int | None) -> tuple[int, int]:
    """Variants per pass of the encoder and of the decoder, by the memory of their activations.

    The encoder's variants are short: many fit, and many share one read of its weights. The
    decoder's are as long as an image.
    """
    if chunk is not None:
        return chunk, chunk
    width, decoder_width = teacher.cls_token.shape[-1], teacher.mask_token.shape[-1]
    values = teacher.decoder_pred.out_features
    encoder = (visible + 1) * width * (8 + 2 * teacher.mlp_ratio)
    decoder = decoder_width * (8 + 2 * teacher.decoder_mlp_ratio) + 4 * values
    decoder = (teacher.num_patches + 1) * decoder
    budget = _memory(rows.device)
    encoded = _even(len(rows), int(budget / (4 * encoder)))
    return encoded, _even(encoded, int(budget / (4 * decoder)))


def _memory(device: torch.device) -> float:
    """Bytes for the activations of a chunk."""
    if device.type != "cuda":
        return _CPU_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _DEVICE_SHARE * (free + cached)


def _even(total: int, size: int) -> int:
    """The chunk size for the fewest chunks up to ``size``, all about equal."""
    return math.ceil(total / math.ceil(total / max(1, size)))


class _Variants:
    """Predicts the masked patches from all visible ones, or from all but one."""

    def __init__(
        self, teacher: MAETeacher, images: Tensor, visible_indices: Tensor, removal: str
    ) -> None:
        self.teacher, self.images = teacher, images
        self.removal, self.visible = removal, visible_indices
        self.masked = masked_indices(visible_indices, teacher.num_patches)
        self.tokens = teacher.embed(images, visible_indices)
        self.mask_tokens = teacher.mask_tokens(self.masked)
        self.placed = teacher.place(teacher.encode_tokens(self.tokens), visible_indices)
        every = torch.arange(len(images), device=images.device)
        self.anchor = self.predict(self.placed, every)
        self.isolated = _isolate(teacher, self.tokens) if removal == "encoder" else None

    def show(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The decoder's input for image rows (n,) without their visible patches at columns (n,).

        Tokens (n, L, D'): the class token and those of the V places.
        """
        kept = _other_columns(self.visible.shape[1], columns)
        if self.removal == "decoder":
            with_class = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
            return gather_patches(self.placed[rows], with_class)
        visible, removed = self.visible[rows], columns.unsqueeze(1)
        places, gone = visible.gather(1, kept), visible.gather(1, removed)
        latents = self.teacher.encode_tokens(gather_patches(self.tokens[rows], kept))
        if self.isolated is None:
            known = self.teacher.place(latents, places)
            return torch.cat([known, self.teacher.mask_tokens(gone).to(known.dtype)], dim=1)
        lonely = gather_patches(self.isolated[rows], removed)
        latents, places = torch.cat([latents, lonely], dim=1), torch.cat([places, gone], dim=1)
        return self.teacher.place(latents, places)

    def predict(self, shown: Tensor, rows: Tensor) -> Tensor:
        """Tokens (n, L, D') of image rows (n,) -> their masked patches (n, M, C) float32."""
        tokens = torch.cat([shown, self.mask_tokens[rows].to(shown.dtype)], dim=1)
        return self.teacher.predict(tokens, self.masked.shape[1]).float()

    def change(
        self, predicted: Tensor, rows: Tensor, metric: str | ImageChange, aggregate: str
    ) -> Tensor:
        """Compare predictions (n, M, C) of image rows (n,) with the anchor -> scores (n,)."""
        anchor, channels = self.anchor[rows], self.teacher.in_chans
        name = metric if isinstance(metric, str) else ""
        if name in PREDICTION_CHANGES:
            values = PREDICTION_CHANGES[name](predicted, anchor, channels)
            return values.mean(dim=1) if aggregate == "mean" else values.amax(dim=1)
        true = self.teacher.patchify(self.images[rows]).float()
        masked = self.masked[rows]
        hidden = gather_patches(true, masked)
        pixels = [self.teacher.to_pixels(each, hidden) for each in (predicted, anchor)]
        if name in PIXEL_CHANGES:
            values = PIXEL_CHANGES[name](pixels[0], pixels[1], channels)
            return values.mean(dim=1) if aggregate == "mean" else values.amax(dim=1)
        seen, places = self.teacher.denormalise(true), masked.unsqueeze(2).expand_as(hidden)
        pictures = [self.teacher.unpatchify(seen.scatter(1, places, part)) for part in pixels]
        distance = lpips_change if isinstance(metric, str) else metric
        values = distance(pictures[0], pictures[1]).float()
        if values.shape != rows.shape:
            raise ValueError(
                f"metric must return one distance a picture, {list(rows.shape)}, "
                f"got {list(values.shape)}."
            )
        return values


def _isolate(teacher: MAETeacher, tokens: Tensor) -> Tensor:
    """Tokens (B, V, D) that neither attend nor are attended to -> their latents (B, V, D).

    Attention adds the bias of its projection to such a token. No token sees another, so one pass
    computes all of them.
    """
    for block in teacher.blocks:
        tokens = tokens + block.attn.proj.bias
        tokens = tokens + block.mlp(block.norm2(tokens))
    return teacher.norm(tokens)


def l1_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """Mean absolute difference of patches a and b (…, M, C) -> (…, M)."""
    return (a - b).abs().mean(dim=-1)


def mse_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """Mean squared difference of patches a and b (…, M, C) -> (…, M)."""
    return (a - b).square().mean(dim=-1)


def psnr_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """Minus the peak signal to noise ratio in dB, of pixels with the range [0, 1].

    Patches a and b (…, M, C) -> (…, M). Equal patches give -100 dB, not minus infinity.
    """
    return 10.0 / math.log(10.0) * mse_change(a, b).clamp(min=1e-10).log()


def ssim_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """One minus the structural similarity of pixels with the range [0, 1]; a patch is the window.

    Patches a and b (…, M, C) -> (…, M) in [0, 2], the mean over the channels. All
    pixels of the window weigh the same; variances are those of a population.

    Source: Wang et al. (2004), Image quality assessment: from error visibility to structural
    similarity; K1 = 0.01, K2 = 0.03.
    """
    a, b = (rearrange(x, "... (pixels c) -> ... c pixels", c=num_channels) for x in (a, b))
    mean_a, mean_b = (x.mean(dim=-1, keepdim=True) for x in (a, b))
    a, b = a - mean_a, b - mean_b
    variances = (a.square() + b.square()).mean(dim=-1)
    covariance = (a * b).mean(dim=-1)
    mean_a, mean_b = mean_a.squeeze(-1), mean_b.squeeze(-1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return 1.0 - (luminance * structure).mean(dim=-1)


def lpips_change(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS distance (AlexNet) of images a and b (n, 3, H, W) with pixels in [0, 1] -> (n,).

    torchvision's weights of the network are downloaded at the first call.

    Raises:
        ImportError: torchmetrics is not installed; the message has the command to type.

    Source: Zhang et al. (2018), The unreasonable effectiveness of deep features as a perceptual
    metric.
    """
    network = _lpips_network(a.device)
    values: Tensor = network(a.clamp(0.0, 1.0), b.clamp(0.0, 1.0))
    network.reset()  # it keeps all its values otherwise
    return values.reshape(-1)


@functools.lru_cache(maxsize=2)
def _lpips_network(device: torch.device) -> Any:
    name, reason = "torchmetrics.image.lpip", "metric='lpips' needs torchmetrics"
    module = optional_import(name, reason, "'ltrp-timm[lpips]'")
    network = module.LearnedPerceptualImagePatchSimilarity
    return network("alex", reduction="none", normalize=True).to(device)


# the first compare predictions, the second need pixels
PREDICTION_CHANGES: dict[str, PatchChange] = {"l1": l1_change, "mse": mse_change}
PIXEL_CHANGES: dict[str, PatchChange] = {"ssim": ssim_change, "psnr": psnr_change}
