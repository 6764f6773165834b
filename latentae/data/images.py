"""Images to train on: a map-style data set in which a sample is a pure function of its position.

Positions count the samples since the start of training, so one number says where training stands, whatever the number
of workers and ranks. A position gives the epoch and the place in it; the epoch's order gives the index of the image
there; and a generator seeded with (seed, epoch, index) crops it.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from latentae.console import say
from latentae.data.decode import DEFAULT_POLICY, BadImage, DecodePolicy, decode_image
from latentae.data.samples import dead_leaves as generate_dead_leaves
from latentae.data.sources import Source
from latentae.data.transforms import adm_center_crop, random_resized_crop_flip, to_tensor
from latentae.errors import DataError, RequestError


@lru_cache(maxsize=2)
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The indices 0 to ``length - 1`` in the order of one epoch: a pure function, whose result is not to be changed."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def refuse_too_many(bad: int, what: str, total: int, last: str, max_bad: float) -> None:
    """Stop training where too many samples are bad.

    Args:
        what: is wrong with ``bad`` of the ``total``, such as "images cannot be decoded".
        last: key of the last bad one.
        max_bad: share that is let pass; a single one always is, unless it is all there is.

    Raises:
        DataError: they are too many.
    """
    if bad > max(1, max_bad * total) or bad == total:
        raise DataError(
            f"{bad} of {total} {what}, {last} the last of them, more than the share of {max_bad} that is let pass: "
            "remove or repair them."
        )


class ImageDataset(Dataset[dict[str, Any]]):
    """Square crops of a source's images.

    With ``augment`` (training), position ``p`` of any epoch gives image ``epoch_order(len, seed, epoch)[p % len]``
    with ``epoch = p // len``, cropped by `random_resized_crop_flip`. Without (evaluation), it gives image ``p % len``
    in key order, cropped by `adm_center_crop`; ``seed`` plays no part.

    Images smaller than ``size`` are enlarged. A broken image is reported once by each process that meets it and
    replaced by the next good one, in key order, so that the sample stays a pure function of its position.

    Args:
        source: where the images come from.
        size: side of the crops in pixels.
        seed: of the order and of the crops, 0 or more.
        augment: random crops in random order, or centre crops in order.
        dead_leaves: share of samples that are generated (`dead_leaves`) instead of read, in training only.
        policy: how bytes become pixels.
        cache_bytes: memory for decoded images, shared between the workers of a loader, so that small data sets are
            decoded once; when it is full, nothing more enters.
        max_bad: share of broken images from which on the data set is refused; a single one is always let pass.
    """

    noun = "images"

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        seed: int = 0,
        augment: bool = True,
        dead_leaves: float = 0.0,
        policy: DecodePolicy = DEFAULT_POLICY,
        cache_bytes: int = 256 * 2**20,
        max_bad: float = 0.01,
    ):
        if not 0 <= dead_leaves <= 1:
            raise RequestError(f"dead_leaves is a share of samples, from 0 to 1, not {dead_leaves}.")
        self.source = source
        self.items = source.items()
        if not self.items:
            raise RequestError("The source holds no images: give one that does.")
        self.size, self.seed, self.augment, self.dead_leaves = size, seed, augment, dead_leaves
        self.policy, self.cache_bytes, self.max_bad = policy, cache_bytes, max_bad
        self.bad: dict[int, str] = {}
        self._cache: dict[int, np.ndarray] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Samples of one epoch; positions go on beyond it."""
        return len(self.items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The first epoch: without this, a loop would never end."""
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position: ``pixels`` uint8 (3, size, size), ``index`` of the image among the source's items,
        its ``key``, its ``label``, -1 without one, and as text, separated by spaces, the indices of the broken images
        that it ``stands_in_for``.

        Raises:
            DataError: more than the share ``max_bad`` of the images is broken.
        """
        epoch, place = divmod(position, len(self.items))
        if not self.augment:
            index, image = self._good_image(place)
            return self._sample(place, index, adm_center_crop(image, self.size))
        drawn = int(epoch_order(len(self.items), self.seed, epoch)[place])
        rng = np.random.default_rng((self.seed, epoch, drawn))
        if rng.random() < self.dead_leaves:
            pixels = to_tensor(generate_dead_leaves(position, self.size, self.seed))
            key = f"dead-leaves/{position}"
            return {"pixels": pixels, "index": drawn, "key": key, "label": -1, "stands_in_for": ""}
        index, image = self._good_image(drawn)
        return self._sample(drawn, index, random_resized_crop_flip(image, self.size, rng))

    def _sample(self, drawn: int, index: int, crop: np.ndarray) -> dict[str, Any]:
        item = self.items[index]
        broken = ((drawn + i) % len(self.items) for i in range((index - drawn) % len(self.items)))
        return {
            "pixels": to_tensor(crop),
            "index": index,
            "key": item.key,
            "label": -1 if item.label is None else item.label,
            "stands_in_for": " ".join(map(str, broken)),
        }

    def _good_image(self, index: int) -> tuple[int, np.ndarray]:
        """The image at ``index``, or the next one that can be decoded, with its index."""
        while True:
            if index not in self.bad:
                try:
                    return index, self._image(index)
                except BadImage as error:
                    self._note_bad(index, error)
            index = (index + 1) % len(self.items)

    def _image(self, index: int) -> np.ndarray:
        """Decoded pixels (H, W, 3), from the cache if they are there; not to be written to."""
        if index in self._cache:
            return self._cache[index]
        image = decode_image(self.source.read(self.items[index]), self.policy)
        worker = get_worker_info()
        if self._cached_bytes + image.nbytes <= self.cache_bytes // (worker.num_workers if worker else 1):
            self._cache[index] = image
            self._cached_bytes += image.nbytes
        return image

    def _note_bad(self, index: int, error: BadImage) -> None:
        self.bad[index] = error.reason
        say(f"{self.items[index].key}: {error} The next image stands in for it.")
        self.refuse_too_many(len(self.bad), index)

    def refuse_too_many(self, bad: int, last: int) -> None:
        """Stop where ``bad`` broken images, that at index ``last`` the last of them, are too many.

        Raises:
            DataError: they are more than the share ``max_bad``, and more than one; or all.
        """
        refuse_too_many(bad, "images cannot be decoded", len(self.items), self.items[last].key, self.max_bad)
