"""What do exact pseudo-scores cost, all removals in one batch, against masking one after another?

Claim. The batch gives the same scores (shown before anything is timed), for one image at least 1.25
times as fast as the loop on one CPU core, and to score R of the V visible patches takes about (R +
1)/(V + 1) of its time.

Arithmetic. MAE ViT-B at mask ratio 0.9 sees V = 19 of 196 patches. A removal is an encoder pass
over 20 tokens (12 blocks of 768: 1.7 G multiply-adds) and a decoder pass over 197 (8 blocks of 512:
5.3 G). Leaving the token out instead of masking it saves one of 20 encoder tokens, predicting the
masked patches alone one tenth of the last layer: 2 % in all. What pays is the batch: a pass over 20
tokens reads 340 MB of weights for 3.4 GFLOP, so that a loop waits for memory; a chunk of variants
reads them once. The decoder's share of the work, three quarters, was busy before; so the ratio ends
between 1.3 and 1.4. A loop that takes several images at a time reads the weights less often, which
leaves less to gain on a CPU. Removal "decoder" needs the encoder once, in the loop too, and has
less to gain. "share" is of the batch's time: R of V removals and the anchor are (R + 1)/(V + 1) of
the passes.

Timed, in turns in one process, on images in memory:
    loop       the anchor, then each removal by itself: attention masks hide the token, the decoder
               paints the whole grid (fused attention here too: it is the masking that is compared)
    batch      ltrp_timm.semantic_density, chunk fitted to memory
    chunk:n    the same, n variants at a time
    drawn:r    the same, num_removed = r
Not timed: reading images, drawing the visible patches, building the teacher, warm-up. Weights are
random: they do not change the time.
"""

import argparse
from collections.abc import Callable
from typing import Any

import common
import tables
import torch
from common import Row
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.commands._flags import positive
from ltrp_timm.measure import throughput
from ltrp_timm.teacher import masked_indices, random_visible_indices
from ltrp_timm.teacher.density import REMOVALS

NAME = "pseudo_score_cost"
TITLE = "Pseudo-scores: all removals in one batch against one after another"


def make_parser() -> argparse.ArgumentParser:
    """The options; by default what the goals speak of."""
    parser = common.timing_parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--img-size", type=positive, default=224, help="side of an image in pixels")
    add("--removals", nargs="+", default=list(REMOVALS), choices=REMOVALS, help="to compare")
    add("--mask-ratio", type=float, default=0.9, help="share of masked patches")
    add("--chunks", nargs="*", type=positive, default=[1, 4, 8, 19], help="variants at a time")
    add("--num-removed", nargs="*", type=positive, default=[10, 5], help="patches to score")
    parser.set_defaults(batch_sizes=[1, 4], seconds=300.0)
    return parser


def goals() -> list[Goal]:
    """The project's goals that this file's rows can answer."""
    default = {"method": "batch", "removal": "full", "depth": "all"}
    cpu = {"device": "cpu", "dtype": "float32", "threads": "1", "batch": 1, **default}
    gpu = {"device": "cuda", **default}
    return [
        Goal("one image, times as fast as the loop, CPU, one core", cpu, "speedup", ">=", 1.25),
        Goal("times as fast as the loop, GPU", gpu, "speedup", ">=", 2.0),
    ]


@torch.no_grad()
def masked_loop(teacher: Any, images: Tensor, visible: Tensor, removal: str) -> Tensor:
    """The plain way: one removal after another, tokens hidden by attention masks -> (B, V)."""
    masked = masked_indices(visible, teacher.num_patches)
    latents = _encode(teacher, images, visible, None, removal)
    anchor = _decode(teacher, latents, visible, None, removal)
    scores = []
    for column in range(visible.shape[1]):
        if removal != "decoder":  # there the encoder sees all that is visible
            latents = _encode(teacher, images, visible, column, removal)
        painted = _decode(teacher, latents, visible, column, removal)
        scores.append((painted - anchor).abs().mean(dim=2).gather(1, masked).mean(dim=1))
    return torch.stack(scores, dim=1)


def _encode(
    teacher: Any, images: Tensor, visible: Tensor, column: int | None, removal: str
) -> Tensor:
    """Images (B, …), nobody looking at the patch of one column -> latents (B, 1 + V, D)."""
    token = teacher.cls_token + teacher.pos_embed[:, :1]
    x = teacher.embed(images, visible)
    x = torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)
    mask = None
    if column is not None:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        mask[:, column + 1] = False
    for block in teacher.blocks:
        alone = None
        if column is not None and removal == "encoder":  # it attends to nobody either
            alone = x[:, column + 1] + block.attn.proj.bias
            alone = alone + block.mlp(block.norm2(alone))
        x = block(x, attn_mask=mask)
        if alone is not None:
            x[:, column + 1] = alone
    return teacher.norm(x)


