"""How the energy of latents is spread over spatial frequencies, summed while the batches stream by."""

import math
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.metrics.image import ExactSums

BINS_TO_NYQUIST = 16
BINS = math.ceil(BINS_TO_NYQUIST * math.sqrt(2))  # the corner of the square of frequencies is at √2


class RadialSpectrum(ExactSums):
    """Energy of latents by radial frequency, averaged over channels.

    Each channel of each latent map goes through an orthonormal cosine transform (DCT-II), by which "Improving the
    Diffusability of Autoencoders" (arXiv 2502.14831) tells latents with too much high frequency; unlike Fourier's, it
    does not take the jump between opposite edges of an image for one. Coefficient (i, j) of an h×w map has frequency
    √((i/h)² + (j/w)²) in units of the Nyquist frequency. The mean of a map, at frequency 0, stays out. Every channel
    counts alike, whatever its scale. Maps of different sizes may be mixed, and processes merge exactly.

    Args:
        channels: of the latents.
    """

    is_differentiable = False
    full_state_update = False
    energy: Tensor
    coefficients: Tensor

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("energy", torch.zeros(channels, BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("coefficients", torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor) -> None:
        """Add latents (B, C, h, w), or (B, C, t, h, w) whose frames count as images."""
        if latents.ndim not in (4, 5) or latents.shape[1] != len(self.energy):
            raise RequestError(
                f"RadialSpectrum of {len(self.energy)} channels got latents of shape {tuple(latents.shape)}; expected "
                "(B, C, h, w) or (B, C, t, h, w)."
            )
        height, width = latents.shape[-2:]
        rows, columns = cosine_matrix(height).to(self.energy), cosine_matrix(width).to(self.energy)
        squares = (rows @ latents.to(self.energy) @ columns.T).square()  # (B, C, …, h, w)
        by_channel = squares.transpose(0, 1).flatten(1, -3).sum(1).flatten(1)  # (C, h * w)
        bins = _bins(height, width).to(self.energy.device)
        maps = latents.numel() // (latents.shape[1] * height * width)
        self.energy.index_add_(1, bins, by_channel[:, 1:])
        self.coefficients += maps * bins.bincount(minlength=BINS)

    def compute(self) -> dict[str, Tensor]:
        """What the channels have in common; NaN where nothing varies.

        Returns:
            ``frequency``: the middle of each bin, in units of Nyquist. ``energy``: the share of it in each bin, which
            sum to 1. ``density``: that share over the share of coefficients, 1 everywhere for white noise, NaN where
            no coefficient lies. ``high_frequency_share``: of the energy from half the Nyquist frequency on; of white
            noise on a large grid 1 - π/16 = 0.80.
        """
        varying = self.energy[self.energy.sum(1) > 0]
        energy = (varying / varying.sum(1, keepdim=True)).mean(0)
        return {
            "frequency": (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS_TO_NYQUIST,
            "energy": energy,
            "density": energy / (self.coefficients / self.coefficients.sum()),
            "high_frequency_share": energy[BINS_TO_NYQUIST // 2 :].sum(),
        }


def cosine_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II (size, size) in float64: rows are frequencies."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (n + 0.5) * k) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _bins(height: int, width: int) -> Tensor:
    """The bin of each coefficient but the first, (h * w - 1,), in whole numbers: no edge is a matter of rounding."""
    rows, columns = torch.arange(height)[:, None] * width, torch.arange(width) * height
    squares = (rows**2 + columns**2) * BINS_TO_NYQUIST**2 // (height * width) ** 2  # of the frequency in bins
    return squares.double().sqrt().long().flatten()[1:]
