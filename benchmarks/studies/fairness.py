"""Does a selector that never saw a label treat all classes alike, and one that saw labels not?

Claim. A selector trained with the labels of five digits keeps these and drops the other five.
LTRP, contrast and other selectors without labels keep seen and unseen digits alike. A classifier
recognises unseen classes better from patches that were chosen without labels.

Arithmetic. Scenes of 64 px are 64 patches of 8; 2 to 4 digits cover 9 % of a scene, and the best
16 patches can hold 95 % of their ink, a random 16 a quarter. A selector that misses all unseen
digits and is right about the others has a recall gap near 0.7. With 2000 scenes, of which 30 % show
a class, the average precision of a class is known to about 0.02, a share of ink to 0.01.

Without labels, 20 000 scenes train an MAE (`ltrp_timm.train.train_teacher`) and four LTRP rankers
(`train_ranker`: removal × aggregate of the scores). With the labels of five digits they train a CNN
(→ `cam`, blurred or not, `grad_cam`) and a ViT that starts from the MAE (→ `attention`); once for
0-4 and once for 5-9: `seen` says which. The judge is one classifier of all ten digits, trained once
under masks that favour no selector. It gets only the kept patches. Measured on new scenes of other
samples of the digits:
    recall   share of the ink of the digits in kept patches; mean over the five classes
    mAP      of the judge; mean over the five classes
    gap      seen − unseen. A class may be easier than another: of selectors without labels the gap
             of 5-9 is that of 0-4 with another sign, and `all patches` has the judge's own
    own mAP  of the classifier behind a selector, on whole scenes and its classes
    AUC      chance that a patch with ink outranks one without, for the teacher's own scores under
             one mask: what a ranker could learn from
Scenes to train on are the same for every seed, those to measure on are each seed's own; settings
were chosen in trials with other seeds and other scenes to measure on. On a network that pools by
maximum Grad-CAM is CAM, by its definition. The run fails where a goal is not met. Goals are for
means over the seeds; a single seed may miss one (the teacher of the first does: its AUC is 0.086
above that of `decoder` removal, the bound is 0.1).
`low` and `high` are a 95 % interval over resampled scenes; in rows of all seeds, the least and the
largest of the seeds. `smooth` scenes, without noise, blobs and strokes, are a control.
`--quick` loads weights that were trained so (the third seed's) and measures fewer scenes.
"""

import argparse
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import tables
from common import Row, set_up
from tables import Goal

from ltrp_timm.commands._flags import positive
from studies.fairness.compared import CAM, labels_of
from studies.fairness.judged import PARTS, judged, over_seeds
from studies.fairness.pictures import draw_scenes, plot
from studies.fairness.scenes import TRAIN, make_scenes
from studies.fairness.stages import (
    LTRP,
    Run,
    Trained,
    add_epochs,
    load_shipped,
    make_parser,
    ship,
    train_all,
)

NAME = "fairness"
TITLE = "What is kept of classes that labels named, and of others"
WEIGHTS = Path(__file__).parent / "fairness" / "quick.safetensors"

SETTINGS = ("scale", "scenes", "test_scenes", "mask_ratio", "list_size", "teacher_epochs")
SETTINGS += ("ranker_epochs", "cnn_epochs", "vit_epochs", "judge_epochs")
SETTINGS += ("teacher_lr", "ranker_lr", "cnn_lr", "vit_lr")


