"""The latents of a run, from a store or from images or clips that are encoded on the fly, in an order that is the same.

Images are cropped at their centre, as encoding into a store does, so that both ways train on the same latents. So are
clips, but in training they begin at a frame that is drawn, where a store has the first ones.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from latentae.data.clip_dataset import ClipDataset
from latentae.data.clips import ClipSource, open_inputs
from latentae.data.images import ImageDataset, epoch_order
from latentae.data.sample_clips import SampleClips
from latentae.data.sources import ItemTable, Source
from latentae.data.transforms import adm_center_crop
from latentae.errors import DataError, RequestError
from latentae.store.reader import LatentStore
from latentae.training.datamodule import SAMPLES, ImageData, SamplePhotos, hold_out, split

Labelled = list[tuple[str, int]]  # keys with their labels, -1 for none


class CentreCrops(ImageDataset):
    """Images cropped at their centre; in training in the random order of each epoch, and perhaps mirrored.

    Args:
        seed: of the order and of which images are mirrored; None for the source's own order.
        flip: mirror half of the samples, in training.
    """

    def __init__(self, source: Source, *, size: int, seed: int | None, flip: bool = False, max_bad: float = 0.01):
        super().__init__(source, size=size, augment=False, max_bad=max_bad)
        self.order_seed, self.flip = seed, flip

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self.order_seed is None:
            return super().__getitem__(position)
        epoch, place = divmod(position, len(self))
        drawn = int(epoch_order(len(self), self.order_seed, epoch)[place])
        sample = super().__getitem__(drawn)
        if self.flip and np.random.default_rng((self.order_seed, epoch, drawn)).random() < 0.5:
            sample["pixels"] = sample["pixels"].flip(-1)
        return sample

    @property
    def labelled(self) -> Labelled:
        return labelled(self.items)


class CentreClips(ClipDataset):
    """Clips cropped at their centre; in training in the random order of each epoch, each from a frame on that is drawn
    anew, and perhaps mirrored; in validation from their first frame.

    Args:
        items: those of the source that are taken.
        seed: of the order, the first frames and which clips are mirrored; None for validation.
        flip: mirror half of the samples, in training.
        options: of `ClipDataset`.
    """

    def __init__(self, source: ClipSource, items: ItemTable, *, seed: int | None, flip: bool = False, **options: Any):
        super().__init__(source, seed=seed or 0, augment=seed is not None, **options)
        self.items, self.flip = items, flip

    def _crop(self, frame: np.ndarray, seed: tuple[int, int, int]) -> np.ndarray:
        crop = adm_center_crop(frame, self.size)
        return crop[:, ::-1] if self.flip and np.random.default_rng((*seed, 1)).random() < 0.5 else crop

    @property
    def labelled(self) -> Labelled:
        return labelled(self.items)


def labelled(items: ItemTable) -> Labelled:
    """Keys and labels of a source's items."""
    return list(zip(items.keys.to_pylist(), items.labels.fill_null(-1).to_pylist()))


