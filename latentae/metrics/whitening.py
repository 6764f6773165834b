"""Latents made white over their channels, so that neither scale nor rotation of channels matters to what follows."""

from collections.abc import Callable

import torch
from torch import Tensor

from latentae.errors import RequestError

FLOOR = 1e-6  # of the largest variance: a direction with less is dead, and its rounding noise must not be blown up
BATCH = 256


class Whitening:
    """The affine map after which the channels of latents have mean 0, variance 1 and no correlation (PCA whitening).

    Mean and covariance are of the vectors at all positions of all images, in float64. The new channels are the
    principal directions in falling order, each with the sign that makes its third moment positive: latents that differ
    by a shift, a scale and a rotation of their channels come out the same, but for rounding. Directions with less than
    a millionth of the largest variance are scaled as if they had that much, and so stay near 0.

    Args:
        latents: (N, C, h, w), finite.

    Raises:
        RequestError: no vectors, or all are the same.
    """

    def __init__(self, latents: Tensor):
        if not latents.numel():
            raise RequestError("There are no latents to whiten.")
        self.mean = mean = _average(latents, lambda x: x.sum(1))  # (C,)
        covariance = _average(latents, lambda x: (x - mean[:, None]) @ (x - mean[:, None]).T)
        variances, directions = torch.linalg.eigh(covariance)
        if not variances[-1] > 1e-12 * self.mean.square().mean():
            raise RequestError("The latents are the same everywhere: there is nothing to model.")
        self.variances = variances.flip(0).clamp(min=0)  # (C,), falling
        directions = directions.flip(1)
        cubes = _average(latents, lambda x: (directions.T @ (x - mean[:, None])).pow(3).sum(1))
        directions = directions * torch.where(cubes < 0, -1.0, 1.0)
        scale = self.variances.clamp(min=FLOOR * self.variances[0]).sqrt()
        self.forward_matrix, self.backward_matrix = directions.T / scale[:, None], directions * scale

    @property
    def dead(self) -> int:
        """How many directions have next to no variance."""
        return int((self.variances < FLOOR * self.variances[0]).sum())

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, …) whitened, float32."""
        parts = latents.split(BATCH)
        return torch.cat([_apply(self.forward_matrix, x.double() - _beside(self.mean, x)).float() for x in parts])

    def undo(self, white: Tensor) -> Tensor:
        """The inverse, float32."""
        return (_apply(self.backward_matrix, white.double()) + _beside(self.mean, white)).float()


def _average(latents: Tensor, summed: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over all vectors of what ``summed`` adds up over some of them, (C, B * …) in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for part in latents.split(BATCH):
        total = total + summed(part.double().cpu().transpose(0, 1).flatten(1))
    return total / (latents.numel() // latents.shape[1])


def _apply(matrix: Tensor, latents: Tensor) -> Tensor:
    return (matrix.to(latents.device) @ latents.flatten(2)).view(latents.shape)  # (B, C, …)


def _beside(values: Tensor, latents: Tensor) -> Tensor:
    return values.to(latents.device).view(-1, *[1] * (latents.ndim - 2))
