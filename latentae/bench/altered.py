"""What is decoded from altered latents: rounded ones, which shows how many bits they take, and noisy ones.

Both need the latents of some images twice, first for the statistics of their channels, and decode each image a few
times more; the first 32 images of a benchmark serve for all of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.planes import as_repeated, independent_values
from latentae.codec import LatentCodec, Latents
from latentae.metrics.codebook import codes_of
from latentae.metrics.image import psnr
from latentae.metrics.video import over_frames
from latentae.nn.pixels import to_uint8

BATCH = 8
PERFECT = 100.0  # dB, in place of infinity
STEPS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of a channel's standard deviation, coarsest first
ALLOWED_LOSS = 0.1  # dB
NOISES = (0.1, 0.2, 0.4)  # of a channel's standard deviation


class AlteredLatents:
    """Keeps raw latents with their images, of the first ``count`` images, and decodes what is made of them.

    Args:
        noise: makes the generators of a decoder that samples, one for each name of an image.
    """

    def __init__(self, codec: LatentCodec, noise: Callable[[list[str]], Any], count: int):
        self.codec, self.noise, self.count = codec, noise, count
        self.kept: list[tuple[int, str, Tensor, Tensor]] = []

    def add(self, places: Sequence[int], keys: list[str], originals: Tensor, z: Tensor) -> None:
        """Take places in the order, names, uint8 pixels (B, 3, ...) and raw latents (B, C, ...) while they are needed.

        Latents with NaN or infinity stay out.
        """
        for place, key, original, latents in zip(places, keys, originals, z):
            if len(self.kept) < self.count and latents.isfinite().all():
                self.kept.append((place, key, original.cpu().clone(), latents.cpu().clone()))

    def merge(self, other: "AlteredLatents") -> None:
        """Take what another process kept, so that the first images of all are left."""
        self.kept = sorted(self.kept + other.kept, key=lambda kept: kept[0])[: self.count]

    def results(self) -> dict[str, Any]:
        """``rate`` and ``noise_robustness``, both None where there were no images."""
        if not self.kept:
            return {"rate": None, "noise_robustness": None}
        unaltered = self._psnr(lambda z: z)
        return {"rate": self._rate(unaltered), "noise_robustness": self._robustness(unaltered)}

    def _rate(self, unaltered: float) -> dict[str, Any]:
        """``bits_per_pixel``, ``psnr`` and ``step`` of a model, and the ``curve`` of all `STEPS`.

        Floats per pixel say little: a channel may hold ten bits or a tenth of one. So latents are rounded to steps in
        units of the standard deviation of their channel, and their empirical entropy is counted. The step is the
        coarsest whose mean PSNR is at most 0.1 dB below that of unaltered latents; where every step loses more, it is
        the finest, and ``within`` is false. Discrete latents take the bits that name a code of their codebook.

        The figures are of ``images`` images, so that ``psnr_unaltered`` may differ from the PSNR of the table.
        """
        common = {"images": len(self.kept), "psnr_unaltered": unaltered, "allowed_loss": ALLOWED_LOSS}
        if (quantizer := getattr(self.codec.autoencoder, "quantize", None)) is not None:
            codes = codes_of(quantizer)
            positions = math.prod(self.kept[0][3].shape[1:])
            bits = math.log2(codes) * positions / self._pixels
            return {**common, "bits_per_pixel": bits, "psnr": unaltered, "codes": codes}
        curve = [self._point(step) for step in STEPS]
        good = [point for point in curve if point["psnr"] >= unaltered - ALLOWED_LOSS]
        return {**common, **(good or curve[-1:])[0], "within": bool(good), "curve": curve}

    def _point(self, step: float) -> dict[str, float]:
        """Rate and distortion of one step."""
        mean, std = self._channels()
        symbols = independent_values(self.codec.autoencoder, ((self._latents() - mean) / (std * step)).round())
        bits = sum(entropy_bits(channel.numpy()) * channel.shape[1] for channel in symbols)

        def rounded(z: Tensor) -> Tensor:
            return ((z.double() - mean) / (std * step)).round() * (std * step) + mean

        return {"step": step, "bits_per_pixel": bits / self._pixels, "psnr": self._psnr(rounded)}

    def _robustness(self, unaltered: float) -> dict[str, Any]:
        """PSNR of what is decoded from latents with white noise, by its spread in units of each channel's own.

        Models that were trained on noisy latents fall late (l-DeTok, arXiv 2507.15856); a narrow posterior does not
        mean robust latents.
        """
        _, std = self._channels()
        curve = []
        for noise in NOISES:
            generator = torch.Generator().manual_seed(0)

            def noisy(z: Tensor, noise: float = noise, generator: torch.Generator = generator) -> Tensor:
                drawn = torch.randn(z.shape, generator=generator, dtype=torch.float64)
                return z.double() + noise * std * as_repeated(self.codec.autoencoder, drawn)

            curve.append({"noise": noise, "psnr": self._psnr(noisy)})
        return {"images": len(self.kept), "psnr_unaltered": unaltered, "curve": curve}

    @property
    def _pixels(self) -> int:
        return math.prod(self.kept[0][2].shape[1:])

    def _latents(self) -> Tensor:
        return torch.stack([z.double() for *_, z in self.kept])  # (N, C, ...)

    def _channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel, shaped to stand beside latents."""
        z = self._latents()
        by_channel = z.transpose(0, 1).flatten(1)  # (C, N * ...)
        shape = (-1, *[1] * (z.ndim - 2))
        return by_channel.mean(1).view(shape), by_channel.std(1).clamp(min=1e-12).view(shape)

    def _psnr(self, change: Callable[[Tensor], Tensor]) -> float:
        """Mean over images of what is decoded from changed latents; 100 dB for a perfect image."""
        values = []
        is_clip = self.kept[0][2].ndim == 4
        batch = 1 if is_clip else BATCH
        for start in range(0, len(self.kept), batch):
            _, keys, pixels, latents = zip(*self.kept[start : start + batch])
            originals, z = torch.stack(pixels), torch.stack(latents)
            frames = originals.shape[2] if is_clip else None
            z = self.codec.normalise(change(z).to(self.codec.device, z.dtype))
            height, width = originals.shape[-2:]
            decoded = self.codec.decode(Latents(z, height, width, frames), generator=self.noise(list(keys)))
            values += psnr_of_each(to_uint8(decoded).cpu(), originals).clamp(max=PERFECT).tolist()
        return float(np.mean(values))


def psnr_of_each(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """In dB, (B,), of uint8 images (B, 3, H, W), or as the mean over the frames of clips (B, 3, T, H, W)."""
    return over_frames(psnr, reconstructions, originals) if originals.ndim == 5 else psnr(reconstructions, originals)


def entropy_bits(symbols: np.ndarray) -> float:
    """Empirical entropy of integers in bits per symbol, with the correction of Miller and Madow for finite samples.

    The plain estimate is too low by about (distinct symbols - 1) / (2 N) nats.
    """
    _, counts = np.unique(symbols, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() + (len(counts) - 1) / (2 * counts.sum() * math.log(2)))
