"""The intrinsic dimension of a set of latents: how many numbers would locate a point among its neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from latentae.metrics.image import ExactSums

FEWEST_POINTS = 20
KEPT = 0.9  # of the ratios; the paper leaves out the largest tenth
CANDIDATES = 4  # for the two nearest neighbours
DUPLICATE = 1e-14  # squared distance over the mean squared distance below which two points are one


def two_nn(points: Tensor) -> float:
    """The TwoNN estimate (Facco et al. 2017, doi:10.1038/s41598-017-11873-y) by its linear fit.

    On a uniform sample of a d-dimensional manifold the ratio µ of the distances to the second and the first neighbour
    has the distribution F(µ) = 1 - µ^-d, so that -log(1 - F) over log µ is a line through the origin of slope d. Points
    with a duplicate stay out.

    Args:
        points: (N, D) of any dtype, computed with in float64.

    Returns:
        The dimension; NaN of fewer than 20 points. With few points in many dimensions it comes out too low.
    """
    if len(points) < FEWEST_POINTS:
        return float("nan")
    first, second, scale = _nearest(points)
    distinct = first > DUPLICATE * scale
    ratios = (0.5 * (second[distinct] / first[distinct]).log()).sort().values  # log µ
    kept = int(KEPT * len(ratios))
    if len(ratios) < FEWEST_POINTS:
        return float("nan")
    x = ratios[:kept]
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64, device=x.device) / len(ratios))
    return float(x @ y / (x @ x))


def _nearest(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances to the first and the second neighbour, (N,) float64, and their mean over all pairs.

    Products of coordinates find candidates; their distances, which products would lose to rounding, come from
    differences. A part of the coordinates at a time, so that no float64 copy of all is made.
    """
    parts = points.split(4096, dim=1)
    products = torch.zeros(len(points), len(points), dtype=torch.float64, device=points.device)
    for part in parts:
        centred = part.double() - part.double().mean(0)
        products.addmm_(centred, centred.T)
    norms = products.diagonal()
    squares = norms[:, None] + norms - 2 * products
    squares.fill_diagonal_(torch.inf)
    candidates = squares.topk(CANDIDATES, largest=False).indices.unbind(1)  # each (N,)
    exact = torch.stack([sum((p.double() - p[i].double()).square().sum(1) for p in parts) for i in candidates], 1)
    first, second = exact.topk(2, largest=False).values.unbind(1)
    return first, second, 2 * norms.mean()


class TwoNN(ExactSums):
    """The TwoNN intrinsic dimension of a random sample of what streams by.

    Each point draws a number from its place in the order, and those with the smallest numbers are kept: a uniform
    sample, the same for every batch size, and of merged processes too.

    Args:
        most_points: size of the sample.
        seed: of the sample.
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor
    sample: list[Tensor]

    def __init__(self, most_points: int = 2000, seed: int = 0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.most_points, self.seed = most_points, seed
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # rows (1, 1 + D): the number that was drawn, the point
        self.add_state("sample", [], dist_reduce_fx="cat")

    def update(self, points: Tensor, places: Sequence[int] | None = None) -> None:
        """Add points, (B, …), each flattened to D coordinates.

        Args:
            points: to add.
            places: theirs in the order of all; by default they follow the last. Processes that share the work give
                them, and then draw the sample that one would.
        """
        places = range(int(self.count), int(self.count) + len(points)) if places is None else places
        for place, point in zip(places, points.detach().flatten(1).float()):
            number = np.random.default_rng((self.seed, place)).random()
            self.sample.append(torch.cat([point.new_tensor([number]), point])[None])
        self.count += len(points)
        if len(self.sample) > self.most_points:
            order = torch.cat([row[:, 0] for row in self.sample]).argsort(stable=True)[: self.most_points].tolist()
            self.sample = [self.sample[i] for i in order]

    def compute(self) -> dict[str, Tensor]:
        """``dimension``, NaN of fewer than 20 points, and ``points``: how many it was estimated from."""
        if not int(self.count):
            return {"dimension": torch.tensor(torch.nan, dtype=torch.float64), "points": torch.tensor(0)}
        rows = dim_zero_cat(self.sample)
        rows = rows[rows[:, 0].argsort(stable=True)[: self.most_points]]
        dimension = torch.tensor(two_nn(rows[:, 1:]), dtype=torch.float64)
        return {"dimension": dimension, "points": torch.tensor(len(rows))}
