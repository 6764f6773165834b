"""What every module in training does alike: seeded draws, windows of batches, skipped steps, averaging, the log.

Optimization is manual, since one step may move several networks and accumulates over batches itself. Everything random
is seeded by the images seen so far, which a checkpoint holds, so a resumed run repeats the losses of an uninterrupted
one.
"""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from latentae.errors import DataError, RequestError
from latentae.objectives import LossByTime
from latentae.training.ema import ModelEMA
from latentae.training.optimization import OptimizerFactory, Schedule, parameter_groups, set_training_modes
from latentae.training.window import Window

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class TrainingModule(pl.LightningModule):
    """A model in training: what its subclasses share.

    ``global_step`` counts optimizer steps of the first network. A checkpoint is a plain Lightning checkpoint that opens
    with ``torch.load(weights_only=True)`` and holds

    - ``latentae_ema``: the averaged weights of `model` as a whole state dict; absent without averaging;
    - ``state_dict``: the raw weights;
    - ``latentae_progress``: ``samples_seen`` of all ranks, ``skipped_steps``, ``ema_updates``.

    A subclass says what `model` and `networks` are, and its ``training_step`` begins with `begin_batch` and ends with
    `end_batch`.

    Args:
        ema: decay of the averaged weights; None for no averaging.
        optimizer: makes the optimizer of each network from its parameter groups.
        schedule: learning rate by step; constant by default.
        gradient_clip: largest norm of the gradient, of each network apart; None for no limit.
        accumulate: batches per optimizer step.
        max_skipped_steps: a loss or gradient that is not finite skips its step; so many in a row end the run.
        seed: of every random draw.
    """

    model_kind = "model"  # what `model` is called in errors

    def __init__(
        self,
        ema: float | None,
        optimizer: OptimizerFactory,
        schedule: Schedule | None,
        gradient_clip: float | None,
        accumulate: int,
        max_skipped_steps: int,
        seed: int,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.ema_decay = ema
        self.inherited_ema_updates = 0
        self.optimizer = optimizer
        self.schedule = schedule or Schedule()
        self.gradient_clip = gradient_clip
        self.accumulate = accumulate
        self.max_skipped_steps = max_skipped_steps
        self.seed = seed
        self.loss_by_time = LossByTime()
        self.window = Window()
        self.samples_seen = 0  # images of all ranks, up to the last step that ended
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.last_values: dict[str, Tensor] = {}  # of the last step
        self.ema: ModelEMA | None = None
        self.buffers_before: list[tuple[Tensor, Tensor]] = []
        self.mid_update = False  # some weights have moved and others have not: not a state to save
        self._resumed_ema: tuple[dict[str, Tensor], int] | None = None

    # What a subclass trains

    @property
    def model(self) -> nn.Module:
        """What is averaged and used after training."""
        raise NotImplementedError

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What has an optimizer of its own, by the name under which the norm of its gradient is logged."""
        return {"gradient_norm": self.model}

    def networks_of_step(self, values: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Those of `networks`, from the first on, that a step with these values moves."""
        return self.networks

    def after_step(self, values: dict[str, Tensor]) -> None:
        """What else moves at the end of a step that counts."""

    # One training step

    def begin_batch(self) -> None:
        """Seed the draws of a batch, and keep what its forward pass changes, in case its step does not count."""
        torch.manual_seed(self.draw_seed())
        if self.window.batches == 0:
            buffers = [buffer for network in self.networks.values() for buffer in network.buffers()]
            self.buffers_before = [(buffer, buffer.clone()) for buffer in buffers]

    def draw_seed(self) -> int:
        """The seed of every random draw in a batch: a function of the run's seed and of the images before it."""
        position = self.samples_seen + self.window.samples
        return (self.seed * 0x9E3779B97F4A7C15 + position) % 2**63  # an odd factor keeps the runs' seeds apart

    def end_batch(self, values: dict[str, Tensor], images: int) -> None:
        """Take in the values of a batch of so many images on this rank; its gradients are there already."""
        self.window.add(values, samples=images * self.trainer.world_size)
        if self.window.batches == self.accumulate:
            self.end_step(self.window.means())

    def end_step(self, values: dict[str, Tensor]) -> None:
        """Move the weights along the accumulated gradients, unless something in the step is not finite."""
        trained = self.networks_of_step(values)
        for name, network in trained.items():
            values[name] = clip_grad_norm_(network.parameters(), self.gradient_clip or float("inf"))

        broken = self.not_finite(values)
        self.mid_update = True
        if broken:
            self.restore_buffers()
        else:
            self.set_learning_rates()
            for optimizer in self.optimizers_of_networks[: len(trained)]:  # the first is counted as the global step
                optimizer.step()
            if self.ema:
                self.ema.update()
            self.after_step(values)
        for optimizer in self.optimizers_of_networks:
            optimizer.zero_grad()
        self.samples_seen += self.window.samples
        self.window = Window()
        self.buffers_before = []
        self.mid_update = False
        self.count_skipped(broken)
        self.log_values(values)

    def restore_buffers(self) -> None:
        """Back to the end of the last step that counted; a checkpoint in the midst of a step holds that state."""
        for buffer, before in self.buffers_before:
            buffer.copy_(before)

    @property
    def optimizers_of_networks(self) -> list[Any]:
        """Lightning's counted optimizer of the first network, and those of the others, which it must not count."""
        counted = self.optimizers()
        if not isinstance(counted, list):
            return [counted]
        return [counted[0], *self.trainer.optimizers[1:]]

    def set_learning_rates(self) -> None:
        factor = self.schedule.factor(self.global_step, self.trainer.max_steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def not_finite(self, values: dict[str, Tensor]) -> list[str]:
        """Names of the values that are NaN or infinite on any rank; one synchronisation with the device."""
        finite = torch.stack([value.detach().float() for value in values.values()]).isfinite().int()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return [name for name, good in zip(values, finite.tolist()) if not good]

    def count_skipped(self, broken: list[str]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if broken else 0
        self.skipped_steps += bool(broken)
        if self.skipped_in_a_row == self.max_skipped_steps:
            raise DataError(
                f"{self.max_skipped_steps} steps in a row were not finite in {', '.join(broken)} at step "
                f"{self.global_step}: lower the learning rate or the weight of that term; the weights are as before."
            )

    def log_values(self, values: dict[str, Tensor]) -> None:
        """Keep the values of this step for callbacks and, now and then, log them at its ``global_step``.

        Lightning's own log counts batches and would not know of accumulation and skipped steps.
        """
        self.last_values = values
        trainer: Any = self.trainer
        if self.global_step % trainer.log_every_n_steps == 0:
            logged = {f"train/{name}": float(value) for name, value in values.items()}
            logged["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
            logged["train/skipped_steps"] = self.skipped_steps
            logged |= self.loss_by_time.means("train/loss")
            self.log_dict(logged, logger=False)
            for logger in self.loggers:
                logger.log_metrics(logged, step=self.global_step)

    def optimizer_of(self, name: str) -> OptimizerFactory:
        """What makes the optimizer of the network of this name."""
        return self.optimizer

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = [self.optimizer_of(name)(parameter_groups(network)) for name, network in self.networks.items()]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        self._configured = [[_options(group) for group in optimizer.param_groups] for optimizer in optimizers]
        return optimizers

    # Validation, with averaged weights if there are any

    def on_validation_start(self) -> None:
        self._start_averaging()

    def on_validation_epoch_start(self) -> None:
        if self.ema:
            self.ema.use_average()

    def on_validation_epoch_end(self) -> None:
        self.use_weights()

    def use_weights(self) -> None:
        """Back to the raw weights, also when an exception ended a validation."""
        if self.ema:
            self.ema.use_weights()

    # Start and resume

    def on_fit_start(self) -> None:
        if self.trainer.precision not in PRECISIONS:
            raise RequestError(
                f"trainer.precision {self.trainer.precision} is not supported in training; choose one of "
                f"{', '.join(PRECISIONS)}."
            )
        if self.schedule.kind == "cosine" and self.trainer.max_steps < 0:
            raise RequestError("A cosine schedule ends at trainer.max_steps: set it.")
        self._start_averaging()

    def _start_averaging(self) -> None:
        if self.ema is None and self.ema_decay is not None:
            self.ema = ModelEMA(self.model, self.ema_decay, self.inherited_ema_updates)
            if self._resumed_ema:
                self.ema.load_state_dict(*self._resumed_ema)
                self._resumed_ema = None

    def on_train_start(self) -> None:
        set_training_modes(self.model)
        # A restored optimizer brings its old options along; those of the configuration count (--fork changes them).
        for optimizer, groups in zip(self.trainer.optimizers, self._configured):
            for group, options in zip(optimizer.param_groups, groups):
                group.update(options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = self.model.state_dict()
        if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise DataError(
                f"{broken[0]} and {len(broken) - 1} other tensors of the {self.model_kind} are not finite, so no "
                "checkpoint is written: continue from the last one with a lower learning rate."
            )
        checkpoint["latentae_progress"] = {
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "ema_updates": self.ema.updates if self.ema else 0,
        }
        if self.ema:
            checkpoint["latentae_ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["latentae_progress"]
        self.samples_seen = progress["samples_seen"]
        self.skipped_steps = progress["skipped_steps"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        if "latentae_ema" in checkpoint:
            self._resumed_ema = checkpoint["latentae_ema"], progress["ema_updates"]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