class StoredLatents(Dataset[dict[str, Any]]):
    """Some of a store's entries; in training in the random order of each epoch.

    Args:
        indices: of the entries in the store, with the key and the label of each.
        seed: of the order; None for that of ``indices``.
    """

    def __init__(self, store: LatentStore, indices: list[int], labelled: Labelled, *, seed: int | None):
        self.store, self.indices, self.labelled, self.seed = store, indices, labelled, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position: its ``key``, its ``label``, -1 without one, and its ``moments``, float32
        (2C, h, w), or ``latents``, (C, h, w); of clips (2C, t, h, w) and (C, t, h, w).

        Raises:
            DataError: they are not finite.
        """
        epoch, place = divmod(position, len(self))
        if self.seed is not None:
            place = int(epoch_order(len(self), self.seed, epoch)[place])
        key, label = self.labelled[place]
        values = self.store.stored(self.indices[place]).float()
        name = "moments" if self.store.kind == "moments" else "latents"
        if not values.isfinite().all():
            raise DataError(
                f"The {name} of {key} in {self.store.path} are not all finite: encode the store again, which leaves "
                "such an image out."
            )
        return {name: values, "label": label, "key": key, "index": place}


class LatentData(ImageData):
    """A store of latents, or images or clips that the codec of the run encodes on the fly; some are held out.

    Batches are dicts with the ``label`` and the ``key`` of each sample, and its ``latents``, its ``moments`` or its
    ``pixels``. Training is one endless stream: its length is ``trainer.max_steps``.

    Args:
        path: a store that ``latentae encode`` wrote, or images as for every ``fit``; ``samples`` for the few photos
            that dependencies bring along; with ``frames`` a folder of clips.
        size: side of the centre crops of images and clips; a store has its own.
        frames: of each clip; None for images. A store has its own.
        fps: of clips; None for their own rates.
        clip_cache: folder that remembers the times of the clips' frames from run to run.
        batch_size: samples per batch on each device.
        workers: processes that read; they change nothing but the speed.
        flip: mirror half of the images or clips in training; latents of a store stay as they are.
        val_path: held-out latents or images, as ``path``; by default a part of ``path`` is held out.
        val_fraction: that part, chosen by a hash of each key, at least one sample; 0 for no validation.
        val_images: at most so many held-out samples; None for all.
        max_bad: share of images that may be broken: they are reported, counted and replaced by the next good ones,
            and the run stops with exit code 3 when there are more (a single one is always let pass).
        seed: of the order and the mirroring.

    Raises:
        RequestError: no ``path``, nothing there, or a store without latents.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int = 256,
        batch_size: int = 16,
        workers: int = 4,
        flip: bool = False,
        frames: int | None = None,
        fps: float | None = None,
        clip_cache: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.02,
        val_images: int | None = 256,
        max_bad: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(
            path,
            size=size,
            batch_size=batch_size,
            workers=workers,
            val_path=val_path,
            val_fraction=val_fraction,
            val_images=val_images,
            max_bad=max_bad,
            seed=seed,
        )
        self.flip = flip
        self.frames, self.fps, self.clip_cache = frames, fps, clip_cache

    def setup(self, stage: str) -> None:
        """Find the samples; those to train on also in validation, since they say how many classes there are."""
        if self.path is None:
            raise RequestError("There is nothing to train on: give a store of latents, or images, with --data.path.")
        self.train_set, self.val_set = self._open(self.path, self.val_fraction if self.val_path is None else 0.0)
        if self.val_path is not None:
            _, self.val_set = self._open(self.val_path, 1.0)

    def _open(self, path: str, fraction: float) -> tuple[Any, ...]:
        """Two parts of what is at ``path``; at a fraction of 1 the second is all of it."""
        if (Path(path) / "store.json").is_file():
            store = LatentStore(path)
            if not len(store):
                raise RequestError(f"{path} is a store without latents: run 'latentae encode' to its end first.")
            keys, labels = store.keys, store.labels
            trained, held_out = split(keys, fraction) if fraction < 1 else ([], list(range(len(store))))
            return tuple(
                StoredLatents(store, part, [(keys[i], labels[i]) for i in part], seed=seed)
                for part, seed in ((trained, self.seed), (held_out, None))
            )
        if self.frames is not None and path == SAMPLES:
            options: dict[str, Any] = {"frames": self.frames, "size": self.size}
            return SampleClips("train", seed=self.seed, **options), SampleClips("held_out", **options)
        if self.frames is not None:
            return self._open_clips(ClipSource(path), fraction)
        if path == SAMPLES:
            sources: tuple[Source, Source] = (SamplePhotos("train"), SamplePhotos("held_out"))
        else:
            source = open_inputs(path, clips=False)
            if isinstance(source, ClipSource):
                raise RequestError(f"{path} holds clips: say how many frames to take of each with --data.frames.")
            sources = hold_out(source, fraction) if fraction < 1 else (source, source)
        options = {"size": self.size, "max_bad": self.max_bad}
        trained_on, held_out_of = sources
        return (
            CentreCrops(trained_on, seed=self.seed, flip=self.flip, **options),
            CentreCrops(held_out_of, seed=None, **options) if held_out_of.items() else [],
        )

    def _open_clips(self, source: ClipSource, fraction: float) -> tuple[Any, Any]:
        items = source.items()
        trained, held_out = split(items.keys.to_pylist(), fraction) if fraction < 1 else ([], list(range(len(items))))
        options: dict[str, Any] = {
            "frames": self.frames,
            "size": self.size,
            "fps": self.fps,
            "cache": self.clip_cache,
            "max_bad": self.max_bad,
        }
        return (
            CentreClips(source, items.take(trained), seed=self.seed, flip=self.flip, **options),
            CentreClips(source, items.take(held_out), seed=None, **options),
        )

    @property
    def sets(self) -> list[Any]:
        """What is trained on, and what is validated on if there is anything."""
        return [self.train_set, *([self.val_set] if len(self.val_set) else [])]

    @property
    def validates(self) -> bool:
        return len(self.val_set) > 0

    def train_dataloader(self) -> DataLoader:
        """The stream of samples from the position at which the run stands."""
        return self._stream(self.train_set)

    def first(self, count: int) -> DataLoader:
        """The first samples of training, each on one rank."""
        return self._in_order(self.train_set, count)

    def val_dataloader(self) -> list[DataLoader]:
        """A loader of this rank's part of the held-out samples; none without such samples."""
        return [self._in_order(self.val_set, self.val_images)] if self.validates else []


def class_names(labelled: Labelled) -> dict[int, str] | None:
    """The names of classes that are first-level folders, as the keys of their samples tell; None where they are not."""
    names: dict[int, str] = {}
    for key, label in labelled:
        folder, slash, _ = key.partition("/")
        if label < 0 or not slash or names.setdefault(label, folder) != folder:
            return None
    return names if len(set(names.values())) == len(names) else None


def count_classes(labelled: Labelled, asked: int | None, where: str) -> int:
    """How many classes a run has: as many as asked for, else as the labels say; 1 for unconditional training.

    Args:
        where: the place of the samples, for errors.

    Raises:
        RequestError: some samples have no label, or one beyond the classes that are asked for.
    """
    if asked is not None and asked < 1:
        raise RequestError(f"model.num_classes is {asked}; expected at least 1, which trains without classes.")
    if asked == 1 or (asked is None and all(label < 0 for _, label in labelled)):
        return 1
    without = [key for key, label in labelled if label < 0]
    if without:
        raise RequestError(
            f"{len(without)} of the {len(labelled)} samples of {where} have no label, such as {without[0]}: put each "
            "class into a folder of its own, or train without classes with --model.num_classes 1."
        )
    largest, key = max((label, key) for key, label in labelled)
    if asked is not None and largest >= asked:
        raise RequestError(
            f"{key} of {where} has label {largest}, but model.num_classes {asked} allows 0 to {asked - 1}: leave "
            "num_classes out to take as many as there are."
        )
    return asked or largest + 1
