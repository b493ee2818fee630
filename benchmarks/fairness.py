"""Does a selector that never saw a label treat all classes alike, and one that saw labels not?

Claim. A selector trained with the labels of five digits keeps these and drops the other five; LTRP,
contrast and whatever else sees no label keeps seen and unseen digits alike. What is left tells a
judge more about unseen classes when it was chosen without labels.

Arithmetic. Scenes of 64 px are 64 patches of 8; 2 to 4 digits cover 9 % of a scene, and the best
16 patches can hold 95 % of their ink, a random 16 a quarter. A selector that misses all unseen
digits and is right about the others has a recall gap near 0.7. With 2000 scenes, of which 30 % show
a class, the average precision of a class is known to about 0.02, a share of ink to 0.01.

Without labels, 20 000 scenes train an MAE (`ltrp_timm.train.train_teacher`) and four LTRP rankers
(`train_ranker`: removal × aggregate of the scores). With the labels of five digits they train a CNN
(→ `cam`, blurred or not, `grad_cam`) and a ViT that starts from the MAE (→ `attention`); once for
0-4 and once for 5-9: `seen` says which. The judge is one classifier of all ten digits, trained once
under masks that favour nobody, which sees the kept patches alone. Measured on other scenes of other
samples of the digits:
    recall   share of the ink of the digits in kept patches; mean over the five classes
    mAP      of the judge; mean over the five classes
    gap      seen − unseen. A class may be easier than another: of selectors without labels the gap
             of 5-9 is that of 0-4 with another sign, and `all patches` has the judge's own
    AUC      chance that a patch with ink outranks one without, for the teacher's own scores under
             one mask: what a ranker could learn from
Scenes and settings were chosen in trials with seed 0; those measured are others.
`low` and `high` are a 95 % interval over resampled scenes; in rows of all seeds, the least and the
largest of the seeds. `smooth` scenes, without noise, blobs and strokes, are a control.
`--quick` loads weights that were trained so (the first seed's) and measures fewer scenes.
"""

import argparse
import json
import statistics
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import tables
from common import Row, make_parser, set_up
from fairness.compared import CAM, OF_CNN, label_free, labels_of, with_labels
from fairness.measures import Judging, Kept, interval, scores_of, teacher_auc
from fairness.networks import logits_of
from fairness.pictures import draw_scenes, plot
from fairness.scenes import CLASSES, TEST, TRAIN, Scenes, make_scenes
from fairness.stages import HALVES, LTRP, Run, Trained, load_shipped, ship, train_all
from tables import Goal

from ltrp_timm import throughput
from ltrp_timm.metrics import average_precision

NAME = "fairness"
TITLE = "What is kept of classes that labels named, and of others"
WEIGHTS = Path(__file__).parent / "fairness" / "quick.safetensors"
KEEP_RATIOS = (0.5, 0.25, 0.125)
PARTS = ("seen", "unseen", "gap")
DIFFERENCES = ("recall_above_random", "map_unseen_above_cam", "map_unseen_above_contrast")
DIFFERENCES += ("auc_above_decoder",)


def musts(rows: list[Row]) -> list[Goal]:
    """What must hold of means over seeds, or the run fails.

    LTRP against weight-free scores is told, not asked.
    """
    halves = tuple(dict.fromkeys(row["seen"] for row in rows if row["seen"] != "both"))
    case = {"seed": "all", "images": "clutter", "keep_ratio": 0.25}
    total = {**case, "seen": "both" if len(halves) > 1 else halves[0]}
    ltrp = {"method": LTRP[:2]}
    found = [
        Goal(f"|recall gap|, labels of {half}", at, "recall_gap_size", "<=", 0.04)
        for half in halves
        for at in [{**case, **ltrp, "seen": half}]
    ]
    found += [
        Goal(
            "the CNN's mAP on its classes",
            {**case, "seen": half, "method": CAM},
            "own_map",
            ">=",
            0.8,
        )
        for half in halves
    ]
    return [
        *found,
        Goal("recall − random's", {**total, **ltrp}, "recall_above_random", ">=", 0.25),
        Goal("recall gap", {**total, "method": CAM}, "recall_gap", ">=", 0.2),
        Goal("unseen mAP − blurred CAM's", {**total, **ltrp}, "map_unseen_above_cam", ">=", 0.1),
        auc_goal(total, 0.05),
    ]


