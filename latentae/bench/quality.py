"""Which metrics a benchmark measures, and what they give for one model.

PSNR, SSIM, MS-SSIM, GMSD and HaarPSI need nothing. LPIPS, DISTS, rFID, KID, precision and recall need weight files,
which are never downloaded: what is missing is recorded with the reason, and everything else is still measured.

Of clips the metrics of images are means over frames; difference PSNR and flicker look at what moves, and rFVD, which
needs weights, takes the place of rFID.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.pairs import Pair
from latentae.bench.presets import PRESETS, Preset
from latentae.bench.reference import FrechetReference
from latentae.errors import MissingExtra, MissingWeights, RequestError
from latentae.metrics.dists import DISTS
from latentae.metrics.features import NEIGHBOURHOOD, FeatureSample
from latentae.metrics.frechet import BIASED_BELOW, FrechetDistance, FrechetInceptionDistance
from latentae.metrics.image import PSNR, SSIM, LPIPSMetric, MeanOfImages
from latentae.metrics.similarity import GMSD, MSSSIM, HaarPSI
from latentae.metrics.variants import FloatLPIPS, FloatPSNR, OwnRangeSSIM, PaddedSSIM, SignedSSIM, UniformSSIM
from latentae.metrics.video import CLIP_FRAMES, FrechetVideoDistance, difference_psnr, flicker, over_frames

SAMPLED = ("kid", "precision", "recall")  # of the features behind rFID
OF_TIME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"difference_psnr": difference_psnr, "flicker": flicker}
OF_CLIPS = (*OF_TIME, "rfvd")
OF_IMAGES = ("rfid", "fid", *SAMPLED)
PER_IMAGE = ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "lpips_alex", "lpips_vgg", "dists")
METRICS = (*PER_IMAGE, *OF_CLIPS, *OF_IMAGES)
WITHOUT_WEIGHTS: dict[str, type[MeanOfImages]] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "ms_ssim": MSSSIM,
    "gmsd": GMSD,
    "haarpsi": HaarPSI,
}
GROUPS = {"lpips": ("lpips_alex", "lpips_vgg")}
PSNRS: dict[str, type[MeanOfImages]] = {"uint8": PSNR, "clamped": FloatPSNR}
SSIM_VARIANTS: dict[str, type[MeanOfImages]] = {
    "gaussian": SSIM,
    "padded": PaddedSSIM,
    "padded-signed": SignedSSIM,
    "padded-own-range": OwnRangeSSIM,
    "uniform": UniformSSIM,
}
LOWER_IS_BETTER = ("gmsd", "lpips_alex", "lpips_vgg", "dists", "flicker", "rfvd", "rfid", "fid", "kid")
HIGHER_IS_BETTER = {name: name not in LOWER_IS_BETTER for name in METRICS}
BOOTSTRAP_DRAWS = 1000
FRAMES_AT_ONCE = 8  # through the networks of metrics
ROWS = {"images": "per_image", "clips": "per_clip"}  # what `Measurement.results` calls its rows
NOT_FINITE = "the reconstruction holds NaN or infinity"


def expand_metric_names(names: Sequence[str], clips: bool = False) -> list[str]:
    """Metric and group names to metrics, in the order of `METRICS`, with those that are always measured.

    Raises:
        RequestError: a name is unknown, or of images where ``clips`` are measured, or the other way round.
    """
    wanted = {*WITHOUT_WEIGHTS, *(OF_TIME if clips else ())}
    others, kind = (OF_IMAGES, "images and not of clips") if clips else (OF_CLIPS, "clips, of which --frames are taken")
    for name in names:
        if name not in METRICS and name not in GROUPS:
            raise RequestError(f"There is no metric {name!r}: choose from {', '.join([*METRICS, *GROUPS])}.")
        if name in others:
            raise RequestError(f"{name} is a metric of {kind}: leave it out.")
        wanted.update(GROUPS.get(name, (name,)))
    return [name for name in METRICS if name in wanted]


class Quality:
    """The metrics of a benchmark, built once for all its models.

    Args:
        names: metrics that must be measured; None measures all whose weights are here.
        size: side of the images in pixels.
        preset: the protocol, which says what each metric reads and how.
        fid_reference: file of the mean and the covariance that ``fid`` is measured against.
        frames: of each clip; None of images.

    Attributes:
        knows_originals: a whole pass over the images has been made, so that rFID need not see the originals again.

    Raises:
        MissingWeights, MissingExtra, RequestError: a metric that was asked for by name cannot be measured.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        size: int | None = None,
        preset: Preset = PRESETS["latentae"],
        fid_reference: str | Path | None = None,
        frames: int | None = None,
    ):
        self.preset, self.knows_originals, self.frames = preset, False, frames
        self.reference = None if fid_reference is None else FrechetReference(fid_reference)
        self.per_image: dict[str, MeanOfImages] = {}
        self.reads: dict[str, str] = {}  # of each metric per image
        self.of_time: list[str] = []
        self.frechet: FrechetDistance | None = None
        self.sample: FeatureSample | None = None
        self.distances: list[str] = []
        self.sampled: list[str] = []
        self.skipped: dict[str, str] = {}
        for name in self._wanted(names):
            if reason := self._too_few_frames(name) or ("" if names is not None else self._unasked(name)):
                if names is not None and name in names:
                    raise RequestError(f"{name} cannot be measured: {reason}.")
                self.skipped[name] = reason
                continue
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

    def _wanted(self, names: Sequence[str] | None) -> list[str]:
        others = OF_IMAGES if self.frames else OF_CLIPS
        all_there_are = [name for name in METRICS if name not in others]
        wanted = expand_metric_names(all_there_are if names is None else names, clips=bool(self.frames))
        if names is None and not self.frames:
            wanted.remove("fid")
            if self.reference is None and "fid" in self.preset.reports:
                self.skipped["fid"] = (
                    "the protocol compares with a reference set, whose statistics --fid-reference names"
                )
        return [*wanted, *(["fid"] if self.reference and "fid" not in wanted else [])]

    def _unasked(self, name: str) -> str:
        """Why a metric is left out unless it is named: what needs a network costs time."""
        if name == "fid" or name in WITHOUT_WEIGHTS or name in self.preset.reports or name in OF_CLIPS:
            return ""
        return f"it is not of the protocol {self.preset.name}: name it to measure it (--metrics)"

    def _too_few_frames(self, name: str) -> str:
        """Why clips are too short for a metric."""
        least = {"rfvd": CLIP_FRAMES}.get(name, 2 if name in OF_TIME else 1)
        if self.frames is None or self.frames >= least:
            return ""
        return f"it needs clips of at least {least} frames, these have {self.frames}"

    def _add(self, name: str) -> None:
        preset = self.preset
        if name in OF_TIME:
            self.of_time.append(name)
        elif name == "rfvd":
            self.frechet = FrechetVideoDistance(keep_originals=True)
            self.distances.append(name)
        elif name in ("rfid", "fid", *SAMPLED):
            if name == "fid" and self.reference is None:
                raise RequestError("fid needs the statistics of a reference set: --fid-reference.")
            if self.frechet is None:
                self.frechet = FrechetInceptionDistance(keep_originals=True, **preset.inception())
            assert self.frechet is not None
            if name in SAMPLED and self.sample is None:
                self.sample = FeatureSample(self.frechet.dimension, keep_originals=True)
            (self.sampled if name in SAMPLED else self.distances).append(name)
        elif name.startswith("lpips_"):
            net = name.removeprefix("lpips_")
            self.per_image[name] = LPIPSMetric(net) if preset.lpips == "uint8" else FloatLPIPS(net)
            self.reads[name] = preset.lpips
        elif name == "dists":
            self.per_image[name], self.reads[name] = DISTS(), "uint8"
        else:
            variants = {"psnr": PSNRS[preset.psnr], "ssim": SSIM_VARIANTS[preset.ssim]}
            self.per_image[name] = variants.get(name, WITHOUT_WEIGHTS[name])()
            self.reads[name] = {"psnr": preset.psnr, "ssim": preset.ssim_reads}.get(name, "uint8")

    @property
    def weights(self) -> dict[str, str]:
        """The sha256 of every weight file in use, by metric."""
        hashes = {n: m.weights_sha256 for n, m in self.per_image.items() if isinstance(m, LPIPSMetric | DISTS)}
        frechet: Any = self.frechet
        of_features = [*self.distances, *self.sampled]
        return hashes | ({name: frechet.weights_sha256 for name in of_features} if frechet else {})

    def values(self, name: str, pair: Pair) -> list[float]:
        """One figure for each image or clip of a pair."""
        if name in self.of_time:
            return OF_TIME[name](*pair.uint8).tolist()
        metric, (x, y) = self.per_image[name], pair.read(self.reads[name])
        if self.frames is None:
            return metric.values(x, y).tolist()

        def few_at_once(frames: Tensor, originals: Tensor) -> Tensor:
            parts = zip(frames.split(FRAMES_AT_ONCE), originals.split(FRAMES_AT_ONCE))
            return torch.cat([metric.values(one, other) for one, other in parts])

        return over_frames(few_at_once, x, y).tolist()

    def add_features(self, images: Tensor, keys: Sequence[str], original: bool) -> None:
        """Count images of these names among the originals or the reconstructions, if a metric needs their features."""
        if self.frechet is None:
            return
        features = self.frechet.features(images)
        self.frechet.update(features, original=original)
        if self.sample:
            self.sample.update(features, keys, original=original)


