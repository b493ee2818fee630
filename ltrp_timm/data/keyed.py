"""Samples of images by (epoch, place), and batches of them.

A sample depends only on the seed, the epoch and its image, not on the process or worker that reads
it; see ``ltrp_timm.runtime.keyed_rng``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from ltrp_timm.data.images import Images
from ltrp_timm.data.photos import load_image
from ltrp_timm.runtime.keyed_rng import HELD_OUT, sample_seed, seeded
from ltrp_timm.runtime.world import World, signals_held, worker_init

Sample = dict[str, Any]
Transform = Callable[[Image.Image], Tensor]


class KeyedImages(Dataset[Sample]):
    """Samples by (epoch, place); the place is a position in ``indices``, which belong to this set.

    If an image cannot be read, training gets the next readable one instead. A held-out sample, and
    one of training when no image can be read any more, is marked as not real and does not count.

    The transform takes a picture to ``shape`` (3, H, W) and ``dtype``, drawing by ``seed``; it may
    carry the scores of patches, see ``ltrp_timm.scoring.transform``. ``others`` are further
    transforms of the same picture by the (height, width) of their images.
    """

    def __init__(
        self,
        images: Images,
        indices: Sequence[int],
        transform: Transform,
        seed: int,
        shape: tuple[int, ...],
        others: Mapping[tuple[int, int], Transform] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.images, self.indices, self.transform = images, indices, transform
        self.seed, self.others = seed, others or {}
        self.blank = torch.zeros(shape, dtype=dtype)
        self.scores: Any = getattr(transform, "with_scores", None) and transform
        self._lost = False  # no image could be read last time: look no further than the next one

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, place = key
        attempts = 1 if epoch == HELD_OUT or self._lost else len(self)
        found, problems = self._read(place, attempts)
        if epoch != HELD_OUT:
            self._lost = found is None
        index, target = self.indices[place], self.images.blank
        if found is None:
            sample = _sample(self.blank, index, problems, real=False)
            sample["others"] = {size: torch.zeros(3, *size) for size in self.others}
            if self.scores is not None:
                sample["scores"] = self.scores.blank
        else:
            source, picture, label = found
            target = None if target is None else label
            with seeded(sample_seed(self.seed, epoch, index, "transform")):
                if self.scores is None:
                    sample = _sample(self.transform(picture), index, problems)
                else:  # those of the image that was read
                    image, scores = self.scores.with_scores(picture, source)
                    sample = {**_sample(image, index, problems), "scores": scores}
                sample["others"] = {size: fn(picture) for size, fn in self.others.items()}
        return sample if target is None else {**sample, "target": target}

    def _read(
        self, place: int, attempts: int
    ) -> tuple[tuple[int, Image.Image, Any] | None, list[str]]:
        """(index, picture, target) of the first readable image, and what is wrong with others."""
        problems: list[str] = []
        for attempt in range(attempts):
            try:
                index = self.indices[(place + attempt) % len(self)]
                picture, target = self.images.read_item(index)
                if self.scores is not None:
                    self.scores.check(index, self.images.name(index))
                return (index, picture, target), problems
            except ValueError as error:
                problems.append(str(error))
        return None, problems[:1]  # of perhaps a million

    def check_readable(self) -> None:
        """Raise ValueError, with the reason for the first, if no image can be read."""
        if not len(self):
            raise ValueError("there are no images.")
        found, problems = self._read(0, len(self))
        if found is None:
            raise ValueError(f"none of {len(self)} images can be read; {problems[0]}")


def _sample(image: Tensor, index: int, problems: Sequence[str] = (), real: bool = True) -> Sample:
    return {"image": image, "index": index, "real": real, "problems": "\n".join(problems)}


class KeyedStream(IterableDataset[Sample]):
    """Samples of a stream of (picture, target); ``labelled`` ones carry the latter.

    An image's index is its number in the stream of its worker and process.
    """

    def __init__(
        self, dataset: Any, transform: Transform, seed: int, world: World, labelled: bool = False
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.labelled = labelled
        self.rank, self.size, self.epoch = world.rank, world.size, 0

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for count, (picture, target) in enumerate(self.dataset):
            index = (count * workers + number) * self.size + self.rank
            with seeded(sample_seed(self.seed, self.epoch, index, "transform")):
                sample = _sample(self.transform(load_image(picture, f"image {index}")), index)
            yield {**sample, "target": target} if self.labelled else sample


class KeyedSampler(DistributedSampler[Any]):
    """(epoch, place) of the samples of one process, from any point of an epoch on.

    The order is that of torch's DistributedSampler. An incomplete last batch is dropped, so that no
    sample counts twice. With ``crops``, epoch e draws what epoch e mod ``crops`` drew.
    """

    def __init__(
        self, count: int, per_epoch: int, world: World, seed: int, crops: int | None = None
    ) -> None:
        options: Any = {"num_replicas": world.size, "rank": world.rank, "seed": seed}
        super().__init__(range(count), **options, drop_last=True)  # type: ignore[arg-type]
        self.per_epoch, self.start, self.crops = per_epoch, 0, crops

    def set_position(self, epoch: int, start: int) -> None:
        """Begin at sample ``start`` of this process in that epoch."""
        self.set_epoch(epoch)
        self.start = start

    @property
    def crop(self) -> int | None:
        """Number of the crop that this epoch shows; None if it is a new one."""
        return self.epoch % self.crops if self.crops else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = islice(super().__iter__(), self.start, self.per_epoch)
        epoch = self.epoch if self.crop is None else self.crop
        return ((epoch, place) for place in places)

    def __len__(self) -> int:
        return self.per_epoch - self.start


def held_out_keys(count: int, world: World) -> list[tuple[int, int]]:
    """The held-out samples of this process; each is in exactly one, without padding."""
    return [(HELD_OUT, place) for place in range(world.rank, count, world.size)]


class _Loader(DataLoader[Sample]):
    """torch's, whose workers do not die of a signal while they start."""

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()


