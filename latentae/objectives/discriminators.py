"""Networks that tell real pixels from reconstructions."""

from typing import Literal

import torch
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Base of all discriminators: ``forward(pixels)`` gives logits of any shape, larger for real pixels."""


class PatchGAN(Discriminator):
    """Fully convolutional patch discriminator (Isola et al., 2017, arXiv 1611.07004) in taming-transformers' layout.

    ``layers`` convolutions of stride 2 and two of stride 1, all 4×4, so that a logit sees 70×70 pixels for three
    layers. Weights start as N(0, 0.02²), as there; state dict keys are ``main.<index>``, so its checkpoints load.

    Args:
        channels: width of the first layer; it doubles up to eight times that.
        layers: number of strided convolutions.
        norm: after every convolution but the first and the last. ``group`` (32 channels a group) and ``none`` do not
            mix images; taming's ``batch`` does, and real and reconstructed batches go through it apart.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: Literal["group", "batch", "none"] = "group"):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            stack.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=norm == "none"))
            stack += [*_norm(norm, widths[i]), nn.LeakyReLU(0.2)]
        stack.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*stack)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to a map of logits (B, 1, h, w); for three layers h = H/8 - 2."""
        return self.main(pixels)


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        return [nn.GroupNorm(max(channels // 32, 1), channels)]
    return []


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        with torch.no_grad():
            nn.init.normal_(module.weight, 1.0, 0.02)
