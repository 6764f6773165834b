"""Statistics of the raw latents of a model, summed in float64 while the images stream by, and their picture."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_TILES = 16


class LatentStatistics:
    """Mean and standard deviation of raw (not normalised) samples of the posterior, per channel and overall."""

    def __init__(self) -> None:
        self.shape: list[int] = []
        self.count = 0
        self.total: np.ndarray | float = 0.0
        self.squares: np.ndarray | float = 0.0

    def add(self, z: Tensor) -> None:
        """Add latents (B, C, ...); those with NaN or infinity are left out."""
        z = z.cpu()
        z = z[z.isfinite().flatten(1).all(1)].double()
        self.shape = list(z.shape[1:])
        channels = z.transpose(0, 1).flatten(1)  # (C, B * ...)
        self.count += channels.shape[1]
        self.total = self.total + channels.sum(1).numpy()
        self.squares = self.squares + channels.square().sum(1).numpy()

    def merge(self, other: "LatentStatistics") -> None:
        """Add what another process summed."""
        self.shape = self.shape or other.shape
        self.count += other.count
        self.total, self.squares = self.total + other.total, self.squares + other.squares

    def results(self) -> dict[str, Any]:
        """``mean`` and ``std`` per channel, the same overall, and the normalisation that they suggest.

        ``(z - shift_factor) * scaling_factor`` has mean 0 and standard deviation 1 (latent diffusion, arXiv
        2112.10752); per channel, ``mean`` and ``std`` are what ``latents_mean`` and ``latents_std`` should be.
        """
        if not self.count:
            return {"shape": self.shape}
        mean = np.asarray(self.total) / self.count
        second = np.asarray(self.squares) / self.count
        std = np.sqrt(np.clip(second - mean**2, 0, None))
        overall_mean = float(mean.mean())
        overall_std = float(np.sqrt(max(second.mean() - overall_mean**2, 0)))
        return {
            "shape": self.shape,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "overall_mean": overall_mean,
            "overall_std": overall_std,
            "suggested_shift_factor": overall_mean,
            "suggested_scaling_factor": 1 / overall_std if overall_std else None,
        }


def latent_tiles(z: Tensor) -> np.ndarray:
    """The first channels of the latents of one image as grey tiles, each stretched over its own range.

    Args:
        z: (C, h, w) or (C, t, h, w), of which the first frame shows.

    Returns:
        Grey and opacity, uint8 (rows * (h + 1) - 1, columns * (w + 1) - 1, 2): a grid with transparent seams.
    """
    z = z.float().cpu()
    z = (z[:, 0] if z.ndim == 4 else z)[:MOST_TILES]  # (C', h, w)
    low, high = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
    tiles = ((z - low) / (high - low).clamp(min=1e-12) * 255).nan_to_num().to(torch.uint8)
    columns = int(np.ceil(np.sqrt(len(tiles))))
    height, width = tiles.shape[1] + 1, tiles.shape[2] + 1
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * height, columns * width, 2), np.uint8)
    for i, tile in enumerate(tiles.numpy()):
        top, left = i // columns * height, i % columns * width
        cell = sheet[top : top + height - 1, left : left + width - 1]
        cell[..., 0], cell[..., 1] = tile, 255
    return sheet[:-1, :-1]
