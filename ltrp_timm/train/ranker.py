"""Train a ranker on images without labels, to reproduce the order of a teacher's scores.

The teacher is an MAE (its exact pseudo-scores), another ranker (its scores), or both.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from ltrp_timm import losses
from ltrp_timm.data.images import check_data
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.sources import SCALE
from ltrp_timm.layers.bridge import resize_score_map
from ltrp_timm.metrics import ndcg, spearman
from ltrp_timm.rankers import create_ranker, ranker_class
from ltrp_timm.runtime.keyed_rng import sample_seed, seeded
from ltrp_timm.runtime.world import join_world
from ltrp_timm.scoring.scorer import open_ranker
from ltrp_timm.selection import num_keep, select_top
from ltrp_timm.teacher.density import Aggregate, Metric, Removal
from ltrp_timm.train.loop import Summary, Task, fit
from ltrp_timm.train.recipe import cropped_sources
from ltrp_timm.train.settings import AtLeastOne, CropScale, check_choice, check_value, make_settings
from ltrp_timm.train.targets import Targets
from ltrp_timm.visualize import kept_patches, score_map, show_images

Loss = Literal["list_mle", "list_net", "rank_net", "focused_rank", "pointwise_mse", "lambda_rank"]
LOSSES: tuple[str, ...] = get_args(Loss)
# their value for equal scores does not depend on the targets: it is the chance level
_LOSSES_WITH_CHANCE = {"list_mle", "list_net", "rank_net", "focused_rank"}
Recipe = Literal["short", "paper"]
RECIPES: dict[str, dict[str, Any]] = {
    "short": {"epochs": 20, "base_lr": 1e-3, "lr_base_scale": "sqrt", "weight_decay": 0.06},
    "paper": {"epochs": 400, "base_lr": 1.5e-4, "weight_decay": 0.06},
}
CONV_LR = 4e-3  # base_lr of conv in the short recipe
CROPS, EPOCHS = 4, 8  # of the short recipe without a teacher


def train_ranker(
    data: Any,
    output: Any,
    ranker: str = "conv",
    teacher: Any = "facebook/vit-mae-base",
    img_size: int | None = None,
    ranker_args: Mapping[str, Any] | None = None,
    init_from: Any = None,
    distill_from: Any = None,
    distill_args: Mapping[str, Any] | None = None,
    distill_weight: float = 0.5,
    crops: AtLeastOne | None = None,
    recipe: Recipe = "short",
    loss: Loss = "list_mle",
    list_size: int | None = None,
    visible_only: bool = False,
    mask_ratio: float = 0.9,
    removal: Removal = "full",
    metric: Metric = "l1",
    aggregate: Aggregate = "mean",
    chunk: int | None = None,
    scale: CropScale = SCALE,
    compare: Sequence[str] = (),
    dry_run: bool = False,
    **settings: Any,
) -> Summary:
    """Train a ranker; ``create_ranker(ranker, pretrained=output)`` loads it.

    One process, or several that ``torchrun`` starts. The output folder gets the ranker of the last
    epoch (that of the best held-out order in ``best``), ``log.csv``, and the checkpoint from which
    a run continues.

    Args:
        data: Images without labels: a folder, a ``.tar`` or a name that timm's ``create_dataset``
            takes (``hfds/…``, ``wds/…``, ``torch/…``). In Python also a torch dataset of pictures.
        output: Folder of the run, new or empty.
        ranker: Name of a ranker that learns.
        teacher: An MAE (a Hub id, a folder or a file), a timm ViT by its name (scores are changes
            of its features), or None with ``distill_from`` alone. In Python also a module.
        img_size: Side of the images (default: the teacher's, or 224 without a teacher).
        ranker_args: More arguments of the ranker (default patch and image size: the teacher's).
        init_from: Folder of the same kind of ranker, to start from its weights.
        distill_from: Folder or name of a ranker that is a second teacher, or the only one; a name
            loads its published weights. In Python also a ranker.
        distill_args: Arguments of that ranker, such as checkpoint_path=FILE for its backbone.
        distill_weight: Share of ``distill_from`` in the loss beside a teacher, in (0, 1).
        crops: Random crops of a picture that epochs show in turn; the scores of ``distill_from``
            for each are computed once and kept (default: 4 in the short recipe without a teacher,
            else each epoch shows new crops).
        recipe: Defaults of other options. "paper" has the published ones: 400 epochs of new crops,
            ``base_lr`` 1.5e-4 with linear ``lr_base_scale``.
        loss: Ranking loss, from ``ltrp_timm.losses``.
        list_size: Patches scored per image, drawn before scoring (default: 20 with a teacher, all
            without one).
        visible_only: Show the ranker only the visible patches during training (ViT rankers).
        mask_ratio: Share of patches that the teacher does not see.
        removal: How the teacher loses a patch; see ``semantic_density``.
        metric: Distance between reconstructions; see ``semantic_density``.
        aggregate: How patch distances become a score; see ``semantic_density``.
        chunk: Reconstructions computed at a time (default: what fits in memory).
        scale: Share of a picture's area that a random crop takes, from and to.
        compare: Names of rankers to measure on the same held-out lists.
        dry_run: Check everything, report what would be done, write nothing.
        **settings: See ``Settings``. Both recipes have AdamW (0.9, 0.95), weight decay 0.06 and a
            tenth of the epochs as warm-up; the short one 20 epochs (8 without a teacher), base_lr
            4e-3 for conv and 1e-3 for other rankers, and lr_base_scale "sqrt".

    Returns:
        How the run ended.

    Raises:
        ValueError: An argument is out of its range, no image is readable, or the checkpoint is of
            another configuration.
        TypeError: An argument is unknown.
        FileNotFoundError: Data, teacher or ranker do not exist.
        FileExistsError: ``output`` holds a run.
        BlockingIOError: Another process writes to ``output``.
        NonFiniteLossError: The loss is not finite.

    >>> train_ranker("photos", "run", epochs=10, mask_ratio=0.9)  # doctest: +SKIP
    """
    check_choice("recipe", recipe, tuple(RECIPES))
    defaults = dict(RECIPES[recipe])
    if recipe == "short":
        defaults["base_lr"] = CONV_LR if ranker == "conv" else defaults["base_lr"]
        if teacher is None:
            defaults["epochs"], crops = EPOCHS, CROPS if crops is None else crops
    common = make_settings(defaults, settings)
    if crops is not None:
        check_value("crops", crops, "at least 1")
    check_choice("loss", loss, LOSSES)
    check_value("scale", scale, "two numbers, 0 < from <= to <= 1")
    check_data(data)  # before a teacher is downloaded
    args = dict(ranker_args or {})
    with join_world(common.device) as world:
        targets = Targets(
            teacher,
            distill_from=distill_from,
            distill_args=distill_args,
            distill_weight=distill_weight,
            img_size=img_size,
            patch_size=args.get("patch_size"),
            list_size=list_size,
            mask_ratio=mask_ratio,
            scoring={"removal": removal, "metric": metric, "aggregate": aggregate, "chunk": chunk},
            device=world.device,
        )
        with seeded(sample_seed(common.seed, 0, 0, "weights")):
            net = make_ranker(ranker, targets, args, init_from)
        task = RankerTask(net.to(world.device), targets, loss, visible_only, compare)
        sources = cropped_sources(data, common, world, targets, scale, crops=crops)
        return fit(task, sources, common, world, output, dry_run)


def make_ranker(name: str, targets: Targets, args: Mapping[str, Any], init_from: Any) -> Any:
    """Make a ranker to train, on the grid of its targets unless ``args`` differ.

    ValueError if it has no weights, or ``init_from`` holds another ranker.
    """
    kind = ranker_class(name)
    if not kind.learned:
        raise ValueError(f"the {name} ranker has no weights to train.")
    if init_from is not None:
        return create_ranker(name, pretrained=init_from, **args)
    known = inspect.signature(kind.__init__).parameters
    sizes = {"img_size": targets.img_size, "patch_size": targets.patch_size}
    return create_ranker(name, **{**{n: sizes[n] for n in sizes if n in known}, **args})


class RankerTask(Task):
    """A ranker on the device and what it learns; ``train_ranker`` describes the other arguments.

    ValueError if ranker or targets do not allow ``visible_only``.
    """

    name = "train-ranker"
    metric = "spearman"

    def __init__(
        self,
        ranker: Any,
        targets: Targets,
        loss: Loss,
        visible_only: bool,
        compare: Sequence[str] = (),
    ) -> None:
        super().__init__(ranker)
        self.targets, self.visible_only, self.loss_name = targets, visible_only, loss
        self.bridge, self.grid_size = targets.bridge_to(ranker), targets.grid_size
        self.loss_function: Callable[..., Tensor] = getattr(losses, loss)
        if loss == "focused_rank":
            self.loss_function = partial(self.loss_function, k=min(10, targets.list_size))
        opened = {name: open_ranker(name, targets.patch_size) for name in compare}
        self.others = {name: targets.scorer(other) for name, other in opened.items()}
        self._check_grid()
        if loss in _LOSSES_WITH_CHANCE:
            ordered = torch.arange(float(targets.list_size)).unsqueeze(0)
            self.chance = float(self.loss_function(torch.zeros_like(ordered), ordered))

    def _check_grid(self) -> None:
        """Run the ranker once: it must give a map, and for ``visible_only`` the teacher's grid."""
        images = torch.zeros(1, 3, *self.targets.img_size, device=self.targets.device)
        with torch.no_grad():
            found = tuple(self.model.eval()(self.bridge(images)).shape[1:])
        if not self.visible_only:
            return  # to another grid the map is resized
        if "visible_indices" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                "visible_only is for rankers that can leave patches out (vit_…), not for the "
                f"{self.model.name} ranker."
            )
        if self.targets.teacher is None:
            raise ValueError("visible_only needs a teacher, which draws the visible patches.")
        if found != self.grid_size:
            raise ValueError(
                f"visible_only needs one grid: the teacher's is {self.grid_size}, the ranker's "
                f"{found}."
            )

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {
            "ranker": {"name": self.model.name, **self.model.config()},
            "loss": self.loss_name,
            "visible_only": self.visible_only,
            **self.targets.config(),
        }

    def scores(self, model: nn.Module, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) -> scores (B, N) on the grid of the targets."""
        own = self.bridge(images)
        found = model(own) if visible is None else model(own, visible)
        return resize_score_map(found, *self.grid_size)

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        """Mean ranking loss."""
        lists = self.targets.draw(batch)
        visible = lists.visible if self.visible_only else None
        pred = self.scores(forward, batch.images, visible).gather(1, lists.indices)
        parts = [weight * self.loss_function(pred, target) for weight, target in lists.scores]
        # NaN has a place in an order, so that no ranking loss shows it
        finite = torch.stack([target.isfinite().all() for _, target in lists.scores]).all()
        return torch.where(finite, torch.stack(parts).sum(), torch.nan)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss of a ranker that sees whole images, and its agreement with the first target."""
        lists = self.targets.draw(batch)
        pred = self.scores(model, batch.images).gather(1, lists.indices)
        loss_function = partial(self.loss_function, reduction="none")
        parts = [weight * loss_function(pred, target) for weight, target in lists.scores]
        out = {"loss": torch.stack(parts).sum(dim=0)}
        rankings = {"": pred}
        for name, score in self.others.items():
            rankings[f"_{name}"] = score(batch.images).gather(1, lists.indices)
        for name, scores in rankings.items():
            out[f"spearman{name}"] = spearman(scores, lists.scores[0][1], reduction="none")
            out[f"ndcg{name}"] = ndcg(scores, lists.scores[0][1], reduction="none")
        return out

    def save(self, model: Any, folder: Path) -> None:
        """Write the ranker for ``create_ranker``."""
        model.trained = True
        model.save(folder, overwrite=True)

    def panels(self, model: nn.Module, batch: Batch) -> list[list[tuple[Image.Image, str]]]:
        """The photo, its score map, the kept half of its patches."""
        targets, (h, w) = self.targets, self.grid_size
        scores, (p, q) = self.scores(model, batch.images), targets.patch_size
        keep = select_top(scores, num_keep(h * w, 0.5))
        photos = [
            photo.crop((0, 0, w * q, h * p))
            for photo in show_images(batch.images, targets.mean, targets.std)
        ]
        return [
            [
                (photo, "photo"),
                (score_map(photo, score, (h, w)), "score: yellow = keep first"),
                (kept_patches(photo, kept, (h, w)), "keep 0.5"),
            ]
            for photo, score, kept in zip(photos, scores, keep)
        ]