def auc_goal(case: Row, bound: float) -> Goal:
    """By how much the teacher's scores find ink better than those of `decoder` removal."""
    text = "teacher's AUC − with removal=decoder"
    return Goal(text, {**case, "method": LTRP[0]}, "auc_above_decoder", ">=", bound)


def goals(rows: list[Row]) -> list[Goal]:
    """What must hold, and what is asked beside it."""
    must = musts(rows)
    return [*must, auc_goal({**must[-1].where}, 0.1)]


def judge_all(trained: Trained, args: argparse.Namespace) -> list[Row]:
    """Rows of one seed: every selector, for each half of the digits with labels.

    Smooth scenes are the control: what is kept there; the judge has not learned them.
    """
    clutter = make_scenes(args.test_scenes, 1, TEST)
    smooth = make_scenes(args.test_scenes, 1, TEST, smooth=True)
    judges = {"clutter": Judging(clutter, trained.judge), "smooth": Judging(smooth, None)}
    free = label_free(trained)
    costs = milliseconds({**free, **with_labels(trained, next(iter(trained.cnns)))}, clutter)
    aucs = {
        name: teacher_auc(trained.teacher, clutter, args.mask_ratio, *name.split()) for name in LTRP
    }
    rows: list[Row] = []
    ratios = (1.0, *KEEP_RATIOS)
    kept = {key: keep_all(free, judge, ratios) for key, judge in judges.items()}
    for half, cnn in trained.cnns.items():
        own = own_map(cnn, clutter, HALVES[half])
        for images, judge in judges.items():
            found = kept[images] | keep_all(with_labels(trained, half), judge, KEEP_RATIOS)
            for (method, ratio), what in found.items():
                row: Row = {"seen": half, "images": images, "keep_ratio": ratio}
                row |= {"method": method, **measured(what, HALVES[half])}
                row["teacher_auc"] = aucs.get(method, "")
                row["own_map"] = own if method.startswith(OF_CNN) else ""
                rows.append({**row, "rank_ms": costs.get(method, "")})
    return with_differences(rows)


