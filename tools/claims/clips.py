"""What the claim about video trains and tests on, the figures of clips, and the linear codes that stand in its table.

Clips are pans, zooms and rotations of photos, and moving dead leaves: a picture of dead leaves under a moving camera,
with leaves in front of it that have other textures and each their own motion, so that things cover each other.
"""

import statistics
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from claims.pictures import TEST_SEED, TUNE_SEED, from_blocks, principal_components, to_blocks
from latentae.data.clip_dataset import ClipDataset
from latentae.data.clips import ClipSource
from latentae.data.sample_clips import Kind, Split, moving_picture
from latentae.families.fourplane import time_weights
from latentae.metrics.image import psnr, ssim
from latentae.nn.pixels import to_float, to_uint8

POOL_SEED = 20_000
REAL_STRIDE = 2  # of the frames of real clips, so that things move
ROUNDING = 1 / 6  # mean square of a difference of two rounded values: below it nothing is measured


@lru_cache(maxsize=2)
def pool(count: int, frames: int, size: int) -> Tensor:
    """The first clips of an endless frozen stream for training, of photos and of leaves in turn.

    Returns:
        uint8 (count, 3, frames, size, size), a pure function of its arguments: clip i is the same for every count.
    """
    kinds: tuple[Kind, ...] = ("photos", "leaves")
    return torch.stack([moving_picture(kinds[i % 2], i, POOL_SEED, frames, size) for i in range(count)])


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
        "photos": torch.stack([moving_picture("photos", i, seed, frames, size, split) for i in range(count)]),
        "leaves": torch.stack([moving_picture("leaves", i, seed, frames, size) for i in range(count)]),
    }


def real_clips(folder: Path, count: int, frames: int, size: int) -> Tensor:
    """Random squares of random parts of the clips in a folder, in turn: uint8 (count, 3, frames, size, size)."""
    data = ClipDataset(ClipSource(folder), frames=frames, size=size, stride=REAL_STRIDE, seed=TEST_SEED)
    return torch.stack([data[position]["pixels"] for position in range(count)])


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
