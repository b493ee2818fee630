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
    loop       the anchor, then one removal after another: attention masks hide the token, the
               decoder paints the whole grid (with fused attention, too: masking is compared)
    batch      ltrp_timm.semantic_density, chunk fitted to memory
    chunk:n    the same, n variants at a time
    drawn:r    the same, num_removed = r
Not timed: reading images, drawing the visible patches, building the teacher, warm-up. Weights are
random: they do not change the time.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Row, compare, timed_row, timing_parser
from runner import Benchmark, bars, cells, figure, plain
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.commands._flags import positive
from ltrp_timm.measure import throughput
from ltrp_timm.teacher import masked_indices, random_visible_indices
from ltrp_timm.teacher.density import REMOVALS


def parser(description: str) -> argparse.ArgumentParser:
    """The options; by default what the goals are about."""
    options = timing_parser(description)
    add = options.add_argument
    add("--img-size", type=positive, default=224, help="side of an image in pixels")
    text = "what a removal hides a patch from"
    add("--removals", nargs="+", default=list(REMOVALS), choices=REMOVALS, help=text)
    add("--mask-ratio", type=float, default=0.9, help="share of masked patches")
    add("--chunks", nargs="*", type=positive, default=[1, 4, 8, 19], help="variants at a time")
    add("--num-removed", nargs="*", type=positive, default=[10, 5], help="patches to score")
    options.set_defaults(batch_sizes=[1, 4], seconds=300.0)
    return options


def goals() -> list[Goal]:
    """What the claim says."""
    default = {"method": "batch", "removal": "full", "depth": "all"}
    cpu = {"device": "cpu", "dtype": "float32", "threads": "1", "batch": 1, **default}
    gpu = {"device": "cuda", **default}
    return [
        Goal("one image, speed-up over the loop, CPU, one core", cpu, "speedup", ">=", 1.25),
        Goal("speed-up over the loop, GPU", gpu, "speedup", ">=", 2.0),
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
    """Images (B, …) -> latents (B, 1 + V, D); no token attends to the patch of ``column``."""
    token = teacher.cls_token + teacher.pos_embed[:, :1]
    x = teacher.embed(images, visible)
    x = torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)
    mask = None
    if column is not None:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        mask[:, column + 1] = False
    for block in teacher.blocks:
        alone = None
        if column is not None and removal == "encoder":  # it attends to no other token either
            alone = x[:, column + 1] + block.attn.proj.bias
            alone = alone + block.mlp(block.norm2(alone))
        x = block(x, attn_mask=mask)
        if alone is not None:
            x[:, column + 1] = alone
    return teacher.norm(x)


def _decode(
    teacher: Any, latents: Tensor, visible: Tensor, column: int | None, removal: str
) -> Tensor:
    """Latents (B, 1 + V, D) -> predictions (B, N, C) without the patch of ``column``."""
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
        SystemExit: The scores differ.
    """
    expected = fns["loop"]()
    difference = float((fns["batch"]() - expected).abs().max() / expected.std())
    if dtype == "float32" and difference > 1e-3:
        raise SystemExit(f"loop and batch disagree by {difference:.2g} standard deviations")
    return difference


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every removal and batch size."""
    depth = {"depth": args.depth, "decoder_depth": args.depth} if args.depth else {}
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    teacher = ltrp_timm.MAETeacher(args.img_size, **depth).to(**place)
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
            timings, rows = compare(fns, args), []
            for method, timing in timings.items():
                drawn = method.startswith("drawn")
                removed = int(method.split(":")[1]) if drawn else case["visible"]
                row = timed_row(
                    {**case, "method": method, "removed": removed},
                    timing,
                    speedup=throughput.ratio(timings["loop"], timing),
                    share=throughput.ratio(timing, timings["batch"]),
                )
                rows.append(row)
            yield rows


main = Benchmark(
    name="pseudo_score_cost",
    doc=__doc__,
    title="Pseudo-scores: all removals in one batch against one after another",
    run=run,
    progress="{method} ×{speedup:.2f}",
    table=cells(
        {
            "removal": plain("removal"),
            "batch": plain("batch"),
            "method": plain("method"),
            "removed of visible": lambda row: f"{row['removed']} of {row['visible']}",
            "seconds": lambda row: f"{row['seconds_median']:.3f}",
            "speed-up over the loop (quartiles)": figure("speedup", ".2f"),
            "share of the batch's time (quartiles)": figure("share", ".2f"),
        }
    ),
    goals=goals,
    plot=lambda rows, _: bars(
        rows,
        "speedup",
        "speed-up over the loop (quartiles)",
        panel="removal {removal}",
        group="batch {batch}",
    ),
    parser=parser,
).main


if __name__ == "__main__":
    main()