def _decode(
    teacher: Any, latents: Tensor, visible: Tensor, column: int | None, removal: str
) -> Tensor:
    """Latents (B, 1 + V, D) -> predictions (B, N, C), the patch of one column hidden or a mask."""
    batch, n = visible.shape[0], teacher.num_patches
    x = teacher.place(latents, visible)
    tokens = teacher.mask_tokens(torch.arange(n, device=x.device)[None]).repeat(batch, 1, 1)
    shown, places, mask = x[:, 1:], visible, None
    if column is not None and removal == "full":  # a mask token stands at its place
        others = [i for i in range(visible.shape[1]) if i != column]
        shown, places = shown[:, others], places[:, others]
    tokens.scatter_(1, places.unsqueeze(2).expand_as(shown), shown)
    tokens = torch.cat([x[:, :1], tokens], dim=1)
    if column is not None and removal == "decoder":
        mask = torch.ones(batch, 1, 1, n + 1, dtype=torch.bool, device=x.device)
        mask[torch.arange(batch), :, :, visible[:, column] + 1] = False
        mask = mask.expand(-1, -1, n + 1, -1)
    for block in teacher.decoder_blocks:
        tokens = block(tokens, attn_mask=mask)
    return teacher.decoder_pred(teacher.decoder_norm(tokens))[:, 1:].float()


def callables(
    teacher: Any, images: Tensor, visible: Tensor, removal: str, args: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, in the order of a round."""

    def batch(**kwargs: Any) -> Callable[[], Tensor]:
        call = {"removal": removal, **kwargs}
        return lambda: ltrp_timm.semantic_density(teacher, images, visible, **call)[0]

    fns = {"loop": lambda: masked_loop(teacher, images, visible, removal), "batch": batch()}
    fns |= {f"chunk:{n}": batch(chunk=n) for n in args.chunks}
    fns |= {f"drawn:{n}": batch(num_removed=n) for n in args.num_removed}
    return fns


def prove(fns: dict[str, Callable[[], Tensor]], dtype: str) -> float:
    """Largest difference of the batch's scores from the loop's, over the spread of the scores.

    Raises:
        SystemExit: they are not the same scores.
    """
    expected = fns["loop"]()
    difference = float((fns["batch"]() - expected).abs().max() / expected.std())
    if dtype == "float32" and difference > 1e-3:
        raise SystemExit(f"loop and batch disagree by {difference:.2g} standard deviations")
    return difference


def to_rows(timings: dict[str, throughput.Timing], case: Row, where: Row) -> list[Row]:
    """One row for each method."""
    rows = []
    for method, timing in timings.items():
        removed = int(method.split(":")[1]) if method.startswith("drawn") else case["visible"]
        row = {**case, "method": method, "removed": removed}
        row |= common.timing_columns(timing, case["batch"])
        row |= common.spread("speedup", throughput.ratio(timings["loop"], timing))
        row |= common.spread("share", throughput.ratio(timing, timings["batch"]))
        rows.append({**row, **where})
    return rows


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every removal and batch size."""
    depth = {"depth": args.depth, "decoder_depth": args.depth} if args.depth else {}
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    teacher = ltrp_timm.MAETeacher(args.img_size, **depth).to(**place)
    rows: list[Row] = []
    for removal in args.removals:
        for batch in args.batch_sizes:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, 3, args.img_size, args.img_size, generator=generator)
            visible = random_visible_indices(
                batch, teacher.num_patches, args.mask_ratio, generator, args.device
            )
            fns = callables(teacher, images.to(**place), visible, removal, args)
            case = {"removal": removal, "batch": batch, "patches": teacher.num_patches}
            case |= {"visible": visible.shape[1], "difference": prove(fns, args.dtype)}
            new = to_rows(common.compare(fns, args), case, where)
            rows += new
            print(f"{removal} batch {batch}, {new[0]['rounds']} rounds:", flush=True)
            print("  " + "; ".join(f"{r['method']} ×{r['speedup']:.2f}" for r in new), flush=True)
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "removal": row["removal"],
            "batch": row["batch"],
            "method": row["method"],
            "removed of visible": f"{row['removed']} of {row['visible']}",
            "seconds": f"{row['seconds_median']:.3f}",
            "times as fast as the loop (quartiles)": tables.figure(row, "speedup", ".2f"),
            "share of the batch's time (quartiles)": tables.figure(row, "share", ".2f"),
        }
        for row in rows
    ]


def plot(rows: list[Row]) -> Any:
    """Times as fast as the loop: a panel per removal, a group of bars per batch size."""
    pyplot = common.load_pyplot()
    removals = list(dict.fromkeys(row["removal"] for row in rows))
    size = (1 + 4 * len(removals), 4.2)
    figure, axes = pyplot.subplots(1, len(removals), figsize=size, squeeze=False, sharey=True)
    for ax, removal in zip(axes[0], removals):
        panel = [row for row in rows if row["removal"] == removal]
        methods = list(dict.fromkeys(row["method"] for row in panel))
        batches = list(dict.fromkeys(row["batch"] for row in panel))
        for i, batch in enumerate(batches):
            bars = [row for row in panel if row["batch"] == batch]
            x = [methods.index(row["method"]) + 0.8 * i / len(batches) for row in bars]
            y = [row["speedup"] for row in bars]
            below = [row["speedup"] - row["speedup_low"] for row in bars]
            above = [row["speedup_high"] - row["speedup"] for row in bars]
            width = 0.8 / len(batches)
            ax.bar(x, y, width, yerr=(below, above), capsize=2, label=f"batch {batch}")
        ax.axhline(1.0, color="k", linestyle=":")
        ax.set_xticks([i + 0.4 - 0.4 / len(batches) for i in range(len(methods))])
        ax.set_xticklabels(methods, rotation=45, ha="right", fontsize=8)
        ax.set_title(f"removal {removal!r}", fontsize=9)
        ax.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("times as fast as the loop")
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = make_parser().parse_args()
    rows = common.rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, summary(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
