"""Space to channel and back: the parameter-free shortcuts of DC-AE (arXiv 2410.10733, figure 4).

``F.pixel_unshuffle`` orders channels as ``c * 4 + dy * 2 + dx``; both shortcuts group consecutive ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def average_groups(x: Tensor, channels_out: int) -> Tensor:
    """(B, C, H, W) to (B, channels_out, H, W): the mean over groups of consecutive channels."""
    return x.unflatten(1, (channels_out, -1)).mean(2)


def space_to_channel_average(x: Tensor, channels_out: int) -> Tensor:
    """(B, C, H, W) to (B, channels_out, H/2, W/2): pixel-unshuffle, then the mean over groups of channels.

    With twice the channels a group is a horizontal pair, with as many channels a 2x2 block.
    """
    channels = x.shape[1]
    if channels_out == 2 * channels:
        pairs = (x[..., 0::2] + x[..., 1::2]) * 0.5  # (B, C, H, W/2)
        return pairs.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)  # (B, 2C, H/2, W/2)
    if channels_out <= channels:
        x = F.avg_pool2d(x, 2)
        return x if channels_out == channels else average_groups(x, channels_out)
    return average_groups(F.pixel_unshuffle(x, 2), channels_out)


def pixels_of(x: Tensor) -> Tensor:
    """A view of (B, C, 2H, 2W) as (B, C, H, 2, W, 2): each 2x2 block of pixels apart."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))


def duplicate_to_pixels(x: Tensor, channels_out: int) -> Tensor:
    """(B, C, H, W) to a view of (B, channels_out, H, 2, W, 2): channels duplicated, then spread over 2x2 pixels.

    The 2x2 blocks of ``F.pixel_shuffle(x.repeat_interleave(4 * channels_out // C, 1), 2)`` without a copy of them.
    """
    if channels_out > x.shape[1]:
        x = x.repeat_interleave(channels_out // x.shape[1], dim=1)
    rows, columns = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[x.shape[1] // channels_out]
    blocks = x.unflatten(1, (channels_out, rows, columns)).permute(0, 1, 4, 2, 5, 3)  # (B, O, H, rows, W, columns)
    return blocks.expand(-1, -1, -1, 2, -1, 2)


def nearest_upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest upsampling by two and a 3x3 convolution in one step: 16 instead of 36 products for each 2x2 of output.

    On the upsampled grid every pixel appears twice in each direction, so the three taps of a row fall on two source
    pixels; their sums are the taps of a 4x4 transposed convolution of stride two. Exact up to rounding.

    Args:
        x: (B, C, H, W); weight: (O, C, 3, 3). Returns (B, O, 2H, 2W).
    """
    for dim in (2, 3):
        first, middle, last = weight.unbind(dim)
        weight = torch.stack([last, middle + last, first + middle, first], dim)
    weight = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)  # (C, O, 4, 4)
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
