"""With a quarter of the patches, which ranker and which selection keep the most accuracy?

Claim. The default ranker keeps more of the full model's accuracy than `contrast`, by a linear probe
and in the mean of three ways to measure it. Tokens of three scales keep more than `contrast`, too.

Arithmetic. What differs between objects does not get smaller with more pictures of the same ones:
with 70 objects a paired difference is known to 0.03 at best. So every object is tested, each half
with probes trained on the other half: with 140 objects in 48 pictures each, to about 0.016.

Pictures, probes and measures are those of quality.py, at 224 px and without a clock: `accuracy` is
the mean of linear, neighbours and retrieval. Differences are to `contrast`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import tables
from common import WIDTH, Row, base_parser, load_pyplot, set_up
from tables import Goal

from ltrp_timm import PatchSelector
from ltrp_timm.commands._flags import positive
from studies.quality import judge
from studies.quality.material import (
    add_source_options,
    load_backbone,
    open_material,
    parse_sources,
)
from studies.quality.methods import (
    DITHERED,
    ORACLE,
    THREE,
    make_coarse,
    make_rankers,
    score_pictures,
)
from studies.quality.pictures import composites

NAME = "quality_quarter"
TITLE = "Accuracy with a quarter of the patches, without training"
KEEP, BASE, DEFAULT = 0.25, "contrast", "border"
RANKERS = (BASE, DEFAULT, "feature_contrast", ORACLE)
MEASURES = ("accuracy", "linear", "neighbours", "retrieval", "precision", "recall")


def measure_half(
    args: argparse.Namespace, material: Any, full: Any, test: bool
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Measure every method on the objects of one half, with probes trained on the other.

    Returns:
        Values of each picture by method and measure, and the object of each by measure.
    """
    draw = args.seed + 10 * test
    one = composites(material, test, args.pictures, draw + 1, args.size)
    several = composites(material, test, args.pictures // 4, draw + 2, args.size, many=True)
    known = [
        composites(material, not test, args.pictures // 2, draw + 4, args.size),
        composites(material, not test, args.pictures // 4, draw + 5, args.size, many=True),
    ]
    probes = judge.Probes(*[(judge.encode(full, each.images), each.labels) for each in known])
    share = judge.share_of_objects(one.masks, full.patch_embed.grid_size)

    def measured(encode: Callable[[Any, int], Any]) -> dict[str, np.ndarray]:
        """Values of each picture by measure, from the features of a set and its number."""
        found, both = encode(one, 0), encode(several, 1)
        three = probes.accuracies(found, one)
        precision = probes.precision(both, several.labels)
        return {"accuracy": np.mean(list(three.values()), axis=0), **three, "precision": precision}

    models = make_rankers(args, full, args.size)
    models = {name: model for name, model in models.items() if name in RANKERS}
    scores = [
        score_pictures(
            models, each.images, judge.share_of_objects(each.masks, models[BASE].patch_grid)
        )
        for each in (one, several)
    ]
    values = {"full": measured(lambda each, _: judge.encode(full, each.images))}
    ways = [(ranker, "", "top") for ranker in RANKERS] + [(DEFAULT, DITHERED, "dithered")]
    for ranker, name, selection in ways:
        layer = PatchSelector(KEEP, 0, selection)
        kept = [judge.kept_by(each[ranker], layer) for each in scores]
        found = measured(
            lambda each, n, kept=kept: judge.encode(models[DEFAULT], each.images, kept[n])
        )
        values[ranker + name] = {**found, "recall": judge.object_recall(kept[0], share)}
        print(f"{ranker}{name}", flush=True)
    three = make_coarse(full, models[DEFAULT].ranker)[THREE]
    three.keep_ratio = KEEP
    kept = [judge.refined_by(three, s[DEFAULT], e.images) for s, e in zip(scores, (one, several))]
    values[DEFAULT + THREE] = measured(lambda each, n: judge.encode(three, each.images, kept[n]))
    groups = dict.fromkeys(MEASURES, one.objects.numpy())
    return values, groups | {"precision": several.objects.numpy()}


def run(args: argparse.Namespace, material: Any, where: Row) -> list[Row]:
    """Measure every method on both halves of the objects; rows."""
    full = load_backbone(args, args.size)
    halves = [measure_half(args, material, full, test) for test in (True, False)]
    fixed = {"keep_ratio": KEEP, "img_size": args.size, "backbone": args.backbone}
    fixed |= {"blocks": args.blocks or "all", "seed": args.seed}
    groups = {name: np.concatenate([own[name] for _, own in halves]) for name in MEASURES}
    values = {
        (method, measure): np.concatenate([found[method][measure] for found, _ in halves])
        for method, measures in halves[0][0].items()
        for measure in measures
    }
    rows = []
    for (method, measure), value in values.items():
        row: Row = {"method": method, "measure": measure, "pictures": len(value)}
        row["objects"] = len(np.unique(groups[measure]))
        row |= judge.columns("value", judge.interval(value, groups[measure]))
        gain = judge.interval(value - values[BASE, measure], groups[measure])
        rows.append({**row, **judge.columns(f"above_{BASE}", gain), **fixed, **where})
    return rows


def goals() -> list[Goal]:
    """What the claim says."""
    cases = ((DEFAULT, "accuracy"), (DEFAULT, "linear"), (DEFAULT + THREE, "accuracy"))
    return [
        Goal(
            f"{measure} above contrast's",
            {"method": method, "measure": measure},
            f"above_{BASE}_low",
            ">=",
            0,
        )
        for method, measure in cases
    ]


def table(rows: list[Row]) -> list[Row]:
    """Figures with their intervals as text: a line for each method."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["method"], {"method": row["method"]})
        more = [row[f"above_{BASE}{end}"] for end in ("", "_low", "_high")]
        line[row["measure"]] = "{:.3f}: {:+.3f} ({:+.3f} – {:+.3f})".format(row["value"], *more)
    return list(lines.values())


def plot(rows: list[Row]) -> Any:
    """The difference to `contrast` in each measure."""
    shown = MEASURES[:5]
    figure, axes = load_pyplot().subplots(1, len(shown), figsize=(WIDTH, 3.2), sharey=True)
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m not in ("full", BASE)]
    for axis, measure in zip(axes, shown):
        of = {row["method"]: row for row in rows if row["measure"] == measure}
        for place, method in enumerate(reversed(methods)):
            low, middle, high = (of[method][f"above_{BASE}{end}"] for end in ("_low", "", "_high"))
            axis.plot([low, high], [place, place], "-", color="C0")
            axis.plot([middle], [place], "o", color="C0", markersize=5)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(measure, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(methods)), list(reversed(methods)))
    figure.supxlabel(f"above {BASE}, with 95 % intervals", fontsize=9)
    return figure


def main() -> None:
    """Fetch or read the pictures, measure, write CSV, PNG and Markdown, check the goals."""
    parser = base_parser((__doc__ or "").splitlines()[0])
    add_source_options(parser)
    parser.add_argument("--size", type=positive, default=224, help="side in pixels")
    parser.add_argument(
        "--pictures", type=positive, default=3360, help="of each half, one object each"
    )
    args = parse_sources(parser)
    if args.quick:
        args.size, args.pictures = 64, 48
    where = set_up(args)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, open_material(args, Path(folder)), where)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
