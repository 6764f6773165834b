"""What a stage trains and how fast: parameters chosen by name, weight decay groups, learning rate schedules."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from latentae.errors import RequestError

OptimizerFactory = Callable[[Iterable], Optimizer]


def adamw(parameters: Iterable) -> Optimizer:
    """The default optimizer: DC-AE's for its first phase, without weight decay."""
    return AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a factor of the configured one, by generator step.

    Args:
        warmup_steps: linear growth from ``1 / (warmup_steps + 1)`` to 1 over as many steps.
        kind: what follows; ``cosine`` falls to ``final`` at ``trainer.max_steps``, ``step`` falls at ``milestones``.
        final: last factor of the cosine.
        milestones: steps from which on a ``step`` schedule is ``decay`` times what it was.
        decay: that factor.
    """

    warmup_steps: int = 0
    kind: Literal["constant", "cosine", "step"] = "constant"
    final: float = 0.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1

    def factor(self, step: int, max_steps: int) -> float:
        """The factor at ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            return self.decay ** sum(step >= milestone for milestone in self.milestones)
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


def select_trainable(model: nn.Module, prefixes: list[str] | None) -> None:
    """Freeze every parameter whose dotted name does not start with one of ``prefixes``; None trains all.

    Raises:
        RequestError: a prefix names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = names if prefixes is None else [n for n in names if any(_starts_with(n, prefix) for prefix in prefixes)]
    for prefix in prefixes or []:
        if not any(_starts_with(name, prefix) for name in names):
            modules = [name for name, _ in model.named_modules() if name]
            near = get_close_matches(prefix, modules, n=1)
            raise RequestError(
                f"model.trainable names {prefix!r}, which {type(model).__name__} has no parameter of"
                + (f"; did you mean {near[0]}?" if near else ".")
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(chosen))


def _starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def set_training_modes(module: nn.Module, inherited: bool = True) -> None:
    """Training mode where something trains, eval mode where nothing does: frozen BatchNorm must not drift.

    What has no parameters, such as dropout, does as the module around it.
    """
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else inherited
    for child in module.children():
        set_training_modes(child, module.training)


def last_layer(decoder: nn.Module) -> nn.Parameter:
    """The weight of a decoder's last layer: of its parameters the last that is not one-dimensional."""
    return [p for p in decoder.parameters() if p.ndim > 1][-1]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two optimizer groups; norms and biases, all that is one-dimensional, are undecayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
