"""Fine-tune a pruned ViT, or a plain timm model, on labelled images."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import trunc_normal_
from torch import nn

from ltrp_timm.data.labels import ClassData, listed_names, open_class_data, order_of
from ltrp_timm.data.multi_label import open_multi_label_data
from ltrp_timm.data.sources import Sources
from ltrp_timm.layers.ml_decoder import MLDecoder, make_head
from ltrp_timm.measure.accuracy import seen_classes
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import is_source, open_model, with_front_end
from ltrp_timm.models.timm_interface import GENERIC
from ltrp_timm.runtime.keyed_rng import sample_seed, seeded
from ltrp_timm.runtime.world import join_world
from ltrp_timm.scoring import CachedTransform
from ltrp_timm.share.save import check_ranker
from ltrp_timm.train.classify import ClassifyTask, MultiLabelTask
from ltrp_timm.train.distill import Distillation
from ltrp_timm.train.loop import Summary, fit
from ltrp_timm.train.recipe import MULTI_LABEL_KEEP_RATIO, KeepPlan, Recipe, split_options
from ltrp_timm.train.settings import Settings, make_sources

HEAD_STD = 2e-5  # of a new head, as published
RANDOM = "random: this trains from the start (pretrained or checkpoint begins with weights)"


def finetune(model: Any, data: Any, output: Any, **options: Any) -> Summary:
    """Fine-tune a model; ``timm.create_model("local-dir:OUTPUT", pretrained=True)`` loads it.

    One process, or several that ``torchrun`` starts. The output folder gets the model of the last
    epoch (that of the best held-out accuracy in ``best``), ``log.csv``, and the checkpoint from
    which a run continues.

    Args:
        model: An ``ltrp_*`` name, any timm model, ``hf-hub:…`` or ``local-dir:…``. A
            ``keep_ratio`` or a ``ranker`` turns a plain timm ViT into a pruned one; without them it
            is trained as it is. In Python also a module, which is trained in place.
        data: Labelled images: a folder with a folder for each class (below ``train``, if there is
            such a folder), a ``.tar`` of one or a name that timm's ``create_dataset`` takes
            (``hfds/…``, ``wds/…``, ``torch/…``). With ``multi_label``, the folder of the files that
            ``labels`` names. In Python also a torch dataset of (picture, class number).
        output: Folder of the run, new or empty.
        **options: See ``Recipe`` (model, budget, teacher), ``Augmentation`` (images and labels)
            and ``Settings`` (optimisation and bookkeeping). Defaults are the published ones: 50
            epochs, 5 of them warm-up, AdamW, 1e-3 · images per update / 256 down to 1e-6, weight
            decay 0.05, layer decay 0.75, drop path 0.1, RandAugment, random erasing, label
            smoothing, a new head of standard deviation 2e-5; the ranker is frozen. With
            ``multi_label``: 100 epochs, 5e-4 · images per update / 256, layer decay 0.65, an
            average of the weights (0.9997), three quarters of the patches, the asymmetric loss.

    Returns:
        How the run ended.

    Raises:
        ValueError: An argument is out of its range, classes disagree, no image is readable, or the
            checkpoint is of another configuration.
        TypeError: An argument is unknown, or patches cannot be dropped from the model.
        FileNotFoundError: Data or weights do not exist.
        FileExistsError: ``output`` holds a run.
        BlockingIOError: Another process writes to ``output``.
        NonFiniteLossError: The loss is not finite.

    Source: Luo et al. (2024), Learning to rank patches for unbiased image redundancy reduction.

    >>> finetune("ltrp_vit_base", "photos", "run", pretrained=True)  # doctest: +SKIP
    """
    recipe, augmentation, common = split_options(options)
    recipe = _with_published_budget(model, recipe)
    if recipe.gate and common.compile:
        raise ValueError(
            f"gate={recipe.gate!r} installs a forward hook and cannot be compiled; drop compile."
        )
    with join_world(common.device) as world:
        classes = open_classes(data, common, recipe)
        seen = seen_classes(recipe.seen_classes, classes.class_names)
        with seeded(sample_seed(common.seed, 0, 0, "weights")):
            net, notes, new_head = make_network(model, recipe, classes)
        net = net.to(world.device)
        images = image_config(net, recipe.img_size)
        parts = {
            "model": net,
            "plan": make_plan(net, recipe, common),
            "augmentation": augmentation,
            "distillation": make_distillation(net, recipe, images, new_head),
            "gate": recipe.train_ranker,
            "channels_last": recipe.channels_last,
            "cached": recipe.index_cache is not None,
        }
        if recipe.multi_label:
            loss = recipe.loss or "asymmetric"
            task: ClassifyTask = MultiLabelTask(**parts, loss=loss, seen_classes=seen)
        else:
            task = ClassifyTask(**parts)
        train, measure = augmentation.transforms(images)
        if recipe.index_cache is not None:
            if augmentation.mixes:
                raise ValueError(
                    "index_cache holds scores of single images; set mixup and cutmix to 0."
                )
            train = CachedTransform(recipe.index_cache, net, classes.train, train)
        common = dataclasses.replace(common, val_data=classes.held_out)
        size = tuple(images["input_size"][-2:])
        sources = make_sources(
            classes.train,
            common,
            world,
            train_transform=train,
            eval_transform=measure,
            img_size=size,
            labelled=True,
        )
        if augmentation.mixes and sources.batch_size % 2:
            raise ValueError(f"mixing needs an even batch_size, got {sources.batch_size}.")
        task.notes = (*classes.notes, *notes, _describe(task, sources))
        return fit(task, sources, common, world, output)


def open_classes(data: Any, common: Settings, recipe: Recipe) -> ClassData:
    """Open training and held-out images with one class each, or several."""
    if not recipe.multi_label:
        names = ("split", "val_data", "val_split", "input_key", "target_key")
        named = {name: getattr(common, name) for name in names}
        named["root"] = common.data_root
        return open_class_data(data, num_classes=recipe.num_classes, **named)
    for name in ("data_root", "input_key", "target_key", "num_samples"):
        if getattr(common, name) is not None:
            raise ValueError(f"{name} is for named datasets: no multi_label.")
    return open_multi_label_data(
        data,
        recipe.labels,
        val_data=common.val_data,
        val_labels=recipe.val_labels,
        num_classes=recipe.num_classes,
        skip_absent=recipe.skip_absent,
    )


def _with_published_budget(model: Any, recipe: Recipe) -> Recipe:
    """Keep 147 of 196 patches with several classes, unless the user or a saved model differs."""
    named = not isinstance(model, nn.Module) and not is_source(str(model))
    if not recipe.multi_label or recipe.keep_ratio is not None or not named:
        return recipe
    ours = str(model).split(".")[0] in timm.list_models(f"{GENERIC}*")
    pruned = ours or recipe.front or recipe.head
    return dataclasses.replace(recipe, keep_ratio=MULTI_LABEL_KEEP_RATIO) if pruned else recipe


def make_network(model: Any, recipe: Recipe, classes: ClassData) -> tuple[Any, list[str], bool]:
    """Make the model to train; returns it, notes for the user, and whether its head is new."""
    front, net = recipe.front, model
    if isinstance(model, nn.Module):
        for name in ("pretrained", "checkpoint", "img_size", "model_kwargs"):
            if getattr(recipe, name):
                raise ValueError(f"{name} goes with a model's name; this model is a module.")
        if front or isinstance(model, LTRPModel):
            net = with_front_end(model, dict(front))
        notes = []
    else:
        kwargs = dict(recipe.model_kwargs or {})
        for name, value in (("img_size", recipe.img_size), ("drop_path_rate", recipe.drop_path)):
            if value is not None:
                kwargs[name] = value
        net, origin = open_model(
            str(model),
            pretrained=recipe.pretrained or (None if is_source(str(model)) else False),
            checkpoint=recipe.checkpoint,
            plain=not front,
            **front,
            **kwargs,
        )
        notes = [f"weights: {origin or RANDOM}"]
    _prepare_ranker(net, recipe)
    named = bool((net.pretrained_cfg or {}).get("label_names"))
    new_head = fit_head(net, classes.num_classes, classes.class_names)
    if recipe.head is not None:
        new_head = put_head(net, recipe.head, recipe.head_args) or new_head
    classes.match(net.pretrained_cfg.get("label_names"))
    head = "a new one" if new_head else "that of the weights"
    notes.append(f"head: {head}, for {classes.num_classes} classes")
    if not (new_head or named) and classes.class_names:
        how = order_of(classes.class_names)
        notes.append(f"the weights name no classes; those of the data are taken {how}")
    if recipe.channels_last:
        net = net.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        net.set_grad_checkpointing(True)
    check_network(net)
    return net, notes, new_head


def _prepare_ranker(net: Any, recipe: Recipe) -> None:
    """Check that the ranker can be saved with the model; unfreeze it if it is trained."""
    if not isinstance(net, LTRPModel):
        if recipe.train_ranker:
            raise ValueError("train_ranker needs a pruned model: give a ranker or a keep_ratio.")
        return
    if net.budget is not None:
        hint = f"give --ranker {net.ranker.name} (in Python, set model.budget = None) to end it"
        raise ValueError(f"an adaptive budget is calibrated after training: {hint}.")
    if recipe.train_ranker:
        if not getattr(net.ranker, "learned", True):
            raise ValueError(f"train_ranker: the {net.ranker.name} ranker has no weights.")
        net.ranker.trained = True
        net.ranker.requires_grad_(True)
    check_ranker(net.ranker, whole=True)


def make_plan(net: Any, recipe: Recipe, common: Settings) -> KeepPlan:
    """Plan the keep ratio of each update."""
    pruned = isinstance(net, LTRPModel)
    ratio = recipe.keep_ratio
    if ratio is None:
        if recipe.keep_schedule and not pruned:
            raise ValueError("keep_schedule leads to a keep_ratio: give one.")
        ratio = net.keep_ratio if pruned else 1.0
    schedule, length = recipe.keep_schedule, recipe.keep_schedule_epochs
    return KeepPlan(ratio, schedule, length, epochs=common.epochs, seed=common.seed)


def make_distillation(
    net: Any, recipe: Recipe, images: Mapping[str, Any], new_head: bool
) -> Distillation | None:
    """Open the unpruned model to learn from, if there is one, and check that it fits."""
    if recipe.distill is None:
        return None
    if recipe.distill == "self":
        if new_head:
            raise ValueError(
                "distill='self' learns from the start weights, whose head is new here and "
                "knows nothing: name a fine-tuned model."
            )
        teacher = copy.deepcopy(net)
    else:
        teacher, _ = open_model(recipe.distill, pretrained=True, plain=True)
    device = next(net.parameters()).device
    names = ("weight", "temperature", "features")
    options = {name: getattr(recipe, f"distill_{name}") for name in names}
    distillation = Distillation(teacher.to(device), net, **options)
    distillation.check(torch.zeros(1, *images["input_size"], device=device), net)
    return distillation


def _describe(task: ClassifyTask, sources: Sources) -> str:
    if task.pruned:
        ratios = " ".join(f"{ratio:g}" for ratio in task.plan.ratios)
        kept = f"{task.model.ranker.name} keeps {ratios} of the patches"
    else:
        kept = "a plain model, all patches"
    return f"{kept}; {sources.describe()}"


def fit_head(model: Any, num_classes: int, class_names: Sequence[str]) -> bool:
    """Give a model, in place, a new head for these classes unless its head is already for them.

    A head stays if it has C classes and did not record other names. A new head starts close to
    zero, so that the features decide the first steps. The names, C or none, are recorded.

    Returns:
        Whether the head is new.
    """
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    known = listed_names(cfg.get("label_names"))
    others = bool(known and class_names) and set(known) != set(class_names)
    new = model.num_classes != num_classes or others
    if new:
        model.reset_classifier(num_classes)
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            if isinstance(head, MLDecoder):  # weights close to zero would stop its own layers
                continue
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_(module.weight, std=HEAD_STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
    for key in ("label_names", "label_descriptions"):
        cfg.pop(key, None)
    names = list(class_names) if new or not known else known
    model.pretrained_cfg = model.default_cfg = {
        **cfg,
        "num_classes": num_classes,
        **({"label_names": names} if names else {}),
    }
    return new


def put_head(model: Any, name: str, args: Mapping[str, Any] | None) -> bool:
    """Give a pruned model the named head, unless it has one with these arguments.

    Returns whether the head is new. TypeError if the model is not pruned or gives no tokens.
    """
    if not isinstance(model, LTRPModel):
        raise TypeError(f"head {name!r} needs a pruned model: give a ranker or a keep_ratio.")
    found = model.get_classifier()
    if isinstance(found, MLDecoder) and {**found.config(), **(args or {})} == found.config():
        return False
    model.set_classifier(make_head(name, model.backbone, args))
    return True


def image_config(model: Any, img_size: int | None = None) -> dict[str, Any]:
    """timm's data configuration of a model at its present size; ValueError unless it takes RGB."""
    if isinstance(model, LTRPModel):
        config = model.data_config()
    else:
        config = resolve_model_data_config(model)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = (img_size, img_size) if size is None and img_size else size
        if size is not None:
            config["input_size"] = (config["input_size"][0], *size)
    channels = getattr(model, "in_chans", config["input_size"][0])
    if channels != 3:
        raise ValueError(f"pictures have 3 channels, the model takes {channels}.")
    return config


def check_network(model: Any) -> None:
    """Run a model once on an image of zeros; ValueError unless it returns logits (B, C)."""
    size = image_config(model)["input_size"]
    parameter = next(model.parameters())
    images = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    with torch.no_grad():
        out = model.eval()(images)
    model.train(training)
    if not isinstance(out, torch.Tensor) or out.dim() != 2:
        raise ValueError(f"{type(model).__name__} gives no logits (B, C).")
