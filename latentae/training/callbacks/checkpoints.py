"""Checkpoints that are whole or absent, and always one to continue from."""

import os
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from latentae.console import say
from latentae.errors import LatentAEError, RequestError
from latentae.files import atomic_write, remove_stale_temporaries
from latentae.weights import open_state_dict

FOLDER = "checkpoints"
LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, then renames it; opens one with ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            _write(checkpoint, stream)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return open_state_dict(path)


def _write(checkpoint: dict[str, Any], stream: BinaryIO) -> None:
    """torch.save, whose own error hides that the disk is full."""
    guarded: Any = _Guarded(stream)
    try:
        torch.save(checkpoint, guarded)
    except RuntimeError:
        if guarded.error:
            raise guarded.error from None
        raise


class _Guarded:
    """A stream that remembers why writing to it failed."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes ``checkpoints/last.ckpt`` in the run folder: regularly, at the end, on SIGTERM and on any other exception.

    ``last.ckpt`` is replaced only by a complete new one, so a full disk or a kill leaves the previous.

    Args:
        every_steps: steps between two checkpoints.
        keep_every: keep those whose step is a multiple of it as ``step-00010000.ckpt``; None keeps none.
        monitor: validated value of which the best checkpoint is kept as ``best.ckpt``; None keeps none.
        mode: whether the largest or the smallest is best.
    """

    def __init__(
        self,
        every_steps: int = 1000,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ):
        if every_steps < 1:
            raise RequestError(f"checkpoint.every_steps is {every_steps}; expected at least 1.")
        self.every_steps = every_steps
        self.keep_every = keep_every
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self._saved_at = -1  # samples seen by the run at the last save

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        remove_stale_temporaries(_folder(trainer))
        self._saved_at = pl_module.samples_seen

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every_steps == 0 and pl_module.window.batches == 0:
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * value > sign * self.best:
            self.best = value
            trainer.save_checkpoint(_folder(trainer) / "best.ckpt")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, OSError) or pl_module.mid_update or self._saved_at < 0:
            return  # nothing could be written, or nothing fit to be
        pl_module.use_weights()
        pl_module.restore_buffers()
        try:
            self._save_last(trainer, pl_module)
        except (OSError, RuntimeError, LatentAEError) as error:
            say(f"No checkpoint could be written at step {trainer.global_step}: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _save_last(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.samples_seen == self._saved_at:
            return
        last = _folder(trainer) / LAST
        trainer.save_checkpoint(last)
        self._saved_at = pl_module.samples_seen
        if self.keep_every and trainer.global_step % self.keep_every == 0 and trainer.is_global_zero:
            kept = last.with_name(f"step-{trainer.global_step:08d}.ckpt")
            kept.unlink(missing_ok=True)
            os.link(last, kept)  # last.ckpt is replaced, never rewritten, so the link keeps this one


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER
