"""What is lost on real pictures when weak patches are dropped, beside the rivals?

Claim. The default ranker finds objects without weights (AUC >= .92 on objects pasted on photos).
With a quarter of the patches it loses less accuracy than `contrast` does; quality_quarter.py has
more pictures for that. At twice the speed, tokens of half resolution in place of dropped patches
lose no more than token merging and a smaller image do.

Arithmetic. 280 pictures of 70 objects: a share of right answers is known to about 0.07; differences
between methods on the same pictures are known far better, so intervals of paired differences
decide. 95 % intervals are resampled by object, or by picture where there is no object.

Objects with alpha masks are pasted on squares of photos. Probes are trained on features of the full
model, of other objects on other photos. Nothing is fine-tuned. Measured at each keep ratio:
    linear      share of objects whose class a linear probe finds
    neighbours  share whose class the five nearest training pictures give
    retrieval   share whose nearest other picture shows the same object
    precision   average precision of the classes of pictures with two or three objects
    AUC         chance that a patch of an object outranks one without; also on photos with boxes
    recall      share of the object's area in kept patches
    token, map  1 - cosine to the full model's pooled feature and feature map, whole photos
    mask        overlap of a linear probe's mask of the object with the true one, on patches; places
                without features get those of the nearest kept patch (mask zeros: zeros)
Cosine is not accuracy: what knows the objects' masks keeps the most accuracy and is far from the
full model, whose features describe the background too.

Rivals are the plain model on a smaller image, and token merging, with several settings each.
`speedup` over the full model is timed interleaved, the ranking of `border` included. Rows `at N x`
compare at equal time: the default ranker, dropping or with a coarse rest, minus each rival, both at
their best setting that is N times as fast.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import tables
from common import WIDTH, Row, base_parser, compare, load_pyplot, set_up
from tables import Goal

from ltrp_timm import PatchSelector, drop_patches, throughput
from ltrp_timm.commands._flags import keep_ratio, positive
from ltrp_timm.measure.payoff import twin
from ltrp_timm.selection import num_keep
from studies.quality import judge
from studies.quality.material import (
    add_source_options,
    load_backbone,
    open_material,
    parse_sources,
)
from studies.quality.methods import (
    COARSE,
    DITHERED,
    ORACLE,
    RANDOM,
    THREE,
    make_coarse,
    make_rankers,
    make_rivals,
    ratios_of,
    score_pictures,
    timed_calls,
)
from studies.quality.pictures import Pictures, composites, object_photos, scenes

NAME = "quality"
TITLE = "What dropping patches loses on real pictures, without training"
BASE = "contrast"  # differences are to it
DEFAULT = "border"
OURS = (DEFAULT, DEFAULT + DITHERED, DEFAULT + COARSE, DEFAULT + THREE)
WITH_COARSE = (DEFAULT, "cell_std", "feature_contrast")  # rankers that also refine cells
WITH_DITHERED = (DEFAULT, BASE)  # rankers whose patches are also dithered
FIND_ONLY = ("pixel_std", "centre", "attention")  # judged by what they find, not by accuracy
AT = (2.0, 2.7)  # times as fast


class Found:
    """Measures of each picture, by image size, method, setting and measure."""

    def __init__(self, speedups: dict[tuple[int, str], throughput.Ratio]) -> None:
        self.values: dict[tuple[int, str, str, str], np.ndarray] = {}
        self.groups: dict[tuple[int, str], np.ndarray] = {}
        self.tokens: dict[tuple[int, str, str], float] = {}
        self.speedups = speedups

    def add(self, size: int, method: str, setting: str, measured: dict[str, Any]) -> None:
        """Note what was measured of a method at a setting: {measure: (values, groups)}."""
        for measure, (values, groups) in measured.items():
            self.values[size, method, setting, measure] = values
            self.groups[size, measure] = groups

    def speedup(self, size: int, method: str, setting: str) -> throughput.Ratio | None:
        """Over the full model; that of dropping is the default ranker's."""
        if method == "full":
            return throughput.Ratio(1.0, 1.0, 1.0)
        return self.speedups.get((size, f"{method} {setting}"))

    def rows(self) -> list[Row]:
        """One row for each method, setting and measure, and the comparisons at equal time."""
        rows = []
        for (size, method, setting, measure), values in self.values.items():
            groups = self.groups[size, measure]
            row: Row = {"img_size": size, "method": method, "setting": setting, "at": ""}
            row |= {"tokens": self.tokens.get((size, method, setting), ""), "measure": measure}
            row["pictures"] = int((~np.isnan(values)).sum())
            row |= judge.columns("value", judge.interval(values, groups))
            base = self.values.get((size, BASE, setting, measure))
            paired = None if base is None else judge.interval(values - base, groups)
            row |= judge.columns(f"above_{BASE}", paired)
            ratio = self.speedup(size, method, setting)
            quartiles = None if ratio is None else (ratio.median, ratio.low, ratio.high)
            row |= judge.columns("speedup", quartiles)
            rows.append(row)
        return [*rows, *self._at_equal_time()]

    def _at_equal_time(self) -> list[Row]:
        rows = []
        for size, measure in sorted({(key[0], key[3]) for key in self.values}):
            if measure.startswith(("AUC", "recall")):
                continue
            for factor, method in itertools.product(AT, OURS):
                ours = self._best(size, method, measure, factor)
                for rival in ("smaller image", "token merging"):
                    theirs = self._best(size, rival, measure, factor)
                    if ours is None or theirs is None:
                        continue
                    a, b = (self.values[size, m, s, measure] for m, s in (ours, theirs))
                    row: Row = {"img_size": size, "method": f"{method} − {rival}"}
                    row |= {"setting": f"at {factor:g} x: {ours[1]}, {theirs[1]}", "tokens": ""}
                    row["at"] = factor
                    row |= {"measure": measure, "pictures": len(a)}
                    row |= judge.columns("value", judge.interval(a - b, self.groups[size, measure]))
                    row |= judge.columns(f"above_{BASE}", None) | judge.columns("speedup", None)
                    rows.append(row)
        return rows

    def _best(self, size: int, method: str, measure: str, factor: float) -> Any:
        """A method's setting that is at least so fast and measures best; None if there is none."""
        sign = -1 if measure.startswith(("token", "map")) else 1
        options = [
            (sign * values.mean(), (method, key[2]))
            for key, values in self.values.items()
            if (key[0], key[1], key[3]) == (size, method, measure)
            for ratio in [self.speedup(size, method, key[2])]
            if ratio is not None and ratio.median >= 0.97 * factor
        ]
        return max(options)[1] if options else None


def _numbers(pictures: Pictures) -> np.ndarray:
    objects = pictures.objects.numpy()
    return objects if objects.min(initial=0) >= 0 else np.arange(len(objects))


class Study:
    """The sets of pictures of one image size, probes, and what the full model makes of them."""

    def __init__(self, args: argparse.Namespace, material: Any, size: int, full: Any) -> None:
        self.args, self.size, self.full = args, size, full
        self.grid = tuple(full.patch_embed.grid_size)
        counts = args.pictures if size == args.sizes[0] else args.pictures // 4
        whole = max(4, args.pictures // (6 if size == args.sizes[0] else 12))
        self.sets = {
            "single": composites(material, True, counts, args.seed + 1, size),
            "photos": object_photos(material, size),
            "scenes": scenes(material, whole, args.seed + 3, size),
        }
        self.probes = self.mask_probe = None
        if size == args.sizes[0]:
            self.sets["several"] = composites(
                material, True, counts // 2, args.seed + 2, size, many=True
            )
            known = [
                composites(material, False, 2 * counts, args.seed + 4, size),
                composites(material, False, counts, args.seed + 5, size, many=True),
            ]
            encoded = [
                (judge.encode(full, one.images, dense=one is known[0]), one.labels) for one in known
            ]
            self.probes = judge.Probes(*encoded)
            shares = judge.share_of_objects(known[0].masks, self.grid)
            self.mask_probe = judge.MaskProbe(encoded[0][0], shares)
        self.whole = judge.encode(full, self.sets["scenes"].images, dense=True)
        self.share = {
            name: judge.share_of_objects(one.masks, self.grid) for name, one in self.sets.items()
        }

    def scored(self, models: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Scores of each set by each ranker."""
        return {
            name: score_pictures(models, one.images, self.share[name])
            for name, one in self.sets.items()
        }

    def found_objects(self, scores: dict[str, Any], method: str) -> dict[str, Any]:
        """AUC of a ranker on composites and on photos with boxes."""
        return {
            f"AUC {name}": (
                judge.object_auc(scores[name][method], self.share[name]),
                _numbers(self.sets[name]),
            )
            for name in ("single", "photos")
        }

    def recalled(self, kept: Any) -> dict[str, Any]:
        """Share of the objects' area in kept patches."""
        recall = judge.object_recall(kept, self.share["single"])
        return {"recall": (recall, _numbers(self.sets["single"]))}

    def measured(self, encode: Any, sets: Any = None) -> dict[str, Any]:
        """Measures of a method by ``encode``: name of a set (of ``sets`` if given) -> features."""
        found: dict[str, Any] = {}
        if self.probes is not None:
            one, groups = self.sets["single"], _numbers(self.sets["single"])
            encoded = encode("single")
            for measure, values in self.probes.accuracies(encoded, one).items():
                found[measure] = (values, groups)
            if encoded.dense is not None:
                share, probe = self.share["single"], self.mask_probe
                found["mask"] = (probe.overlap(encoded, share), groups)
                if encoded.kept is not None:
                    found["mask zeros"] = (probe.overlap(encoded, share, "zeros"), groups)
            several = self.sets["several"]
            found["precision"] = (
                self.probes.precision(encode("several"), several.labels),
                _numbers(several),
            )
        if sets is not None and "scenes" not in sets:  # an oracle knows no objects there
            return found
        encoded, groups = encode("scenes"), _numbers(self.sets["scenes"])
        found["token error"] = (judge.token_error(encoded, self.whole), groups)
        if encoded.dense is not None:
            found["map error"] = (judge.dense_error(encoded, self.whole), groups)
        return found


def run(args: argparse.Namespace, material: Any, where: Row) -> list[Row]:
    """Measure every method at every size; rows."""
    found = Found({})
    for size in args.sizes:
        measure_size(args, material, size, found)
    fixed = {"backbone": args.backbone, "blocks": args.blocks or "all", "seed": args.seed}
    return [{**row, **fixed, **where} for row in found.rows()]


def measure_size(args: argparse.Namespace, material: Any, size: int, found: Found) -> None:
    """Time and judge every method at one image size."""
    full = load_backbone(args, size)
    study = Study(args, material, size, full)
    models = make_rankers(args, full, size)
    rivals = make_rivals(args, full, size, args.keep_ratios)
    batch = study.sets["single"].images[: args.batch if size == args.sizes[0] else 2]
    coarse = make_coarse(full, models[DEFAULT].ranker)
    dithered = drop_patches(twin(full), models[DEFAULT].ranker, selection="dithered")
    ours = {DEFAULT: models[DEFAULT], DEFAULT + DITHERED: dithered}
    ours |= {DEFAULT + name: model for name, model in coarse.items()}
    calls = timed_calls(full, ours, args.keep_ratios, rivals, batch)
    timings = compare(calls, args)
    for name, timing in timings.items():
        found.speedups[size, name] = throughput.ratio(timings["full"], timing)
    print(f"{size} px: timed", flush=True)

    def encoded(model: Any, kept: Any = None) -> Any:
        """Features of a set by its name, with a map of whole photos and of single objects."""
        return lambda name: judge.encode(
            model, study.sets[name].images, kept and kept[name], dense=name != "several"
        )

    patches = study.grid[0] * study.grid[1]
    found.tokens[size, "full", ""] = patches
    found.add(size, "full", "", study.measured(encoded(full)))
    scores = study.scored(models)
    for method in (*models, RANDOM, ORACLE):
        found.add(size, method, "", study.found_objects(scores, method))
        of_sets = {name: one[method] for name, one in scores.items() if method in one}
        ways = {method: "top"}
        if method in WITH_DITHERED:
            ways[method + DITHERED] = "dithered"
        ratios = args.keep_ratios if method not in FIND_ONLY else ()
        for ratio, (way, selection) in itertools.product(ratios, ways.items()):
            layer = PatchSelector(ratio, 0, selection)
            kept = {name: judge.kept_by(one, layer) for name, one in of_sets.items()}
            setting = f"keep {ratio:g}"
            found.tokens[size, way, setting] = num_keep(patches, ratio)
            found.add(size, way, setting, study.recalled(kept["single"]))
            found.add(size, way, setting, study.measured(encoded(models[DEFAULT], kept), kept))
        for name, model in coarse.items() if method in WITH_COARSE else ():
            if name == THREE and method != DEFAULT:
                continue
            for ratio in ratios_of(model, args.keep_ratios):
                model.keep_ratio, setting = ratio, f"keep {ratio:g}"
                kept = {
                    one: judge.refined_by(model, of_sets[one], study.sets[one].images)
                    for one in of_sets
                }
                found.tokens[size, method + name, setting] = model.num_tokens()
                found.add(size, method + name, setting, study.measured(encoded(model, kept), kept))
        print(f"{size} px: {method}", flush=True)
    for rival in rivals:
        found.tokens[size, rival.method, rival.setting] = round(rival.tokens, 1)
        measured = study.measured(rival.encoder(study.sets))
        found.add(size, rival.method, rival.setting, measured)
    print(f"{size} px: rivals", flush=True)


def goals(rows: list[Row]) -> list[Goal]:
    """What the default ranker must reach."""
    first = {"method": DEFAULT, "img_size": rows[0]["img_size"]}
    quarter = {**first, "setting": "keep 0.25", "measure": "linear"}
    against = [
        Goal(
            f"{measure}, coarse rest − {rival}, {factor:g} x",
            {**first, "method": f"{DEFAULT}{COARSE} − {rival}", "at": factor, "measure": measure},
            "value_high" if factor == AT[0] else "value",
            ">=",
            0.0,
        )
        for measure in ("linear", "neighbours", "retrieval")
        for rival in ("smaller image", "token merging")
        for factor in AT
        if any(
            (row["method"], row["at"]) == (f"{DEFAULT}{COARSE} − {rival}", factor) for row in rows
        )
    ]
    return [
        Goal("AUC, objects on photos", {**first, "measure": "AUC single"}, "value", ">=", 0.92),
        Goal("AUC, photos with boxes", {**first, "measure": "AUC photos"}, "value", ">=", 0.89),
        Goal("linear above contrast's, keep 0.25", quarter, f"above_{BASE}_low", ">=", 0.0),
        *against,
    ]


def table(rows: list[Row]) -> list[Row]:
    """Figures with their intervals as text: a line for each method and setting."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    lines: dict[Any, Row] = {}
    for row in rows:
        key = row["img_size"], row["method"], row["setting"]
        line = lines.setdefault(
            key,
            {
                "image": f"{row['img_size']} px",
                "method": row["method"],
                "setting": row["setting"],
                "tokens": f"{row['tokens']:.0f}" if row["tokens"] != "" else "",
                "speed-up": f"{row['speedup']:.2f}" if row["speedup"] != "" else "",
                **dict.fromkeys(measures, ""),
            },
        )
        line[row["measure"]] = (
            f"{row['value']:.3f} ({row['value_low']:.3f} – {row['value_high']:.3f})"
        )
    return list(lines.values())


def plot(rows: list[Row]) -> Any:
    """Accuracy against speed-up, and closeness to the full model against speed-up."""
    pyplot = load_pyplot()
    sizes = list(dict.fromkeys(row["img_size"] for row in rows))
    panels = [(sizes[0], "linear", "right classes (linear probe)")]
    panels += [(sizes[0], "retrieval", "right objects (retrieval)")]
    panels += [(size, "token error", f"1 − cosine, {size} px photos") for size in sizes]
    figure, axes = pyplot.subplots(-(-len(panels) // 2), 2, figsize=(WIDTH, 6.4), squeeze=False)
    axes = axes.flatten()
    speeds = {
        (row["img_size"], row["setting"]): row["speedup"]
        for row in rows
        if row["method"] == DEFAULT and row["speedup"] != ""
    }
    styles = {DEFAULT: "o-", BASE: "s-", "feature_contrast": "D-", RANDOM: "x:"}
    styles |= {DEFAULT + DITHERED: "v-", DEFAULT + COARSE: "o--", DEFAULT + THREE: "*--"}
    styles |= {"token merging": "^--", "smaller image": "P-."}
    for axis, (size, measure, label) in zip(axes, panels):
        for method, style in styles.items():
            points = sorted(
                (row["speedup"] or speeds.get((size, row["setting"]), 0), row["value"])
                for row in rows
                if (row["img_size"], row["method"], row["measure"]) == (size, method, measure)
            )
            colour = {"color": "0.45"} if method == "smaller image" else {}
            axis.plot(*zip(*points), style, label=method, markersize=5, **colour)
        full = [
            r for r in rows if (r["img_size"], r["method"], r["measure"]) == (size, "full", measure)
        ]
        axis.axhline(full[0]["value"], color="grey", linewidth=0.8)
        axis.set(xlabel="speed-up over the full model", ylabel=label)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[2].legend(fontsize=7)
    return figure


def main() -> None:
    """Fetch or read the pictures, measure, write CSV, PNG and Markdown, check the goals."""
    parser = base_parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_source_options(parser)
    add("--sizes", type=positive, nargs="+", default=[224, 448], help="sides in pixels")
    ratios = [0.75, 0.5, 0.375, 0.25]
    add("--keep-ratios", type=keep_ratio, nargs="+", default=ratios, help="shares of patches")
    add("--pictures", type=positive, default=280, help="pictures with one object, for test")
    add("--batch", type=positive, default=8, help="images of a timed call")
    add("--repeats", type=int, default=7, help="timed rounds")
    args = parse_sources(parser)
    if args.quick:
        args.sizes, args.pictures, args.repeats = [64], 12, 1
    where = set_up(args)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        material = open_material(args, Path(folder))
        rows = run(args, material, where)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(rows), plot(rows), args)


if __name__ == "__main__":
    main()
