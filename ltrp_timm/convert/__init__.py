"""Checkpoints of the authors, of MAE and of Hugging Face -> folders of this library.

The layout is found by the names of the tensors, sizes by their shapes. Nothing is written before
everything fits.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from torch import nn

from ltrp_timm.convert.found import (
    HF,
    MAE,
    RANKER,
    STAGE_1,
    STAGE_2,
    TEACHER,
    Checkpoint,
    open_checkpoint,
)
from ltrp_timm.convert.parts import Lines, make_model, make_ranker, make_teacher
from ltrp_timm.share.cards import check_card
from ltrp_timm.share.save import save_pretrained
from ltrp_timm.teacher import MAETeacher
from ltrp_timm.weights.files import PathLike

__all__ = ["KINDS", "Conversion", "convert_checkpoint"]

KINDS = ("ranker", "teacher", "model")
# what each layout can become, that which it becomes unasked first
_ALLOWED = {
    STAGE_1: ("ranker", "teacher"),
    STAGE_2: ("model", "ranker"),
    MAE: ("teacher",),
    HF: ("teacher",),
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion found and did.

    Attributes:
        layout: of the file.
        folders: what was written.
        report: (word, line) with the words "found", "mapped", "ignored" and "missing".
    """

    layout: str
    folders: Tuple[Path, ...]
    report: Tuple[Tuple[str, str], ...]


def convert_checkpoint(
    source: PathLike,
    output: PathLike,
    teacher: Optional[PathLike] = None,
    kind: Optional[str] = None,
    ranker: Optional[PathLike] = None,
    keep_ratio: float = 0.5,
    selection: str = "mixed",
    num_heads: Optional[int] = None,
    teacher_num_heads: Optional[int] = None,
    decoder_num_heads: Optional[int] = None,
    img_size: Union[int, Sequence[int], None] = None,
    model_card: Optional[Mapping[str, Any]] = None,
    cache_dir: Optional[PathLike] = None,
    token: Optional[str] = None,
) -> Conversion:
    """Turn a checkpoint of another layout into folders that this library loads.

    Read are: the authors' LTRP checkpoints of stage 1 (``score_net.*``, ``mim.*``), which become a
    ranker and, if asked, a teacher; of stage 2 (a fine-tuned plain ViT), which become a pruned
    model for ``timm.create_model("local-dir:…")``; the MAE authors' files and those of Hugging
    Face's ``ViTMAEForPreTraining``, which become a teacher. Sizes are those of the shapes. Numbers
    of heads are told here, or by the arguments that the training left in its file; else they are
    the usual ones of ViT-Ti to ViT-H.

    Args:
        source: a file, a folder or a Hub id, as for ``create_teacher``.
        output: new folder.
        teacher: new folder for the MAE of a stage 1 checkpoint.
        kind: "ranker", "teacher" or "model": what ``output`` gets; None goes by the layout.
        ranker: of a pruned model: folder or file of one, or the name of one without weights.
        keep_ratio: of a pruned model.
        selection: of a pruned model; "mixed" is the published one.
        num_heads: of what ``output`` gets.
        teacher_num_heads: of the encoder that ``teacher`` gets.
        decoder_num_heads: of an MAE's decoder.
        img_size: side or (height, width) of the images, where the grid of patches is not square.
        model_card: as in ``save_pretrained``; a teacher has no card.
        cache_dir: as in huggingface_hub.
        token: as in huggingface_hub.

    Returns:
        What was found, mapped and ignored.

    Raises:
        FileNotFoundError: nothing is at ``source``.
        FileExistsError: a folder to write is there already.
        OSError: the Hub or the disk refuses.
        ValueError: a layout that is not known, or something that neither shapes nor arguments tell.
        RuntimeError: a table of the tensors that are missing, unexpected or of another shape.

    >>> convert_checkpoint("ltrp.pth", "my-ranker", teacher="my-mae")  # doctest: +SKIP
    """
    targets = [Path(output), *([] if teacher is None else [Path(teacher)])]
    _check_targets(targets)
    check_card(model_card)
    found = open_checkpoint(source, cache_dir, token)
    kind = _check_kind(found, kind, teacher is not None)
    report: Lines = [("found", _describe(found))]
    given = {"num_heads": num_heads, "img_size": img_size}
    decoder = {"decoder_num_heads": decoder_num_heads}
    models: List[nn.Module] = []
    if kind == "model":
        front = {"ranker": ranker, "keep_ratio": keep_ratio, "selection": selection}
        models.append(make_model(found, given, front, report))
    elif kind == "ranker":
        prefix = RANKER if found.layout == STAGE_1 else ""
        models.append(make_ranker(found, prefix, given, report))
    if kind == "teacher" or teacher is not None:
        heads = num_heads if kind == "teacher" else teacher_num_heads
        models.append(make_teacher(found, {**given, **decoder, "num_heads": heads}, report))
    _report_rest(found, kind, teacher is not None, report)
    card: Dict[str, Any] = {"description": f"Converted from {found.name} ({found.layout})."}
    if kind == "ranker" or found.part(RANKER):
        card["ranker"] = f"converted from {found.name}"
    elif kind == "model" and ranker is not None and Path(ranker).exists():
        card["ranker"] = f"those of {Path(ranker).name}"
    _write(models, targets, {**card, **(model_card or {})})
    return Conversion(found.layout, tuple(targets), tuple(report))


