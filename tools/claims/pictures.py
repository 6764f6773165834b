"""What the claims about images train and test on, and the trivial codes that stand in every table."""

import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.data.images import ImageDataset
from latentae.data.samples import dead_leaves, photos
from latentae.data.transforms import adm_center_crop, to_tensor
from latentae.metrics.image import psnr
from latentae.nn.pixels import to_float, to_uint8
from latentae.training.datamodule import SamplePhotos

TEST_SEED, TUNE_SEED = 10_001, 10_002  # of dead leaves that no training stream contains
SHARE_OF_LEAVES = 0.6


@lru_cache(maxsize=8)
def stream(seed: int, count: int, size: int) -> Tensor:
    """The first pictures of an endless frozen stream of random crops of the training photos and of dead leaves.

    Returns:
        uint8 (count, 3, size, size), a pure function of its arguments: sample i is the same for every count.
    """
    dataset = ImageDataset(SamplePhotos("train"), size=size, seed=seed, dead_leaves=SHARE_OF_LEAVES)
    return torch.stack([dataset[position]["pixels"] for position in range(count)])


@lru_cache(maxsize=4)
def held_out_pictures(leaves: int = 12, size: int = 256) -> dict[str, Tensor]:
    """Held-out photos, centre-cropped, and dead leaves of another seed: uint8 (N, 3, size, size) by kind."""
    crops = [to_tensor(adm_center_crop(image, size)) for image in photos("held_out").values()]
    return {"photos": torch.stack(crops), "leaves": leaves_of(TEST_SEED, leaves, size)}


@lru_cache(maxsize=4)
def tune_pictures(leaves: int = 12, size: int = 256) -> dict[str, Tensor]:
    """What learning rates are chosen on: centre crops of the training photos, and dead leaves of a third seed."""
    crops = [to_tensor(adm_center_crop(image, size)) for image in photos("train").values()]
    return {"photos": torch.stack(crops), "leaves": leaves_of(TUNE_SEED, leaves, size)}


def crops_of(split: Literal["train", "held_out"], count: int, size: int, seed: int) -> Tensor:
    """Random crops of the photos of one split, scaled and flipped as in training: uint8 (count, 3, size, size)."""
    dataset = ImageDataset(SamplePhotos(split), size=size, seed=seed)
    return torch.stack([dataset[position]["pixels"] for position in range(count)])


def leaves_of(seed: int, count: int, size: int) -> Tensor:
    return torch.stack([to_tensor(dead_leaves(i, size, seed)) for i in range(count)])


def psnr_by_kind(reconstructions: dict[str, Tensor], pictures: dict[str, Tensor]) -> dict[str, float]:
    """Mean PSNR in dB of each kind of pictures, and under ``psnr`` the mean of the kinds.

    Args:
        reconstructions: float in [-1, 1] or uint8; floats are rounded as uint8 files would hold them.
    """
    values = {}
    for kind, original in pictures.items():
        given = reconstructions[kind]
        rounded = given if given.dtype == torch.uint8 else to_uint8(given)
        values[f"psnr_{kind}"] = psnr(rounded, original).mean().item()
    return {"psnr": statistics.fmean(values.values()), **values}


def block_mean(pictures: dict[str, Tensor], factor: int) -> dict[str, float]:
    """PSNR of every ``factor`` x ``factor`` block as its average colour, which is 3 floats."""
    flat = {
        kind: F.interpolate(F.avg_pool2d(to_float(images), factor), scale_factor=factor)
        for kind, images in pictures.items()
    }
    return psnr_by_kind(flat, pictures)


def pca(training: Tensor, pictures: dict[str, Tensor], factor: int, components: int) -> dict[str, float]:
    """PSNR of the best linear code of ``factor`` x ``factor`` blocks with as many floats, fitted on ``training``.

    Args:
        training: uint8 (N, 3, H, W) with sides that are multiples of ``factor``.
    """
    mean, basis = principal_components(training, factor, components)
    decoded = {}
    for kind, images in pictures.items():
        code = (to_blocks(to_float(images), factor) - mean) @ basis
        decoded[kind] = from_blocks(code @ basis.T + mean, images.shape, factor)
    return psnr_by_kind(decoded, pictures)


def principal_components(training: Tensor, factor: int, components: int) -> tuple[Tensor, Tensor]:
    """Mean (3 factor^2,) and principal axes (3 factor^2, components) of the pictures' blocks in [-1, 1].

    They are found by randomised subspace iteration on at most 8,000 blocks, which is exact enough (0.01 dB) and fits
    64 x 64 blocks of 12,288 numbers.

    Args:
        training: uint8 (N, 3, H, W) with sides that are multiples of ``factor``.
    """
    blocks = to_blocks(to_float(training), factor)  # (M, 3 factor^2)
    if len(blocks) > 8000:
        chosen = np.random.default_rng(0).choice(len(blocks), 8000, replace=False)
        blocks = blocks[torch.from_numpy(chosen)]
    mean = blocks.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rank = min(components, *blocks.shape)
        extra = min(rank + 16, *blocks.shape)
        _, _, basis = torch.svd_lowrank(blocks - mean, q=extra, niter=6)
    return mean, basis[:, :rank]


def to_blocks(pixels: Tensor, factor: int) -> Tensor:
    """(B, 3, H, W) to (B * H/factor * W/factor, 3 factor^2)."""
    return F.pixel_unshuffle(pixels, factor).permute(0, 2, 3, 1).flatten(0, 2)


def from_blocks(blocks: Tensor, shape: Sequence[int], factor: int) -> Tensor:
    """The inverse of `to_blocks` for pixels of ``shape``."""
    batch, _, height, width = shape
    grid = blocks.unflatten(0, (batch, height // factor, width // factor)).permute(0, 3, 1, 2)
    return F.pixel_shuffle(grid, factor)
