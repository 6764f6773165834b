"""How many bits latents take under a diffusion model: the rate of noisy latents. Experimental.

A code for real-valued latents x must stop at some precision. Let that be white noise of variance 1 / s on latents of
unit variance: the receiver gets y = √s x + n, with n ~ N(0, 1). By I-MMSE (Guo, Shamai and Verdú 2005) the mutual
information of the two is the integral of the least error with which x can be estimated from noisier versions of it,

    I(x; y) = 1/2 ∫₀^s* E|x - x̂(s)|² ds   nats,

and with the x̂ of a trained denoiser it is the diffusion term of the bound of variational diffusion models (Kingma et
al. 2021, arXiv 2107.00630, section 5): the nats that this model needs to send y, never fewer than I. A denoiser that
only knows the variance needs 1/2 log(1 + s*) for each number; whatever it knows more makes it fewer.

On the path of flow matching, noisy = (1 - t) x + t n, the signal-to-noise ratio is s = ((1 - t) / t)², the estimate
from a velocity v̂ is x̂ = noisy - t v̂, and so x - x̂ = t (v̂ - v). With ds = -2 (1 - t) / t³ dt,

    nats = ∫_{t*}^1 E|v - v̂|² (1 - t) / t dt,   t* = σ / (1 + σ), σ² = 1 / s*.

At t -> 1 the weight (1 - t) / t goes to 0 and E|v - v̂|² to E|x - x̂|², which is at most E|x|² for any denoiser that has
learned the mean: the integrand is finite and ends at 0. Towards t* it grows as 1 / t, and stops there.

The integral is taken over λ = log s, where it is 1/2 ∫ s E|x - x̂|² dλ. For a Gaussian of any variance the integrand is
a logistic function, which is smooth at all scales, and Gauss and Legendre's 16 nodes are exact to better than 1e-5. It
begins at λ = -10; what lies below is 1/2 s E|x - x̂|² at the first node, next to nothing.

Rate depends on s*, which must mean the same for all that is compared: in the probe it is the noise at which decoded
images have lost 0.1 dB. It does not change if latents are scaled or their channels rotated, because they are whitened
first. But whitening makes a channel that the decoder ignores as large as any other, and the rate counts what it holds.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from latentae.metrics.spectrum import cosine_matrix
from latentae.nn.flow import add_noise

NODES = 16
LEAST_LOG_SNR = -10.0
BATCH = 256

Velocity = Callable[[Tensor, Tensor], Tensor]


def diffusion_nats(
    velocity: Velocity, latents: Tensor, snr: float, *, seed: int = 0, nodes: int = NODES, batch_size: int = 64
) -> Tensor:
    """Nats that a denoiser needs for latents with noise of this signal-to-noise ratio, for each image.

    Args:
        velocity: from noisy latents (B, C, h, w) and times (B,) to the velocity.
        latents: whitened, (N, C, h, w).
        snr: s*, where the integral ends.
        seed: of the noise, which is the same for all that have this shape.

    Returns:
        (N,) float64.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    start, end = min(LEAST_LOG_SNR, math.log(snr) - 1), math.log(snr)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(latents), dtype=torch.float64)
    for node, (point, weight) in enumerate(zip(points, weights)):
        level = math.exp(start + (end - start) * (point + 1) / 2)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        errors = _clean_errors(velocity, latents, noise, level, batch_size)
        total += 0.5 * level * errors * weight * (end - start) / 2
        if node == 0:
            total += 0.5 * math.exp(start) * errors
    return total


@torch.no_grad()
def _clean_errors(velocity: Velocity, latents: Tensor, noise: Tensor, snr: float, batch_size: int) -> Tensor:
    """|x - x̂|² of each image at one signal-to-noise ratio, (N,) float64."""
    time = 1 / (1 + math.sqrt(snr))
    errors = []
    for clean, drawn in zip(latents.split(batch_size), noise.split(batch_size)):
        t = torch.full((len(clean),), time, device=clean.device)
        predicted = velocity(add_noise(clean, drawn, t), t)
        difference = (predicted.float() - (drawn - clean)).cpu().double()
        errors.append((time * difference).square().flatten(1).sum(1))
    return torch.cat(errors)


def gaussian_nats(coefficients: Tensor, variances: Tensor, snr: float) -> Tensor:
    """The same for the best denoiser of independent Gaussians, in closed form over noise and noise levels.

    With x̂ = s l / (1 + s l) y / √s and variance l, the expected error of a number x is x² / (1 + s l)² + s l² / (1 + s
    l)²; half its integral is 1/2 [log(1 + s* l) + (x² - l) s* / (1 + s* l)].

    Args:
        coefficients: (N, D), of mean 0.
        variances: l of each, (D,).

    Returns:
        (N,) float64.
    """
    x, variances = coefficients.double(), variances.double()
    gain = 1 + snr * variances
    return 0.5 * (gain.log() + (x.square() - variances) * snr / gain).sum(1)


class SpectralGaussian:
    """Latents as a Gaussian that knows the covariance of the channels at each spatial frequency, and the mean map.

    The channels of each coefficient of the orthonormal cosine transform have a covariance of their own; coefficients of
    different frequencies are taken as independent. Estimated covariances are drawn towards white by as many imagined
    images as there are channels.

    Args:
        latents: those to learn from, (N, C, h, w).
    """

    def __init__(self, latents: Tensor):
        images, channels = latents.shape[:2]
        self.mean = torch.stack([part.double().sum(0) for part in latents.split(BATCH)]).sum(0) / images
        covariance = torch.zeros((), dtype=torch.float64)  # (h * w, C, C), as often as there are images
        for part in latents.split(BATCH):
            found = self._transform(part)  # (h * w, B, C)
            covariance = covariance + found.transpose(1, 2) @ found
        level = covariance.diagonal(dim1=1, dim2=2).mean(1) / images
        prior = (channels * level)[:, None, None] * torch.eye(channels, dtype=torch.float64)
        self.variances, self.directions = torch.linalg.eigh((covariance + prior) / (images + channels))

    def nats(self, latents: Tensor, snr: float) -> Tensor:
        """What it needs for latents (N, C, h, w), (N,) float64."""
        coefficients = self._transform(latents) @ self.directions  # (h * w, N, C)
        return gaussian_nats(coefficients.transpose(0, 1).flatten(1), self.variances.flatten(), snr)

    def _transform(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        centred = latents.double() - self.mean
        found = cosine_matrix(height).to(centred) @ centred @ cosine_matrix(width).to(centred).T
        return found.flatten(2).permute(2, 0, 1)
