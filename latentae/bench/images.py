"""The images or clips of a benchmark: decoded and cropped in threads, in one order, for every model the same pixels.

One that cannot be decoded is left out, counted and named once; the others are measured. Batches are the same
whoever takes them: where a process starts again, or several share the work, each sees whole batches of the one order.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.crops import Crop
from latentae.data.clips import ClipSource
from latentae.data.decode import BadImage, decode_image
from latentae.data.sources import Item, Source
from latentae.data.transforms import adm_center_crop
from latentae.data.video import FrameChoice
from latentae.errors import DataError
from latentae.store.worker import PREFETCH_BYTES, prefetch


@dataclass
class ImageFacts:
    """What is known of the images so far, by their place in the order; JSON can hold it.

    Attributes:
        digests: the sha256 of the cropped pixels.
        enlarged: the places of those that were smaller than the crop.
        bad: reason and explanation for those that cannot be decoded.
    """

    digests: dict[int, str] = field(default_factory=dict)
    enlarged: list[int] = field(default_factory=list)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)

    def merge(self, other: "ImageFacts") -> None:
        self.digests |= other.digests
        self.enlarged = sorted({*self.enlarged, *other.enlarged})
        self.bad |= other.bad

    def to_json(self) -> dict[str, Any]:
        return {"digests": [*self.digests.items()], "enlarged": self.enlarged, "bad": [*self.bad.items()]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ImageFacts":
        bad = {place: (reason, explanation) for place, (reason, explanation) in value["bad"]}
        return cls(dict(value["digests"]), value["enlarged"], bad)


@dataclass(frozen=True)
class Batch:
    """Images of one batch: its number, their places in the order, their keys and pixels.

    These are uint8 (B, 3, size, size), of clips (B, 3, T, size, size).
    """

    number: int
    places: list[int]
    keys: list[str]
    pixels: Tensor


class ImageSet:
    """Square crops of the images of a source, streamed in batches as often as there are models.

    ``facts`` fills up on the way. With a ``choice`` of a number of frames, these of each clip of a `ClipSource` are
    what an image is without it.
    """

    def __init__(
        self,
        source: Source | ClipSource,
        items: Sequence[Item],
        size: int,
        batch_size: int,
        workers: int,
        crop: Crop = adm_center_crop,
        choice: FrameChoice | None = None,
    ):
        self.source, self.items, self.size, self.crop = source, items, size, crop
        self.batch_size, self.workers, self.choice = batch_size, workers, choice
        self.facts = ImageFacts()

    @property
    def frames(self) -> int | None:
        """Of each clip; None of images."""
        return self.choice.frames if self.choice else None

    @property
    def unit(self) -> str:
        """What is measured, in the plural."""
        return "clips" if self.choice else "images"

    @property
    def good(self) -> list[Item]:
        """The images that have not turned out bad."""
        return [item for place, item in enumerate(self.items) if place not in self.facts.bad]

    @property
    def bad(self) -> dict[str, BadImage]:
        """Key to error of those that cannot be decoded."""
        return {self.items[place].key: BadImage(*why) for place, why in sorted(self.facts.bad.items())}

    @property
    def sha256(self) -> str:
        """Hash of all cropped pixels in order."""
        digests = "".join(digest for _, digest in sorted(self.facts.digests.items()))
        return hashlib.sha256(digests.encode()).hexdigest()

    def batches(
        self, start: int = 0, share: int = 0, shares: int = 1, keys: Collection[str] | None = None
    ) -> Iterator[Batch]:
        """Batches from number ``start`` on, every ``shares``-th of them from ``share`` on; of them the images ``keys``.

        Raises:
            DataError: an image has other pixels than an earlier pass met.
        """
        chosen = [
            place
            for place in range(len(self.items))
            if (number := place // self.batch_size) >= start
            and number % shares == share
            and place not in self.facts.bad
            and (keys is None or self.items[place].key in keys)
        ]
        cost = 3 * self.size**2 * (self.frames or 1)
        loaded = prefetch(self._load, chosen, workers=self.workers, cost=lambda _: cost, budget=PREFETCH_BYTES)
        for number, members in groupby(loaded, lambda pair: pair[0] // self.batch_size):
            crops = [(place, crop) for place, found in members if (crop := self._note(place, found)) is not None]
            if crops:
                places = [place for place, _ in crops]
                pixels = torch.stack([torch.from_numpy(np.moveaxis(crop, -1, 0).copy()) for _, crop in crops])
                yield Batch(number, places, [self.items[place].key for place in places], pixels)

    def _load(self, place: int) -> tuple[int, tuple[np.ndarray, str, bool] | BadImage]:
        """The crop, its digest and whether it was enlarged; called by threads, which leave ``facts`` alone."""
        try:
            crop, shape = self._read(self.items[place])
        except BadImage as error:
            return place, error
        return place, (crop, hashlib.sha256(crop.data).hexdigest(), min(shape) < self.size)

    def _read(self, item: Item) -> tuple[np.ndarray, tuple[int, int]]:
        """The crop of an image or a clip, and the height and width before."""
        if self.choice is None or not isinstance(self.source, ClipSource):
            image = decode_image(self.source.read(item))
            return self.crop(image, self.size), (image.shape[0], image.shape[1])
        video = self.source.open(item)
        frames = [self.crop(frame, self.size) for frame in video.frames(self.choice.numbers(video.info))]
        return np.stack(frames), (video.info.height, video.info.width)

    def _note(self, place: int, found: tuple[np.ndarray, str, bool] | BadImage) -> np.ndarray | None:
        """The crop, if there is one; what is known of it goes into ``facts``."""
        if isinstance(found, BadImage):
            self.facts.bad[place] = (found.reason, found.explanation)
            return None
        crop, digest, enlarged = found
        if self.facts.digests.get(place, digest) != digest:
            raise DataError("The images changed while they were measured: run again when nothing writes to them.")
        self.facts.digests[place] = digest
        if enlarged and place not in self.facts.enlarged:
            self.facts.enlarged.append(place)
        return crop
