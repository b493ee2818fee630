"""The training and held-out images of a run, checked before anything is written."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, default_collate

from ltrp_timm._text import counted
from ltrp_timm.data.images import Images
from ltrp_timm.data.keyed import (
    Batch,
    KeyedImages,
    KeyedSampler,
    KeyedStream,
    Transform,
    held_out_keys,
    make_loader,
)
from ltrp_timm.runtime.keyed_rng import HELD_OUT, sample_seed
from ltrp_timm.runtime.world import World

SCALE = (0.2, 1.0)  # of the published crops


class Sources:
    """Batches to train on and to measure with.

    The arguments from ``batch_size`` to ``seed`` are those of training's ``Settings``. Transforms
    take a picture to (3, H, W); that of ``train`` may draw random numbers.

    Args:
        train: data set to train on, see ``open_dataset``; or ``Images`` of it; or a stream.
        held_out: data set to measure with, no stream; None holds out a share of ``train``.
        world: the processes that share the images.
        train_transform: see above.
        eval_transform: see above.
        img_size: (H, W) of transformed pictures.
        min_side: smallest side of a readable picture, in pixels.
        labelled: whether samples of a stream carry their targets.
        crops: how many random crops of an image epochs show in turn; None, and a stream, draw new
            ones.

    Attributes:
        held_out: the images to measure with, or None.
        given: whether they are a data set that could be read; a share of ``train`` may be unlucky.
        fingerprint: identifies the training images.
        batch_size: images of one process at a time.
        per_update: images of all processes per update.
        updates_per_epoch: number of whole updates in an epoch.

    Raises:
        ValueError: No image can be read, or there are fewer than an update needs.
    """

    def __init__(
        self,
        train: Any,
        held_out: Any,
        world: World,
        *,
        train_transform: Transform,
        eval_transform: Transform,
        img_size: tuple[int, int],
        min_side: int = 1,
        labelled: bool = False,
        batch_size: int | None = None,
        accumulate: int = 1,
        holdout: float = 0.0,
        num_samples: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        crops: int | None = None,
    ) -> None:
        self.seed, self.world, self.workers = seed, world, num_workers
        self._shape, self._min_side = (3, *img_size), min_side
        self.streaming = isinstance(train, IterableDataset)
        self.held_out: KeyedImages | None = None
        self.given = held_out is not None
        if self.given:
            images = self._images(held_out)
            self.held_out = self._keyed(images, range(len(images)), eval_transform)
            self.held_out.check_readable()
        if self.streaming:
            length = self._stream_length(train)
            count = num_samples or length
            self.fingerprint: dict[str, Any] = {"images": count}
        else:
            images = self._images(train)
            self._keyed(images, range(len(images)), eval_transform).check_readable()
            indices, held = images.split(0.0 if self.held_out is not None else holdout)
            count, self.fingerprint = len(indices), images.fingerprint(indices)
            if held:
                self.held_out = self._keyed(images, held, eval_transform)
        if crops:
            self.fingerprint["crops"] = crops
        self.accumulate = accumulate
        self.batch_size = self._batch_size(count, batch_size)
        self.per_update = self.batch_size * world.size * accumulate
        self.updates_per_epoch = count // self.per_update
        if self.streaming:
            self.train: Any = KeyedStream(train, train_transform, seed, world, labelled)
            self.sampler = None
        else:
            self.train = self._keyed(images, indices, train_transform)
            self.train.check_readable()
            mine = self.updates_per_epoch * self.batch_size * accumulate
            self.sampler = KeyedSampler(count, mine, world, seed, crops)
        self._loaders: dict[str, Any] = {}

    def describe(self) -> str:
        """Say how many images there are, for the user."""
        updates = counted(self.updates_per_epoch, "update")
        held_out = counted(len(self.held_out or ()), "image")
        return f"{updates} of {counted(self.per_update, 'image')} an epoch, {held_out} held out"

    def _images(self, dataset: Any) -> Images:
        return dataset if isinstance(dataset, Images) else Images(dataset, self._min_side)

    def _keyed(self, images: Images, indices: Sequence[int], transform: Transform) -> KeyedImages:
        return KeyedImages(images, indices, transform, self.seed, self._shape)

    def _stream_length(self, stream: Any) -> int:
        """Images of all processes; a stream of timm's knows those of one process."""
        if hasattr(stream, "set_loader_cfg"):
            stream.set_loader_cfg(num_workers=self.workers)
        return len(stream) * self.world.size if hasattr(stream, "__len__") else 0

    def _batch_size(self, count: int, given: int | None) -> int:
        """Images of one process at a time."""
        size, many = self.world.size, self.world.size * self.accumulate
        if count < 1:
            raise ValueError("a stream of unknown length needs num_samples.")
        if count < many:
            raise ValueError(
                f"{count} training images are too few for {size} processes with accumulate = "
                f"{self.accumulate}."
            )
        batch_size = given or min(64, count // many)
        if batch_size * many > count:
            raise ValueError(
                f"an update of {batch_size} images x {size} processes x accumulate = "
                f"{self.accumulate} needs more than the {count} training images; choose a "
                f"batch_size up to {count // many}."
            )
        return batch_size

    def _loader(self, name: str, dataset: Any, sampler: Any) -> Any:
        if name not in self._loaders:
            self._loaders[name] = make_loader(
                dataset,
                sampler,
                batch_size=self.batch_size,
                num_workers=self.workers,
                device=self.world.device,
                persistent=name == "train",
            )
        return self._loaders[name]

    def training_batches(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """Yield this process's batches of an epoch, from batch ``start`` on (streams: from 0 on).

        ValueError if a stream gives no batch.
        """
        sampler = self.sampler
        begin = start if sampler is not None else 0
        with contextlib.closing(self._training_samples(epoch, start)) as samples:
            for number, sample in enumerate(samples, start=begin):
                update = number // self.accumulate
                crop = None if sampler is None else sampler.crop
                yield Batch(sample, self.seed, epoch, self.world.device, update, crop)

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
        while True:  # a stream that is shorter here than in other processes starts again
            empty = True
            for sample in loader:
                if len(sample["index"]) == self.batch_size:
                    empty = False
                    yield sample
            if empty:
                raise ValueError(
                    "the stream gave no batch: check that it has images, each with its label."
                )

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield this process's held-out images, each once."""
        if self.held_out is None:
            return
        sampler = held_out_keys(len(self.held_out), self.world)
        for sample in self._loader("held out", self.held_out, sampler):
            yield Batch(sample, self.seed, HELD_OUT, self.world.device)

    def fixed_batch(self, count: int = 4) -> Batch:
        """The first readable held-out images; training images if there are too few."""
        sets = [keyed for keyed in (self.held_out, self.train) if isinstance(keyed, KeyedImages)]
        every = (keyed[HELD_OUT, place] for keyed in sets for place in range(len(keyed)))
        samples = list(islice((sample for sample in every if sample["real"]), count))
        if not samples:
            raise ValueError("no image can be read any more.")
        return Batch(default_collate(samples), self.seed, HELD_OUT, self.world.device)
