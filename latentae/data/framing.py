"""Which part of an image is encoded, and at which size: crops, aspect-ratio buckets, several resolutions, or all of it.

The shape is decided from the header of an image alone, so that a data set can be planned before it is decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.data.transforms import adm_center_crop, as_picture, limit_aspect, to_tensor
from latentae.errors import RequestError
from latentae.nn.pixels import pad_to_multiple

NATIVE = "native"
CROPS = {
    "adm": "adm centre crop",
    "center": "bicubic to the shorter side, centre crop",
    "squash": "bicubic to a square, no crop",
    "buckets": "bicubic to cover the bucket of the nearest aspect ratio, centre crop",
}
STEPS = 16  # a bucket's sides are multiples of the size over this
BUCKET_SIDES = (0.5, 2.0)  # the shortest and the longest of a bucket, times the size

Crop = tuple[int, int, int, int]  # top, left, height and width of what was encoded, in the image's own pixels


@dataclass(frozen=True)
class Framing:
    """How images become pixels for an encoder.

    Args:
        sizes: sides of the crop in ascending order; of several, an image gets the largest for which it need not be
            enlarged, or else the smallest. None keeps whole images, padded to a multiple of ``multiple``.
        crop: ``adm`` (as evaluation does it), ``center`` (as torchvision's Resize and CenterCrop do), ``squash``, or
            ``buckets``: rectangles of about ``size * size`` pixels, of which an image gets that of its aspect ratio.
        multiple: the ratio of the autoencoder.

    Raises:
        RequestError: no such crop, or no sizes.
    """

    sizes: tuple[int, ...]
    crop: str = "adm"
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise RequestError(f"crop={self.crop!r}; expected one of {', '.join(CROPS)}.")
        if any(size < 1 for size in self.sizes):
            raise RequestError(f"size={min(self.sizes)}; expected at least 1.")
        if not self.sizes and self.crop != "adm":
            raise RequestError(f"crop={self.crop!r} needs a size; whole images (size 'native') are not cropped.")

    @property
    def fixed_shape(self) -> tuple[int, int] | None:
        """The shape of all images, None where they differ."""
        return (self.sizes[0],) * 2 if len(self.sizes) == 1 and self.crop != "buckets" else None

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Every shape that may occur, None of them for whole images."""
        if self.crop != "buckets":
            return [(size, size) for size in self.sizes]
        return list(chain.from_iterable(buckets(size, self.multiple) for size in self.sizes))

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """What an image of that size becomes: (height, width)."""
        if not self.sizes:
            return height + -height % self.multiple, width + -width % self.multiple
        for size in reversed(self.sizes):
            shape = (size, size)
            if self.crop == "buckets":
                shape = nearest_bucket(height, width, buckets(size, self.multiple))
            if size == self.sizes[0] or (shape[0] <= height and shape[1] <= width):
                break
        return shape

    def apply(self, image: np.ndarray | Image.Image, shape: Sequence[int]) -> tuple[Tensor, Crop]:
        """An image, uint8 (H, W, 3) or Pillow's, as uint8 (3, height, width) of its shape, and what it shows."""
        if not self.sizes:
            pixels = to_tensor(np.asarray(image))
            padded = pad_to_multiple(pixels.float(), self.multiple).to(torch.uint8)
            return padded, (0, 0, *pixels.shape[1:])
        picture = as_picture(image)
        width, height = picture.size
        if self.crop == "squash":
            resized = picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
            return to_tensor(np.asarray(resized)), (0, 0, height, width)
        if self.crop == "adm":
            side = min(height, width)
            square = adm_center_crop(picture, shape[0])
            return to_tensor(square), ((height - side) // 2, (width - side) // 2, side, side)
        return to_tensor(cover_crop(picture, shape[0], shape[1])), _covered(height, width, shape[0], shape[1])

    def describe(self) -> dict[str, Any]:
        """What of it the latents depend on, as JSON values."""
        size: Any = NATIVE if not self.sizes else self.sizes[0] if len(self.sizes) == 1 else list(self.sizes)
        return {"size": size, "crop": CROPS[self.crop] if self.sizes else "none, padded to a multiple of the ratio"}


@lru_cache
def buckets(size: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Shapes (height, width) of at most ``size * size`` pixels, from 1:4 to 4:1, the square among them.

    Sides are multiples of ``multiple`` of about a sixteenth of ``size``; of each width, the largest height.
    """
    step = multiple * max(1, round(size / STEPS / multiple))
    shortest, longest = (int(size * share) // step * step for share in BUCKET_SIDES)
    sides = [side for side in range(max(shortest, step), longest + 1, step)]
    shapes = {(size, size)}
    for side in sides:
        other = min(size * size // side // step * step, longest)
        if other >= max(shortest, step):
            shapes |= {(side, other), (other, side)}
    return tuple(sorted(shapes))


def nearest_bucket(height: int, width: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape of the nearest aspect ratio, the largest of several."""
    aspect = math.log(height / width)
    return min(shapes, key=lambda shape: (round(abs(math.log(shape[0] / shape[1]) - aspect), 9), -math.prod(shape)))


def cover_crop(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize by Pillow's bicubic filter, which averages when it reduces, to cover the shape, and cut the centre.

    For a square that is what torchvision's ``Resize`` and ``CenterCrop`` do to a Pillow image.

    Args:
        picture: RGB.

    Returns:
        uint8 (height, width, 3).
    """
    picture = limit_aspect(picture)
    if height == width:  # cut after resizing, as torchvision does
        wide, high = (int(height * side / min(picture.size)) for side in picture.size)
        down, right = round((high - height) / 2), round((wide - width) / 2)
        resized = picture.resize((wide, high), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((right, down, right + width, down + height)))
    top, left, part_height, part_width = _covered(picture.height, picture.width, height, width)
    box = (left, top, left + part_width, top + part_height)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _covered(image_height: int, image_width: int, height: int, width: int) -> Crop:
    """The largest part around the centre of an image that has the aspect ratio of a shape."""
    scale = min(image_height / height, image_width / width)
    part_height, part_width = min(round(height * scale), image_height), min(round(width * scale), image_width)
    part_height, part_width = max(part_height, 1), max(part_width, 1)
    return (image_height - part_height) // 2, (image_width - part_width) // 2, part_height, part_width
