"""How much faster is a pruned ViT than the full one, ranker included, and how close to the ceiling?

Claim. A pruned ViT-S or ViT-B is 1.5 to 2 times as fast at keep ratio 0.5, at batch 1 too, and its
ranking costs so little that it reaches more than 0.9 of what would be possible if the right patches
were known for free. A ViT-Ti is so cheap that ranking shows.

Arithmetic. A block of width D on L tokens takes 12 L D² + 2 L² D multiply-adds, nearly linear in L
at L = 197 (the quadratic part is L / 6D of the other: 4 % for ViT-B, 17 % for ViT-Ti). Half of the
patches is 99 of 197 tokens, so the blocks can become a little more than 2 times as fast. What does
not shrink: the patch embedding (0.7 % of a ViT-B, 2.3 % of a ViT-Ti), and at batch 1 the weights,
which are read from memory whatever the tokens are. The ranker comes on top: ViT-B takes 17.5 G
multiply-adds an image and ViT-Ti 1.26 G, the conv ranker 0.037 G, so 0.2 % and 3 %; the contrast
ranker is some passes over the pixels. "achieved" is time of ideal ÷ time of pruned: 1 means that
ranking, selecting and gathering cost nothing.

Timed, in turns in one process, each call for itself on a batch that is in memory already:
    full      the plain timm model
    ideal     the same, its `patch_drop` keeping the first P + K tokens: all patches are embedded,
              as in timm, and nobody has to find out which ones to keep
    contrast, conv, …   ltrp_timm.drop_patches with that ranker: rank, select, gather, encode
    ranker    `model.patch_scores(images)` alone; its share is of the full model's time
Not timed: reading, decoding and moving images, building models, warm-up, compiling.
Weights are random: they do not change the time. All variants share one set of weights in memory.
"""

import argparse
import copy
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import common
import timm
import torch
from common import Goal, Row
from torch import Tensor, nn

import ltrp_timm
from ltrp_timm import throughput

NAME = "speed_vs_keep_ratio"
BASELINES = ("full", "ideal")

_B, _S, _TI, _L = (f"vit_{size}_patch16_224" for size in ("base", "small", "tiny", "large"))
_CPU = {"device": "cpu", "dtype": "float32", "threads": "1"}
_EAGER = {**_CPU, "compiled": False}


def _achieved(short: str, model: str, keep_ratio: float, bound: float) -> Goal:
    where = {**_EAGER, "model": model, "batch": 8, "keep_ratio": keep_ratio, "method": "conv"}
    return Goal(f"{short} keep {keep_ratio:g} batch 8, achieved", where, "achieved", ">=", bound)


def _goals(rankers: list[str]) -> list[Goal]:
    """The project's goals that this file's rows can answer."""
    fast = {"model": _B, "batch": 1, "keep_ratio": 0.5, "method": tuple(rankers)}
    share = {**_EAGER, "model": _B, "batch": 8, "method": "contrast"}
    text = "ViT-B keep 0.5 batch 1, times as fast as eager full"
    return [
        _achieved("ViT-L", _L, 0.5, 0.98),
        _achieved("ViT-B", _B, 0.5, 0.97),
        _achieved("ViT-S", _S, 0.5, 0.94),
        _achieved("ViT-Ti", _TI, 0.5, 0.88),
        _achieved("ViT-B", _B, 0.25, 0.96),
        _achieved("ViT-S", _S, 0.25, 0.92),
        Goal("ViT-B batch 8, ranker's share of full", share, "ranker_share", "<=", 0.005),
        Goal(text, {**_EAGER, **fast}, "speedup_over_eager", ">=", 1.55),
        Goal(
            f"{text}, compiled", {**_CPU, "compiled": True, **fast}, "speedup_over_eager", ">=", 2.2
        ),
    ]


