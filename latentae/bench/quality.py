"""Which metrics a benchmark measures, and what they give for one model.

PSNR, SSIM, MS-SSIM, GMSD and HaarPSI need nothing. LPIPS and rFID need weight files, which are never downloaded: what
is missing is recorded with the reason, and everything else is still measured.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.errors import MissingExtra, MissingWeights, RequestError
from latentae.metrics.frechet import BIASED_BELOW, FrechetInceptionDistance
from latentae.metrics.image import PSNR, SSIM, LPIPSMetric, MeanOfImages
from latentae.metrics.similarity import GMSD, MSSSIM, HaarPSI

METRICS = ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "lpips_alex", "lpips_vgg", "rfid")
WITHOUT_WEIGHTS: dict[str, type[MeanOfImages]] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "ms_ssim": MSSSIM,
    "gmsd": GMSD,
    "haarpsi": HaarPSI,
}
GROUPS = {"lpips": ("lpips_alex", "lpips_vgg")}
LOWER_IS_BETTER = ("gmsd", "lpips_alex", "lpips_vgg", "rfid")
HIGHER_IS_BETTER = {name: name not in LOWER_IS_BETTER for name in METRICS}
BOOTSTRAP_DRAWS = 1000
NOT_FINITE = "the reconstruction holds NaN or infinity"


def expand_metric_names(names: Sequence[str]) -> list[str]:
    """Metric and group names to metrics, in the order of `METRICS`, with those that are always measured.

    Raises:
        RequestError: a name is unknown.
    """
    wanted = set(WITHOUT_WEIGHTS)
    for name in names:
        if name not in METRICS and name not in GROUPS:
            raise RequestError(f"There is no metric {name!r}: choose from {', '.join([*METRICS, *GROUPS])}.")
        wanted.update(GROUPS.get(name, (name,)))
    return [name for name in METRICS if name in wanted]


class Quality:
    """The metrics of a benchmark, built once for all its models.

    Args:
        names: metrics that must be measured; None measures all whose weights are here.
        size: side of the images in pixels.

    Raises:
        MissingWeights, MissingExtra, RequestError: a metric that was asked for by name cannot be measured.
    """

    def __init__(self, names: Sequence[str] | None = None, size: int | None = None):
        self.per_image: dict[str, MeanOfImages] = {}
        self.frechet: FrechetInceptionDistance | None = None
        self.skipped: dict[str, str] = {}
        for name in expand_metric_names(METRICS if names is None else names):
            try:
                self._add(name)
            except (MissingWeights, MissingExtra) as error:
                if names is not None:
                    raise
                self.skipped[name] = str(error)
        for name, metric in list(self.per_image.items()):
            if size is not None and size < metric.smallest:
                reason = f"it needs images of at least {metric.smallest} px, these have {size} px"
                if names is not None and name in names:
                    raise RequestError(f"{name} cannot be measured: {reason}.")
                self.skipped[name] = reason
                del self.per_image[name]

    def _add(self, name: str) -> None:
        if name == "rfid":
            self.frechet = FrechetInceptionDistance(keep_originals=True)
        elif name.startswith("lpips_"):
            self.per_image[name] = LPIPSMetric(name.removeprefix("lpips_"))
        else:
            self.per_image[name] = WITHOUT_WEIGHTS[name]()

    @property
    def weights(self) -> dict[str, str]:
        """The sha256 of every weight file in use, by metric."""
        hashes = {n: m.weights_sha256 for n, m in self.per_image.items() if isinstance(m, LPIPSMetric)}
        return {**hashes, **({"rfid": self.frechet.weights_sha256} if self.frechet else {})}


class Measurement:
    """Collects one model's figures: call `add` batch by batch, then `results`.

    Args:
        first: this is the first model, so that rFID has to see the originals too.
        device: where the pairs live and the metrics run.
    """

    def __init__(self, quality: Quality, *, first: bool, device: torch.device):
        self.quality, self.first = quality, first
        self.keys: list[str] = []
        self.rows: dict[str, list[float]] = {name: [] for name in quality.per_image}
        self.failed: list[dict[str, str]] = []
        if quality.frechet:
            quality.frechet.to(device).reset()

    def add(self, keys: list[str], reconstruction: Tensor, originals: Tensor, finite: Tensor) -> None:
        """Compare a batch.

        Args:
            reconstruction, originals: the uint8 pair that every metric sees, (B, 3, H, W).
            finite: (B,) false where the model returned NaN or infinity; such an image is named and not measured.
        """
        if self.quality.frechet and self.first:
            self.quality.frechet.update(originals, original=True)
        usable = finite.tolist()
        self.failed += [{"key": key, "reason": NOT_FINITE} for key, is_usable in zip(keys, usable) if not is_usable]
        if not any(usable):
            return
        self.keys += [key for key, is_usable in zip(keys, usable) if is_usable]
        reconstruction, originals = reconstruction[finite], originals[finite]
        if self.quality.frechet:
            self.quality.frechet.update(reconstruction, original=False)
        for name, metric in self.quality.per_image.items():
            self.rows[name] += metric.values(reconstruction, originals).tolist()

    def results(self) -> dict[str, Any]:
        """Means over images with bootstrap intervals, what was skipped and why, and the rows behind the means."""
        means: dict[str, float | None] = {}
        intervals: dict[str, list[float] | None] = {}
        skipped, warnings = dict(self.quality.skipped), list[str]()
        for name, row in self.rows.items():
            values = np.array([value for value in row if np.isfinite(value)])
            means[name] = float(values.mean()) if len(values) else None
            intervals[name] = bootstrap_interval(values)
            if not len(values):
                skipped[name] = "every reconstruction equals its original" if row else "no image could be measured"
        identical = sum(np.isinf(self.rows["psnr"]).tolist())
        if identical:
            warnings.append(f"{identical} reconstructions equal their originals and stay out of the mean PSNR.")
        if self.failed:
            warnings.append(f"{len(self.failed)} reconstructions hold NaN or infinity and stay out of every figure.")
        if self.quality.frechet:
            means["rfid"] = self._rfid(skipped, warnings)
        return {
            "metrics": {name: means.get(name) for name in METRICS if name in means or name in skipped},
            "intervals": intervals,
            "skipped": skipped,
            "warnings": warnings,
            "images": len(self.keys),
            "identical": identical,
            "failed": self.failed,
            "per_image": [
                {"key": key, **{name: row[i] if np.isfinite(row[i]) else None for name, row in self.rows.items()}}
                for i, key in enumerate(self.keys)
            ],
        }

    def _rfid(self, skipped: dict[str, str], warnings: list[str]) -> float | None:
        if len(self.keys) < 2:
            skipped["rfid"] = "a Fréchet distance needs at least two images"
            return None
        if len(self.keys) < BIASED_BELOW:
            warnings.append(
                f"rFID of {len(self.keys)} images is biased upwards; compare it only with rFID of as many images "
                f"(papers use 50,000, and below {BIASED_BELOW:,} the bias is plain)."
            )
        assert self.quality.frechet is not None
        return float(self.quality.frechet.compute())


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float] | None:
    """95 % percentile interval of the mean over images (Efron 1979), or None for fewer than two images."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]