def goals(rows: list[Row]) -> list[Goal]:
    """What must hold of means over seeds, or the run fails.

    There is no goal for LTRP against weight-free scores.
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
        Goal(
            "teacher's AUC − with removal=decoder",
            {**total, "method": LTRP[0]},
            "auc_above_decoder",
            ">=",
            0.1,
        ),
    ]


def run(args: argparse.Namespace, where: Row, folder: Path) -> tuple[list[Row], Trained]:
    """Train, or load, and judge each seed; rows, and what the first seed trained."""
    rows: list[Row] = []
    first: Any = None
    scenes = cache(lambda: make_scenes(args.scenes, 0, TRAIN))
    fixed = {name: getattr(args, name) for name in SETTINGS}
    for seed in args.seeds:
        if args.quick:
            trained, shipped = load_shipped(WEIGHTS)
            fixed |= {**shipped, "test_scenes": args.test_scenes}
            seed = int(fixed.pop("seed"))
        else:
            trained = train_all(Run(folder / f"seed_{seed}", seed, args, fixed), scenes)
        first = first or trained
        seconds = round(sum(trained.seconds.values()), 1)
        for row in judged(trained, seed, args, folder):
            size = abs(row["recall_gap"])
            rows.append({"seed": seed, **row, "recall_gap_size": size, "train_seconds": seconds})
        print(f"seed {seed}: {seconds:.0f} s of training", flush=True)
    return [{**row, **fixed, **where} for row in [*rows, *over_seeds(rows)]], first


def text_of(row: Row, column: str, spec: str) -> str:
    """A figure as text; – for none."""
    return tables.figure(row, column, spec) if row[column] != "" else "–"


def table(rows: list[Row]) -> list[Row]:
    """The figures over all seeds and of each half as text: means, and the extremes of the seeds.

    Over both halves the gap of a selector without labels is zero by construction.
    """
    shown = [row for row in rows if row["seed"] == "all" and row["seen"] != "both"]
    return [
        {
            "scenes": row["images"],
            "keep": f"{row['keep_ratio']:g}",
            "selector": row["method"],
            "labels": labels_of(row["method"]),
            "seen digits": row["seen"],
            **{
                f"{name} {part}": text_of(row, f"{name.lower()}_{part}", ".2f")
                for name in ("recall", "mAP")
                for part in PARTS
            },
            "unseen mAP − contrast's": text_of(row, "map_unseen_above_contrast", "+.3f"),
            "teacher's AUC": text_of(row, "teacher_auc", ".2f"),
            "own mAP": text_of(row, "own_map", ".2f"),
            "ms an image": text_of(row, "rank_ms", ".3f"),
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
    add("--quick", action="store_true", help="load trained weights, measure at most 400 scenes")
    add("--teacher-epochs", type=positive, default=8, help="of the MAE, batches of 64")
    add_epochs(parser, "--cnn-epochs", [3, 3], "of each CNN, batches of 64")
    add_epochs(parser, "--vit-epochs", [3], "of each ViT, batches of 64")
    add_epochs(parser, "--judge-epochs", [4], "of the judge, batches of 64")
    add("--teacher-lr", type=float, default=3e-3, help="learning rate")
    add("--cnn-lr", type=float, default=4e-3, help="learning rate, the judge's too")
    add("--vit-lr", type=float, default=1e-3, help="learning rate")
    text = "folder for what is trained; a second run continues there"
    add("--runs", type=Path, help=text)
    add("--ship", action="store_true", help="write the weights of the first seed for --quick")
    parser.set_defaults(name=NAME)
    args = parser.parse_args()
    if args.quick and (args.ship or args.runs):
        parser.error("--quick loads what was shipped: it goes without --ship and --runs")
    if args.quick:
        args.seeds, args.test_scenes = [0], min(args.test_scenes, 400)
    where = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        rows, trained = run(args, where, args.runs or Path(name))
    args.output.mkdir(parents=True, exist_ok=True)
    stem = f"{NAME}_quick" if args.quick else NAME
    draw_scenes(trained, args.output / f"{stem}_scenes.png")
    tables.conclude(NAME, TITLE, rows, table(rows), goals(rows), plot(rows), args)
    checks = [(goal, goal.check(rows)) for goal in goals(rows)]
    unmet = [row["goal"] for _, found in checks for row in found if row[""] != "met"]
    unmet += [f"{goal.text} (no such row)" for goal, found in checks if not found]
    if unmet:
        raise SystemExit(f"not met: {'; '.join(unmet)}")
    if args.ship:
        settings = {name: getattr(args, name) for name in SETTINGS}
        ship(trained, WEIGHTS, {**settings, "seed": args.seeds[0]})
        print(f"{WEIGHTS} written")


if __name__ == "__main__":
    main()
