"""How the latents of a model follow rotations and scalings of the image, as a part of a benchmark."""

from typing import Any

import numpy as np
from torch import Tensor

from latentae.bench.report import Section
from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.metrics.equivariance import EquivarianceMeasurement
from latentae.nn.pixels import pad_to_multiple, to_float


class LatentEquivariance:
    """How the latents of a model follow rotations and scalings of the first images: EQ-VAE's error and its company.

    Args:
        images: how many; each costs six more encodings and decodings. 0 measures nothing.
    """

    def __init__(self, codec: LatentCodec, images: int):
        self.codec, self.left = codec, images
        self.skipped = "this model works on videos" if codec.is_video else ""
        self.measurement = EquivarianceMeasurement(
            lambda pixels: codec.posterior(pixels).mode(),
            lambda z: codec.decode(codec.normalise(z)),
            codec.latent_channels,
        )

    def add(self, originals: Tensor) -> None:
        """Add images, uint8 (B, 3, H, W)."""
        originals = originals[: self.left]
        self.left -= len(originals)
        if not len(originals) or self.skipped:
            return
        pixels = pad_to_multiple(to_float(originals.to(self.codec.device)), self.codec.spatial_ratio)
        try:
            self.measurement.update(pixels.to(self.codec.dtype))
        except RequestError as error:
            self.skipped = str(error)

    def results(self) -> dict[str, Any]:
        """``{"equivariance": …}``: its figures, None where they are not finite, or why there are none."""
        if self.skipped:
            return {"equivariance": {"skipped": self.skipped}}
        figures = self.measurement.results()
        return {"equivariance": {name: value if np.isfinite(value) else None for name, value in figures.items()}}


def equivariance_section(models: list[dict[str, Any]]) -> Section:
    """The part of the report that shows them, without a verdict."""
    names = [f"{kind}_{figure}" for figure in ("error", "error_standardised", "psnr") for kind in ("rotation", "scale")]
    rows = []
    for model in models:
        figures = model["latents"]["equivariance"]
        cells = [f"{figures[name]:.3g}" if figures.get(name) is not None else "–" for name in names]
        rows.append([model["name"], *cells, figures.get("skipped", "")])
    return Section(
        "Equivariance of the latents",
        "‖τE(x) − E(τx)‖² / ‖E(τx)‖² for rotations by 90, 180 and 270 degrees and for 0.25, 0.5 and 0.75 of the size, "
        "as EQ-VAE's paper defines it, lower is more equivariant; the same with every channel standardised, which an "
        "offset of the latents does not lower; and the PSNR in dB of D(τE(x)) against τ(x).",
        ["Model", *(name.replace("_", " ").replace("psnr", "PSNR").capitalize() for name in names), ""],
        rows,
    )
