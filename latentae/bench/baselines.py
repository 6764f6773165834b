"""Two trivial codes that every autoencoder should beat, measured on the same photos by the same uint8 protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentae.data.transforms import to_tensor
from latentae.errors import RequestError
from latentae.metrics.image import psnr


@dataclass(frozen=True)
class Baseline:
    """A code, its mean PSNR in dB over the images, and the reconstructions, uint8 (H, W, 3)."""

    name: str
    psnr: float
    reconstructions: list[np.ndarray]

    def row(self) -> dict[str, Any]:
        """Its line in the tables of results and reports."""
        return {"name": self.name, "psnr": self.psnr}


def block_mean_baseline(images: Sequence[np.ndarray], factor: int = 8) -> Baseline:
    """Every ``factor`` x ``factor`` block becomes its average colour.

    Args:
        images: uint8 (H, W, 3).
    """

    def flatten(patches: np.ndarray) -> np.ndarray:
        colours = patches.reshape(len(patches), factor * factor, 3)
        return np.broadcast_to(colours.mean(1, keepdims=True), colours.shape).reshape(patches.shape)

    return _measure(f"block mean {factor} × {factor}", images, factor, flatten)


def pca_baseline(
    train_images: Sequence[np.ndarray], test_images: Sequence[np.ndarray], patch: int = 8, components: int = 16
) -> Baseline:
    """The best linear code of ``patch`` x ``patch`` blocks with ``components`` numbers each, fitted on other images.

    Principal component analysis: an autoencoder of compression ``patch`` and as many latent channels that is worse
    has learned less than a linear one.

    Args:
        train_images, test_images: uint8 (H, W, 3) of any size.

    Raises:
        RequestError: there are fewer training patches than components.
    """
    patches = np.concatenate([_to_patches(image, patch) for image in train_images])  # (N, 3 patch^2)
    if len(patches) <= components:
        raise RequestError(f"{len(patches)} training patches cannot give {components} components: use more images.")
    mean = patches.mean(0)
    _, vectors = np.linalg.eigh(np.cov(patches.T))  # ascending
    basis = vectors[:, -components:]  # (3 patch^2, components)
    name = f"PCA {patch} × {patch}, {components} components"
    return _measure(name, test_images, patch, lambda patches: (patches - mean) @ basis @ basis.T + mean)


def _measure(name: str, images: Sequence[np.ndarray], patch: int, code: Any) -> Baseline:
    reconstructions = [_from_patches(code(_to_patches(image, patch)), image.shape, patch) for image in images]
    values = [psnr(to_tensor(a)[None], to_tensor(b)[None]).item() for a, b in zip(reconstructions, images)]
    return Baseline(name, float(np.mean(values)), reconstructions)


def _to_patches(image: np.ndarray, patch: int) -> np.ndarray:
    """Disjoint patches, float64 (N, patch * patch * 3); the bottom and the right are replicated to a multiple."""
    height, width, _ = image.shape
    image = np.pad(image, ((0, -height % patch), (0, -width % patch), (0, 0)), mode="edge").astype(np.float64)
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    return image.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(rows * columns, -1)


def _from_patches(patches: np.ndarray, shape: tuple[int, ...], patch: int) -> np.ndarray:
    rows, columns = -(-shape[0] // patch), -(-shape[1] // patch)
    image = patches.reshape(rows, columns, patch, patch, 3).swapaxes(1, 2)  # (rows, patch, columns, patch, 3)
    image = image.reshape(rows * patch, columns * patch, 3)[: shape[0], : shape[1]]
    return np.floor(image.clip(0, 255) + 0.5).astype(np.uint8)
