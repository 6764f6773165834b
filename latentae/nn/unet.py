"""Denoisers of pixels that know the latents: a convolutional U-Net, and with a transformer in its middle a U-ViT.

The plain form is that of the consistency decoder (DALL-E 3), which DiTo has in three widths: residual blocks with
group norm, scaled and shifted by the time, three of each width on the way down and four on the way up, no attention.
The U-ViT works on patches and has transformer blocks in place of the two in the middle, as Unified Latents and SSDD.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.nn.precision import widen

FREQUENCIES = 320  # of the time, at every width
EMBEDDING = 1280
TIME_SCALE = 1000.0
FEATURES = 64  # of the latents, for adaptive norms
HEAD = 64  # channels of an attention head, at most
EPSILON = 1e-5


def time_frequencies(t: Tensor, count: int = FREQUENCIES) -> Tensor:
    """Times (B,) in [0, 1] to cosines and sines (B, count) of wavelengths from 2π to 20000π thousandths."""
    half = count // 2
    exponent = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angles = TIME_SCALE * t[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """Group norm with 32 groups, or as many as divide the channels; of single pixels too."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ResBlock(nn.Module):
    """shortcut(x) + conv(silu(modulated norm(conv(silu(norm(x)))))), at half or twice the size if it resamples.

    Args:
        features: channels of the latents' features, which modulate beside the time; 0 for none.
        resample: 0.5, 1 or 2: by means and by repetition.
    """

    def __init__(self, channels_in: int, channels_out: int, features: int = 0, resample: float = 1):
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(EMBEDDING, 2 * channels_out)
        self.features = nn.Conv2d(features, 2 * channels_out, 1) if features else None
        self.norm2 = GroupNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor, features: Tensor | None) -> Tensor:
        y = F.silu(self.norm1(x))
        if self.resample != 1:
            x, y = (_resample(each, self.resample) for each in (x, y))
        y = self.conv1(y)
        modulation = self.time(embedding)[:, :, None, None]  # (B, 2C, 1, 1)
        if self.features is not None and features is not None:
            modulation = modulation + F.interpolate(self.features(features), size=y.shape[-2:], mode="area")
        scale, shift = modulation.chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.shortcut(x) + y


def _resample(x: Tensor, factor: float) -> Tensor:
    return F.avg_pool2d(x, 2) if factor < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")


class TransformerBlock(nn.Module):
    """Attention with rotary positions of rows and columns, and a gated MLP; norms scaled, shifted and gated by time."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(channels // HEAD, 1)
        if channels % (4 * self.heads):
            raise ValueError(f"Rotary positions need channels of each head in fours, not {channels} / {self.heads}.")
        hidden = 8 * channels // 3
        self.time = nn.Linear(EMBEDDING, 6 * channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.gate = nn.Linear(channels, 2 * hidden)
        self.mlp_out = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, embedding: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens (B, N, C)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.time(embedding)[:, None].chunk(6, dim=-1)
        y = _layer_norm(x) * (1 + scale1) + shift1
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)  # (B, heads, N, C / heads)
        x = x + gate1 * self.project(y.transpose(1, 2).flatten(2))
        y, gate = self.gate(_layer_norm(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return x + gate2 * self.mlp_out(y * F.gelu(gate))


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def rotation_of(height: int, width: int, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (h * w, channels / 2) of rotary positions: half of them for the row, half for the column."""
    quarter = channels // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=like.device, dtype=widen(like[:0]).dtype) / quarter)
    rows, columns = (torch.arange(n, device=like.device, dtype=frequency.dtype)[:, None] for n in (height, width))
    angles = torch.cat(
        [
            (rows * frequency)[:, None].expand(-1, width, -1),
            (columns * frequency)[None].expand(height, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 1)  # (h * w, 2 * quarter)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, heads, N, channels) turned by their positions, in pairs of the two halves of the channels."""
    cos, sin = rotation
    a, b = widen(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class UNet(nn.Module):
    """Noisy pixels, the time and a map made of the latents to whatever is predicted of the pixels.

    Args:
        channels: of the pixels, in and out.
        condition_channels: of the map, which has the pixels' size over ``patch_size``.
        widths: of each level; every level but the last halves the size.
        layers: residual blocks of each level on the way down; one more on the way up.
        patch_size: pixels along a side that are one position of the first level.
        transformer_layers: blocks in the middle, in place of two residual ones; 0 for none.
        latent_channels: of latents that modulate every residual block, at any size; 0 for none.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        widths: Sequence[int] = (128, 256, 512, 512),
        layers: int = 3,
        patch_size: int = 1,
        transformer_layers: int = 0,
        latent_channels: int = 0,
    ):
        super().__init__()
        self.patch_size = patch_size
        features = FEATURES if latent_channels else 0
        patch = channels * patch_size**2
        self.time_in = nn.Linear(FREQUENCIES, EMBEDDING)
        self.time_out = nn.Linear(EMBEDDING, EMBEDDING)
        self.feature_in = nn.Conv2d(latent_channels, features, 3, padding=1) if features else None
        self.conv_in = nn.Conv2d(patch + condition_channels, widths[0], 3, padding=1)

        down: list[nn.Module] = []
        skips = [widths[0]]
        for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
            for layer in range(layers):
                down.append(ResBlock(before if layer == 0 else width, width, features))
                skips.append(width)
            if level < len(widths) - 1:
                down.append(ResBlock(width, width, features, resample=0.5))
                skips.append(width)
        self.down_blocks = nn.ModuleList(down)

        deepest = widths[-1]
        self.mid_blocks = nn.ModuleList(
            [TransformerBlock(deepest) for _ in range(transformer_layers)]
            or [ResBlock(deepest, deepest, features) for _ in range(2)]
        )

        up: list[nn.Module] = []
        before = deepest
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(layers + 1):
                up.append(ResBlock(before + skips.pop(), width, features))
                before = width
            if level > 0:
                up.append(ResBlock(width, width, features, resample=2))
        self.up_blocks = nn.ModuleList(up)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], patch, 3, padding=1)

    def forward(self, noisy: Tensor, t: Tensor, condition: Tensor, latents: Tensor | None = None) -> Tensor:
        """(B, C, H, W), times (B,) in [0, 1], the map (B, Cc, H / p, W / p) and latents (B, c, h, w), if they modulate.

        H and W are multiples of ``patch_size`` times two to the number of levels less one.
        """
        x = torch.cat([F.pixel_unshuffle(noisy, self.patch_size), condition], dim=1)
        embedding = self.time_in(time_frequencies(widen(t)).to(x.dtype))
        embedding = F.silu(self.time_out(F.silu(embedding)))
        features = None
        if self.feature_in is not None:
            assert latents is not None
            features = F.silu(self.feature_in(latents))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = self._run(block, x, embedding, features)
            skips.append(x)
        x = self._middle(x, embedding, features)
        for block in self.up_blocks:
            if block.resample == 1:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, embedding, features)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)

    def _middle(self, x: Tensor, embedding: Tensor, features: Tensor | None) -> Tensor:
        if isinstance(self.mid_blocks[0], ResBlock):
            for block in self.mid_blocks:
                x = self._run(block, x, embedding, features)
            return x
        height, width = x.shape[-2:]
        blocks: Any = self.mid_blocks
        rotation = rotation_of(height, width, x.shape[1] // blocks[0].heads, x)
        tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, C)
        for block in blocks:
            tokens = self._run(block, tokens, embedding, rotation)
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)
