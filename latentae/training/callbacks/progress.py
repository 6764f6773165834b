"""How far training is, how fast, and with which losses."""

import time
from typing import Any

import pytorch_lightning as pl

from latentae.console import Progress
from latentae.training.callbacks.broken import BROKEN_IMAGES

REFRESH_SECONDS = 0.5  # reading a loss waits for the device


class TrainingProgress(pl.callbacks.ProgressBar):
    """A progress bar with losses and images or clips per second on a terminal, a line every 30 s elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None

    def disable(self) -> None:
        """For the ranks that print nothing; Lightning calls it."""
        self._silent = True

    _silent = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._silent:
            return
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._bar = Progress("training", total, "steps", done=trainer.global_step).__enter__()
        self._started, self._samples = time.monotonic(), pl_module.samples_seen
        self._refreshed, self._figures = 0.0, dict[str, float | str]()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self._bar is None or pl_module.window.batches:
            return
        now = time.monotonic()
        if now - self._refreshed > REFRESH_SECONDS:
            self._refreshed = now
            rate = (pl_module.samples_seen - self._samples) / (now - self._started)
            losses = {name: float(value) for name, value in pl_module.last_values.items()}
            noun = getattr(trainer.train_dataloader.dataset, "noun", "images")  # type: ignore[union-attr]
            self._figures = {f"{noun}/s": rate, **losses}
            if (broken := trainer.callback_metrics.get(BROKEN_IMAGES)) is not None:
                self._figures["broken"] = str(int(broken))
        self._bar.advance(trainer.global_step - self._bar.done, **self._figures)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None
