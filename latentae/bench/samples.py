"""The images that the report shows, kept as lossless files beside ``results.json``."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from latentae.bench.images import ImageSet
from latentae.bench.latents import latent_tiles

REPORT_PIXELS = 48_000_000  # a page with more than this opens slowly


class Samples:
    """Saves evenly chosen images, their reconstructions and latents under ``folder / "samples"``.

    ``rows`` is their list for ``results.json``: paths are relative to ``folder`` and never contain names of images or
    models. Without a folder nothing is saved.
    """

    def __init__(self, folder: Path | None, images: ImageSet, models: int, wanted: int):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        if folder is None:
            self.chosen = dict[str, int]()
            return
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        affordable = REPORT_PIXELS // (images.size**2 * (1 + models))
        count = min(wanted, max(1, affordable), len(images.items))
        indices = np.linspace(0, len(images.items) - 1, count).round().astype(int)
        self.chosen = {images.items[i].key: place for place, i in enumerate(indices)}

    def save(self, model: int, keys: list[str], originals: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        """Save those of a batch that were chosen: uint8 pairs (B, 3, H, W) and raw latents (B, C, ...)."""
        for i, key in enumerate(keys):
            if key not in self.chosen:
                continue
            stem = f"{self.chosen[key]:03d}"
            if model == 0:
                self.rows.append(
                    {"key": key, "input": self._write(f"{stem}-input", _as_image(originals[i])), "models": []}
                )
            row = next(row for row in self.rows if row["key"] == key)
            row["models"].append(
                {
                    "reconstruction": self._write(f"{stem}-model-{model}", _as_image(reconstructions[i])),
                    "latents": self._write(f"{stem}-model-{model}-latents", latent_tiles(latents[i])),
                }
            )

    def _write(self, name: str, image: np.ndarray) -> str:
        assert self.folder is not None
        path = Path("samples", f"{name}.png")
        Image.fromarray(image).save(self.folder / path)
        return path.as_posix()


def _as_image(pixels: Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
