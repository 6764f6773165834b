"""How far two sets of images lie apart in their small patches at several scales: sliced Wasserstein distance.

As Karras et al. 2018 ("Progressive growing of GANs", section 5) with a Haar pyramid in place of the Laplacian one. Each
level has three bands of details, and the last one also its coarse rest; from every band come random patches of 7 x 7
with three colours, projected on random directions. The distance of two sets is W1, the mean absolute difference of
sorted projections, averaged over directions and bands. It needs no network and no weights, sees texture, sharpness and
noise, and does not see what the picture shows.

Unlike there, coefficients are divided by the standard deviation of their band and colour in the *reference* images
instead of each set by its own, which would hide that a set is blurred. So distances are in units of that deviation, and
all that are measured to one reference have the same units.
"""

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.wavelet import dwt2

PATCH = 7
LEAST_BAND = 16  # pixels a side of the coarsest bands, at least
ROUNDING = 12**-0.5  # standard deviation of rounding to bytes, in every band: no coefficient is known better
BATCH = 64


def wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """W1 between the columns of samples (n, K) and (m, K): the mean absolute difference of quantiles, (K,) float64.

    Exact for unequal numbers too: both quantile functions are steps, and the integral goes from step to step.
    """
    a, b = a.double().sort(0).values, b.double().sort(0).values
    if len(a) == len(b):
        return (a - b).abs().mean(0)
    n, m = len(a), len(b)
    # in units of 1 / (n m), where all steps are whole numbers
    steps = torch.cat([torch.arange(n) * m, torch.arange(m + 1) * n]).unique().to(a.device)
    starts, lengths = steps[:-1], steps.diff().double() / (n * m)
    return ((a[starts // m] - b[starts // n]).abs() * lengths[:, None]).sum(0)


class SlicedWasserstein:
    """The distance of sets of images to one set of reference images.

    Args:
        reference: uint8 (N, 3, H, W), with sides of at least 32.
        patches: from each band of each image, at random places that are the same for all sets.
        projections: random directions for each band.
        seed: of places and directions.

    Raises:
        RequestError: these are no such images.
    """

    def __init__(self, reference: Tensor, *, patches: int = 64, projections: int = 64, seed: int = 0):
        _check(reference)
        self.size = tuple(reference.shape[-2:])
        self.patches, self.seed = patches, seed
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(3 * PATCH**2, projections, generator=generator, dtype=torch.float64)
        self.directions = directions / directions.norm(dim=0)
        self.scales = self._deviations(reference)
        self.reference = self._projections(reference)

    def __call__(self, images: Tensor, others: Tensor | None = None) -> dict[str, float]:
        """The distance of images, uint8 (M, 3, H, W), to the reference, or to ``others`` in the reference's units.

        Returns:
            For each scale: ``2 px``, ``4 px``, … for details within blocks of so many pixels, ``coarse`` for the rest;
            and the ``mean`` over these.

        Raises:
            RequestError: these are no images, or not of the size of the reference.
        """
        reference = self.reference if others is None else self._projections(others)
        found = [wasserstein_1d(mine, theirs).mean() for mine, theirs in zip(self._projections(images), reference)]
        *details, coarse = torch.stack(found).tolist()
        by_scale = {
            f"{2 ** (level + 1)} px": sum(details[3 * level : 3 * level + 3]) / 3 for level in range(len(details) // 3)
        }
        by_scale["coarse"] = coarse
        return {**by_scale, "mean": sum(by_scale.values()) / len(by_scale)}

    def _deviations(self, images: Tensor) -> list[Tensor]:
        """The standard deviation of every band and colour, each (1, 3, 1, 1)."""
        sums: list[Tensor] = []
        for batch in images.split(BATCH):
            found = [
                torch.stack([band.mean((2, 3)).sum(0), band.square().mean((2, 3)).sum(0)])
                for band in self._bands(batch)
            ]
            sums = [a + b for a, b in zip(sums, found)] if sums else found
        moments = [total / len(images) for total in sums]
        return [(m[1] - m[0] ** 2).clamp(min=ROUNDING**2).sqrt().view(1, 3, 1, 1) for m in moments]

    def _projections(self, images: Tensor) -> list[Tensor]:
        """For each band, the projections of patches, (N * patches, projections) float64."""
        _check(images)
        if tuple(images.shape[-2:]) != self.size:
            raise RequestError(
                f"The images have {images.shape[-2]} x {images.shape[-1]} pixels, the reference has "
                f"{self.size[0]} x {self.size[1]}: crop both to one size."
            )
        projected: list[list[Tensor]] = [[] for _ in self.scales]
        generator = torch.Generator().manual_seed(self.seed)
        directions = self.directions.to(images.device)
        for batch in images.split(BATCH):
            for rows, band, scale in zip(projected, self._bands(batch), self.scales):
                rows.append(_patches(band / scale, self.patches, generator) @ directions)
        return [torch.cat(rows) for rows in projected]

    def _bands(self, images: Tensor) -> list[Tensor]:
        """cH, cV, cD of every level from the finest to the coarsest, then cA of the last, each (N, 3, h, w) float64."""
        rest, bands = images.double(), list[Tensor]()
        while not bands or min(rest.shape[-2:]) >= 2 * LEAST_BAND:
            rest, *details = dwt2(rest)
            bands += details
        return [*bands, rest]


def _patches(band: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random patches from each image of a band (N, 3, h, w): (N * count, 3 * 49)."""
    images, _, height, width = band.shape
    top = torch.randint(height - PATCH + 1, (images, count), generator=generator).to(band.device)
    left = torch.randint(width - PATCH + 1, (images, count), generator=generator).to(band.device)
    inside = torch.arange(PATCH, device=band.device)
    rows, columns = (top[..., None] + inside)[..., :, None], (left[..., None] + inside)[..., None, :]
    image = torch.arange(images, device=band.device)[:, None, None, None]
    return band.permute(0, 2, 3, 1)[image, rows, columns].flatten(0, 1).flatten(1)  # (N, count, 7, 7, 3) before


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise RequestError(
            f"The sliced Wasserstein distance got {images.dtype} of shape {tuple(images.shape)}; expected uint8 "
            "(N, 3, H, W)."
        )
    if min(images.shape[-2:]) < 2 * LEAST_BAND:
        raise RequestError(
            f"The sliced Wasserstein distance needs images of at least {2 * LEAST_BAND} px a side, these have "
            f"{images.shape[-2]} x {images.shape[-1]}."
        )