def make_loader(
    dataset: Dataset[Sample],
    sampler: Iterable[tuple[int, int]] | None,
    *,
    batch_size: int,
    device: torch.device,
    num_workers: int = 0,
    persistent: bool = False,
) -> DataLoader[Sample]:
    """Make torch's loader, with its own generator: the global random state does not change."""
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0 and persistent and sampler is not None,
        worker_init_fn=worker_init(),
        generator=torch.Generator(),
    )


class Batch:
    """Images of a batch on the device, and their random numbers.

    Attributes:
        images: (B, 3, H, W), normalised.
        real: (B,) bool; False if an image could not be read.
        targets: (B,) class numbers, or (B, C); None without labels.
        scores: (B, N) of patches, from an index cache; None without one.
        others: the same images (B, 3, h, w) at other sizes, by (h, w).
        indices: B indices of the images in their set.
        problems: one line for each image that could not be read.
        epoch: epoch of the batch.
        update: number of its update within the epoch.
        crop: number of the images' crop if epochs show it again, else None.
    """

    def __init__(
        self,
        sample: Sample,
        seed: int,
        epoch: int,
        device: torch.device,
        update: int = 0,
        crop: int | None = None,
    ) -> None:
        self.images: Tensor = sample["image"].to(device, non_blocking=True)
        self.real: Tensor = sample["real"].to(device)
        target, scores = sample.get("target"), sample.get("scores")
        self.targets: Any = None if target is None else target.to(device)
        self.scores: Tensor | None = None if scores is None else scores.to(device)
        others = sample.get("others", {}).items()
        self.others = {size: images.to(device, non_blocking=True) for size, images in others}
        self.indices: list[int] = sample["index"].tolist()
        self.problems = [line for text in sample["problems"] for line in text.splitlines()]
        self._seed, self.epoch, self.update = seed, epoch, update
        self.crop = HELD_OUT if epoch == HELD_OUT else crop

    def __len__(self) -> int:
        return len(self.indices)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A generator for each image, with its random numbers for that purpose."""
        seeds = [sample_seed(self._seed, self.epoch, index, purpose) for index in self.indices]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def seed(self, purpose: str) -> int:
        """A seed for what is drawn once for the batch: that of its first image."""
        return sample_seed(self._seed, self.epoch, self.indices[0], purpose)
