"""The images of a benchmark: decoded and cropped in threads, in one order, for every model the same pixels.

An image that cannot be decoded is left out, counted and named once; the others are measured.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from latentae.data.decode import BadImage, decode_image
from latentae.data.sources import Item, Source
from latentae.data.transforms import adm_center_crop, to_tensor
from latentae.errors import DataError
from latentae.store.worker import PREFETCH_BYTES, prefetch


class ImageSet:
    """Square crops of the images of a source, streamed in batches as often as there are models.

    After the first complete pass ``bad`` holds the images that could not be decoded, key to error, ``sha256`` the hash
    of all cropped pixels in order, and ``enlarged`` the number of images that were smaller than the crop.
    """

    def __init__(self, source: Source, items: list[Item], size: int, batch_size: int, workers: int):
        self.source, self.items, self.size = source, items, size
        self.batch_size, self.workers = batch_size, workers
        self.bad: dict[str, BadImage] = {}
        self.enlarged = 0
        self.sha256: str | None = None

    @property
    def good(self) -> list[Item]:
        return [item for item in self.items if item.key not in self.bad]

    def batches(self) -> Iterator[tuple[list[str], Tensor]]:
        """Keys and pixels, uint8 (B, 3, size, size).

        Raises:
            DataError: a later pass met other pixels than the first.
        """
        digest, enlarged, keys, crops = hashlib.sha256(), 0, list[str](), list[Tensor]()
        cost = 3 * self.size**2
        loaded = prefetch(self._load, self.good, workers=self.workers, cost=lambda _: cost, budget=PREFETCH_BYTES)
        for item, image in loaded:
            if isinstance(image, BadImage):
                self.bad[item.key] = image
                continue
            crop, was_enlarged = image
            digest.update(crop.data)
            enlarged += was_enlarged
            keys.append(item.key)
            crops.append(to_tensor(crop))
            if len(keys) == self.batch_size:
                yield keys, torch.stack(crops)
                keys, crops = [], []
        if keys:
            yield keys, torch.stack(crops)
        if self.sha256 not in (None, digest.hexdigest()):
            raise DataError("The images changed while they were measured: run again when nothing writes to them.")
        self.sha256, self.enlarged = digest.hexdigest(), enlarged

    def _load(self, item: Item) -> tuple[Item, tuple[np.ndarray, bool] | BadImage]:
        try:
            image = decode_image(self.source.read(item))
        except BadImage as error:
            return item, error
        return item, (adm_center_crop(image, self.size), min(image.shape[:2]) < self.size)
