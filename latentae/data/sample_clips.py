"""Clips that need no download, made of the bundled photos and of dead leaves, each a pure function of its number.

A clip is a photo under a camera that pans, turns and zooms, or a picture of dead leaves under such a camera, with
leaves in front of it that have other textures and each their own motion, so that things cover each other.
"""

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from latentae.data.samples import dead_leaves, photos
from latentae.data.transforms import to_tensor
from latentae.errors import RequestError
from latentae.nn.pixels import to_float, to_uint8

Split = Literal["train", "held_out"]
Kind = Literal["photos", "leaves"]

TEXTURE = 2.5  # sides of a clip: how much of a picture a camera can wander over
PAN, TURN, ZOOM = 1.5, 0.03, 0.015  # deviations a frame: pixels, radians, logarithm of the scale
HELD_OUT = 16  # clips to validate on
HELD_OUT_SEED = 1_000_003  # of their leaves and motions, which no run trains on


class SampleClips(Dataset[dict[str, Any]]):
    """Generated clips of photos and of leaves in turn: an endless supply to train on, or the few held-out ones.

    Args:
        split: of the photos.
        frames, size: of a clip, the side in pixels.
        seed: of the clips to train on; those held out are always the same.
    """

    noun = "clips"

    def __init__(self, split: Split, *, frames: int, size: int, seed: int = 0):
        if min(frames, size) < 1:
            raise RequestError(f"Clips of {frames} frames of {size} pixels: expected at least 1 of each.")
        self.split, self.frames, self.size = split, frames, size
        self.seed = seed if split == "train" else HELD_OUT_SEED

    def __len__(self) -> int:
        """Of the held-out clips; those to train on have no end, and this many are as good as an epoch."""
        return HELD_OUT

    @property
    def labelled(self) -> list[tuple[str, int]]:
        """Keys with their labels: they have none."""
        return [(f"{position}", -1) for position in range(len(self))]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The clip at a position: ``pixels`` uint8 (3, frames, size, size), its ``index``, its ``key``, and the label
        -1."""
        kind: Kind = "leaves" if position % 2 else "photos"
        return {
            "pixels": moving_picture(kind, position, self.seed, self.frames, self.size, self.split),
            "index": position,
            "key": f"{kind}/{position}",
            "label": -1,
        }


def moving_picture(kind: Kind, index: int, seed: int, frames: int, size: int, split: Split = "train") -> Tensor:
    """Clip number ``index`` of a seed: uint8 (3, frames, size, size), a pure function of its arguments.

    Args:
        split: of the photos.
    """
    rng = np.random.default_rng((seed, index))
    side = round(TEXTURE * size)
    if kind == "photos":
        made = _look(_photo_texture(rng, split, side), _motion(rng, frames, size))
    else:
        leaves = [to_float(to_tensor(dead_leaves(2 * index + i, side, seed))) for i in range(2)]
        made = _look(leaves[0], _motion(rng, frames, size))
        for _ in range(rng.integers(1, 5)):
            made = _drop_leaf(made, leaves[1], rng)
    return to_uint8(made.transpose(0, 1))  # (3, frames, size, size)


@lru_cache(maxsize=2)
def _photos(split: Split) -> list[np.ndarray]:
    return list(photos(split).values())


def _photo_texture(rng: np.random.Generator, split: Split, side: int) -> Tensor:
    """A random square of a photo, between ``side`` and its shorter side, at ``side``: (3, side, side)."""
    photo = _photos(split)[rng.integers(len(_photos(split)))]
    height, width, _ = photo.shape
    shorter = min(height, width)
    taken = round(side * (shorter / side) ** rng.random()) if shorter > side else shorter
    top, left = rng.integers(height - taken + 1), rng.integers(width - taken + 1)
    square = Image.fromarray(np.ascontiguousarray(photo[top : top + taken, left : left + taken]))
    resized = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0))
    return to_float(to_tensor(resized))


def _motion(rng: np.random.Generator, frames: int, size: int, start: float = 0.0) -> Tensor:
    """Where each pixel of each frame looks, as seen from the middle: x and y in pixels, (frames, size, size, 2).

    Args:
        start: deviation of the first frame's place.
    """
    time = torch.arange(frames) - (frames - 1) / 2
    velocity, place = torch.from_numpy(rng.normal(0, [[PAN], [start]], (2, 2))).float()
    turn, zoom = rng.normal(0, [TURN, ZOOM])
    angle, scale = rng.uniform(-0.3, 0.3) + turn * time, torch.exp(zoom * time)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    line = torch.arange(size) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # (size, size, 2)
    seen = torch.einsum("tij,hwj->thwi", scale[:, None, None] * rotation, grid)
    return seen + (place + velocity * time[:, None])[:, None, None]


def _look(texture: Tensor, at: Tensor) -> Tensor:
    """A texture (3, S, S), whose edges are mirrors, at places (T, H, W, 2) from its middle: (T, 3, H, W)."""
    grid = at * (2 / texture.shape[-1])
    wide = texture.expand(len(at), -1, -1, -1)
    return F.grid_sample(wide, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def _drop_leaf(frames: Tensor, texture: Tensor, rng: np.random.Generator) -> Tensor:
    """Frames (T, 3, H, W) with a leaf in front, of its own motion, with a part of a texture."""
    size = frames.shape[-1]
    at = _motion(rng, len(frames), size, start=size / 3)
    radius, corners, phase = rng.uniform(size / 12, size / 3), int(rng.integers(2, 7)), rng.uniform(0, 2 * math.pi)
    outline = radius * (1 + 0.25 * torch.cos(corners * torch.atan2(at[..., 1], at[..., 0]) + phase))
    cover = (outline - at.norm(dim=-1) + 0.5).clamp(0, 1)[:, None]  # (T, 1, H, W), soft over one pixel
    shift = torch.from_numpy(rng.uniform(-size / 2, size / 2, 2)).float()
    return torch.lerp(frames, _look(texture, at + shift), cover)
