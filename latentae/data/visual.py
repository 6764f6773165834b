"""The picture that shows how an autoencoder does: input, reconstruction, error and latents side by side."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from latentae.nn.pixels import to_uint8

ERROR_GAIN = 8
LATENT_CHANNELS_SHOWN = 4
GAP = 2


def panel(pixels: torch.Tensor, reconstruction: torch.Tensor, latents: torch.Tensor | None = None) -> np.ndarray:
    """One row per image: input | reconstruction | absolute error times 8 | the first four latent channels in grey.

    Each latent channel is shown from three standard deviations below its mean over the batch (black) to three above
    (white), every latent as a square as large as the pixels that it stands for.

    Args:
        pixels, reconstruction: (B, 3, H, W), uint8 or float in [-1, 1].
        latents: (B, C, h, w), raw or normalised.

    Returns:
        uint8 (rows, columns, 3) with white gaps.
    """
    pixels, reconstruction = _to_uint8(pixels), _to_uint8(reconstruction)
    columns = [pixels, reconstruction, _error(pixels, reconstruction)]
    if latents is not None:
        columns += _latents_as_grey(latents[:, :LATENT_CHANNELS_SHOWN], pixels.shape[-2:])
    return _tiles(torch.stack(columns, dim=1))


def clip_panel(pixels: torch.Tensor, reconstruction: torch.Tensor, frames: int = 8) -> np.ndarray:
    """Three rows per clip: so many of its frames, evenly from the first to the last; their reconstructions; the
    absolute error times 8.

    Args:
        pixels, reconstruction: (B, 3, T, H, W), uint8 or float in [-1, 1].

    Returns:
        uint8 (rows, columns, 3) with white gaps.
    """
    pixels, reconstruction = (_some_frames(x, frames) for x in (pixels, reconstruction))
    rows = torch.stack([pixels, reconstruction, _error(pixels, reconstruction)], dim=1)  # (B, 3 rows, 3, T, H, W)
    return _tiles(rows.flatten(0, 1).transpose(1, 2))


def grid(pixels: torch.Tensor) -> np.ndarray:
    """Images side by side, as many in a row as make the picture about square, uint8 (rows, columns, 3).

    Args:
        pixels: (B, 3, H, W), uint8 or float in [-1, 1].
    """
    pixels = _to_uint8(pixels)
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    white = pixels.new_full((rows * columns - len(pixels), *pixels.shape[1:]), 255)
    return _tiles(torch.cat([pixels, white]).unflatten(0, (rows, columns)))


def film(pixels: torch.Tensor, frames: int = 8) -> np.ndarray:
    """One row per clip: so many of its frames, evenly from the first to the last, uint8 (rows, columns, 3).

    Args:
        pixels: (B, 3, T, H, W), uint8 or float in [-1, 1].
    """
    return _tiles(_some_frames(pixels, frames).transpose(1, 2))


def _some_frames(pixels: torch.Tensor, frames: int) -> torch.Tensor:
    shown = torch.linspace(0, pixels.shape[2] - 1, min(frames, pixels.shape[2])).round().long()
    return _to_uint8(pixels[:, :, shown])


def _error(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    return (ERROR_GAIN * (pixels.int() - reconstruction.int()).abs()).clamp(max=255).to(torch.uint8)


def _tiles(images: torch.Tensor) -> np.ndarray:
    """Images (rows, columns, 3, H, W) as one picture with white gaps."""
    padded = F.pad(images, (0, GAP, 0, GAP), value=255).permute(0, 3, 1, 4, 2)  # (rows, H + gap, columns, W + gap, 3)
    return padded.flatten(2, 3).flatten(0, 1)[:-GAP, :-GAP].contiguous().numpy()


def _to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    pixels = pixels.detach().cpu()
    return pixels if pixels.dtype == torch.uint8 else to_uint8(pixels.float())


def _latents_as_grey(latents: torch.Tensor, size: torch.Size) -> list[torch.Tensor]:
    """Channels as pictures, each (B, 3, H, W)."""
    latents = latents.detach().cpu().float()
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True, correction=0)
    grey = to_uint8((latents - mean) / (3 * deviation).clamp(min=1e-12))  # (B, C, h, w)
    grey = F.interpolate(grey, size=tuple(size), mode="nearest-exact")
    return [channel[:, None].expand(-1, 3, -1, -1) for channel in grey.unbind(dim=1)]
