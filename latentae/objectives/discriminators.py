"""Networks that tell real pixels from reconstructions.

All are fully convolutional and size-agnostic; those for images take (B, 3, H, W), `PatchGAN3D` takes (B, 3, T, H, W).
In an `Adversary` the former judge clips frame by frame, and the latter takes images for clips of one frame.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from latentae.errors import RequestError

Norm = Literal["group", "batch", "none"]


class Discriminator(nn.Module):
    """Base of all discriminators: ``forward(pixels)`` gives logits of any shape, larger for real pixels.

    One that judges in several ways returns a tuple and names its ``outputs``; each counts alike in the losses. One with
    ``of_clips`` takes pixels (B, 3, T, H, W).
    """

    outputs: tuple[str, ...] = ("logits",)
    of_clips = False


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

    def __init__(self, channels: int = 64, layers: int = 3, norm: Norm = "group"):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            stack.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=norm == "none"))
            stack += [*_norm(norm, widths[i], nn.BatchNorm2d), nn.LeakyReLU(0.2)]
        stack.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*stack)
        self.smallest_side = 3 * 2**layers
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to a map of logits (B, 1, h, w); for three layers h = H/8 - 2.

        Raises:
            RequestError: a side is too short for one logit.
        """
        if min(pixels.shape[-2:]) < self.smallest_side:
            height, width = pixels.shape[-2:]
            raise RequestError(
                f"This PatchGAN needs sides of at least {self.smallest_side} pixels, got {height}x{width}: give it "
                "fewer layers, take a larger data.size, or larger scales in model.latent_transforms."
            )
        return self.main(pixels)


class PatchGAN3D(Discriminator):
    """Patch discriminator of videos in the layout of WF-VAE and Open-Sora-Plan: 3×3×3 convolutions.

    ``layers`` of them halve the frame and the first two of these also halve time; two of stride 1 follow. A logit of
    the default three layers sees 31 frames of 47×47 pixels. One frame is enough, so that images go through it too.

    Args:
        channels, layers, norm: as in `PatchGAN`; the original's norm is ``batch``.
    """

    of_clips = True

    def __init__(self, channels: int = 64, layers: int = 3, norm: Norm = "group"):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv3d(3, widths[0], 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 1 if i == layers else (2 if i == 1 else 1, 2, 2)
            stack.append(nn.Conv3d(widths[i - 1], widths[i], 3, stride, padding=1, bias=norm == "none"))
            stack += [*_norm(norm, widths[i], nn.BatchNorm3d), nn.LeakyReLU(0.2)]
        stack.append(nn.Conv3d(widths[-1], 1, 3, stride=1, padding=1))
        self.main = nn.Sequential(*stack)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) to logits (B, 1, t, h, w); for three layers t = ⌈T/4⌉ and h = ⌈H/8⌉."""
        return self.main(pixels)


class BlurPatchGAN(Discriminator):
    """N-layer discriminator that downsamples through a binomial blur, so that its judgement does not alias: TiTok's.

    Each stage is a 3×3 convolution, the blur (1, 3, 3, 1) of StyleGAN2 with stride 2, GroupNorm of 32 groups and a
    leaky ReLU; a maximum over 2×2 neighbours precedes the logits, which at 256 pixels is TiTok's pooling to 16×16.

    Args:
        channels: width of the first layer, a multiple of 32; it doubles at every stage but the first.
        stages: number of times that the frame is halved before the logits.
    """

    def __init__(self, channels: int = 128, stages: int = 3):
        super().__init__()
        widths = [channels, *(channels * 2**i for i in range(stages))]
        stack: list[nn.Module] = [nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1)]
        for channels_in, channels_out in pairwise(widths):
            stack += [
                nn.Conv2d(channels_in, channels_out, 3, padding=1),
                BlurDownsample(),
                nn.GroupNorm(32, channels_out),
                nn.LeakyReLU(0.1),
            ]
        stack += [nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1)]
        self.main = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 5, padding=2))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to a map of logits (B, 1, h, w); for three stages h = ⌈H/16⌉."""
        return self.main(pixels)


