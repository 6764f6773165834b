"""SIGTERM in a run of several ranks."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import distributed


class Termination(pl.Callback):
    """Ends all ranks after the same step when any of them receives SIGTERM.

    Lightning's own handler starts a broadcast wherever the signal meets a rank, and ranks can wait for one another
    ever after.
    """

    def __init__(self) -> None:
        self.received = False

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self.receive

    def receive(self, *_: Any) -> None:
        self.received = True

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.world_size == 1:
            return
        received = torch.tensor(int(self.received), device=trainer.strategy.root_device)
        distributed.all_reduce(received, distributed.ReduceOp.MAX)
        if received:
            raise SIGTERMException
