"""The images of a run: training samples by position, and a fixed held-out set.

A position counts the samples of all ranks since the start of training and says everything about a sample, so a run
resumes where it stopped by starting its loader at the position that its checkpoint holds.
"""

import hashlib
import io
import signal
from collections.abc import Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler

from latentae.data.images import ImageDataset
from latentae.data.samples import photos
from latentae.data.sources import Item, Source, open_source
from latentae.errors import RequestError

SAMPLES = "samples"  # what data.path says for the bundled photos


class ImageData(pl.LightningDataModule):
    """Random crops of a folder's images to train on, centre crops of held-out ones to validate on.

    Batches are dicts whose ``pixels`` are uint8 (B, 3, size, size). Training is one endless stream: its length is
    ``trainer.max_steps``.

    Args:
        path: what `open_source` takes: a folder of images, searched recursively, a tar, parquet file or manifest, a
            pattern or folder of tars; ``samples`` for the few photos that dependencies bring along.
        size: side of the square crops in pixels.
        batch_size: images per batch on each device.
        workers: processes that decode; they change nothing but the speed.
        dead_leaves: share of training samples that are generated pictures instead of photos, from 0 to 1.
        val_path: held-out images, as ``path``; by default a part of ``path`` is held out.
        val_fraction: that part, chosen by a hash of each image's key, at least one image; 0 for no validation.
        val_sizes: sides of the centre crops to validate on, such as ``[256, 512]``, each logged as ``val/psnr@256``;
            by default ``size`` alone, logged as ``val/psnr``. Smaller images are enlarged.
        val_images: at most so many held-out images; None for all.
        max_bad: share of images that may be broken: they are reported, counted and replaced by the next good ones,
            and the run stops with exit code 3 when there are more (a single one is always let pass).
        seed: of the order and the crops.

    Raises:
        RequestError: no ``path``, nothing there, or no image in it.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int = 256,
        batch_size: int = 16,
        workers: int = 4,
        dead_leaves: float = 0.0,
        val_path: str | None = None,
        val_fraction: float = 0.02,
        val_sizes: list[int] | None = None,
        val_images: int | None = 256,
        max_bad: float = 0.01,
        seed: int = 0,
    ):
        super().__init__()
        for name, value, least in (("size", size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise RequestError(f"data.{name} is {value}; expected at least {least}.")
        self.path, self.val_path = path, val_path
        self.size, self.batch_size, self.workers = size, batch_size, workers
        self.dead_leaves, self.max_bad, self.seed = dead_leaves, max_bad, seed
        self.val_fraction, self.val_images = val_fraction, val_images
        self.validated_sizes = val_sizes or [size]

    def setup(self, stage: str) -> None:
        """Find the images."""
        if stage == "fit" or self.val_path is None:
            self.train_source, self.val_source = self._split()
        if self.val_path is not None:
            self.val_source = open_source(self.val_path)

    def _split(self) -> tuple[Source, Source]:
        if self.path is None:
            raise RequestError("There are no images to train on: give a folder, tar or manifest with --data.path.")
        if self.path == SAMPLES:
            return SamplePhotos("train"), SamplePhotos("held_out")
        return hold_out(open_source(self.path), self.val_fraction if self.val_path is None else 0.0)

    def train_dataloader(self) -> DataLoader:
        """The stream of samples from the position at which the run stands."""
        dataset = ImageDataset(
            self.train_source, size=self.size, seed=self.seed, dead_leaves=self.dead_leaves, max_bad=self.max_bad
        )
        return self._stream(dataset)

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each size, of this rank's part of the held-out images; none without such images."""
        if not self.validates:
            return []
        chosen = _Chosen(self.val_source, self.val_source.items()[: self.val_images])
        options: dict[str, Any] = {"augment": False, "max_bad": self.max_bad}
        return [self._in_order(ImageDataset(chosen, size=size, **options)) for size in self.validated_sizes]

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.val_source.items())

    def _stream(self, dataset: Any) -> DataLoader:
        """Batches of this rank from the position at which the run stands, without end."""
        trainer: Any = self.trainer
        start = trainer.lightning_module.samples_seen
        batches = PositionBatches(start, self.batch_size, trainer.global_rank, trainer.world_size)
        return DataLoader(dataset, batch_sampler=batches, **self._loader_options())

    def _in_order(self, dataset: Any, count: int | None = None) -> DataLoader:
        """This rank's part of the first ``count`` samples; all of them where there are more ranks than samples."""
        trainer: Any = self.trainer
        count = min(len(dataset), count or len(dataset))
        mine = range(trainer.global_rank, count, trainer.world_size)
        if count < trainer.world_size:
            mine = range(count)
        return DataLoader(dataset, self.batch_size, sampler=mine, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_signals_to_the_parent,
        }


def leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group must not kill workers before the parent has written its checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class PositionBatches(Sampler[list[int]]):
    """Endless batches of positions; the ranks' batches of one step lie side by side.

    N ranks with batches of B see, step by step, what one rank with batches of N·B sees.
    """

    def __init__(self, start: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.start, self.batch_size, self.rank, self.world_size = start, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.batch_size * self.world_size


class _Chosen:
    """Some items of a source."""

    def __init__(self, source: Source, items: list[Item]):
        self.source, self._items = source, items

    def items(self) -> list[Item]:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.source.read(item)


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """Split a source in two by a hash of the keys, so that adding images moves no other image across.

    The second part has about ``fraction`` of the items, at least one where there are two, and is in the order of the
    hash, so that its first images are of all kinds.
    """
    items = source.items()
    trained, held_out = split([item.key for item in items], fraction)
    return _Chosen(source, [items[i] for i in trained]), _Chosen(source, [items[i] for i in held_out])


def split(keys: list[str], fraction: float) -> tuple[list[int], list[int]]:
    """The indices of the two parts of `hold_out`: the first in the order of the keys, the second of their hashes."""
    order = sorted(range(len(keys)), key=lambda i: _hash(keys[i]))
    count = sum(_hash(key) < fraction for key in keys)
    if fraction > 0:
        count = min(max(count, 1), len(keys) - 1)
    return sorted(order[count:], key=lambda i: keys[i]), order[:count]


def _hash(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class SamplePhotos:
    """The bundled photos of one split as a source."""

    def __init__(self, split: Literal["train", "held_out"]):
        self._files = {}
        for name, image in photos(split).items():
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "ppm")
            self._files[name] = stream.getvalue()

    def items(self) -> list[Item]:
        return [Item(key=name, uri=f"samples:{name}", size=len(data)) for name, data in sorted(self._files.items())]

    def read(self, item: Item) -> bytes:
        return self._files[item.key]