class BlurDownsample(nn.Module):
    """Halve height and width, rounding up, through the filter (1, 3, 3, 1) / 8 along each; edges are repeated."""

    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("taps", line[:, None] * line, persistent=False)  # (4, 4)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        bottom, right = x.shape[2] % 2, x.shape[3] % 2
        padded = F.pad(x, (1, 1 + right, 1, 1 + bottom), mode="replicate")
        return F.conv2d(padded, self.taps.to(x.dtype).expand(channels, 1, 4, 4), stride=2, groups=channels)


class UNetGAN(Discriminator):
    """U-Net discriminator (Schönfeld et al., 2020, arXiv 2002.12655): a score of the image and a logit of every pixel.

    The unconditional 256-pixel network of the paper, residual blocks of BigGAN under spectral normalisation, for any
    size: upsampling goes to the size of the skip connection, and the score is that of the mean, not of the sum, of the
    deepest features. CutMix consistency, the paper's other half, is left out, as in LiteVAE.

    Spectral normalisation takes one power iteration at every forward pass in training.

    Args:
        channels: width of the first block; 16, 32 and 64 give 2.76, 11.0 and 44.1 million parameters.
    """

    outputs = ("map_logits", "score_logits")

    def __init__(self, channels: int = 32):
        super().__init__()
        down = [3, *(channels * factor for factor in (1, 2, 4, 8, 8, 16))]
        up = [channels * factor for factor in (8, 8, 4, 2, 1, 1)]
        skips = [0, *reversed(down[1:-1])]  # what the i-th block upwards gets beside its input
        self.down = nn.ModuleList(_DownBlock(a, b, first=a == 3) for a, b in pairwise(down))
        self.up = nn.ModuleList(_UpBlock(a + skip, b) for a, b, skip in zip([down[-1], *up], up, skips))
        self.score = spectral_norm(nn.Linear(down[-1], 1))
        self.map = spectral_norm(nn.Conv2d(up[-1], 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) to logits of the pixels (B, 1, H, W) and of the images (B, 1)."""
        features = [pixels]
        for block in self.down:
            features.append(block(features[-1]))
        x = features.pop()
        score = self.score(F.relu(x).mean(dim=(2, 3)))  # (B, 1)
        for i, block in enumerate(self.up):
            skip = features.pop()
            x = block(x, size=skip.shape[2:])
            if i + 1 < len(self.up):
                x = torch.cat([x, skip], dim=1)
        return self.map(x), score


class _ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a 1×1 convolution beside them; subclasses change the size in between."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = _spectral_conv(channels_in, channels_out, 3)
        self.conv2 = _spectral_conv(channels_out, channels_out, 3)
        self.shortcut = _spectral_conv(channels_in, channels_out, 1)


class _DownBlock(_ResidualBlock):
    """Halves the size, rounding up; the first block of all sees pixels, which no ReLU may cut."""

    def __init__(self, channels_in: int, channels_out: int, first: bool):
        super().__init__(channels_in, channels_out)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        main = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return F.avg_pool2d(main + self.shortcut(x), 2, ceil_mode=True)


class _UpBlock(_ResidualBlock):
    """Resizes to a given size by nearest neighbours."""

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        main = self.conv2(F.relu(self.conv1(F.interpolate(F.relu(x), size))))
        return main + F.interpolate(self.shortcut(x), size)  # a 1×1 convolution commutes with the resizing


def _spectral_conv(channels_in: int, channels_out: int, kernel_size: int) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2)
    nn.init.orthogonal_(convolution.weight)
    return spectral_norm(convolution)


def _norm(kind: Norm, channels: int, batch_norm: type[nn.Module]) -> list[nn.Module]:
    if kind == "batch":
        return [batch_norm(channels)]
    if kind == "group":
        return [nn.GroupNorm(max(channels // 32, 1), channels)]
    return []


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        with torch.no_grad():
            nn.init.normal_(module.weight, 1.0, 0.02)
