"""Latents that are planes, seen as the volume that codecs speak of: which values count, and what may be added."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from latentae.nn.planes import PlaneLayout

LACKING = {"xt": 3, "yt": 4}  # the axis that a plane lacks; the others lack time


def has_planes(autoencoder: Any) -> bool:
    """Whether its latents are planes, each repeated along one axis of the volume."""
    return bool(autoencoder.config.get("spatial_planes"))


def independent_values(autoencoder: Any, z: Tensor) -> list[Tensor]:
    """The values of each channel of latents (B, C, ...), every one (B, n): what planes repeat counts once."""
    if not has_planes(autoencoder):
        return [channel.flatten(1) for channel in z.unbind(1)]
    windows = [planes for _, planes in _windows(autoencoder, z)]
    whole = {name: torch.cat([planes[name].flatten(2) for planes in windows], dim=2) for name in windows[0]}
    return [channel for plane in whole.values() for channel in plane.unbind(1)]


def as_repeated(autoencoder: Any, noise: Tensor) -> Tensor:
    """Independent noise in the shape of latents (B, C, ...) to noise of the same planes, which can be added to them."""
    if not has_planes(autoencoder):
        return noise
    volumes = []
    for layout, planes in _windows(autoencoder, noise):
        volume = torch.cat([layout.spread(name, plane) for name, plane in planes.items()], dim=1)
        rest = layout.volume_channels - volume.shape[1]  # of an image all but one plane are zero
        volumes.append(torch.cat([volume, volume.new_zeros(len(volume), rest, *volume.shape[2:])], dim=1))
    return torch.cat(volumes, dim=2)


def _windows(autoencoder: Any, z: Tensor) -> Iterator[tuple[PlaneLayout, dict[str, Tensor]]]:
    """The planes (B, C, rows, columns) by name of each window of a volume (B, C', T', h, w)."""
    config = autoencoder.config
    most = -(-(config["window_frames"] - 1) // config["temporal_compression"]) + 1
    for window in z.split(most, dim=2):
        frames, height, width = window.shape[2:]
        planes, channels = config["spatial_planes"], config["plane_channels"]
        layout = PlaneLayout(frames, height, width, planes, channels)
        parts = zip(layout.shapes, window.split(channels, dim=1))
        yield layout, {name: part.select(LACKING.get(name, 2), 0) for name, part in parts}
