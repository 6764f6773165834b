"""What an export reads: the entries of a store as other people's loaders want them, moments, draws or both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.console import Progress
from latentae.errors import RequestError
from latentae.store.draws import draw
from latentae.store.reader import LatentStore
from latentae.store.worker import key_generator

FILE_BYTES = 256 * 2**20  # of the tensors of a file of many entries, about
TENSORS = ("latents", "moments", "latents_flip", "moments_flip")


class Entries:
    """All encoded inputs of a store, one after the other.

    Args:
        seed: with the key of an entry, of its draw from a store of moments.
        images: where the pictures of the entries are, for the formats that keep these too.
    """

    def __init__(self, store: LatentStore, *, seed: int = 0, images: str | Path | None = None):
        self.store, self.seed, self.images = store, seed, images
        self.are_moments = store.kind == "moments"
        first = store[0]
        self.tensors = [name for name in TENSORS if name in first and not (self.are_moments and name[0] == "l")]
        self.shape = _common_shape(store)
        self.bytes_each = sum(first[name].nbytes for name in self.tensors)

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with Progress("export", len(self), "entries") as progress:
            for index in range(len(self)):
                yield self.store[index]
                progress.advance()

    def blocks(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """The same, ``size`` at a time."""
        block: list[dict[str, Any]] = []
        for item in self:
            block.append(item)
            if len(block) == size:
                yield block
                block = []
        if block:
            yield block

    @property
    def pixel_size(self) -> int:
        """The side of the pictures that were encoded, of a store of squares."""
        return self.store.latent_shape[-1] * self.store.config["model"]["spatial_ratio"]

    def per_file(self, most: int) -> int:
        """How many entries go into a file of many."""
        return min(most, max(FILE_BYTES // self.bytes_each, 1))

    def arrays(self, item: dict[str, Any]) -> dict[str, np.ndarray]:
        """The tensors of an item as they are in the store, by name; bfloat16, which numpy has not, as float32."""
        return {name: _array(item[name]) for name in self.tensors}

    def latents(self, item: dict[str, Any], *, flip: bool = False) -> Tensor:
        """Raw latents of one item, float32: a draw where the store has moments, else what is stored."""
        end, purpose = ("_flip", "flip") if flip else ("", "")
        if not self.are_moments:
            return item[f"latents{end}"].float()
        return draw(item[f"moments{end}"], key_generator(self.seed, item["key"], purpose))

    def mean_and_std(self, item: dict[str, Any]) -> np.ndarray:
        """Means, and standard deviations after them, float32 (2C, h, w)."""
        mean, log_variance = item["moments"].float().chunk(2)
        return torch.cat([mean, (0.5 * log_variance).exp()]).numpy()


def _common_shape(store: LatentStore) -> tuple[int, ...] | None:
    """The shape of every entry's latents, None where they have several."""
    try:
        return store.latent_shape
    except RequestError:
        return None


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def columns_of(item: dict[str, Any]) -> dict[str, Any]:
    """What is known of an item beside its tensors; a label that is not there is None."""
    columns = {name: value for name, value in item.items() if name not in TENSORS}
    return {**columns, "label": None if item["label"] < 0 else item["label"]}
