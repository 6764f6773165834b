"""How many bits the latents of an autoencoder take: quantised channel by channel, their entropy, and the PSNR left.

Floats per pixel say little: a channel may hold ten bits or a tenth of one. So the latents of some images are rounded to
steps of ``STEPS`` times the standard deviation of their channel, decoded again, and their empirical entropy is counted.
The size of a model is that of the coarsest step whose mean PSNR is at most 0.1 dB below that of unchanged latents.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.codec import LatentCodec, Latents
from latentae.metrics.image import psnr
from latentae.nn.pixels import to_uint8

STEPS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # of a channel's standard deviation, coarsest first
ALLOWED_LOSS = 0.1  # dB
IMAGES = 32
PERFECT = 100.0  # dB, in place of infinity


def entropy_bits(symbols: np.ndarray) -> float:
    """Empirical entropy of integers in bits per symbol, with the correction of Miller and Madow for finite samples.

    The plain estimate is too low by about (distinct symbols - 1) / (2 N) nats.
    """
    _, counts = np.unique(symbols, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() + (len(counts) - 1) / (2 * counts.sum() * math.log(2)))


class LatentRate:
    """Collects raw latents with their images, of the first ``count`` images, and measures rate and distortion once.

    Args:
        noise: makes the generators of a decoder that samples, one for each name of an image.
    """

    def __init__(self, codec: LatentCodec, noise: Callable[[list[str]], Any], count: int = IMAGES):
        self.codec, self.noise, self.count = codec, noise, count
        self.batches: list[tuple[list[str], Tensor, Tensor]] = []
        self.images = 0

    def add(self, keys: list[str], originals: Tensor, z: Tensor) -> None:
        """Take the names, uint8 pixels (B, 3, H, W) and raw latents (B, C, ...) of a batch, while they are needed."""
        missing = self.count - self.images
        if missing > 0 and z.isfinite().all():
            self.batches.append((keys[:missing], originals[:missing].cpu(), z[:missing].cpu()))
            self.images += len(keys[:missing])

    def results(self) -> dict[str, Any] | None:
        """``bits_per_pixel``, ``psnr`` and ``step`` of the chosen step, and the ``curve`` of all; None without images.

        The figures are of ``images`` images, so that ``psnr_unquantised`` may differ from the PSNR of the table.
        Where every step loses more than is allowed, the finest is taken and ``within`` is false. Discrete latents take
        the bits that name a code of their codebook.
        """
        if not self.batches:
            return None
        unquantised = self._psnr(lambda z: z)
        common = {"images": self.images, "psnr_unquantised": unquantised, "allowed_loss": ALLOWED_LOSS}
        if (quantizer := getattr(self.codec.autoencoder, "quantize", None)) is not None:
            return {**common, **self._of_codes(quantizer), "psnr": unquantised}
        curve = [self._point(step) for step in STEPS]
        good = [point for point in curve if point["psnr"] >= unquantised - ALLOWED_LOSS]
        return {**common, **(good or curve[-1:])[0], "within": bool(good), "curve": curve}

    def _of_codes(self, quantizer: Any) -> dict[str, Any]:
        codes = int(getattr(quantizer, "codes", 0) or quantizer.n_e)  # ours, or diffusers' VectorQuantizer
        _, _, z = self.batches[0]
        return {"bits_per_pixel": math.log2(codes) * math.prod(z.shape[2:]) / self._pixels, "codes": codes}

    def _point(self, step: float) -> dict[str, float]:
        """Rate and distortion of one step."""
        mean, std = self._channels()
        symbols = [_channels_first((z.double() - mean) / (std * step)).round() for _, _, z in self.batches]
        by_channel = torch.cat(symbols, dim=1).numpy()  # (C, positions of all images)
        bits = sum(entropy_bits(channel) for channel in by_channel) * by_channel.shape[1] / self.images

        def rounded(z: Tensor) -> Tensor:
            return (((z.double() - mean) / (std * step)).round() * (std * step) + mean).to(z.dtype)

        return {"step": step, "bits_per_pixel": bits / self._pixels, "psnr": self._psnr(rounded)}

    @property
    def _pixels(self) -> int:
        return math.prod(self.batches[0][1].shape[-2:])

    def _channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel, in float64, shaped to stand beside latents."""
        z = torch.cat([_channels_first(z.double()) for _, _, z in self.batches], dim=1)
        shape = (-1, *[1] * (self.batches[0][2].ndim - 2))
        return z.mean(1).view(shape), z.std(1).clamp(min=1e-12).view(shape)

    def _psnr(self, change: Callable[[Tensor], Tensor]) -> float:
        """Mean over images of what is decoded from changed latents; 100 dB for a perfect image."""
        values = []
        for keys, originals, z in self.batches:
            height, width = originals.shape[-2:]
            latents = Latents(self.codec.normalise(change(z).to(self.codec.device)), height, width)
            decoded = to_uint8(self.codec.decode(latents, generator=self.noise(keys))).cpu()
            values += psnr(decoded, originals).clamp(max=PERFECT).tolist()
        return float(np.mean(values))


def _channels_first(z: Tensor) -> Tensor:
    return z.transpose(0, 1).flatten(1)  # (B, C, ...) to (C, B * ...)
