"""A batch of images as the metrics of a protocol read it: rounded or truncated to bytes, or as floats."""

from collections.abc import Callable

import torch
from torch import Tensor

from latentae.nn.pixels import to_float, to_uint8


def truncate(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8: clamped and cut to whole levels, as ``(x * 255).to(uint8)`` does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


# of the decoded floats, of the uint8 originals
QUANTISERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "round": (to_uint8, lambda original: original),
    "truncate": (truncate, lambda original: original),
    "truncate-both": (truncate, lambda original: truncate(to_float(original))),
}


class Pair:
    """Reconstructions and originals.

    Args:
        pixels: decoded floats in about [-1, 1], (B, 3, H, W), or of clips (B, 3, T, H, W).
        originals: uint8 of the same shape.
        quantisation: of `QUANTISERS`.
    """

    def __init__(self, pixels: Tensor, originals: Tensor, quantisation: str):
        self.pixels, self.originals, self.quantisation = pixels.float(), originals, quantisation
        of_pixels, of_originals = QUANTISERS[quantisation]
        self.finite = pixels.isfinite().flatten(1).all(1)  # (B,)
        self.uint8 = of_pixels(self.pixels.nan_to_num()), of_originals(originals)

    def only(self, chosen: Tensor) -> "Pair":
        """The pairs where the mask (B,) is true."""
        return self if chosen.all() else Pair(self.pixels[chosen], self.originals[chosen], self.quantisation)

    def read(self, reading: str) -> tuple[Tensor, Tensor]:
        """Reconstruction and original as ``uint8``, ``clamped`` or ``raw`` floats, see `latentae.bench.presets`."""
        if reading == "uint8":
            return self.uint8
        pixels = self.pixels.clamp(-1, 1) if reading == "clamped" else self.pixels
        return pixels, to_float(self.originals)
