"""The images, or frames of clips, that the report shows, kept as lossless files beside ``results.json``."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from latentae.bench.images import ImageSet
from latentae.bench.latents import latent_tiles
from latentae.bench.pairs import Pair

REPORT_PIXELS = 48_000_000  # a page with more than this opens slowly


class Samples:
    """Saves some images, their reconstructions and latents under ``folder / "samples"``.

    Half of them are chosen evenly, the others are the worst of the first model. All are, where that is every image.
    A clip shows its first, middle and last frame.

    Names of files follow from the places of images and models alone: several processes can save, and a killed one
    leaves what the next needs. Without a folder nothing is saved.
    """

    def __init__(self, folder: Path | None, images: ImageSet, models: int, wanted: int):
        self.folder, self.length = folder, images.frames
        self.frames = sorted({0, images.frames // 2, images.frames - 1}) if images.frames else [None]
        if folder is None:
            self.chosen = dict[str, int]()
            return
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        affordable = REPORT_PIXELS // (images.size**2 * (1 + models) * len(self.frames))
        self.count = min(wanted, max(1, affordable), len(images.items))
        count = self.count if self.count == len(images.items) else (self.count + 1) // 2
        indices = np.linspace(0, len(images.items) - 1, count).round().astype(int)
        self.chosen = {images.items[i].key: place for place, i in enumerate(indices)}

    def choose_worst(self, figures: list[dict[str, Any]]) -> list[str]:
        """Choose the images with the lowest PSNR beside the others, and give their keys.

        Args:
            figures: of each image by the first model, as in ``results.json``.
        """
        if self.folder is None:
            return []
        rows = [row for row in figures if row.get("psnr") is not None and row["key"] not in self.chosen]
        rows = sorted(rows, key=lambda row: (row["psnr"], row["key"]))[: self.count - len(self.chosen)]
        worst = [row["key"] for row in rows]
        self.chosen |= {key: len(self.chosen) + place for place, key in enumerate(worst)}
        return worst

    def save(self, model: int, keys: list[str], pair: Pair, latents: Tensor | None) -> None:
        """Save those of a batch that were chosen: their uint8 pairs and raw latents (B, C, ...), if there are any."""
        reconstructions, originals = pair.uint8
        for i, key in enumerate(keys):
            if key not in self.chosen:
                continue
            for frame in self.frames:
                files = self._files(key, model, frame)
                if model == 0:
                    self._write(self._input(key, frame), _as_image(originals[i], frame))
                self._write(files["reconstruction"], _as_image(reconstructions[i], frame))
                tiles = np.zeros((1, 1, 2), np.uint8)
                if latents is not None:
                    tiles = latent_tiles(latents[i] if frame is None else self._latent_frame(latents[i], frame))
                self._write(files["latents"], tiles)

    def rows(self, models: int, bad: Collection[str] = ()) -> list[dict[str, Any]]:
        """What was saved, for ``results.json``: paths are relative to the folder, never with names of images or models.

        Args:
            models: how many were measured.
            bad: keys of images that could not be decoded.
        """
        return [
            {
                "key": key,
                **({} if frame is None else {"frame": frame}),
                "input": self._input(key, frame),
                "models": [self._files(key, model, frame) for model in range(models)],
            }
            for key in self.chosen
            if key not in bad
            for frame in self.frames
        ]

    def _latent_frame(self, latents: Tensor, frame: int) -> Tensor:
        """Latents (C, t, h, w) to those at about the time of a frame, (C, h, w)."""
        assert self.length is not None
        return latents[:, round(frame * (latents.shape[1] - 1) / max(self.length - 1, 1))]

    def _stem(self, key: str, frame: int | None) -> str:
        return f"samples/{self.chosen[key]:03d}" + ("" if frame is None else f"-frame-{frame}")

    def _input(self, key: str, frame: int | None) -> str:
        return f"{self._stem(key, frame)}-input.png"

    def _files(self, key: str, model: int, frame: int | None) -> dict[str, str]:
        stem = f"{self._stem(key, frame)}-model-{model}"
        return {"reconstruction": f"{stem}.png", "latents": f"{stem}-latents.png"}

    def _write(self, path: str, image: np.ndarray) -> None:
        assert self.folder is not None
        Image.fromarray(image).save(self.folder / path)


def _as_image(pixels: Tensor, frame: int | None) -> np.ndarray:
    pixels = pixels if frame is None else pixels[:, frame]
    return pixels.permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
