"""How well a latent space follows rotations and scalings of the image: EQ-VAE's error, and two that complete it.

The transforms are the paper's: 90, 180 and 270 degrees, and 0.25, 0.5 and 0.75 of the size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.metrics.frechet import FrechetDistance
from latentae.metrics.image import PSNR, ExactSums
from latentae.nn.equivariance import Interpolation, Size, ratio_of, transform
from latentae.nn.pixels import to_uint8

QUARTER_TURNS = (1, 2, 3)
SCALES = (0.25, 0.5, 0.75)
SMALLEST_GRID = 4  # of which a quarter is one latent


class EquivarianceError(ExactSums):
    """EQ-VAE's error (arXiv 2502.09509), and the same of standardised channels; lower is better.

    ``error`` is the mean over images and transforms τ of ‖τE(x) - E(τx)‖² / ‖E(τx)‖². A constant added to the latents
    lowers it and changes nothing for a diffusion model, which sees standardised latents. ``standardised`` is therefore
    the same with every channel of the latents brought to mean 0 and standard deviation 1 over all E(x): the sum of the
    squared differences over the sum of the squares, so that one pass is enough and processes merge exactly.

    Args:
        channels: of the latents.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    ratios: Tensor
    count: Tensor
    moments: Tensor

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("ratios", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # by channel: n, Σ z and Σ z² of E(x); n, Σ z and Σ z² of E(τx); Σ (τE(x) - E(τx))²
        self.add_state("moments", torch.zeros(7, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor, moved: Tensor, encoded: Tensor) -> None:
        """Add a batch under one transform.

        Args:
            latents: E(x), (B, C, …); moved: τE(x); encoded: E(τx), both of one shape.
        """
        if moved.shape != encoded.shape or latents.shape[1] != self.moments.shape[1]:
            raise RequestError(
                f"EquivarianceError of {self.moments.shape[1]} channels got E(x) {tuple(latents.shape)}, τE(x) "
                f"{tuple(moved.shape)} and E(τx) {tuple(encoded.shape)}; the last two must have one shape."
            )
        latents, moved, encoded = (z.to(self.moments) for z in (latents, moved, encoded))
        squares = (moved - encoded).square()
        self.ratios += (squares.flatten(1).sum(1) / encoded.square().flatten(1).sum(1)).sum()
        self.count += len(encoded)
        self.moments += torch.stack([*_moments(latents), *_moments(encoded), _by_channel(squares).sum(1)])

    def compute(self) -> dict[str, Tensor]:
        """``error`` and ``standardised``; channels that are constant stay out of the latter. NaN of no images."""
        n, total, squares, n_encoded, total_encoded, squares_encoded, difference = self.moments
        mean = total / n
        variance = squares / n - mean**2
        wanted = squares_encoded - 2 * mean * total_encoded + n_encoded * mean**2  # Σ (E(τx) - mean)²
        varying = variance > 1e-12 * (squares / n)
        standardised = (difference / variance)[varying].sum() / (wanted / variance)[varying].sum()
        return {"error": self.ratios / self.count, "standardised": standardised}


def _by_channel(z: Tensor) -> Tensor:
    return z.transpose(0, 1).flatten(1)  # (C, B * …)


def _moments(z: Tensor) -> list[Tensor]:
    values = _by_channel(z)
    return [torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)]


class EquivarianceMeasurement:
    """Measures an autoencoder batch by batch: errors of rotation and of scale, and how transformed latents decode.

    Args:
        encode: pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w).
        decode: the inverse, about [-1, 1].
        channels: of the latents.
        interpolation: of images and latents alike; the paper says bicubic.
        frechet: to measure by its network, and by fresh sums, the distance of D(τE(x)) from τ(x) under each transform,
            which is R-rFID if it is a `FrechetInceptionDistance`; 64 MiB for each of the six.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        channels: int,
        interpolation: Interpolation = "bicubic",
        frechet: FrechetDistance | None = None,
    ):
        self.encode, self.decode, self.interpolation = encode, decode, interpolation
        self.errors = {kind: EquivarianceError(channels) for kind in ("rotation", "scale")}
        self.decoded = {kind: PSNR() for kind in ("rotation", "scale")}
        self.frechet: dict[str, dict[str, FrechetDistance]] = {"rotation": {}, "scale": {}}
        if frechet:
            self.frechet["rotation"] = {str(90 * turns): frechet.fresh() for turns in QUARTER_TURNS}
            self.frechet["scale"] = {str(scale): frechet.fresh() for scale in SCALES}

    @torch.no_grad()
    def update(self, pixels: Tensor) -> None:
        """Add a batch of pixels.

        Raises:
            RequestError: the latents are no grid over the image, or less than 4 along a side.
        """
        latents = self.encode(pixels)
        try:
            ratio = ratio_of(latents, pixels)
        except ValueError as error:
            raise RequestError(f"Equivariance is of latents on a grid over the image, but {error}.") from error
        grid: Size = (latents.shape[-2], latents.shape[-1])
        if min(grid) < SMALLEST_GRID:
            raise RequestError(
                f"Equivariance needs latents of at least {SMALLEST_GRID}x{SMALLEST_GRID}, got {grid[0]}x{grid[1]}: "
                f"take images of at least {SMALLEST_GRID * ratio} pixels."
            )
        for turns in QUARTER_TURNS:
            self._compare("rotation", str(90 * turns), pixels, latents, grid, turns, ratio)
        for scale in SCALES:
            height, width = (int(side * scale + 0.5) for side in grid)
            self._compare("scale", str(scale), pixels, latents, (height, width), 0, ratio)

    def _compare(
        self, kind: str, name: str, pixels: Tensor, latents: Tensor, size: Size, turns: int, ratio: int
    ) -> None:
        whole = (size[0] * ratio, size[1] * ratio)
        moved = _moved(latents, size, turns, self.interpolation)
        wanted = _moved(pixels, whole, turns, self.interpolation)
        self.errors[kind].to(latents.device).update(latents, moved, self.encode(wanted))
        reconstruction, original = to_uint8(self.decode(moved)), to_uint8(wanted)
        self.decoded[kind].to(latents.device).update(reconstruction, original)
        if name in self.frechet[kind]:
            distance = self.frechet[kind][name].to(latents.device)
            distance.update(original, original=True)
            distance.update(reconstruction, original=False)

    def results(self) -> dict[str, Any]:
        """``rotation_error``, ``scale_error``, both also with ``_standardised``, and both PSNRs in dB.

        With a Fréchet distance also ``rotation_frechet`` (of "90", "180" and "270") and ``scale_frechet`` (of "0.25",
        "0.5" and "0.75"), each a distance by transform.

        Raises:
            RequestError: there is a Fréchet distance and were fewer than two images.
        """
        figures: dict[str, Any] = {}
        for kind, metric in self.errors.items():
            values = metric.compute()
            figures[f"{kind}_error"] = float(values["error"])
            figures[f"{kind}_error_standardised"] = float(values["standardised"])
            figures[f"{kind}_psnr"] = float(self.decoded[kind].compute())
            if self.frechet[kind]:
                figures[f"{kind}_frechet"] = {name: float(d.compute()) for name, d in self.frechet[kind].items()}
        return figures


def _moved(x: Tensor, size: Size, turns: int, interpolation: Interpolation) -> Tensor:
    """As `transform`, but a size that stays is not resampled."""
    return transform(x, None if tuple(x.shape[-2:]) == size else size, turns, interpolation)
