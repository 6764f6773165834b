"""What the claim about video trains and tests on, the figures of clips, and the linear codes that stand in its table.

Clips are pans, zooms and rotations of photos, and moving dead leaves: a picture of dead leaves under a moving camera,
with leaves in front of it that have other textures and each their own motion, so that things cover each other.
"""

import math
import statistics
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from claims.pictures import TEST_SEED, TUNE_SEED, from_blocks, principal_components, to_blocks
from latentae.data.clip_dataset import ClipDataset
from latentae.data.clips import ClipSource
from latentae.data.samples import dead_leaves, photos
from latentae.data.transforms import to_tensor
from latentae.families.fourplane import time_weights
from latentae.metrics.image import psnr, ssim
from latentae.nn.pixels import to_float, to_uint8

Split = Literal["train", "held_out"]
Kind = Literal["photos", "leaves"]

POOL_SEED = 20_000
TEXTURE = 2.5  # sides of a clip: how much of a picture a camera can wander over
PAN, TURN, ZOOM = 1.5, 0.03, 0.015  # deviations a frame: pixels, radians, logarithm of the scale
REAL_STRIDE = 2  # of the frames of real clips, so that things move
ROUNDING = 1 / 6  # mean square of a difference of two rounded values: below it nothing is measured


@lru_cache(maxsize=2)
def pool(count: int, frames: int, size: int) -> Tensor:
    """The first clips of an endless frozen stream for training, of photos and of leaves in turn.

    Returns:
        uint8 (count, 3, frames, size, size), a pure function of its arguments: clip i is the same for every count.
    """
    kinds: tuple[Kind, ...] = ("photos", "leaves")
    return torch.stack([clip(kinds[i % 2], i, POOL_SEED, frames, size) for i in range(count)])


def batch_at(clips: Tensor, seed: int, step: int, count: int) -> Tensor:
    """The clips of a step: each once an epoch in an order of the seed, mirrored and reversed by chance."""
    per_epoch = len(clips) // count
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(clips))
    chosen = clips[torch.from_numpy(order[place * count : (place + 1) * count])]
    turned = np.random.default_rng((seed, epoch, place)).random((count, 3)) < 0.5
    return torch.stack([one.flip([1 + axis for axis in range(3) if turn[axis]]) for one, turn in zip(chosen, turned)])


@lru_cache(maxsize=4)
def test_clips(count: int, frames: int, size: int) -> dict[str, Tensor]:
    """Clips of held-out photos, and of leaves of another seed: uint8 (count, 3, frames, size, size) by kind."""
    return _both("held_out", TEST_SEED, count, frames, size)


@lru_cache(maxsize=4)
def tune_clips(count: int, frames: int, size: int) -> dict[str, Tensor]:
    """What learning rates are chosen on: other clips of the training photos, and leaves of a third seed."""
    return _both("train", TUNE_SEED, count, frames, size)


def _both(split: Split, seed: int, count: int, frames: int, size: int) -> dict[str, Tensor]:
    return {
        "photos": torch.stack([clip("photos", i, seed, frames, size, split) for i in range(count)]),
        "leaves": torch.stack([clip("leaves", i, seed, frames, size) for i in range(count)]),
    }


def real_clips(folder: Path, count: int, frames: int, size: int) -> Tensor:
    """Random squares of random parts of the clips in a folder, in turn: uint8 (count, 3, frames, size, size)."""
    data = ClipDataset(ClipSource(folder), frames=frames, size=size, stride=REAL_STRIDE, seed=TEST_SEED)
    return torch.stack([data[position]["pixels"] for position in range(count)])


def clip(kind: Kind, index: int, seed: int, frames: int, size: int, split: Split = "train") -> Tensor:
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
    radius, corners, phase = rng.uniform(size / 12, size / 3), rng.integers(2, 7), rng.uniform(0, 2 * math.pi)
    outline = radius * (1 + 0.25 * torch.cos(corners * torch.atan2(at[..., 1], at[..., 0]) + phase))
    cover = (outline - at.norm(dim=-1) + 0.5).clamp(0, 1)[:, None]  # (T, 1, H, W), soft over one pixel
    shift = torch.from_numpy(rng.uniform(-size / 2, size / 2, 2)).float()
    return torch.lerp(frames, _look(texture, at + shift), cover)


