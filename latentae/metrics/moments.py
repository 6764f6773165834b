"""Figures of latents that follow from sums of first and second moments: effective rank, divergence from N(0, 1).

The sums are in float64 and add up, so that memory does not grow with the images and processes merge exactly.
"""

from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.metrics.image import ExactSums


class EffectiveRank(ExactSums):
    """How many channels latents use: exp of the entropy of the covariance's eigenvalues, from 1 to the channels.

    The effective rank of Roy and Vetterli (EUSIPCO 2007), of the covariance of latent vectors at all positions of all
    images. Channels count by their variance: as raw latents are, not standardised.

    Args:
        channels: of the latents.
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(channels, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor) -> None:
        """Add latents (B, C, …)."""
        vectors = _by_channel(latents, self.total)  # (C, B * …)
        self.count += vectors.shape[1]
        self.total += vectors.sum(1)
        self.outer += vectors @ vectors.T

    def compute(self) -> Tensor:
        """A float64 scalar; NaN where nothing varies."""
        mean, second = self.total / self.count, self.outer / self.count
        values = torch.linalg.eigvalsh((second - mean.outer(mean)).cpu()).clamp(min=0)
        if not values.sum() > 1e-12 * second.trace():
            return torch.full_like(values.sum(), torch.nan)
        shares = values / values.sum()
        return torch.special.entr(shares).sum().exp()


class PosteriorKL(ExactSums):
    """Divergence of a Gaussian posterior from N(0, 1) in nats per latent element: what a KL term of training weighs.

    Args:
        channels: of the latents.
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor
    sums: Tensor

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # by channel: Σ KL, Σ µ, Σ (µ² + σ²)
        self.add_state("sums", torch.zeros(3, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add posteriors given by mean and log variance, both (B, C, …)."""
        if mean.shape != log_variance.shape:
            raise RequestError(
                f"PosteriorKL got means {tuple(mean.shape)} and log variances {tuple(log_variance.shape)}; expected "
                "one shape (B, C, …)."
            )
        mu, log_variance = _by_channel(mean, self.sums[0]), _by_channel(log_variance, self.sums[0])
        second = mu.square() + log_variance.exp()
        self.count += mu.shape[1]
        self.sums += torch.stack([(0.5 * (second - 1 - log_variance)).sum(1), mu.sum(1), second.sum(1)])

    def compute(self) -> dict[str, Tensor]:
        """Nats per element.

        Returns:
            ``kl``: the mean over elements of KL(q(z|x) ‖ N(0, 1)). ``per_channel``: the same of each channel, (C,).
            ``aggregate_per_channel``: of the Gaussian with the moments of q(z), the posteriors of all images and
            positions mixed, (C,): how far a channel as a whole is from what a sampler would draw.
        """
        divergence, mean, second = self.sums / self.count
        variance = second - mean**2
        return {
            "kl": divergence.mean(),
            "per_channel": divergence,
            "aggregate_per_channel": 0.5 * (second - 1 - variance.log()),
        }


def _by_channel(z: Tensor, like: Tensor) -> Tensor:
    if z.ndim < 2 or z.shape[1] != len(like):
        raise RequestError(f"A metric of {len(like)} channels got latents of shape {tuple(z.shape)}.")
    return z.transpose(0, 1).flatten(1).to(like)  # (C, B * …)