def judged(trained: Trained, seed: int, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows of one seed; those of a run that goes on are in its folder."""
    path = folder / f"seed_{seed}" / "rows.json"
    if not path.exists():
        rows = judge_all(trained, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keep_all(
    rankers: dict[str, Any], judge: Judging, ratios: tuple[float, ...]
) -> dict[tuple[str, float], Kept]:
    """What is kept by each ranker at each ratio; beside those without labels, by the truth."""
    scores = {name: scores_of(ranker, judge.scenes) for name, ranker in rankers.items()}
    if 1.0 in ratios:
        scores["ink"] = judge.ink.sum(dim=1)
    found = {(name, r): judge(of, r) for r in ratios if r < 1 for name, of in scores.items()}
    if 1.0 in ratios:
        found["all patches", 1.0] = judge(scores["ink"], 1.0)
    return found


def milliseconds(rankers: dict[str, Any], scenes: Scenes) -> dict[str, float]:
    """What ranking costs an image, in a batch of 64: the median of rounds in turns."""
    images = scenes.pixels()[:64]
    calls = {
        name: partial(scores_of, ranker, Scenes(scenes.images[:64], *scenes[1:]))
        for name, ranker in rankers.items()
    }
    timings = throughput.compare(calls, repeats=5, warmup=1)
    return {name: round(1e3 * of.median / len(images), 4) for name, of in timings.items()}


def own_map(cnn: Any, scenes: Scenes, digits: list[int]) -> float:
    """mAP of a classifier on whole scenes, on the classes that it learned."""
    precision = average_precision(logits_of(cnn, scenes), scenes.labels[:, digits])
    return round(float(precision.mean()), 4)


def measured(kept: Kept, seen: list[int]) -> Row:
    """Recall and mAP of seen and unseen classes, with intervals; mAP is empty without a judge."""
    unseen = [number for number in range(CLASSES) if number not in seen]
    row: Row = {}
    for name, of in (("recall", kept.recall), ("map", kept.precision)):
        if of is None:
            columns = [f"{name}_{part}{end}" for part in PARTS for end in ("", "_low", "_high")]
            row |= dict.fromkeys(columns, "")
            continue
        first, second = of[:, seen].mean(dim=1), of[:, unseen].mean(dim=1)
        for part, values in zip(PARTS, (first, second, first - second)):
            row |= interval(f"{name}_{part}", values)
    return row


def with_differences(rows: list[Row]) -> list[Row]:
    """Rows of one seed with what a selector has above random, blurred CAM and `contrast`."""
    of = {(r["seen"], r["images"], r["keep_ratio"], r["method"]): r for r in rows}
    for row in rows:
        case = (row["seen"], row["images"], row["keep_ratio"])
        row |= dict.fromkeys(DIFFERENCES, "")
        if row["keep_ratio"] == 1:
            continue
        random = of[(*case, "random")]
        recall, chance = ((r["recall_seen"] + r["recall_unseen"]) / 2 for r in (row, random))
        row["recall_above_random"] = round(recall - chance, 5)
        for name, other in (("cam", CAM), ("contrast", "contrast")):
            if row["images"] == "clutter":
                difference = row["map_unseen"] - of[(*case, other)]["map_unseen"]
                row[f"map_unseen_above_{name}"] = round(difference, 5)
        if row["method"] == "full mean":
            other = of[(*case, "decoder mean")]["teacher_auc"]
            row["auc_above_decoder"] = round(row["teacher_auc"] - other, 5)
    return rows


def over_seeds(rows: list[Row]) -> list[Row]:
    """Means over the seeds, for each half and for both; low and high are the extremes of seeds."""
    found = []
    halves = list(dict.fromkeys(row["seen"] for row in rows))
    for seen in [*halves, "both"] if len(halves) > 1 else halves:
        own = [row for row in rows if seen in (row["seen"], "both")]
        for key in dict.fromkeys((r["images"], r["keep_ratio"], r["method"]) for r in own):
            some = [r for r in own if (r["images"], r["keep_ratio"], r["method"]) == key]
            found.append(merged(some, {"seed": "all", "seen": seen}))
    return found


def merged(rows: list[Row], case: Row) -> Row:
    """One row of several: the mean of seeds, each the mean of its halves."""
    line: Row = {**rows[0], **case}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for name, value in rows[0].items():
        if not isinstance(value, float) or name.endswith(("_low", "_high")) or name == "keep_ratio":
            continue
        each = [statistics.mean(row[name] for row in rows if row["seed"] == seed) for seed in seeds]
        line[name] = round(statistics.mean(each), 5)
        if f"{name}_low" in line:
            line |= {f"{name}_low": round(min(each), 5), f"{name}_high": round(max(each), 5)}
    line["recall_gap_size"] = abs(line["recall_gap"])
    return line


def run(args: argparse.Namespace, where: Row, folder: Path) -> tuple[list[Row], Trained]:
    """Train, or load, and judge each seed; rows, and what the first seed trained."""
    rows: list[Row] = []
    first: Any = None
    scenes = cache(lambda: make_scenes(args.scenes, 0, TRAIN))
    for seed in args.seeds:
        if args.quick:
            trained = load_shipped(WEIGHTS)
        else:
            trained = train_all(Run(folder / f"seed_{seed}", seed, args), scenes)
        first = first or trained
        seconds = round(sum(trained.seconds.values()), 1)
        for row in judged(trained, seed, args, folder):
            size = abs(row["recall_gap"])
            rows.append({"seed": seed, **row, "recall_gap_size": size, "train_seconds": seconds})
        print(f"seed {seed}: {seconds:.0f} s of training", flush=True)
    settings = ("scale", "scenes", "test_scenes", "mask_ratio", "list_size", "teacher_epochs")
    settings += ("ranker_epochs", "cnn_epochs", "vit_epochs", "judge_epochs", "quick")
    fixed = {name: getattr(args, name) for name in settings}
    return [{**row, **fixed, **where} for row in [*rows, *over_seeds(rows)]], first


def table(rows: list[Row]) -> list[Row]:
    """The figures over all seeds as text: means, and the extremes of the seeds."""
    last = "both" if any(row["seen"] == "both" for row in rows) else rows[0]["seen"]
    shown = [row for row in rows if row["seed"] == "all" and row["seen"] == last]
    return [
        {
            "scenes": row["images"],
            "keep": f"{row['keep_ratio']:g}",
            "selector": row["method"],
            "labels": labels_of(row["method"]),
            **{
                f"{name} {part}": tables.figure(row, f"{name.lower()}_{part}", ".2f")
                if row[f"{name.lower()}_{part}"] != ""
                else "–"
                for name in ("recall", "mAP")
                for part in PARTS
            },
            "teacher's AUC": f"{row['teacher_auc']:.2f}" if row["teacher_auc"] != "" else "–",
            "ms an image": f"{row['rank_ms']:.3f}" if row["rank_ms"] != "" else "–",
        }
        for row in shown
    ]


def main() -> None:
    """Train, judge, write CSV, PNG and Markdown, check the goals.

    Raises:
        SystemExit: what must hold does not.
    """
    parser = make_parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="load what was trained before, measure 400 scenes")
    add("--scenes", type=int, default=20_000, help="to train on")
    add("--test-scenes", type=int, default=2000, help="to measure on")
    add("--teacher-epochs", type=int, default=8, help="of the MAE, batches of 64")
    add(
        "--ranker-epochs",
        type=int,
        nargs="+",
        default=[1, 2],
        help="of each ranker, batches of 32; of each cycle",
    )
    add(
        "--cnn-epochs",
        type=int,
        nargs="+",
        default=[3, 3],
        help="of each CNN, batches of 64; of each cycle",
    )
    add(
        "--vit-epochs",
        type=int,
        nargs="+",
        default=[3],
        help="of each ViT, batches of 64; of each cycle",
    )
    add(
        "--judge-epochs",
        type=int,
        nargs="+",
        default=[4],
        help="of the judge, batches of 64; of each cycle",
    )
    add("--teacher-lr", type=float, default=3e-3, help="learning rate")
    add("--ranker-lr", type=float, default=4e-3, help="learning rate")
    add("--cnn-lr", type=float, default=4e-3, help="learning rate, the judge's too")
    add("--vit-lr", type=float, default=1e-3, help="learning rate")
    add("--scale", type=float, nargs=2, default=(0.7, 1.0), help="of the crops that train them")
    add("--mask-ratio", type=float, default=0.75, help="of the scores that the rankers learn")
    add("--list-size", type=int, default=10, help="scores of an image that a ranker learns from")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the training, a run for each")
    text = "keep what is trained here; started again, it goes on"
    add("--runs", type=Path, help=text)
    add("--ship", action="store_true", help="write the first seed's weights for --quick")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.test_scenes = [0], min(args.test_scenes, 400)
    where = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        rows, trained = run(args, where, Path(name) if args.quick else args.runs or Path(name))
    if args.ship and not args.quick:
        ship(trained, WEIGHTS)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = f"{NAME}_quick" if args.quick else NAME
    draw_scenes(trained, args.output / f"{stem}_scenes.png")
    tables.conclude(stem, TITLE, rows, table(rows), goals(rows), plot(rows), args)
    unmet = [row["goal"] for goal in musts(rows) for row in goal.check(rows) if row[""] != "met"]
    if unmet:
        raise SystemExit(f"not met: {'; '.join(unmet)}")


if __name__ == "__main__":
    main()
