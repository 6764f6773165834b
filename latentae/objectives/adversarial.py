"""The adversary: a discriminator, its loss, and when it acts.

Both losses are computed on the reconstruction of one and the same forward pass; the discriminator sees it detached.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from latentae.nn.precision import widen
from latentae.objectives.discriminators import Discriminator


class Adversary(nn.Module):
    """A discriminator with a schedule, and the two sides of its game.

    Losses, for logits r of real and f of reconstructed pixels, averaged over the batch and the map:

    ============== ============= ========================================
    ``loss``       generator     discriminator
    ============== ============= ========================================
    hinge          -f            ½ max(0, 1 - r) + ½ max(0, 1 + f)
    vanilla        -f            ½ softplus(-r) + ½ softplus(f)
    non_saturating softplus(-f)  ½ softplus(-r) + ½ softplus(f)
    ============== ============= ========================================

    The weight is a constant by default, which LiteVAE, Open-MAGVIT2 and TiTok found as good as LDM's adaptive one.

    Args:
        discriminator: the network.
        weight: factor of the generator's loss once the ramp is over.
        loss: a row of the table.
        start_step: generator step from which the generator's loss counts.
        ramp_steps: steps over which the weight grows linearly from 0 after that.
        warmup_steps: steps before ``start_step`` in which the discriminator already trains.
        optimizer: the discriminator's own optimizer; by default the generator's class and settings.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.1,
        loss: Literal["hinge", "non_saturating", "vanilla"] = "hinge",
        start_step: int = 0,
        ramp_steps: int = 0,
        warmup_steps: int = 0,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
    ):
        super().__init__()
        self.discriminator = discriminator
        self.weight = weight
        self.loss = loss
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.warmup_steps = warmup_steps
        self.optimizer = optimizer

    def weight_at(self, step: int) -> float:
        """The factor of the generator's loss at a generator step; 0 before ``start_step``."""
        if step < self.start_step:
            return 0.0
        return self.weight * min(1.0, (step - self.start_step + 1) / (self.ramp_steps + 1))

    def trains_at(self, step: int) -> bool:
        """Whether the discriminator learns at a generator step."""
        return step >= self.start_step - self.warmup_steps

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """How far the discriminator is from taking (B, 3, H, W) for real; no gradient reaches the discriminator."""
        with _frozen(self.discriminator):
            fake = widen(self.discriminator(reconstruction))
            return F.softplus(-fake).mean() if self.loss == "non_saturating" else -fake.mean()

    def discriminator_loss(self, target: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How badly the two are told apart, and the mean logits; no gradient reaches the reconstruction."""
        real = widen(self.discriminator(target))
        fake = widen(self.discriminator(reconstruction.detach()))
        if self.loss == "hinge":
            value = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        else:
            value = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        return value, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of ``module`` asks for gradients while a graph is built through it."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