def _check_targets(targets: Sequence[Path]) -> None:
    """New folders, or empty ones, neither inside the other."""
    for target in targets:
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{target} exists already: choose a new folder.")
    whole = [target.resolve() for target in targets]
    if len(whole) > 1 and (
        whole[0] in (whole[1], *whole[1].parents) or whole[1] in whole[0].parents
    ):
        raise ValueError(
            f"output and teacher must be folders apart, got {targets[0]} and {targets[1]}."
        )


def _check_kind(found: Checkpoint, kind: Optional[str], second: bool) -> str:
    allowed = _ALLOWED[found.layout]
    if kind is not None and kind not in allowed:
        raise ValueError(
            f"{found.source} is a checkpoint of the kind {found.layout}: it can become a "
            f"{' or a '.join(allowed)}, not {kind!r}."
        )
    kind = kind or allowed[0]
    if second and (found.layout, kind) != (STAGE_1, "ranker"):
        raise ValueError(
            f"{found.source} is a checkpoint of the kind {found.layout}: a teacher beside the "
            f"{kind} comes out of {STAGE_1} alone."
        )
    if (second or (kind, found.layout) == ("teacher", STAGE_1)) and not found.part(TEACHER):
        raise ValueError(f"{found.source} holds no MAE (mim.*): it gives no teacher.")
    return kind


def _describe(found: Checkpoint) -> str:
    beside = f"; beside them {', '.join(found.beside)}" if found.beside else ""
    parts = _count_stems(list(found.weights))
    return f"{found.layout}, {len(found.weights)} tensors: {parts}{beside}"


def _count_stems(names: Sequence[str]) -> str:
    counts: Dict[str, int] = {}
    for name in names:
        stem = name.split(".")[0] + (".*" if "." in name else "")
        counts[stem] = counts.get(stem, 0) + 1
    return ", ".join(f"{stem} ({count})" for stem, count in counts.items())


def _report_rest(found: Checkpoint, kind: str, second: bool, report: Lines) -> None:
    """Say what is left out; a table said already what does not fit."""
    used: Tuple[str, ...] = ("",)
    if found.layout == STAGE_1:
        used = (RANKER, TEACHER) if second else (RANKER if kind == "ranker" else TEACHER,)
    elif found.part(TEACHER):
        used = (TEACHER,)
    rest = [name for name in found.weights if not name.startswith(used)]
    if kind == "model" and found.part(TEACHER):
        rest = [name for name in found.weights if name.startswith(TEACHER)]
    asked = any(name.startswith(TEACHER) for name in rest) and found.layout == STAGE_1
    if rest:
        hint = "; --teacher DIR (teacher=) writes mim.*" if asked else ""
        report.append(("ignored", f"{_count_stems(rest)}{hint}"))
    beside = [name for name in found.beside if not (name == "args" and found.args)]
    if beside:
        report.append(("ignored", f"{', '.join(beside)}: no weights"))
    report.append(("missing", "nothing"))


def _write(models: Sequence[nn.Module], targets: Sequence[Path], card: Mapping[str, Any]) -> None:
    with _new_folders(targets) as folders:
        for model, folder in zip(models, folders):
            if isinstance(model, MAETeacher):
                model.save(folder)
            else:
                save_pretrained(model, folder, card)


@contextlib.contextmanager
def _new_folders(targets: Sequence[Path]) -> Iterator[List[Path]]:
    """Folders to fill, that get their names when all of them are whole, and vanish otherwise."""
    staged: List[Path] = []
    done: List[Path] = []
    umask = os.umask(0)
    os.umask(umask)
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            name = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
            staged.append(Path(name))
            os.chmod(name, 0o777 & ~umask)  # mkdtemp makes private folders
        yield staged
        for folder, target in zip(staged, targets):
            os.replace(folder, target)
            done.append(target)
    finally:
        whole = len(done) == len(targets)
        for folder in [*staged, *([] if whole else done)]:
            shutil.rmtree(folder, ignore_errors=True)
