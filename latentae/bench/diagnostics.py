"""What the latents of a model are like: their spectrum, rank, intrinsic dimension and divergence from N(0, 1).

They describe a latent space and do not judge it: studies disagree on which of them foretell how well a diffusion model
learns. All come from the latents that a benchmark encodes anyway.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from latentae.bench.plots import latent_structure
from latentae.bench.report import Section
from latentae.bench.results import DIAGNOSTICS_HEADER, diagnostics_rows
from latentae.families.fourplane import PlaneGaussian
from latentae.metrics.codebook import CodebookUsage, codes_of, indices_of
from latentae.metrics.intrinsic_dimension import TwoNN
from latentae.metrics.moments import EffectiveRank, PosteriorKL
from latentae.metrics.spatial import SpatialCorrelation
from latentae.metrics.spectrum import RadialSpectrum
from latentae.nn.pixels import frames_of

MOST_POINTS = 2000
MOST_BYTES = 2**28  # of the sample that the intrinsic dimension is estimated from


class LatentDiagnostics:
    """The figures of one model, from its raw latents batch by batch."""

    def __init__(self) -> None:
        self.spectrum: RadialSpectrum | None = None
        self.spatial: SpatialCorrelation | None = None
        self.rank: EffectiveRank | None = None
        self.dimension: TwoNN | None = None
        self.divergence: PosteriorKL | None = None
        self.codebook: CodebookUsage | None = None

    def add(self, z: Tensor, posterior: Any, places: Sequence[int] | None = None, quantizer: Any = None) -> None:
        """Add latents (B, C, …) and the distribution that they come from.

        With the images' places in the order of all, processes that share the work draw the sample that one would.
        Images with NaN or infinity stay out.
        """
        finite = z.isfinite().flatten(1).all(1)
        if quantizer is not None:
            self.codebook = self.codebook or CodebookUsage(codes_of(quantizer))
            usable = z[finite]
            self.codebook.update(indices_of(quantizer, frames_of(usable) if z.ndim == 5 else usable))
        z, finite = z.detach().cpu(), finite.cpu()
        if places is not None:
            places = [place for place, is_finite in zip(places, finite.tolist()) if is_finite]
        self._add_latents(z[finite], places, is_grid=not isinstance(posterior, PlaneGaussian))
        if (moments := gaussian_moments(posterior)) is not None:
            mean, log_variance = (x.detach().cpu() for x in moments)
            finite = (mean.isfinite() & log_variance.isfinite()).flatten(1).all(1)
            if finite.any():
                self.divergence = self.divergence or PosteriorKL(mean.shape[1])
                self.divergence.update(mean[finite], log_variance[finite])

    def _add_latents(self, z: Tensor, places: Sequence[int] | None, is_grid: bool) -> None:
        if not len(z):
            return
        if self.dimension is None:
            self.dimension = TwoNN(min(MOST_POINTS, MOST_BYTES // (4 * z[0].numel())))
            self.rank = EffectiveRank(z.shape[1]) if is_grid else None
            if is_grid and z.ndim > 3:  # tokens are no grid
                self.spectrum, self.spatial = RadialSpectrum(z.shape[1]), SpatialCorrelation(z.shape[1])
        self.dimension.update(z, places)
        if self.rank is not None:
            self.rank.update(z)
        if self.spectrum is not None and self.spatial is not None:
            self.spectrum.update(z)
            self.spatial.update(z)

    def results(self) -> dict[str, Any]:
        """As JSON; what could not be measured is None.

        ``spectrum`` (see `RadialSpectrum`), ``spatial_correlation`` by lag, ``effective_rank`` of as many channels,
        ``intrinsic_dimension`` of whole latents with the number of ``points`` it comes from, ``kl`` in nats per
        element, None without a Gaussian, and ``codebook`` (see `CodebookUsage`), None of continuous latents.
        """
        dimension = self.dimension.compute() if self.dimension else {}
        return {
            "spectrum": _plain(self.spectrum.compute()) if self.spectrum else None,
            "spatial_correlation": _plain(self.spatial.compute()) if self.spatial else None,
            "effective_rank": _plain(self.rank.compute()) if self.rank else None,
            "intrinsic_dimension": {
                "two_nn": _plain(dimension.get("dimension")),
                "points": int(dimension.get("points", 0)),
            },
            "kl": _plain(self.divergence.compute()) if self.divergence else None,
            "codebook": _plain(self.codebook.compute()) if self.codebook else None,
        }


def gaussian_moments(posterior: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and log variance of a diagonal Gaussian, (B, C, ...), or None of anything else."""
    if isinstance(posterior, PlaneGaussian):
        return posterior.mean.transpose(1, 2), posterior.logvar.transpose(1, 2)  # of tokens, (B, C, N)
    mean, log_variance = getattr(posterior, "mean", None), getattr(posterior, "logvar", None)
    if not isinstance(mean, Tensor) or not isinstance(log_variance, Tensor) or posterior.deterministic:
        return None
    return mean, log_variance


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if value is not None and math.isfinite(value) else None


def diagnostics_section(models: Sequence[dict[str, Any]]) -> Section:
    """The part of the report that shows them, without a verdict."""
    return Section(
        "What the latents are like",
        "A description, not a verdict: no model is better by one of these alone. Energy from half Nyquist on: how "
        "much of the variation within an image is fine detail; 80 % of white noise, less of smooth latents; the "
        "curves show all frequencies, flat at 1 for white noise, and how alike neighbours are. Effective rank: how "
        "many independent channels carry the variance. Intrinsic dimension: how many numbers tell the latents of one "
        "image from those of its neighbours (TwoNN on whole latents); it grows with the number of images, so compare "
        "only equal numbers. KL: nats per latent element between the posterior and N(0, 1), at least what the latents "
        "tell about the image; none of a deterministic encoder.",
        DIAGNOSTICS_HEADER,
        diagnostics_rows([model for model in models if model["latents"]]),
        plots=latent_structure(models),
    )


def codebook_section(models: Sequence[dict[str, Any]]) -> Section:
    """The part of the report that says what discrete latents cost, and how much of the codebook the images use."""
    rows = []
    for model in models:
        if codebook := model["latents"].get("codebook"):
            bits = math.log2(codebook["codes"])
            figures = [f"{codebook['codes']:,}", f"{bits:.4g}", f"{bits / model['spatial_ratio'] ** 2:.3g}"]
            rows.append([model["name"], *figures, f"{codebook['used']:.1%}", f"{codebook['perplexity']:,.1f}"])
    return Section(
        "Codebooks",
        "A discrete latent takes the bits that name its code. Used: codes that occur in these images at all; "
        "perplexity: how many equally frequent codes would say as much. Both grow with the number of images, so "
        "compare only equal numbers.",
        ("model", "codes", "bits / position", "bits / pixel", "used", "perplexity"),
        rows,
    )