def figures(reconstructions: dict[str, Tensor], clips: dict[str, Tensor]) -> dict[str, float]:
    """PSNR and SSIM, means over frames, and the PSNR of the differences of successive frames, by kind of clips.

    ``psnr``, ``ssim`` and ``difference`` are means over the synthetic kinds, which all have.

    Args:
        reconstructions: float (N, 3, T, H, W) in [-1, 1].
        clips: uint8.
    """
    values: dict[str, float] = {}
    for kind, original in clips.items():
        made = to_uint8(reconstructions[kind])
        frames, wanted = (x.transpose(1, 2).flatten(0, 1) for x in (made, original))  # (N * T, 3, H, W)
        error = (made.float().diff(dim=2) - original.float().diff(dim=2)).square().mean((1, 2, 3, 4))
        values[f"psnr_{kind}"] = psnr(frames, wanted).mean().item()
        values[f"ssim_{kind}"] = ssim(frames, wanted).mean().item()
        values[f"difference_{kind}"] = (10 * torch.log10(255**2 / error.clamp(min=ROUNDING))).mean().item()
    for name in ("psnr", "ssim", "difference"):
        values[name] = statistics.fmean(values[f"{name}_{kind}"] for kind in ("photos", "leaves"))
    return values


def block_mean(clips: dict[str, Tensor], frames: int, side: int) -> dict[str, float]:
    """Figures of every block of ``frames`` x ``side`` x ``side`` as its average colour, which is 3 floats."""
    factors = (frames, side, side)
    flat = {k: F.interpolate(F.avg_pool3d(to_float(x), factors), scale_factor=factors) for k, x in clips.items()}
    return figures(flat, clips)


def linear_code(
    training: Tensor, clips: dict[str, Tensor], factor: int, channels: int, spread: tuple[str, int] | None, extra: int
) -> dict[str, float]:
    """Figures of the principal components of blocks within frames, each as the best sum of planes in least squares.

    Args:
        training: uint8 (N, 3, T, H, W), on which the components are found.
        channels: components.
        spread: time weights and number of the spatial planes; None for the components themselves, a volume.
        extra: further components that have spatial planes only.
    """
    _, _, t, height, width = training.shape
    mean, basis = principal_components(training.transpose(1, 2).flatten(0, 1), factor, channels + extra)
    made = {}
    for kind, original in clips.items():
        frames = to_float(original).transpose(1, 2).flatten(0, 1)  # (N * T, 3, H, W)
        code = ((to_blocks(frames, factor) - mean) @ basis).unflatten(0, (len(original), -1))  # (N, T * h * w, C)
        if spread is not None:
            parts = code.split([channels, extra], dim=2)
            fits = [best_fit(*spread, t, height // factor, width // factor, moving) for moving in (True, False)]
            code = torch.cat([fit @ part for fit, part in zip(fits, parts)], dim=2)
        blocks = code.flatten(0, 1) @ basis.T + mean
        made[kind] = from_blocks(blocks, frames.shape, factor).unflatten(0, (len(original), t)).transpose(1, 2)
    return figures(made, clips)


def best_fit(weights: str, planes: int, t: int, h: int, w: int, moving: bool) -> Tensor:
    """The projection of volumes (t * h * w,) onto sums of spatial planes and, if ``moving``, of xt and yt."""
    place = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T  # (3, t * h * w)
    spatial = F.one_hot(place[1] * w + place[2], h * w).float()
    columns = [row[place[0], None] * spatial for row in time_weights(weights, planes, t)]
    if moving:
        columns += [F.one_hot(place[0] * side + place[axis], t * side).float() for axis, side in ((2, w), (1, h))]
    design = torch.cat(columns, dim=1).double()
    return (design @ torch.linalg.pinv(design)).float()
