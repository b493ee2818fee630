"""The training and held-out images of a run, checked before anything is written."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any

from timm.data import create_transform
from torch.utils.data import IterableDataset, default_collate

from ltrp_timm.data.images import Images, open_dataset
from ltrp_timm.data.keyed import (
    Batch,
    HeldOutSampler,
    KeyedImages,
    KeyedSampler,
    KeyedStream,
    Transform,
    make_loader,
)
from ltrp_timm.runtime.keyed_rng import HELD_OUT, sample_seed
from ltrp_timm.runtime.world import World
from ltrp_timm.train.settings import SCALE, Settings


class Sources:
    """Batches to train on and to measure with.

    Args:
        data: see ``open_dataset``; or ``Images`` of it, with labels for one.
        settings: which part of it, and how much at a time.
        world: who shares it.
        train_transform: picture -> (3, H, W), may draw random numbers.
        eval_transform: likewise, without.
        img_size: (H, W) of what they give.
        min_side: of the pictures, in pixels.
        labelled: samples of a stream carry its targets.

    Raises:
        ValueError: no image can be read, or there are fewer than a batch of all processes.
        FileNotFoundError: ``data`` names nothing.
    """

    def __init__(
        self,
        data: Any,
        settings: Settings,
        world: World,
        train_transform: Transform,
        eval_transform: Transform,
        img_size: tuple[int, int],
        min_side: int,
        labelled: bool = False,
    ) -> None:
        self.seed, self.world, self.workers = settings.seed, world, settings.num_workers
        self._shape, self._min_side = (3, *img_size), min_side
        self._eval_transform = eval_transform
        dataset = self._open(data, settings, settings.split, training=True)
        self.streaming = isinstance(dataset, IterableDataset)
        self.held_out = self._held_out(settings)
        if self.streaming:
            count = self._stream_length(dataset, settings)
            self.fingerprint: dict[str, Any] = {"images": count}
        else:
            images = self._images(dataset)
            self._keyed(images, range(len(images)), eval_transform).check_readable()
            share = 0.0 if self.held_out is not None else settings.holdout
            indices, held = images.split(share)
            count, self.fingerprint = len(indices), images.fingerprint(indices)
            if held:
                self.held_out = self._keyed(images, held, eval_transform)
        self.batch_size = self._batch_size(count, settings)
        self.accumulate = settings.accumulate
        self.per_update = self.batch_size * world.size * settings.accumulate
        self.updates_per_epoch = count // self.per_update
        if self.streaming:
            self.train: Any = KeyedStream(dataset, train_transform, self.seed, world, labelled)
            self.sampler = None
        else:
            self.train = self._keyed(images, indices, train_transform)
            self.train.check_readable()
            mine = self.updates_per_epoch * self.batch_size * settings.accumulate
            self.sampler = KeyedSampler(count, mine, world, self.seed)
        self._loaders: dict[str, Any] = {}

    def _open(self, data: Any, settings: Settings, split: str, training: bool) -> Any:
        return open_dataset(
            data,
            root=settings.data_root,
            split=split,
            input_key=settings.input_key,
            num_samples=settings.num_samples,
            seed=settings.seed,
            training=training,
        )

    def _images(self, dataset: Any) -> Images:
        return dataset if isinstance(dataset, Images) else Images(dataset, self._min_side)

    def _stream_length(self, dataset: Any, settings: Settings) -> int:
        """Images of all processes; a stream of timm's knows those of its own."""
        if settings.plot and self.held_out is None:
            raise ValueError("pictures of a stream's training need val_data, or plot=False.")
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=settings.num_workers)
        length = len(dataset) * self.world.size if hasattr(dataset, "__len__") else 0
        return settings.num_samples or length

    def _keyed(self, images: Images, indices: Sequence[int], transform: Transform) -> KeyedImages:
        return KeyedImages(images, indices, transform, self.seed, self._shape)

    def _held_out(self, settings: Settings) -> KeyedImages | None:
        if settings.val_data is None:
            return None
        dataset = self._open(settings.val_data, settings, settings.val_split, training=False)
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"val_data must not be a stream, got {settings.val_data}.")
        images = self._images(dataset)
        keyed = self._keyed(images, range(len(images)), self._eval_transform)
        keyed.check_readable()
        return keyed

    def _batch_size(self, count: int, settings: Settings) -> int:
        """Images of one process at a time."""
        size, many = self.world.size, self.world.size * settings.accumulate
        if count < 1:
            raise ValueError("a stream of unknown length needs num_samples.")
        if count < many:
            raise ValueError(
                f"{count} training images are too few for {size} processes with accumulate = "
                f"{settings.accumulate}."
            )
        batch_size = settings.batch_size or min(64, count // many)
        if batch_size * many > count:
            raise ValueError(
                f"an update of {batch_size} images x {size} processes x accumulate = "
                f"{settings.accumulate} needs more than the {count} training images; choose a "
                f"batch_size up to {count // many}."
            )
        return batch_size

    def _loader(self, name: str, dataset: Any, sampler: Any) -> Any:
        if name not in self._loaders:
            self._loaders[name] = make_loader(
                dataset, sampler, self.batch_size, self.workers, self.world.device, name == "train"
            )
        return self._loaders[name]

    def training_batches(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """Batches of an epoch of this process, from batch ``start`` on (streams: from the first).

        Raises:
            ValueError: a stream without any image.
        """
        begin = start if self.sampler is not None else 0
        with contextlib.closing(self._training_samples(epoch, start)) as samples:
            for number, sample in enumerate(samples, start=begin):
                update = number // self.accumulate
                yield Batch(sample, self.seed, epoch, self.world.device, update)

    def _training_samples(self, epoch: int, start: int) -> Generator[Any, None, None]:
        loader = self._loader("train", self.train, self.sampler)
        loader.generator.manual_seed(sample_seed(self.seed, epoch, self.world.rank, "workers"))
        if self.sampler is not None:
            self.sampler.set_position(epoch, start * self.batch_size)
            yield from loader
            return
        self.train.epoch = epoch
        if hasattr(self.train.dataset, "set_epoch"):
            self.train.dataset.set_epoch(epoch)
        while True:  # a stream that is shorter here than in other processes begins again
            empty = True
            for sample in loader:
                if len(sample["index"]) == self.batch_size:
                    empty = False
                    yield sample
            if empty:
                raise ValueError("the stream gave no batch: has it images, each with its label?")

    def held_out_batches(self) -> Iterator[Batch]:
        """The held-out images of this process, each once."""
        if self.held_out is None:
            return
        sampler = HeldOutSampler(len(self.held_out), self.world)
        for sample in self._loader("held out", self.held_out, sampler):
            yield Batch(sample, self.seed, HELD_OUT, self.world.device)

    def fixed_batch(self, count: int = 4) -> Batch:
        """The first readable held-out images; training ones where there are not as many."""
        sets = [keyed for keyed in (self.held_out, self.train) if isinstance(keyed, KeyedImages)]
        every = (keyed[HELD_OUT, place] for keyed in sets for place in range(len(keyed)))
        samples = list(islice((sample for sample in every if sample["real"]), count))
        return Batch(default_collate(samples), self.seed, HELD_OUT, self.world.device)


def crop_transforms(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    scale: Sequence[float] = SCALE,
) -> tuple[Transform, Transform]:
    """The published augmentation, a random resized crop and a flip; and a centre crop."""
    shared = {"input_size": (3, *img_size), "interpolation": "bicubic", "mean": mean, "std": std}
    train = create_transform(**shared, is_training=True, scale=tuple(scale), color_jitter=None)
    return train, create_transform(**shared, is_training=False, crop_pct=1.0)


def cropped_sources(
    data: Any, settings: Settings, world: World, like: Any, scale: Sequence[float]
) -> Sources:
    """Images without labels, as random crops and as centre crops.

    Args:
        data: see ``Sources``.
        settings: likewise.
        world: likewise.
        like: what they are for: its ``img_size``, ``patch_size``, ``mean`` and ``std``.
        scale: share of a picture's area that a random crop takes.

    Raises:
        ValueError: as for ``Sources``.
        FileNotFoundError: likewise.
    """
    transforms = crop_transforms(like.img_size, like.mean, like.std, scale)
    least = max(like.patch_size)
    sources = Sources(data, settings, world, *transforms, like.img_size, least)
    if tuple(scale) != SCALE:
        sources.fingerprint["scale"] = list(scale)
    return sources
