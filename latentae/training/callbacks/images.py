"""Pictures of held-out images as training goes on."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from latentae.data.visual import panel

FOLDER = "samples"


class ReconstructionImages(pl.Callback):
    """At every validation, draws the first held-out images: input, reconstruction, error ×8, latent channels.

    They are the same images each time. The picture is ``samples/step-00001000.png`` in the run folder and
    ``reconstructions`` in TensorBoard.

    Args:
        count: images drawn; 0 draws none.
    """

    def __init__(self, count: int = 8):
        self.count = count
        self._rows: list[dict[str, Tensor]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rows = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        missing = self.count - sum(len(rows["pixels"]) for rows in self._rows)
        if missing > 0:
            self._rows.append({name: value[:missing].cpu() for name, value in outputs.items()})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._rows or trainer.sanity_checking or not trainer.is_global_zero:
            return
        names = ("pixels", "reconstruction", "latents")
        picture = panel(*(torch.cat([rows[name] for rows in self._rows]) for name in names))
        path = Path(trainer.default_root_dir) / FOLDER / f"step-{trainer.global_step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("reconstructions", picture, trainer.global_step, dataformats="HWC")
