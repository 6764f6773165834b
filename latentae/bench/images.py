"""The images of a benchmark: decoded and cropped in threads, in one order, for every model the same pixels.

An image that cannot be decoded is left out, counted and named once; the others are measured. Batches are the same
whoever takes them: where a process starts again, or several share the work, each sees whole batches of the one order.
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.crops import Crop
from latentae.data.decode import BadImage, decode_image
from latentae.data.sources import Item, Source
from latentae.data.transforms import adm_center_crop, to_tensor
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
    """Images of one batch: its number, their places in the order, their keys and pixels, uint8 (B, 3, size, size)."""

    number: int
    places: list[int]
    keys: list[str]
    pixels: Tensor


class ImageSet:
    """Square crops of the images of a source, streamed in batches as often as there are models.

    ``facts`` fills up on the way.
    """

    def __init__(
        self,
        source: Source,
        items: list[Item],
        size: int,
        batch_size: int,
        workers: int,
        crop: Crop = adm_center_crop,
    ):
        self.source, self.items, self.size, self.crop = source, items, size, crop
        self.batch_size, self.workers = batch_size, workers
        self.facts = ImageFacts()

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
        cost = 3 * self.size**2
        loaded = prefetch(self._load, chosen, workers=self.workers, cost=lambda _: cost, budget=PREFETCH_BYTES)
        for number, members in groupby(loaded, lambda pair: pair[0] // self.batch_size):
            crops = [(place, crop) for place, found in members if (crop := self._note(place, found)) is not None]
            if crops:
                places = [place for place, _ in crops]
                pixels = torch.stack([to_tensor(crop) for _, crop in crops])
                yield Batch(number, places, [self.items[place].key for place in places], pixels)

    def _load(self, place: int) -> tuple[int, tuple[np.ndarray, str, bool] | BadImage]:
        """The crop, its digest and whether it was enlarged; called by threads, which leave ``facts`` alone."""
        try:
            image = decode_image(self.source.read(self.items[place]))
        except BadImage as error:
            return place, error
        crop = self.crop(image, self.size)
        return place, (crop, hashlib.sha256(crop.data).hexdigest(), min(image.shape[:2]) < self.size)

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
