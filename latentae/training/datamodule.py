"""The images or clips of a run: training samples by position, and a fixed held-out set.

A position counts the samples of all ranks since the start of training and says everything about a sample, so a run
resumes where it stopped by starting its loader at the position that its checkpoint holds.
"""

import hashlib
import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler

from latentae.console import say
from latentae.data.clip_dataset import ClipDataset
from latentae.data.clips import ClipSource, open_inputs
from latentae.data.images import ImageDataset
from latentae.data.sample_clips import SampleClips, Split
from latentae.data.samples import photos
from latentae.data.sources import Item, ItemTable, Source
from latentae.data.sources.base import path_of
from latentae.data.video import BadVideo
from latentae.errors import RequestError

SAMPLES = "samples"  # what data.path says for the bundled photos, and clips of them
CLIP_TIMES = "clip-times"  # in the run folder: when the frames of the clips are


class ImageData(pl.LightningDataModule):
    """Random crops of a folder's images or clips to train on, centre crops of held-out ones to validate on.

    Batches are dicts whose ``pixels`` are uint8 (B, 3, size, size), of clips (B, 3, frames, size, size). Training is
    one endless stream: its length is ``trainer.max_steps``.

    Args:
        path: what `open_source` takes: a folder of images, searched recursively, a tar, parquet file or manifest, a
            pattern or folder of tars; ``samples`` for the few photos that dependencies bring along. With ``frames`` it
            is what `ClipSource` takes: a folder of videos and of folders of frames, or one video; ``samples`` for
            clips that are made of those photos and of dead leaves.
        size: side of the square crops in pixels.
        frames: of each clip; None for images.
        fps: frames per second of the clips; None for their own rates.
        stride: take every so many-th frame.
        batch_size: images or clips per batch on each device.
        workers: processes that decode; they change nothing but the speed.
        dead_leaves: share of training samples that are generated, pictures or clips, from 0 to 1.
        val_path: held-out images, as ``path``; by default a part of ``path`` is held out.
        val_fraction: that part, chosen by a hash of each image's key, at least one image; 0 for no validation.
        val_sizes: sides of the centre crops to validate on, such as ``[256, 512]``, each logged as ``val/psnr@256``;
            by default ``size`` alone, logged as ``val/psnr``. Smaller images are enlarged.
        val_images: at most so many held-out images; None for all.
        max_bad: share of images that may be broken, and of clips that may be so or shorter than ``frames``: they are
            reported, counted and replaced by the next good ones, and the run stops with exit code 3 when there are more
            (a single one is always let pass).
        seed: of the order and the crops, and of the first frames of clips.

    Raises:
        RequestError: no ``path``, nothing there, no image in it, or none of what ``frames`` asks for.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int = 256,
        frames: int | None = None,
        fps: float | None = None,
        stride: int = 1,
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
        if frames is not None and frames < 1:
            raise RequestError(f"data.frames is {frames}; expected at least 1, or null for images.")
        made = frames is not None and path == SAMPLES
        if (frames is None or made) and (fps is not None or stride != 1):
            what = "generated clips have no rate" if made else "without data.frames these are images"
            raise RequestError(f"data.fps and data.stride choose frames of videos, and {what}: leave them out.")
        self.frames, self.fps, self.stride = frames, fps, stride
        self.path, self.val_path = path, val_path
        self.size, self.batch_size, self.workers = size, batch_size, workers
        self.dead_leaves, self.max_bad, self.seed = dead_leaves, max_bad, seed
        self.val_fraction, self.val_images = val_fraction, val_images
        self.validated_sizes = val_sizes or [size]

    def setup(self, stage: str) -> None:
        """Find the images or clips."""
        if stage == "fit" or self.val_path is None:
            self.train_source, self.val_source = self._split()
        if self.val_path is not None:
            self.val_source = self._source(self.val_path)

    def _split(self) -> tuple[Any, Any]:
        """To train on and to validate on: two sources, or None twice where clips are generated."""
        if self.path is None:
            raise RequestError("There are no images to train on: give a folder, tar or manifest with --data.path.")
        if self.path == SAMPLES:
            return (SamplePhotos("train"), SamplePhotos("held_out")) if self.frames is None else (None, None)
        return hold_out(self._source(self.path), self.val_fraction if self.val_path is None else 0.0)

    def _source(self, path: str) -> Source | ClipSource:
        source = open_inputs(path, clips=self.frames is not None)
        if isinstance(source, ClipSource):
            if self.frames is None:
                raise RequestError(f"{path} holds clips: say how many frames to take of each with --data.frames.")
            refuse_photos(source, path)
        return source

    def train_dataloader(self) -> DataLoader:
        """The stream of samples from the position at which the run stands."""
        return self._stream(self._dataset("train", self.size))

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each size, of this rank's part of the held-out samples; none without any."""
        if not self.validates:
            return []
        return [self._in_order(self._dataset("held_out", size), self.val_images) for size in self.validated_sizes]

    def _dataset(self, split: Split, size: int) -> Any:
        source = self.train_source if split == "train" else self.val_source
        options: dict[str, Any] = {"size": size, "seed": self.seed}
        if source is None:
            return SampleClips(split, frames=self.frames or 1, **options)
        options |= {"augment": split == "train", "dead_leaves": self.dead_leaves, "max_bad": self.max_bad}
        if self.frames is None:
            return ImageDataset(source, **options)
        trainer: Any = self.trainer
        cache = Path(trainer.default_root_dir, CLIP_TIMES)
        return ClipDataset(source, frames=self.frames, fps=self.fps, stride=self.stride, cache=cache, **options)

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return self.val_source is None or bool(self.val_source.items())

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

    def __init__(self, source: Source, items: ItemTable):
        self.source, self._items = source, items

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.source.read(item)


def hold_out(source: Any, fraction: float) -> tuple[Any, Any]:
    """Split a source in two by a hash of the keys, so that adding images moves no other image across.

    The second part has about ``fraction`` of the items, at least one where there are two, and is in the order of the
    hash, so that its first images are of all kinds.
    """
    items = source.items()
    trained, held_out = (items.take(part) for part in split(items.keys.to_pylist(), fraction))
    if isinstance(source, ClipSource):
        return source.only(trained), source.only(held_out)
    return _Chosen(source, trained), _Chosen(source, held_out)


def refuse_photos(source: ClipSource, path: str) -> None:
    """Tell folders of frames, which are clips, from folders of photos, and say where images are taken as frames.

    Raises:
        RequestError: no videos are there, and one of the first folders has images of several sizes.
    """
    items = source.items()
    if not all(Path(path_of(item.uri)).is_dir() for item in items):
        return
    for item in items[:8]:
        try:
            source.open(item).info  # noqa: B018  (it reads the headers)
        except BadVideo as error:
            if error.reason == "mixed-sizes":
                raise RequestError(
                    f"{path} holds no videos but images of several sizes, which are no frames of a clip: leave "
                    "data.frames out to train on images, or give videos or folders of frames."
                ) from error
    say(f"{path}: each of its {len(items)} folders of images is taken as a clip.")


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

    def items(self) -> ItemTable:
        return ItemTable.of(Item(name, f"samples:{name}", len(data)) for name, data in sorted(self._files.items()))

    def read(self, item: Item) -> bytes:
        return self._files[item.key]
