"""How alike latents are that lie near each other, summed while the batches stream by."""

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.metrics.image import ExactSums

LAGS = (1, 2, 4, 8, 16)  # positions


class SpatialCorrelation(ExactSums):
    """Correlation of latent values a few positions apart along a row or a column, averaged over channels.

    1 - E (z(p) - z(p + lag))² / (2 Var z), with the variance over all images and positions: 1 for maps that are
    constant within an image, 0 for white noise. That latents keep the layout of an image is one of the properties by
    which studies explain how well they can be modelled (arXiv 2512.10794 measures it on features). Every channel counts
    alike, whatever its scale or offset. Maps of different sizes may be mixed, and processes merge exactly.

    Args:
        channels: of the latents.
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor
    pairs: Tensor
    differences: Tensor

    def __init__(self, channels: int, **arguments: object) -> None:
        super().__init__(**arguments)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros(len(LAGS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("differences", torch.zeros(channels, len(LAGS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor) -> None:
        """Add latents (B, C, h, w), or (B, C, t, h, w) whose frames count as images."""
        if latents.ndim not in (4, 5) or latents.shape[1] != len(self.total):
            raise RequestError(
                f"SpatialCorrelation of {len(self.total)} channels got latents of shape {tuple(latents.shape)}; "
                "expected (B, C, h, w) or (B, C, t, h, w)."
            )
        z = latents.to(self.total).transpose(0, 1)  # (C, B, …, h, w)
        self.count += z[0].numel()
        self.total += z.flatten(1).sum(1)
        self.squares += z.square().flatten(1).sum(1)
        for i, lag in enumerate(LAGS):
            for apart in (z[..., lag:, :] - z[..., :-lag, :], z[..., lag:] - z[..., :-lag]):
                self.pairs[i] += apart[0].numel()
                self.differences[:, i] += apart.square().flatten(1).sum(1)

    def compute(self) -> dict[int, Tensor]:
        """The correlation at each lag for which a map was large enough; NaN where nothing varies."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        varying = variance > 1e-12 * (self.squares / self.count)
        difference = self.differences[varying] / self.pairs  # (C', lags)
        correlation = (1 - difference / (2 * variance[varying, None])).mean(0)
        return {lag: correlation[i] for i, lag in enumerate(LAGS) if self.pairs[i]}
