"""Crops, in Pillow: the centre crop of evaluation, which papers share, and the random crop of training."""

import numpy as np
import torch
from PIL import Image

# A picture longer than this many times its width is first cut around its centre, so that enlarging its short side
# takes bounded memory.
LONGEST_ASPECT = 32


def adm_center_crop(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """The centre crop of ADM (Dhariwal and Nichol 2021, arXiv 2105.05233), on which ImageNet figures are computed.

    Halve with a box filter while the shorter side is at least ``2 * size``, resize it to ``size`` with Pillow's
    bicubic filter, and cut the centre. Bit for bit that of its authors, but for pictures longer than 32 times their
    width.

    Args:
        image: uint8 (height, width, 3), or an RGB image of Pillow.

    Returns:
        uint8 (size, size, 3).
    """
    picture = limit_aspect(as_picture(image))
    while min(picture.size) >= 2 * size:
        picture = _halved(picture)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.array(picture.crop((left, top, left + size, top + size)))


def _halved(picture: Image.Image) -> Image.Image:
    """Pillow's ``resize`` by its box filter, bit for bit."""
    if picture.width % 2 == picture.height % 2 == 0:
        return picture.reduce((2, 1)).reduce((1, 2))  # faster by half; rounds after each direction, as resize does
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)


def random_resized_crop_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of the picture at ``size``, mirrored half of the time: the augmentation of training.

    The side of the square is log-uniform between ``size`` (the picture at its own resolution) and the whole shorter
    side, so that fine detail and whole views both occur; the aspect ratio is kept. Smaller pictures are enlarged.
    Takes exactly four numbers from ``rng``.

    Args:
        image: uint8 (height, width, 3).

    Returns:
        uint8 (size, size, 3).
    """
    height, width, _ = image.shape
    zoom, down, right, mirror = rng.random(4)
    shorter = min(height, width)
    side = round(size * (shorter / size) ** zoom) if shorter > size else shorter
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    square = image[top : top + side, left : left + side]
    if side != size:
        picture = Image.fromarray(np.ascontiguousarray(square))
        square = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))
    return np.ascontiguousarray(square[:, ::-1] if mirror < 0.5 else square)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (height, width, 3) to a uint8 tensor (3, height, width) with memory of its own."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def as_picture(image: np.ndarray | Image.Image) -> Image.Image:
    """uint8 (height, width, 3) as an image of Pillow."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def limit_aspect(picture: Image.Image) -> Image.Image:
    """Cut as much from both ends of a very long picture."""
    width, height = picture.size
    down = max(0, (height - LONGEST_ASPECT * width) // 2)
    right = max(0, (width - LONGEST_ASPECT * height) // 2)
    return picture.crop((right, down, width - right, height - down)) if down or right else picture
