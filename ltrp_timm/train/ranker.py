"""Train a ranker on images without labels: to have the order of a teacher's scores.

The teacher is an MAE (its exact pseudo-scores), another ranker (its scores), or both.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ltrp_timm import losses
from ltrp_timm.data.images import check_data
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.sources import cropped_sources
from ltrp_timm.layers import resize_score_map
from ltrp_timm.metrics import ndcg, spearman
from ltrp_timm.rankers import create_ranker, ranker_class
from ltrp_timm.runtime.keyed_rng import sample_seed, seeded
from ltrp_timm.runtime.world import join_world
from ltrp_timm.selection import num_keep, select_top
from ltrp_timm.train.loop import fit, rehearse
from ltrp_timm.train.pictures import show_images
from ltrp_timm.train.settings import SCALE, check_range, make_settings
from ltrp_timm.train.state import digest
from ltrp_timm.train.targets import Targets, accepted, open_ranker, saved_name
from ltrp_timm.train.task import Summary
from ltrp_timm.visualize import kept_patches, row, score_map, stack_rows

LOSSES = ("list_mle", "list_net", "rank_net", "focused_rank", "pointwise_mse", "lambda_rank")
_WITH_CHANCE = LOSSES[:4]  # their loss of equal scores does not depend on the targets
DEFAULTS = {"epochs": 400, "base_lr": 1.5e-4, "weight_decay": 0.06}


def train_ranker(
    data: Any,
    output: Any,
    ranker: str = "conv",
    teacher: Any = "facebook/vit-mae-base",
    img_size: int | None = None,
    ranker_args: Mapping[str, Any] | None = None,
    init_from: Any = None,
    distill_from: Any = None,
    distill_weight: float = 0.5,
    loss: str = "list_mle",
    list_size: int | None = None,
    visible_only: bool = False,
    mask_ratio: float = 0.9,
    removal: str = "full",
    metric: str = "l1",
    aggregate: str = "mean",
    chunk: int | None = None,
    scale: Sequence[float] = SCALE,
    compare: Sequence[str] = (),
    dry_run: bool = False,
    **settings: Any,
) -> Summary:
    """Train a ranker; ``create_ranker(ranker, pretrained=output)`` loads it.

    One process, or as many as ``torchrun`` starts. The folder gets the ranker of the last epoch
    (that with the best held-out order in ``best``), ``log.csv``, and the checkpoint to go on from.

    Args:
        data: images without labels: a folder, a ``.tar``, a name that timm's ``create_dataset``
            takes (``hfds/…``, ``wds/…``), or a torch dataset of pictures.
        output: folder of the run, new or empty.
        ranker: name of one that learns.
        teacher: what ``create_teacher`` takes, a MAETeacher, or None with ``distill_from``.
        img_size: side of the images; None for the teacher's (224 without one).
        ranker_args: arguments of the ranker; its patch and image size are the teacher's by default.
        init_from: folder of the same ranker, to begin with its weights.
        distill_from: folder of a ranker, or the name of one without weights, whose scores are the
            target: in place of the teacher's with ``teacher=None``, else beside them.
        distill_weight: its share of the loss beside a teacher, in (0, 1).
        loss: one of ``ltrp_timm.losses``.
        list_size: scores of an image at most, drawn before they are computed; None: 20 of the
            teacher's, all when there is no teacher.
        visible_only: the ranker sees the visible patches alone while it trains (ViT rankers).
        mask_ratio: share of patches that the teacher does not see.
        removal: see ``semantic_density``.
        metric: likewise.
        aggregate: likewise.
        chunk: likewise.
        scale: share of a picture's area that a random crop takes, from and to.
        compare: names of rankers without weights that are measured beside it, for the log.
        dry_run: check everything and say what would be done; write nothing.
        **settings: see ``Settings``. Defaults here are the published ones: 400 epochs, a tenth of
            them warm-up, AdamW (0.9, 0.95), weight decay 0.06, 1.5e-4 · images per update / 256.

    Returns:
        How it ended.

    Raises:
        ValueError: an argument out of its range, no readable image, or a checkpoint of another
            configuration.
        TypeError: an argument of no such name.
        FileNotFoundError: data, teacher or ranker do not exist.
        FileExistsError: ``output`` holds a run, or is in use.
        NonFiniteLossError: the loss is no finite number.

    >>> train_ranker("photos", "run", epochs=10, mask_ratio=0.9)  # doctest: +SKIP
    """
    common = make_settings(DEFAULTS, settings)
    loss_function = _loss(loss)
    args = dict(ranker_args or {})
    check_range("scale", scale, 1.0)
    check_data(data)  # before a teacher is pulled
    scoring = {"removal": removal, "metric": metric, "aggregate": aggregate, "chunk": chunk}
    with join_world(common.device) as world:
        targets = Targets(
            teacher,
            distill_from,
            distill_weight,
            img_size,
            args.get("patch_size"),
            list_size,
            mask_ratio,
            scoring,
            world.device,
        )
        with seeded(sample_seed(common.seed, 0, 0, "weights")):
            net = make_ranker(ranker, targets, args, init_from)
        task = RankerTask(net.to(world.device), targets, loss_function, visible_only, loss, compare)
        sources = cropped_sources(data, common, world, targets, scale)
        return (rehearse if dry_run else fit)(task, sources, common, world, output)


def _loss(name: str) -> Callable[..., Tensor]:
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}.")
    function: Callable[..., Tensor] = getattr(losses, name)
    return function


def make_ranker(name: str, targets: Targets, args: Mapping[str, Any], init_from: Any) -> Any:
    """A ranker to train, on the grid of its targets unless ``args`` say otherwise.

    Raises:
        ValueError: it has nothing to learn, or ``init_from`` holds another one.
    """
    kind = ranker_class(name)
    if not kind.learned:
        raise ValueError(f"the {name} ranker has no weights to train.")
    if init_from is not None:
        found = saved_name(init_from)
        if found != name:
            raise ValueError(f"init_from {init_from} holds a {found!r} ranker, not {name!r}.")
        return create_ranker(name, pretrained=init_from, **args)
    sizes = {"img_size": targets.img_size, "patch_size": targets.patch_size}
    fitting = {key: size for key, size in sizes.items() if key in accepted(kind)}
    return create_ranker(name, **{**fitting, **args})


class RankerTask:
    """A ranker and what it learns.

    Args:
        ranker: images (B, 3, H, W) -> (B, h, w), on the device.
        targets: what it is to learn.
        loss_function: (pred (B, R), target (B, R)) -> scalar.
        visible_only: it sees the visible patches alone while it trains.
        loss_name: of the loss, for the record.
        compare: names of rankers without weights that are measured too.

    Raises:
        ValueError: ``visible_only`` with a ranker, or targets, that do not allow it.
    """

    name = "train-ranker"
    metric = "spearman"
    higher_is_better = True

    def __init__(
        self,
        ranker: Any,
        targets: Targets,
        loss_function: Callable[..., Tensor],
        visible_only: bool,
        loss_name: str,
        compare: Sequence[str] = (),
    ) -> None:
        self.model, self.targets, self.visible_only = ranker, targets, visible_only
        self.bridge, self.loss_name = targets.bridge_to(ranker), loss_name
        self.loss_function = loss_function
        if loss_name == "focused_rank":
            self.loss_function = partial(loss_function, k=min(10, targets.list_size))
        others = {name: open_ranker(name, targets.patch_size) for name in compare}
        self.others = {
            name: (targets.bridge_to(other), other.to(targets.device))
            for name, other in others.items()
        }
        self._check_grid()
        equal = torch.zeros(1, targets.list_size)
        ordered = torch.arange(float(targets.list_size)).unsqueeze(0)
        known = loss_name in _WITH_CHANCE
        self.chance = float(self.loss_function(equal, ordered)) if known else None
        self.start = digest(ranker.state_dict())

    def _check_grid(self) -> None:
        """Run it once: what it gives must be a map, and for ``visible_only`` the teacher's grid."""
        images = torch.zeros(1, 3, *self.targets.img_size, device=self.targets.device)
        with torch.no_grad():
            found = tuple(self.model.eval()(self.bridge(images)).shape[1:])
        if not self.visible_only:
            return  # another grid is bridged: the map is resized
        if "visible_indices" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                f"visible_only is for rankers that can leave patches out (vit_…), not for the "
                f"{self.model.name} ranker."
            )
        if self.targets.teacher is None:
            raise ValueError("visible_only needs a teacher: it tells which patches are visible.")
        if found != self.targets.grid_size:
            raise ValueError(
                f"visible_only needs one grid: the teacher's is {self.targets.grid_size}, the "
                f"ranker's {found}."
            )

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {
            "ranker": {"name": self.model.name, **self.model.config()},
            "start": self.start,
            "loss": self.loss_name,
            "visible_only": self.visible_only,
            **self.targets.config(),
        }

    def scores(self, model: nn.Module, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) -> scores (B, N) on the grid of the targets."""
        own = self.bridge(images)
        found = model(own) if visible is None else model(own, visible)
        return resize_score_map(found, *self.targets.grid_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean ranking loss."""
        lists = self.targets.draw(batch)
        visible = lists.visible if self.visible_only else None
        pred = self.scores(model, batch.images, visible).gather(1, lists.indices)
        parts = [weight * self.loss_function(pred, target) for weight, target in lists.scores]
        return torch.stack(parts).sum()

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """How well the order of the first target is met by a ranker that sees whole images."""
        lists = self.targets.draw(batch)
        pred = self.scores(model, batch.images).gather(1, lists.indices)
        parts = [
            weight * self.loss_function(pred, target, reduction="none")
            for weight, target in lists.scores
        ]
        out = {"loss": torch.stack(parts).sum(dim=0)}
        rankings = {"": pred}
        for name, (bridge, other) in self.others.items():
            found = resize_score_map(other(bridge(batch.images)), *self.targets.grid_size)
            rankings[f"_{name}"] = found.gather(1, lists.indices)
        for name, scores in rankings.items():
            out[f"spearman{name}"] = spearman(scores, lists.scores[0][1], reduction="none")
            out[f"ndcg{name}"] = ndcg(scores, lists.scores[0][1], reduction="none")
        return out

    def save(self, model: Any, folder: Path) -> None:
        """Write the ranker for ``create_ranker``."""
        model.trained = True
        model.save(folder, overwrite=True)

    def draw(self, model: nn.Module, batch: Batch) -> Image.Image:
        """A row for each image: the photo, its score map, what is kept at a half."""
        targets, (h, w) = self.targets, self.targets.grid_size
        scores, (p, q) = self.scores(model, batch.images), targets.patch_size
        keep = select_top(scores, num_keep(h * w, 0.5))
        rows = []
        for photo, score, kept in zip(
            show_images(batch.images, targets.mean, targets.std), scores, keep
        ):
            photo = photo.crop((0, 0, w * q, h * p))
            parts = {
                "photo": photo,
                "score: yellow = keep first": score_map(photo, score, (h, w)),
                "keep 0.5": kept_patches(photo, kept, (h, w)),
            }
            rows.append(row([(part, text) for text, part in parts.items()]))
        return stack_rows(rows)
