"""The centre crops of the papers: they differ in the filter that resizes the shorter side, which moves every figure."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentae.data.transforms import adm_center_crop, to_tensor

Crop = Callable[[np.ndarray, int], np.ndarray]


def pillow_center_crop(image: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """Resize the shorter side to ``size`` with a filter of Pillow, then cut the centre, as torchvision does both.

    Args:
        image: uint8 (height, width, 3).

    Returns:
        uint8 (size, size, 3).
    """
    height, width = _resized(image, size)
    return _centre(np.asarray(Image.fromarray(image).resize((width, height), resample)), size)


def bicubic_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """`pillow_center_crop` with the bicubic filter."""
    return pillow_center_crop(image, size, Image.Resampling.BICUBIC)


def lanczos_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """`pillow_center_crop` with Lanczos' filter."""
    return pillow_center_crop(image, size, Image.Resampling.LANCZOS)


def tensor_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """torchvision's Resize of a float tensor (bilinear, antialiased, its default since 0.17), then the centre.

    Args and returns as `pillow_center_crop`; rounded to uint8 after the resize.
    """
    return _interpolated(image, size, antialias=True)


def linear_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """OpenCV's INTER_LINEAR, which does not antialias, as albumentations' SmallestMaxSize has it; then the centre.

    Args and returns as `pillow_center_crop`.
    """
    return _interpolated(image, size, antialias=False)


def _interpolated(image: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    pixels: Tensor = to_tensor(image)[None].float()  # (1, 3, H, W)
    shape = _resized(image, size)
    pixels = F.interpolate(pixels, shape, mode="bilinear", align_corners=False, antialias=antialias)
    return _centre((pixels[0] + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy(), size)


def _resized(image: np.ndarray, size: int) -> tuple[int, int]:
    """Height and width when the shorter side has become ``size``; the longer one is cut to whole pixels."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return size * height // shorter, size * width // shorter


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])


CROPS: dict[str, tuple[Crop, str]] = {
    "adm": (adm_center_crop, "ADM centre crop in Pillow: box halvings, then bicubic, then the centre"),
    "bicubic": (bicubic_center_crop, "shorter side by Pillow's bicubic filter, then the centre"),
    "lanczos": (lanczos_center_crop, "shorter side by Pillow's Lanczos filter, then the centre"),
    "tensor": (
        tensor_center_crop,
        "shorter side by torchvision's antialiased bilinear Resize of a float tensor, "
        "rounded to uint8, then the centre",
    ),
    "linear": (
        linear_center_crop,
        "shorter side by bilinear interpolation without antialiasing (OpenCV's INTER_LINEAR), then the centre",
    ),
}