class FirstTokens(nn.Module):
    """Stands at a backbone's ``patch_drop``: the patches to keep are known, and are the first."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return x[:, : self.length].contiguous()


def build(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The full model and its variants by name: modules of their own, weights in common."""
    full = timm.create_model(name, pretrained=False).eval().requires_grad_(False)
    full = full.to(device=args.device, dtype=getattr(torch, args.dtype))
    models = {"full": full}
    for method in ("ideal", *args.rankers):
        shared = {id(parameter): parameter for parameter in full.parameters()}
        twin = copy.deepcopy(full, shared)
        models[method] = twin if method == "ideal" else ltrp_timm.drop_patches(twin, ranker=method)
    return models


def callables(
    models: dict[str, Any], images: Tensor, keep_ratio: float, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """What is timed for images (B, C, H, W) at one keep ratio, in the order of a round."""
    full = models["full"]
    kept = ltrp_timm.num_keep(full.patch_embed.num_patches, keep_ratio)
    models["ideal"].patch_drop = FirstTokens(full.num_prefix_tokens + kept)
    fns = {"eager": _inference(full, images)} if compiled else {}
    for method, model in models.items():
        if method not in BASELINES:
            model.keep_ratio = keep_ratio
        run = torch.compile(model, dynamic=False) if compiled else model
        fns[method] = _inference(run, images)
    for method, model in models.items():
        if method not in BASELINES:
            rank = model.patch_scores
            rank = torch.compile(rank, dynamic=False) if compiled else rank
            fns[f"rank:{method}"] = _inference(rank, images)
    return fns


def _inference(fn: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            return fn(images)

    return call


def to_rows(
    timings: dict[str, throughput.Timing], case: Row, args: argparse.Namespace, env: Row
) -> list[Row]:
    """One row for the full model, the ideal one and each ranker."""
    full, ideal = timings["full"], timings["ideal"]
    rows = []
    for method in (*BASELINES, *args.rankers):
        timing = timings[method]
        row = {**case, "method": method, "rounds": len(timing.seconds)}
        for part in ("median", "low", "high"):
            row[f"seconds_{part}"] = round(getattr(timing, part), 7)
        row["images_per_second"] = round(timing.items_per_second(case["batch"]), 3)
        row |= common.spread("speedup", throughput.ratio(full, timing))
        eager = timings.get("eager", full)
        row |= common.spread("speedup_over_eager", throughput.ratio(eager, timing))
        row |= common.spread("achieved", throughput.ratio(ideal, timing))
        rank = timings.get(f"rank:{method}")
        share = common.spread("ranker_share", throughput.ratio(rank or full, full))
        row |= share if rank else dict.fromkeys(share, 0.0)  # the baselines rank nothing
        row |= {"device": args.device, "dtype": args.dtype, "compiled": args.compile, **env}
        rows.append(row)
    return rows


def run(args: argparse.Namespace, env: Row) -> list[Row]:
    """Measure every model, batch size and keep ratio."""
    rows: list[Row] = []
    for name in args.models:
        models = build(name, args)
        channels, *size = models["full"].pretrained_cfg["input_size"]
        for batch in args.batch_sizes:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, channels, *size, generator=generator)
            images = images.to(device=args.device, dtype=getattr(torch, args.dtype))
            for keep_ratio in args.keep_ratios:
                patches = models["full"].patch_embed.num_patches
                case = {"model": name, "batch": batch, "keep_ratio": keep_ratio}
                case["patches_kept"] = ltrp_timm.num_keep(patches, keep_ratio)
                fns = callables(models, images, keep_ratio, args.compile)
                new = to_rows(common.compare(fns, args), case, args, env)
                rows += new
                print(_progress(new), flush=True)
    return rows


def _progress(rows: list[Row]) -> str:
    head = "{model} batch {batch} keep {keep_ratio:g}, {rounds} rounds:".format(**rows[0])
    parts = [f"{row['method']} {row['seconds_median'] * 1e3:.1f} ms" for row in rows]
    parts += [
        "{method} ×{speedup:.2f}, {achieved:.3f} of ideal, ranker {ranker_share:.2%}".format(**row)
        for row in rows
        if row["method"] not in BASELINES
    ]
    return f"{head} {'; '.join(parts)}"


def summary(rows: list[Row]) -> str:
    """The figures as a Markdown table."""
    shown = [
        {
            "model": row["model"],
            "batch": row["batch"],
            "keep": f"{row['keep_ratio']:g}",
            "method": row["method"],
            "ms": f"{row['seconds_median'] * 1e3:.1f}",
            "times as fast (quartiles)": _figure(row, "speedup", ".2f"),
            "achieved ÷ ceiling": _figure(row, "achieved", ".3f"),
            "ranker's share of full": _figure(row, "ranker_share", ".2%"),
        }
        for row in rows
        if row["method"] != "full"
    ]
    return common.markdown_table(shown)


def _figure(row: Row, column: str, spec: str) -> str:
    if row["method"] == "ideal" and column != "speedup":
        return "–"
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return f"{row[column]:{spec}} ({low:{spec}} – {high:{spec}})"


def plot(rows: list[Row], args: argparse.Namespace, title: str) -> Any:
    """Speed-up against keep ratio: a column of panels per model, a row per batch size."""
    pyplot = common.load_pyplot()
    shape = (len(args.batch_sizes), len(args.models))
    figure, axes = pyplot.subplots(
        *shape, figsize=(1 + 3.6 * shape[1], 1 + 3.1 * shape[0]), squeeze=False, sharex=True
    )
    for i, batch in enumerate(args.batch_sizes):
        for j, model in enumerate(args.models):
            panel = [row for row in rows if row["model"] == model and row["batch"] == batch]
            _plot_panel(axes[i][j], panel, args)
            axes[i][j].set_title(f"{model}, batch {batch}", fontsize=9)
        axes[i][0].set_ylabel("times as fast as full")
    for ax in axes[-1]:
        ax.set_xlabel("keep ratio")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(textwrap.fill(title, 30 + 40 * shape[1]), fontsize=8)
    figure.tight_layout()
    return figure


def _plot_panel(ax: Any, rows: list[Row], args: argparse.Namespace) -> None:
    ax.axhline(1.0, color="k", linestyle=":", label="full")
    for method in ("ideal", *args.rankers):
        line = sorted(
            (row for row in rows if row["method"] == method), key=lambda row: row["keep_ratio"]
        )
        x, y = ([row[column] for row in line] for column in ("keep_ratio", "speedup"))
        below = [row["speedup"] - row["speedup_low"] for row in line]
        above = [row["speedup_high"] - row["speedup"] for row in line]
        style = "k--o" if method == "ideal" else "-o"
        ax.errorbar(x, y, (below, above), fmt=style, ms=3, capsize=2, label=method)
    ax.set_xticks(sorted(args.keep_ratios))
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = common.make_parser(
        (__doc__ or "").splitlines()[0],
        models=[_TI, _S, _B],
        keep_ratios=[0.75, 0.5, 0.25, 0.1],
    ).parse_args()
    # an untrained ranker warns; here only its time counts, which its weights do not change
    warnings.filterwarnings("ignore", message=".*no trained weights.*")
    common.set_up_torch(args)
    env = throughput.environment(args.device)
    rows = run(args, env)

    title = "Pruned ViTs against the full ones, ranker included"
    line = common.environment_line(env, args)
    checks = [check for goal in _goals(args.rankers) for check in goal.check(rows)]
    goals = common.markdown_table(checks) if checks else "No goal applies to these settings."
    text = f"# {title}\n\n{line}\n\n{summary(rows)}\n\n## Goals\n\n{goals}\n"
    common.write_csv(rows, args.output / f"{NAME}.csv")
    (args.output / f"{NAME}.md").write_text(text, encoding="utf-8")
    plot(rows, args, f"{title} ({line})").savefig(args.output / f"{NAME}.png", dpi=150)
    print(f"\nGoals\n{goals}")


if __name__ == "__main__":
    main()
