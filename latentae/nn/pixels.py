"""Pixels between their two forms, bytes and floats in [-1, 1], and padding to sizes that an autoencoder takes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(image: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8: clamped, then rounded half up, so that ``to_uint8(to_float(x))`` is ``x``."""
    return (pixels.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Pad height and width at the bottom and the right up to a multiple of ``multiple``.

    By reflection; by replication along a side that is too short to reflect.

    Args:
        pixels: (..., H, W) with at least three dimensions.
    """
    height, width = pixels.shape[-2:]
    pad_h, pad_w = -height % multiple, -width % multiple
    if not (pad_h or pad_w):
        return pixels
    images = pixels.reshape(-1, 1, height, width)  # (B*C*..., 1, H, W)
    images = F.pad(images, (0, pad_w, 0, 0), mode="reflect" if pad_w < width else "replicate")
    images = F.pad(images, (0, 0, 0, pad_h), mode="reflect" if pad_h < height else "replicate")
    return images.reshape(*pixels.shape[:-2], height + pad_h, width + pad_w)


def pad_frames(pixels: Tensor, frames: int) -> Tensor:
    """Repeat the last frame until there are ``frames``.

    Args:
        pixels: (..., T, H, W).
    """
    missing = frames - pixels.shape[-3]
    if not missing:
        return pixels
    return torch.cat([pixels, pixels[..., -1:, :, :].repeat_interleave(missing, dim=-3)], dim=-3)


def frames_of(clips: Tensor) -> Tensor:
    """The frames of clips (B, C, T, H, W) as images, clip by clip: (B * T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)
