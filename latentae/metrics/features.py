"""What needs the features themselves and not their sums: kernel distance, precision and recall of two sets of images.

A sample of bounded size stays, so that memory does not grow with the number of images. It is drawn by the names of the
images: the same for every model, however the images came in and however many processes saw them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.metrics.image import ExactSums

SAMPLE_SIZE = 10_000  # images of each side: 82 MB of 2048 features, up to twice as much while they come in
NEIGHBOURHOOD = 3
ROWS_AT_A_TIME = 1024


class FeatureSample(ExactSums):
    """KID (Bińkowski et al. 2018), and precision and recall (Kynkäänniemi et al. 2019), of features of two sets.

    KID is the unbiased squared maximum mean discrepancy with the kernel (x·y / d + 1)³ over the whole sample, which the
    mean over random subsets of other implementations estimates. A reconstruction is not compared with its own original:
    the two are no independent draws, and these N of N² pairs would push KID far below zero.

    Precision is the share of reconstructions that lie no further from some original than its third nearest other
    original; recall is the same with the sides exchanged.

    Args:
        dimension: number of features.
        size: how many images of each side are kept.
        keep_originals: ``reset`` forgets the reconstructions only, to measure several models on one set of originals.
        seed: with the names of the images, of the draw.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self, dimension: int, size: int = SAMPLE_SIZE, keep_originals: bool = False, seed: int = 0, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.dimension, self.size, self.keep_originals, self.seed = dimension, size, keep_originals, seed
        for side in ("original", "reconstruction"):
            self.add_state(f"features_{side}", [], dist_reduce_fx="cat")
            self.add_state(f"lots_{side}", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, keys: Sequence[str], original: bool) -> None:
        """Add features (B, d) of the images of these names, each once, to the originals or to the reconstructions."""
        if features.shape != (len(keys), self.dimension):
            raise RequestError(
                f"A sample of {self.dimension} features got shape {tuple(features.shape)} for {len(keys)} images."
            )
        side = "original" if original else "reconstruction"
        lots = torch.tensor([self._lot(key) for key in keys], dtype=torch.int64, device=features.device)
        getattr(self, f"features_{side}").append(features.float())
        getattr(self, f"lots_{side}").append(lots)
        if sum(map(len, getattr(self, f"lots_{side}"))) >= 2 * self.size:
            kept, lots = self._drawn(side)
            setattr(self, f"features_{side}", [kept])
            setattr(self, f"lots_{side}", [lots])

    def counts(self) -> tuple[int, int]:
        """How many originals and reconstructions are in the sample."""
        return len(self._drawn("original")[1]), len(self._drawn("reconstruction")[1])

    def compute(self) -> dict[str, Tensor]:
        """``kid``, ``precision`` and ``recall``, float64 scalars.

        Raises:
            RequestError: one side has no more images than the neighbourhood counts.
        """
        (originals, lots), (reconstructions, other_lots) = self._drawn("original"), self._drawn("reconstruction")
        if min(len(lots), len(other_lots)) <= NEIGHBOURHOOD:
            raise RequestError(
                f"KID, precision and recall need at least {NEIGHBOURHOOD + 1} images on each side, got {len(lots)} and "
                f"{len(other_lots)}."
            )
        x, y = originals.double(), reconstructions.double()
        within_x, radius_x = _within(x)
        within_y, radius_y = _within(y)
        kernel_sum, pairs = x.new_zeros(()), 0
        precise = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        recalled = []
        for rows, kernel, distance in _blocks(x, y):
            strangers = lots[rows, None] != other_lots
            kernel_sum += (kernel * strangers).sum()
            pairs += int(strangers.sum())
            precise |= (distance <= radius_x[rows, None]).any(0)
            recalled.append((distance <= radius_y).any(1))
        return {
            "kid": within_x + within_y - 2 * kernel_sum / pairs,
            "precision": precise.double().mean(),
            "recall": torch.cat(recalled).double().mean(),
        }

    def reset(self) -> None:
        # Lists, which torchmetrics empties in place.
        kept = {name: list(getattr(self, name)) for name in self._defaults if name.endswith("_original")}
        super().reset()
        if self.keep_originals:
            for name, value in kept.items():
                setattr(self, name, value)

    def _lot(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}\0{key}".encode()).digest()[:8], "big") >> 1

    def _drawn(self, side: str) -> tuple[Tensor, Tensor]:
        """The features (n, d) with the lowest lots, and these, ascending; what came twice, once."""
        features, lots = getattr(self, f"features_{side}"), getattr(self, f"lots_{side}")
        if isinstance(features, list):  # after a merge of processes a tensor
            if not features:
                return torch.zeros(0, self.dimension), torch.zeros(0, dtype=torch.int64)
            features, lots = torch.cat(features), torch.cat(lots)
        lots, order = lots.sort(stable=True)
        first = torch.ones_like(lots, dtype=torch.bool)
        first[1:] = lots[1:] != lots[:-1]
        chosen = order[first][: self.size]
        return features[chosen], lots[first][: self.size]


def _within(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean kernel between different rows of x, and the squared distance of each to its third nearest other."""
    total, radii = x.new_zeros(()), []
    for rows, kernel, distance in _blocks(x, x):
        own = torch.arange(rows.start, rows.start + len(kernel), device=x.device)[:, None]
        kernel.scatter_(1, own, 0)
        distance.scatter_(1, own, torch.inf)
        total += kernel.sum()
        radii.append(distance.kthvalue(NEIGHBOURHOOD, dim=1).values)
    return total / (len(x) * (len(x) - 1)), torch.cat(radii)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of x at a time: which, their kernel with y, and their squared distances to y, both (rows, len(y))."""
    squares = y.square().sum(1)
    for start in range(0, len(x), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        products = x[rows] @ y.T
        distance = x[rows].square().sum(1, keepdim=True) + squares - 2 * products
        yield rows, (products / x.shape[1] + 1) ** 3, distance.clamp(min=0)
