"""How the latents of a model follow rotations and scalings of the image, as a part of a benchmark."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.quality import Quality
from latentae.bench.report import Section
from latentae.bench.state import merge
from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.metrics.equivariance import EquivarianceMeasurement
from latentae.nn.pixels import pad_to_multiple, to_float

KINDS = ("rotation", "scale")


class LatentEquivariance:
    """How the latents of a model follow rotations and scalings of the first images: EQ-VAE's error and its company.

    Args:
        images: how many; each costs six more encodings and decodings. 0 measures nothing.
        quality: the metrics of the benchmark, whose rFID is measured here too.
    """

    def __init__(self, codec: LatentCodec, images: int, quality: Quality):
        self.codec, self.wanted, self.measured = codec, images, 0
        self.skipped = "this model works on videos" if codec.is_video else ""
        self.rfid_skipped = quality.skipped.get("rfid", "" if quality.frechet else "rfid was not asked for")
        self.device = torch.device("cpu") if codec.device.type == "mps" else codec.device  # MPS has no float64
        self.measurement = EquivarianceMeasurement(
            lambda pixels: codec.posterior(pixels).mode().to(self.device),
            lambda z: codec.decode(codec.normalise(z)).to(self.device),
            codec.latent_channels,
            frechet=quality.frechet if images > 1 else None,
        )

    def add(self, originals: Tensor, places: Sequence[int]) -> None:
        """Add images, uint8 (B, 3, H, W), of which those among the first ``wanted`` places count."""
        originals = originals[: sum(place < self.wanted for place in places)]
        if not len(originals) or self.skipped:
            return
        pixels = pad_to_multiple(to_float(originals.to(self.device)), self.codec.spatial_ratio)
        try:
            self.measurement.update(pixels.to(self.codec.dtype))
            self.measured += len(originals)
        except RequestError as error:
            self.skipped = str(error)

    def merge(self, other: "LatentEquivariance") -> None:
        """Add what another process measured."""
        self.skipped = self.skipped or other.skipped
        self.measured += other.measured
        merge(self.measurement, other.measurement)

    def results(self) -> dict[str, Any]:
        """``{"equivariance": …}``: its figures, None where they are not finite, or why there are none."""
        if self.skipped:
            return {"equivariance": {"skipped": self.skipped}}
        if not self.rfid_skipped and self.measured < 2:
            self.rfid_skipped = "a Fréchet distance needs at least two images"
            self.measurement.frechet = {kind: {} for kind in KINDS}
        figures = {"images": self.measured, **self.measurement.results()}
        for kind in KINDS:
            figures[f"{kind}_rfid"] = figures.pop(f"{kind}_frechet", None)
        reason = {"rfid_skipped": self.rfid_skipped} if self.rfid_skipped else {}
        return {"equivariance": _finite(figures) | reason}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return value if value is None or np.isfinite(value) else None


def equivariance_section(models: list[dict[str, Any]]) -> Section:
    """The part of the report that shows them, without a verdict; files of classical codecs have none."""
    models = [model for model in models if "equivariance" in model["latents"]]
    names = [f"{kind}_{figure}" for figure in ("error", "error_standardised", "psnr", "rfid") for kind in KINDS]
    all_figures = [model["latents"]["equivariance"] for model in models]
    if not any(figures.get("rotation_rfid") for figures in all_figures):
        names = names[:-2]
    rows = [
        [model["name"], *(_cell(figures.get(name)) for name in names), figures.get("skipped", "")]
        for model, figures in zip(models, all_figures)
    ]
    reasons = {figures["rfid_skipped"].split(":")[0] for figures in all_figures if "rfid_skipped" in figures}
    rfid = (
        "R-rFID, the Fréchet distance between the features of the same two, under each transform in the order given: "
        "compare it only with that of as many images."
    )
    return Section(
        "Equivariance of the latents",
        "‖τE(x) − E(τx)‖² / ‖E(τx)‖² for rotations by 90, 180 and 270 degrees and for 0.25, 0.5 and 0.75 of the size, "
        "as EQ-VAE's paper defines it, lower is more equivariant; the same with every channel standardised, which an "
        "offset of the latents does not lower; the PSNR in dB of D(τE(x)) against τ(x); and "
        + (f"R-rFID, which was not measured: {'; '.join(sorted(reasons))}." if reasons else rfid),
        ["Model", *(_title(name) for name in names), ""],
        rows,
    )


def _title(name: str) -> str:
    text = name.replace("_", " ").replace("psnr", "PSNR").replace("rfid", "R-rFID")
    return text[0].upper() + text[1:]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(_cell(inner) for inner in value.values())
    return "–" if value is None else f"{value:.3g}"
