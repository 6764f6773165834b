"""Scale and rotate latents and the pixels that they stand for, both by the same transformation.

Sizes are whole numbers of latents, and the image is resized to exactly that many times the compression ratio: a real
factor, with latents and image rounded each by itself, breaks at most ratios and sizes. Videos go frame by frame.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.nn.precision import widen

Interpolation = Literal["bicubic", "bilinear"]
Size = tuple[int, int]  # height and width


def resize(x: Tensor, size: Size, interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize the last two dimensions of (B, C, H, W) or (B, C, T, H, W), in at least float32, in the dtype of ``x``.

    Args:
        interpolation: ``bicubic`` with antialiasing, as EQ-VAE's paper says, or ``bilinear`` without, as its code does.

    It is ``F.interpolate(..., align_corners=False)`` written as two matrix products, whose backward pass is
    deterministic on a GPU too, as exact resume needs.
    """
    wide = widen(x)
    rows, columns = (_matrix(old, new, interpolation).to(wide) for old, new in zip(x.shape[-2:], size))
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ wide @ columns.mT).to(x.dtype)


def _matrix(old: int, new: int, interpolation: Interpolation) -> Tensor:
    """What interpolation does along one side, as a matrix (new, old)."""
    identity = torch.eye(old, dtype=torch.float64)[None, None]  # (1, 1, old, old), each column an impulse
    return F.interpolate(identity, (new, old), mode=interpolation, antialias=interpolation == "bicubic")[0, 0]


def rotate(x: Tensor, quarter_turns: int) -> Tensor:
    """Rotate the last two dimensions counterclockwise by multiples of 90 degrees; odd ones swap height and width."""
    return x.rot90(quarter_turns, (-2, -1))


def transform(
    x: Tensor, size: Size | None = None, quarter_turns: int = 0, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Resize to ``size``, then rotate; without arguments the identity."""
    return rotate(x if size is None else resize(x, size, interpolation), quarter_turns)


def ratio_of(latents: Tensor, pixels: Tensor) -> int:
    """How many pixels along a side stand for one latent.

    Args:
        latents: (B, C, h, w) or (B, C, t, h, w); pixels: (B, 3, f*h, f*w) or (B, 3, T, f*h, f*w).

    Raises:
        ValueError: the latents are no grid over the image.
    """
    (height, width), (rows, columns) = pixels.shape[-2:], latents.shape[-2:]
    if latents.ndim != pixels.ndim or height % rows or width % columns or height // rows != width // columns:
        raise ValueError(f"latents {tuple(latents.shape)} are no grid over pixels {tuple(pixels.shape)}")
    return height // rows


def scaled_lengths(length: int, low: float, high: float) -> range:
    """The whole numbers from ``length * low`` to ``length * high`` that are less than ``length``; may be empty."""
    first = max(math.ceil(length * low - 1e-9), 1)
    return range(first, min(math.floor(length * high + 1e-9), length - 1) + 1)


def scaled_size(size: Size, longer: int) -> Size:
    """Height and width whose longer side is ``longer`` and whose aspect ratio is as near as whole numbers come."""
    factor = longer / max(size)
    height, width = (max(math.floor(side * factor + 0.5), 1) for side in size)
    return height, width
