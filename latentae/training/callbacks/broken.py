"""How many images or clips of a run could not be decoded, over all the processes that read for it."""

from typing import Any

import pytorch_lightning as pl

from latentae.console import say

BROKEN_IMAGES = "data/broken_images"


class BrokenImages(pl.Callback):
    """Counts the broken images, or the broken and too short clips, that training has met since it was started, and
    stops it where they are too many.

    Each process that reads knows its own; batches tell which images theirs stand in for, so the count is of all
    processes of a rank. It is logged as ``data/broken_images`` once there are any.
    """

    def __init__(self) -> None:
        self.met: set[int] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        new = {int(index) for indices in batch.get("stands_in_for", ()) for index in indices.split()} - self.met
        if new:
            self.met |= new
            dataset: Any = trainer.train_dataloader.dataset  # type: ignore[union-attr]
            dataset.refuse_too_many(len(self.met), max(new))
        if self.met:
            pl_module.log(BROKEN_IMAGES, float(len(self.met)), batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.met and trainer.is_global_zero:
            dataset: Any = trainer.train_dataloader.dataset  # type: ignore[union-attr]
            how = "broken or too short" if dataset.noun == "clips" else "broken"
            what = f"{len(self.met)} of {len(dataset)} {dataset.noun} are {how}"
            say(f"{what} and were replaced by others; each was named above.")