class Measurement:
    """Collects one model's figures: call `add` batch by batch, then `results`. Clips are counted as images are.

    Args:
        quality: the metrics.
        device: where the pairs live and the metrics run.
    """

    def __init__(self, quality: Quality, *, device: torch.device):
        self.quality, self.device = quality, device
        self.places: list[int] = []
        self.keys: list[str] = []
        self.rows: dict[str, list[float]] = {name: [] for name in [*quality.per_image, *quality.of_time]}
        self.failed: dict[int, tuple[str, str]] = {}  # key and reason by place
        if quality.frechet:
            quality.frechet.to(device).reset()
        if quality.sample:
            quality.sample.to(device).reset()

    def add(
        self, places: Sequence[int], keys: Sequence[str], pair: Pair, reasons: dict[int, str] | None = None
    ) -> None:
        """Compare a batch of images at these places in the order; what holds NaN is named and not measured.

        ``reasons`` by place say why a reconstruction does, if it is not the model.
        """
        quality = self.quality
        if not quality.knows_originals:
            quality.add_features(pair.read(quality.preset.rfid)[1], keys, original=True)
        usable: list[str] = []
        for place, key, is_usable in zip(places, keys, pair.finite.tolist()):
            if not is_usable:
                self.failed[place] = (key, (reasons or {}).get(place, NOT_FINITE))
                continue
            self.places.append(place)
            usable.append(key)
        self.keys += usable
        if not pair.finite.any():
            return
        pair = pair.only(pair.finite)
        quality.add_features(pair.read(quality.preset.rfid)[0], usable, original=False)
        for name, row in self.rows.items():
            row += quality.values(name, pair)

    def merge(self, other: "Measurement") -> None:
        """Add what another process compared."""
        order = np.argsort([*self.places, *other.places], kind="stable")

        def sorted_together(mine: list[Any], theirs: list[Any]) -> list[Any]:
            both = [*mine, *theirs]
            return [both[i] for i in order]

        self.rows = {name: sorted_together(row, other.rows[name]) for name, row in self.rows.items()}
        self.keys = sorted_together(self.keys, other.keys)
        self.places = sorted_together(self.places, other.places)
        self.failed = dict(sorted((self.failed | other.failed).items()))

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
                unit = self.unit.removesuffix("s")
                skipped[name] = "every reconstruction equals its original" if row else f"no {unit} could be measured"
        identical = sum(np.isinf(self.rows["psnr"]).tolist())
        if identical:
            warnings.append(f"{identical} reconstructions equal their originals and stay out of the mean PSNR.")
        if self.failed:
            first, reason = next(iter(self.failed.values()))
            what = "hold NaN or infinity" if reason == NOT_FINITE else "cannot be measured"
            warnings.append(
                f"{len(self.failed)} reconstructions {what} and stay out of every figure; the first: {first}, {reason}."
            )
        for name in self.quality.distances:
            means[name] = self._distance(name, skipped, warnings)
        means |= self._sampled(skipped, warnings)
        return {
            "metrics": {name: means.get(name) for name in METRICS if name in means or name in skipped},
            "intervals": intervals,
            "skipped": skipped,
            "warnings": warnings,
            "images": len(self.keys),
            "identical": identical,
            "failed": [{"key": key, "reason": reason} for key, reason in self.failed.values()],
            ROWS[self.unit]: [
                {"key": key, **{name: row[i] if np.isfinite(row[i]) else None for name, row in self.rows.items()}}
                for i, key in enumerate(self.keys)
            ],
        }

    @property
    def unit(self) -> str:
        return "clips" if self.quality.frames else "images"

    def _distance(self, name: str, skipped: dict[str, str], warnings: list[str]) -> float | None:
        frechet, label = self.quality.frechet, {"rfid": "rFID", "fid": "FID", "rfvd": "rFVD"}[name]
        assert frechet is not None
        count, what, papers = len(self.keys), "images", "50,000"
        if self.quality.frames:
            count, what, papers = (
                count * (self.quality.frames // CLIP_FRAMES),
                f"windows of {CLIP_FRAMES} frames",
                "2,048",
            )
        if count < 2:
            skipped[name] = f"a Fréchet distance needs at least two {what}"
            return None
        if count < BIASED_BELOW:
            fewer = "" if count > frechet.dimension else f", fewer than the {frechet.dimension:,} features,"
            warnings.append(
                f"{label} of {count} {what}{fewer} is biased upwards; compare it only with {label} of as many "
                f"{what} (papers use {papers}, and below {BIASED_BELOW:,} the bias is plain)."
            )
        if name != "fid":
            return float(frechet.compute())
        assert self.quality.reference is not None
        return frechet.distance_to(self.quality.reference.mean, self.quality.reference.covariance)

    def _sampled(self, skipped: dict[str, str], warnings: list[str]) -> dict[str, float | None]:
        sample, names = self.quality.sample, self.quality.sampled
        if sample is None:
            return {}
        if len(self.keys) <= NEIGHBOURHOOD:
            skipped |= {name: f"it needs at least {NEIGHBOURHOOD + 1} images" for name in names}
            return dict.fromkeys(names)
        if len(self.keys) > sample.size:
            warnings.append(
                f"KID, precision and recall are of {sample.size:,} of the {len(self.keys):,} images, drawn by name."
            )
        figures = sample.compute()
        return {name: float(figures[name]) for name in names}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float] | None:
    """95 % percentile interval of the mean over images (Efron 1979), or None for fewer than two images."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]
