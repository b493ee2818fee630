"""A ranker, a teacher or a pruned model out of a checkpoint that was read."""

from typing import Any, Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from ltrp_timm.convert.found import RANKER, TEACHER, Checkpoint
from ltrp_timm.convert.plain_vit import build_ranker, build_vit, read_sizes, usual_heads
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.teacher import MAETeacher, teacher_of
from ltrp_timm.train.targets import open_ranker

Lines = List[Tuple[str, str]]


def make_ranker(found: Checkpoint, prefix: str, given: Mapping[str, Any], report: Lines) -> Any:
    """The ranker below a prefix.

    Args:
        found: the file.
        prefix: of its names; empty where the file is that ranker.
        given: num_heads and img_size, None where they are to be found.
        report: gets a line.

    Raises:
        ValueError: something that neither shapes nor arguments tell.
        RuntimeError: a table of the tensors that are missing, unexpected or of another shape.
    """
    weights = found.part(prefix)
    source = f"{prefix}* in {found.source}" if prefix else found.source
    sizes, line = _sizes(found, weights, source, "score_net", given)
    ranker = build_ranker(weights, sizes, source)
    report.append(("mapped", f"{_label(prefix, len(weights))} to a {ranker.name} ranker: {line}"))
    return ranker


def make_teacher(found: Checkpoint, given: Mapping[str, Any], report: Lines) -> MAETeacher:
    """The MAE of a file.

    Args:
        found: the file.
        given: arguments of ``MAETeacher``, None where they are to be found.
        report: gets a line.

    Raises:
        ValueError: no whole MAE, or something that neither shapes nor arguments tell.
        RuntimeError: a table of the tensors that are missing, unexpected or of another shape.
    """
    inner = found.part(TEACHER)
    alone = len(inner) in (0, len(found.weights))
    args: Dict[str, Any] = {
        "num_heads": found.told("mim", "num_heads", alone),
        "decoder_num_heads": found.told("mim", "decoder_num_heads", True),
    }
    if isinstance(found.args.get("norm_pix_loss"), bool):
        args["norm_pix_loss"] = found.args["norm_pix_loss"]
    args.update({name: value for name, value in given.items() if value is not None})
    args = {name: value for name, value in args.items() if value is not None}
    source = f"{TEACHER}* in {found.source}" if inner else found.source
    teacher = teacher_of(found.weights, found.config, found.path, source, args)
    count, kept = len(inner or found.weights), len(teacher.state_dict())
    fused = "" if count == kept else f", {kept} with query, key and value as one,"
    label = _label(TEACHER if inner else "", count)
    report.append(("mapped", f"{label}{fused} to a teacher: {_teacher_line(teacher)}"))
    return teacher


def _teacher_line(teacher: MAETeacher) -> str:
    config = teacher.config()
    line = _size_line(config["img_size"], config["patch_size"])
    for part in ("", "decoder_"):
        width, heads = config[f"{part}embed_dim"], config[f"{part}num_heads"]
        name = part.rstrip("_") or "encoder"
        line += f", {name} {config[f'{part}depth']} blocks of width {width} with {heads} heads"
    return f"{line}, norm_pix_loss {config['norm_pix_loss']}, norm_eps {config['norm_eps']:g}"


def make_model(
    found: Checkpoint, given: Mapping[str, Any], front: Mapping[str, Any], report: Lines
) -> LTRPModel:
    """The pruned model of a fine-tuned ViT.

    Args:
        found: the file.
        given: num_heads and img_size, None where they are to be found.
        front: ranker, keep_ratio and selection.
        report: gets a line for each part.

    Raises:
        ValueError: no ranker, or two, or something that neither shapes nor arguments tell.
        RuntimeError: a table of the tensors that are missing, unexpected or of another shape.
    """
    inside, name = bool(found.part(RANKER)), front["ranker"]
    if inside and name is not None:
        raise ValueError(f"{found.source} brings a ranker of its own: leave ranker (--ranker) out.")
    if not inside and name is None:
        raise ValueError(
            f"{found.source} is a fine-tuned ViT without its ranker: pass ranker (--ranker), the "
            "folder of the one converted from stage 1, or the name of one that needs no weights."
        )
    own = {
        name: tensor
        for name, tensor in found.weights.items()
        if not name.startswith((RANKER, TEACHER))
    }
    sizes, line = _sizes(found, own, found.source, "model", given)
    vit = build_vit(own, sizes, found.source)
    line += f", {vit.num_classes} classes, global_pool {vit.global_pool}"
    if vit.num_classes == vit.patch_embed.num_patches:
        line += " (a class for each patch: if it is a ranker, ask for that with --to ranker, kind=)"
    report.append(("mapped", f"{_label('', len(own))} to a ViT: {line}"))
    if inside:
        ranker = make_ranker(found, RANKER, {**given, "num_heads": None}, report)
    else:
        ranker = open_ranker(name, sizes["patch_size"])
    model = drop_patches(vit, ranker, front["keep_ratio"], front["selection"])
    line = f"ranker {ranker.name}, selection {model.selection}, keep_ratio {model.keep_ratio:g}"
    report.append(("mapped", f"in front of it: {line}"))
    return model


def _sizes(
    found: Checkpoint,
    weights: Mapping[str, Tensor],
    source: str,
    owner: str,
    given: Mapping[str, Any],
) -> Tuple[Dict[str, Any], str]:
    """Sizes of a plain ViT with its heads, and a line on them."""
    sizes = read_sizes(weights, source, given["img_size"])
    width = sizes["embed_dim"]
    heads: Optional[int] = given["num_heads"]
    why = "as told"
    if heads is None:
        alone = len(weights) == len(found.weights)
        heads, why = found.told(owner, "num_heads", alone), "by the arguments in the file"
    if heads is None:
        heads, why = usual_heads(width), "usual at this width"
    if heads is None:
        raise ValueError(
            f"{source} does not tell the number of attention heads at a width of {width}: pass "
            "num_heads (--num-heads)."
        )
    if heads < 1 or width % heads:
        raise ValueError(f"{source}: {heads} heads ({why}) do not divide a width of {width}.")
    line = _size_line(sizes["img_size"], sizes["patch_size"])
    line += f", {sizes['depth']} blocks of width {width} with {heads} heads ({why})"
    return {**sizes, "num_heads": heads}, line


def _size_line(size: Any, patch: Any) -> str:
    return f"{size[0]}x{size[1]} pixels, patches of {patch[0]}x{patch[1]}"


def _label(prefix: str, count: int) -> str:
    return f"{prefix}* ({count} tensors)" if prefix else f"{count} tensors"
