"""A folder of reconstructions that something else made, measured like a model: its images beside their originals."""

from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentae.bench.images import Batch, ImageSet
from latentae.data.decode import BadImage, decode_image, probe_size
from latentae.data.sources import FolderSource, Item
from latentae.data.transforms import to_tensor
from latentae.files import sha256_json
from latentae.nn.pixels import to_float

MODEL_FILES = ("config.json", "model_index.json", "checkpoints")


class ReconstructionFolder:
    """Reconstructions by the names of their originals; another extension (``a.png`` for ``a.jpg``) will do.

    An image of the size of the crop is taken as it is, one of the size of its original is cropped like it.

    Args:
        path: the folder.
    """

    device: ClassVar[torch.device] = torch.device("cpu")
    samples: ClassVar[bool] = False

    def __init__(self, path: Path):
        self.path, self.source = path, FolderSource(path)
        self.items = {item.key: item for item in self.source.items()}
        self.by_stem: dict[str, list[Item]] = {}
        for item in self.items.values():
            self.by_stem.setdefault(_stem(item.key), []).append(item)

    @property
    def identity(self) -> str:
        """A hash of the names and sizes of its files."""
        return sha256_json([[item.key, item.size] for item in self.items.values()])

    def read(self, batch: Batch, images: ImageSet) -> tuple[Tensor, dict[int, str], dict[int, str]]:
        """Float pixels (B, 3, size, size) of the reconstructions of a batch, NaN where there is none to measure.

        Returns:
            The pixels; by the place of each of the latter why; by place the size of those that were resized.
        """
        pixels = torch.full(batch.pixels.shape, torch.nan)
        reasons: dict[int, str] = {}
        resized: dict[int, str] = {}
        for i, place in enumerate(batch.places):
            found = self._read(images.items[place], images)
            if isinstance(found, str):
                reasons[place] = found
                continue
            height, width = found.shape[:2]
            if (height, width) != (images.size, images.size):
                resized[place] = f"{width}x{height}"
                found = images.crop(found, images.size)
            pixels[i] = to_float(to_tensor(found))
        return pixels, reasons, resized

    def _read(self, original: Item, images: ImageSet) -> np.ndarray | str:
        """The reconstruction, of the size of the crop or of the original; or why there is none."""
        candidates = [self.items[original.key]] if original.key in self.items else self.by_stem.get(_stem(original.key))
        if not candidates:
            return f"there is no image of that name in {self.path}"
        if len(candidates) > 1:
            return f"several images of {self.path} could be it: {', '.join(item.key for item in candidates)}"
        try:
            image = decode_image(self.source.read(candidates[0]))
        except BadImage as error:
            return f"its reconstruction cannot be decoded: {error.explanation.rstrip('.')}"
        height, width = image.shape[:2]
        if (height, width) == (images.size, images.size):
            return image
        size = probe_size(images.source.read(original))
        if (height, width) == size:
            return image
        return (
            f"its reconstruction is {width}x{height} px; expected {images.size}x{images.size}, or the original's "
            f"{size[1]}x{size[0]}"
        )


def warn_of_resizing(sizes: dict[int, str], size: int) -> str:
    """What readers must know of reconstructions of these sizes that were cropped like their originals."""
    several = " and other sizes" if len(set(sizes.values())) > 1 else ""
    return (
        f"{len(sizes)} reconstructions of {sizes[min(sizes)]} px{several} were cropped and resized to {size} px with "
        "their originals, which hides errors: compare only with models that decoded at full size."
    )


def reconstruction_folder(name: str | Path) -> ReconstructionFolder | None:
    """The folder of images at a path; None if there is a model, or nothing."""
    path = Path(name)
    if not path.is_dir() or any((path / file).exists() for file in MODEL_FILES):
        return None
    folder = ReconstructionFolder(path)
    return folder if folder.items else None  # whoever opens models says what is missing


def describe_folder(folder: ReconstructionFolder) -> dict[str, Any]:
    """As `latentae.bench.contestants.describe`."""
    unknown = dict.fromkeys(("weights_sha256", "spatial_ratio", "latent_channels", "floats_per_pixel", "decoding"))
    nothing: dict[str, Any] = {key: {} for key in ("normalisation", "parameters", "gmac")}
    what = {"class": "given", "files_sha256": folder.identity, "dtype": "uint8", "device": "cpu", "temporal_ratio": 1}
    return {**what, **unknown, **nothing}


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))
