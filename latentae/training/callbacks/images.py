"""Pictures of held-out images as training goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from latentae.data.visual import clip_panel, film, grid, panel
from latentae.errors import RequestError

FOLDER = "samples"


class ReconstructionImages(pl.Callback):
    """At every validation, draws the first held-out images: input, reconstruction, error ×8, latent channels.

    Of clips it draws three rows of frames: input, reconstruction, error. They are the same images each time. The
    picture is ``samples/step-00001000.png`` in the run folder and ``reconstructions`` in TensorBoard and Weights &
    Biases; where several sizes are validated there is one of each, with ``@SIZE`` in the name.

    Args:
        count: images or clips drawn; 0 draws none.
    """

    def __init__(self, count: int = 8):
        self.count = count
        self._rows: dict[int, list[dict[str, Tensor]]] = {}  # by size

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rows = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        rows = self._rows.setdefault(outputs["pixels"].shape[-1], [])
        missing = self.count - sum(len(row["pixels"]) for row in rows)
        if missing > 0:
            rows.append({name: value[:missing].cpu() for name, value in outputs.items()})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for size, rows in self._rows.items():
            if rows:
                self._draw(rows, f"@{size}" if len(self._rows) > 1 else "", trainer)

    def _draw(self, rows: list[dict[str, Tensor]], suffix: str, trainer: pl.Trainer) -> None:
        pixels, made, latents = (
            torch.cat([row[name] for row in rows]) for name in ("pixels", "reconstruction", "latents")
        )
        picture = clip_panel(pixels, made) if pixels.ndim == 5 else panel(pixels, made, latents)
        save_picture(picture, "reconstructions", suffix, trainer)


class SampleImages(pl.Callback):
    """At every validation, draws and decodes samples of a latent diffusion from the same noise, with averaged weights.

    The picture is ``samples/step-00001000.png`` in the run folder and ``samples`` in TensorBoard and Weights & Biases;
    of clips it has a row of frames of each. There is none without ``model.codec``.

    Args:
        count: samples, over all classes evenly; 0 draws none.
        steps: Euler's, of each.
        guidance_scale: of classifier-free guidance; 1 for none.
    """

    def __init__(self, count: int = 8, steps: int = 20, guidance_scale: float = 1.0):
        if steps < 1:
            raise RequestError(f"images.steps is {steps}; expected at least 1.")
        self.count, self.steps, self.guidance_scale = count, steps, guidance_scale

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self.count < 1:
            return
        images = pl_module.draw_images(self.count, self.steps, self.guidance_scale)
        if images is not None:
            picture = grid(images) if images.ndim == 4 else film(images)
            save_picture(picture, "samples", "", trainer)


def save_picture(picture: np.ndarray, name: str, suffix: str, trainer: pl.Trainer) -> None:
    """Write a picture (H, W, 3) into the run folder and give it to the loggers."""
    path = Path(trainer.default_root_dir) / FOLDER / f"step-{trainer.global_step:08d}{suffix}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(f"{name}{suffix}", picture, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(f"{name}{suffix}", [picture], trainer.global_step)
