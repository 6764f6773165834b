"""Flow matching between images and noise: the path, what a network may predict of it, and Euler's steps back.

Everywhere ``noisy = (1 - t) * clean + t * noise`` with t from 0 (the image) to 1 (noise), and the velocity of that path
is ``noise - clean``, as in diffusers; DiTo's code has the opposite sign. A cosine path is the same up to the scale of
what the network sees: ``noisy / sqrt((1 - t)² + t²)`` has unit variance, and t = s / (c + s) for the sine and cosine of
its angle.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["v", "x0"]
Path = Literal["linear", "cosine"]


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point of the path at times t (B,) from images to noise, both (B, C, H, W)."""
    t = _per_image(t, clean)
    return (1 - t) * clean + t * noise


def network_input(noisy: Tensor, t: Tensor, path: Path) -> Tensor:
    """What a network of this path sees of ``noisy``: itself, or scaled to unit variance."""
    return noisy if path == "linear" else noisy / _spread(t, noisy)


def clean_estimate(predicted: Tensor, noisy: Tensor, t: Tensor, prediction: Prediction, path: Path) -> Tensor:
    """The image that a network's output stands for.

    Args:
        predicted: x0 (the image), or v: ``noise - clean``; on the cosine path ``c * noise - s * clean``.
        noisy: on the linear path, (B, C, H, W).
        t: times, (B,).
    """
    if prediction == "x0":
        return predicted
    if path == "linear":
        return noisy - _per_image(t, noisy) * predicted
    t, spread = _per_image(t, noisy), _spread(t, noisy)
    return ((1 - t) * noisy / spread - t * predicted) / spread


def times_of(steps: int, rho: float = 1.0) -> list[float]:
    """``steps + 1`` falling times from 1 to 0, ``(1 - i / steps) ** rho``: even for rho 1, denser near 0 above."""
    return [(1 - i / steps) ** rho for i in range(steps + 1)]


def solve(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, times: list[float]) -> Tensor:
    """Euler's method from noise at ``times[0]`` to the image at ``times[-1]``.

    Args:
        denoise: estimates the clean image from what is noisy and the times (B,).
        noise: (B, C, H, W).
    """
    noisy = noise
    for t, after in pairwise(times):
        clean = denoise(noisy, torch.full((len(noisy),), t, device=noisy.device, dtype=noisy.dtype))
        noisy = clean + (after / t) * (noisy - clean)  # noisy + (after - t) * velocity
    return noisy


def _per_image(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))  # (B, 1, …, 1)


def _spread(t: Tensor, like: Tensor) -> Tensor:
    t = _per_image(t, like)
    return torch.hypot(1 - t, t)
