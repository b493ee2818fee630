"""Means over seen and unseen categories, their intervals, and the files of the results."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
import torch
from common import load_pyplot
from torch import Tensor

FILES = ("coco.csv", "coco.md", "coco.png", "coco_categories.csv", "coco_seen.txt")
PARTS = ("seen", "unseen", "gap")
TITLE = "Share of annotated objects in kept patches, by kind of object"
LEVEL = 0.95


@dataclass(frozen=True)
class Measured:
    """What was measured of M objects.

    Attributes:
        image: (M,) int64, numbers of their images.
        category: (M,) int64.
        share: (M,) float32, of the picture's area that an object takes.
        recall: (M, R) float32, of the object's area that is kept.
        columns: R rankers and keep ratios.
        categories: C names.
        seen: (C,) bool.
    """

    image: Tensor
    category: Tensor
    share: Tensor
    recall: Tensor
    columns: list[tuple[str, float]]
    categories: tuple[str, ...]
    seen: Tensor

    def counts(self) -> Tensor:
        """Objects by category (C,)."""
        return self.category.bincount(minlength=len(self.categories))


def category_means(values: Tensor, category: Tensor, weight: Tensor, count: int) -> Tensor:
    """Means over the objects of each category, NaN where it has none.

    Args:
        values: (M, R).
        category: (M,) int64, below ``count``.
        weight: (M,), how often an object counts.
        count: C.

    Returns:
        (C, R) float64.
    """
    weight = weight.double().unsqueeze(1)
    zeros = torch.zeros(count, 1, dtype=torch.float64)
    total = zeros.index_add(0, category, weight)
    sums = zeros.repeat(1, values.shape[1]).index_add(0, category, weight * values)
    return sums / total


def seen_unseen_gap(means: Tensor, seen: Tensor) -> Tensor:
    """Category means (C, R), seen (C,) bool -> (3, R): of seen, of unseen, and the difference.

    Categories that are NaN count nowhere.
    """
    of_seen, of_unseen = means[seen].nanmean(dim=0), means[~seen].nanmean(dim=0)
    return torch.stack([of_seen, of_unseen, of_seen - of_unseen])


def intervals(found: Measured, resamples: int, seed: int = 0) -> Tensor:
    """Bootstrap intervals over images.

    Args:
        found: what was measured.
        resamples: how many draws.
        seed: of the draws.

    Returns:
        (2, 3, R): the lower and the upper end for seen, unseen and gap.
    """
    images, place = found.image.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        pick = torch.randint(len(images), (len(images),), generator=generator)
        weight = pick.bincount(minlength=len(images))[place]
        means = category_means(found.recall, found.category, weight, len(found.categories))
        drawn.append(seen_unseen_gap(means, found.seen))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return torch.stack(drawn).nanquantile(ends, dim=0)


def table_rows(found: Measured, resamples: int, facts: tables.Row) -> list[tables.Row]:
    """A row for each ranker and keep ratio.

    Args:
        found: what was measured.
        resamples: of the bootstrap.
        facts: further columns, the same in each row.
    """
    counts, seen = found.counts(), found.seen
    ones = torch.ones(len(found.category))
    means = category_means(found.recall, found.category, ones, len(found.categories))
    sizes = category_means(found.share[:, None], found.category, ones, len(found.categories))
    values, (low, high) = seen_unseen_gap(means, seen), intervals(found, resamples)
    size = seen_unseen_gap(sizes, seen)[:, 0].tolist()
    rows = []
    for number, (ranker, ratio) in enumerate(found.columns):
        row: tables.Row = {"keep_ratio": ratio, "method": ranker}
        for part, name in enumerate(PARTS):
            ends = (values[part, number], low[part, number], high[part, number])
            named = zip((name, f"{name}_low", f"{name}_high"), ends)
            row |= {column: round(float(value), 5) for column, value in named}
        for part, mine in enumerate((seen, ~seen)):
            row[f"{PARTS[part]}_categories"] = int((counts[mine] > 0).sum())
            row[f"{PARTS[part]}_objects"] = int(counts[mine].sum())
            row[f"{PARTS[part]}_share_of_picture"] = round(size[part], 5)
        rows.append({**row, "resamples": resamples, **facts})
    return rows


def category_rows(found: Measured) -> list[tables.Row]:
    """A row for each category: empty figures where it has no object."""
    ones = torch.ones(len(found.category))
    means = category_means(found.recall, found.category, ones, len(found.categories)).tolist()
    rows = []
    for name, seen, count, values in zip(
        found.categories, found.seen.tolist(), found.counts().tolist(), means
    ):
        row: tables.Row = {"category": name, "seen": int(seen), "objects": count}
        for (ranker, ratio), value in zip(found.columns, values):
            row[f"{ranker}@{ratio:g}"] = round(value, 5) if count else ""
        rows.append(row)
    return rows


def report(rows: Sequence[tables.Row], found: Measured, args: argparse.Namespace) -> None:
    """Write all files and print the table."""
    output: Path = args.output
    first, line = rows[0], tables.environment_line(rows[0])
    text = tables.markdown_table([_shown(row) for row in rows])
    says = (
        f"{first['annotations']}: {first['images']} images with objects, of "
        f"{first['img_size']} px in patches of {first['patch_size']} ({first['crop_mode']}). "
        f"Seen: {_counted(first, 'seen')}. Unseen: {_counted(first, 'unseen')}. Left out: "
        f"{first['crowds_left_out']} crowds, {first['boxes_left_out']} objects without a "
        f"segmentation, {first['objects_hidden']} that the pictures do not show, "
        f"{first['images_unreadable']} images that could not be used. In brackets: {LEVEL:.0%} of "
        f"{first['resamples']} bootstrap draws of images."
    )
    tables.write_csv(rows, output / "coco.csv")
    tables.write_csv(category_rows(found), output / "coco_categories.csv")
    seen = [name for name, yes in zip(found.categories, found.seen.tolist()) if yes]
    (output / "coco_seen.txt").write_text("\n".join([*seen, ""]), encoding="utf-8")
    body = f"# {TITLE}\n\n{line}\n\n{says}\n\n{text}\n"
    (output / "coco.md").write_text(body, encoding="utf-8")
    picture = _plot(rows)
    title = textwrap.fill(f"{TITLE} ({line})", int(12 * picture.get_size_inches()[0]))
    picture.suptitle(title, fontsize=8)
    picture.tight_layout()
    picture.savefig(output / "coco.png", dpi=150)
    load_pyplot().close(picture)
    print(f"{says}\n\n{text}", flush=True)


def _counted(row: tables.Row, part: str) -> str:
    size = row[f"{part}_share_of_picture"]
    return (
        f"{row[f'{part}_objects']} objects of {row[f'{part}_categories']} categories, {size:.1%} "
        "of the picture each"
    )


def _shown(row: tables.Row) -> tables.Row:
    kept = f"{row['keep_ratio']:g} ({row['patches_kept']} of {row['patches']})"
    shown = {name: tables.figure(row, name, "+.3f" if name == "gap" else ".3f") for name in PARTS}
    return {"keep": kept, "ranker": row["method"], **shown}


def _plot(rows: Sequence[tables.Row]) -> Any:
    """A panel for each keep ratio: seen and unseen of each ranker; below it, the gap."""
    pyplot = load_pyplot()
    ratios = list(dict.fromkeys(row["keep_ratio"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    width = max(3.2, 0.55 * len(names) + 1)
    figure, axes = pyplot.subplots(
        2, len(ratios), figsize=(width * len(ratios), 6), squeeze=False, sharey="row", sharex=True
    )
    for (upper, lower), ratio in zip(axes.T, ratios):
        mine = [row for row in rows if row["keep_ratio"] == ratio]
        for shift, name in ((-0.15, "seen"), (0.15, "unseen")):
            _points(upper, mine, name, shift, name)
        _points(lower, mine, "gap", 0.0, None)
        upper.axhline(mine[0]["patches_kept"] / mine[0]["patches"], color="grey", lw=1, ls=":")
        lower.axhline(0.0, color="grey", lw=1)
        upper.set_title(f"keep ratio {ratio:g}", fontsize=9)
        lower.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        upper.grid(axis="y", alpha=0.3)
        lower.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("share of an object kept")
    axes[1, 0].set_ylabel("seen − unseen")
    axes[0, 0].set_ylim(0, 1)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    return figure


def _points(ax: Any, rows: Sequence[tables.Row], name: str, shift: float, label: Any) -> None:
    """Values with their intervals, which need not lie around them evenly."""
    values = [row[name] for row in rows]
    places = [place + shift for place in range(len(rows))]
    line = ax.plot(places, values, "o", ms=4, label=label)[0]
    ends = [row[f"{name}_low"] for row in rows], [row[f"{name}_high"] for row in rows]
    ax.vlines(places, *ends, color=line.get_color(), lw=1.5)
