"""The adversary: a discriminator, its loss, what keeps it in check, and when it acts.

Both losses are computed on the reconstruction of one and the same forward pass; the discriminator sees it detached.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from latentae.errors import RequestError
from latentae.nn.pixels import frames_of
from latentae.nn.precision import widen
from latentae.objectives.discriminators import Discriminator

LECAM_DECAY = 0.999
ADAPTIVE_MAXIMUM = 1e4


class Adversary(nn.Module):
    """A discriminator with a schedule, and the two sides of its game.

    Losses, for logits r of real and f of reconstructed pixels, averaged over the batch and the map, and over the
    outputs of a discriminator that has several:

    ============== ============= ========================================
    ``loss``       generator     discriminator
    ============== ============= ========================================
    hinge          -f            ½ max(0, 1 - r) + ½ max(0, 1 + f)
    vanilla        -f            ½ softplus(-r) + ½ softplus(f)
    non_saturating softplus(-f)  ½ softplus(-r) + ½ softplus(f)
    ============== ============= ========================================

    The weight is a constant by default, which LiteVAE, Open-MAGVIT2 and TiTok found as good as LDM's adaptive one. The
    default weights suit a mean-reduced L1 of weight 1 without LPIPS: on 200 photos, 300 steps with them left held-out
    PSNR where it was; without LeCam the discriminator won (loss down to 0.05), with weight 0.1 PSNR fell by 2 dB.
    Published weights, beside LPIPS of weight 0.1 to 1: 0.01 (TiTok) to 0.1 (Open-MAGVIT2).

    The running means of LeCam and the count of clamped adaptive weights are buffers: checkpoints hold them.

    Args:
        discriminator: the network.
        weight: factor of the generator's loss once the ramp is over.
        loss: a row of the table.
        start_step: generator step from which the generator's loss counts.
        ramp_steps: steps over which the weight grows linearly from 0 after that.
        warmup_steps: steps before ``start_step`` in which the discriminator already trains.
        optimizer: the discriminator's own optimizer; by default the generator's class and settings.
        adaptive: multiply the weight by LDM's ratio of gradient norms, see `balance`.
        lecam: weight of LeCam regularisation (Tseng et al., 2021, arXiv 2104.03310): the mean of
            max(0, r - F)² + max(0, R - f)², for running means R and F of the logits of real and reconstructed pixels
            (decay 0.999, from 0). As in the authors' code it is taken logit by logit, so that it adds up over batches;
            TiTok's form, of the batch's mean logits, is weaker. Published weights: 0.001 (TiTok) to 0.05
            (Open-MAGVIT2).
        r1: weight γ of the gradient penalty on real pixels (Mescheder et al., 2018, arXiv 1801.04406), γ/2 times the
            squared gradient of an image's summed logits. It is divided by the number of logits of an image, which
            makes γ independent of the image's size, and is the paper's where that number is one.
        r1_every: the penalty is computed at every so many steps only, and counts as many times there (StyleGAN2).
    """

    running_logits: Tensor
    clamped_steps: Tensor

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.02,
        loss: Literal["hinge", "non_saturating", "vanilla"] = "hinge",
        start_step: int = 0,
        ramp_steps: int = 0,
        warmup_steps: int = 0,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        adaptive: bool = False,
        lecam: float = 0.05,
        r1: float = 0.0,
        r1_every: int = 16,
    ):
        super().__init__()
        self.discriminator = discriminator
        self.weight = weight
        self.loss = loss
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.warmup_steps = warmup_steps
        self.optimizer = optimizer
        self.adaptive = adaptive
        self.lecam = lecam
        self.r1 = r1
        self.r1_every = r1_every
        self.register_buffer("running_logits", torch.zeros(2, len(discriminator.outputs)))  # of real, of fake pixels
        self.register_buffer("clamped_steps", torch.zeros(()))

    def weight_at(self, step: int) -> float:
        """The factor of the generator's loss at a generator step; 0 before ``start_step``."""
        if step < self.start_step:
            return 0.0
        return self.weight * min(1.0, (step - self.start_step + 1) / (self.ramp_steps + 1))

    def trains_at(self, step: int) -> bool:
        """Whether the discriminator learns at a generator step."""
        return step >= self.start_step - self.warmup_steps

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """How far the discriminator is from taking pixels (B, 3, H, W) or (B, 3, T, H, W) for real; no gradient reaches
        the discriminator."""
        with _frozen(self.discriminator):
            fakes = self._logits(reconstruction)
        values = [F.softplus(-fake).mean() if self.loss == "non_saturating" else -fake.mean() for fake in fakes]
        return torch.stack(values).mean()

    def balance(self, loss: Tensor, adversarial: Tensor, layer: nn.Parameter) -> dict[str, Tensor]:
        """LDM's ratio of gradient norms at the decoder's last layer, ‖∇loss‖ / (‖∇adversarial‖ + 1e-4), at most 1e4.

        Gradients are averaged over the ranks first, so that all of them get the same factor. The graphs stay, for the
        backward pass of the step. The ratio is the same for mean- and sum-reduced losses up to their own factor.

        Args:
            loss: everything but the adversarial loss.
            adversarial: what `generator_loss` gave.
            layer: the weight of the last layer.

        Returns:
            The ratio as ``adaptive_factor`` and whether it was clamped as ``adaptive_clamped``, 0 or 1, detached.

        Raises:
            RequestError: the layer is frozen.
        """
        if not layer.requires_grad:
            raise RequestError(
                "model.adversary.adaptive compares gradients at the decoder's last layer, which is frozen here: add it "
                "to model.trainable or set adaptive to false."
            )
        norms = []
        for value in (loss, adversarial):
            (gradient,) = torch.autograd.grad(value, layer, retain_graph=True)
            norms.append(_mean_of_ranks(gradient).norm())
        ratio = norms[0] / (norms[1] + 1e-4)
        clamped = (ratio > ADAPTIVE_MAXIMUM).to(ratio)
        return {"adaptive_factor": ratio.clamp(max=ADAPTIVE_MAXIMUM), "adaptive_clamped": clamped}

    def discriminator_loss(
        self, target: Tensor, reconstruction: Tensor, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises at a generator step, and its parts by name, unweighted and detached.

        ``discriminator`` says how badly the two are told apart, ``logits_real`` and ``logits_fake`` are mean logits,
        ``lecam`` and ``r1`` are there where they count. No gradient reaches the reconstruction.
        """
        penalised = self.r1 > 0 and step % self.r1_every == 0
        target = target.detach().requires_grad_(penalised)
        reals, fakes = self._logits(target), self._logits(reconstruction.detach())

        values: dict[str, Tensor] = {}
        for name, real, fake in zip(self.discriminator.outputs, reals, fakes, strict=True):
            values |= {f"{name}_real": real.mean(), f"{name}_fake": fake.mean()}
        games = [self._game(real, fake) for real, fake in zip(reals, fakes)]
        loss = values["discriminator"] = torch.stack(games).mean()
        if self.lecam:
            lecams = [_lecam(*output) for output in zip(reals, fakes, *self.running_logits)]
            values["lecam"] = torch.stack(lecams).mean()
            loss = loss + self.lecam * values["lecam"]
        if penalised:
            values["r1"] = 0.5 * torch.stack([_squared_slope(real, target) for real in reals]).mean()
            loss = loss + self.r1_every * self.r1 * values["r1"]
        return loss, {name: value.detach() for name, value in values.items()}

    def _game(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.loss == "hinge":
            return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

    def end_step(self, values: dict[str, Tensor]) -> None:
        """Take the values of a step that moved the weights into the buffers; the same on all ranks."""
        if "discriminator" in values and self.lecam:
            seen = [[values[f"{name}_{kind}"] for name in self.discriminator.outputs] for kind in ("real", "fake")]
            means = torch.stack([torch.stack(row) for row in seen])  # (2, outputs)
            self.running_logits.lerp_(_mean_of_ranks(means).to(self.running_logits), 1 - LECAM_DECAY)
        if "adaptive_clamped" in values:
            self.clamped_steps += values["adaptive_clamped"]
            values["adaptive_clamped"] = self.clamped_steps.clone()  # what is logged is the count so far

    def _logits(self, pixels: Tensor) -> list[Tensor]:
        if self.discriminator.of_clips:
            pixels = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels
        elif pixels.ndim == 5:
            pixels = frames_of(pixels)
        logits = self.discriminator(pixels)
        return [widen(output) for output in (logits if isinstance(logits, tuple) else (logits,))]


def _lecam(real: Tensor, fake: Tensor, running_real: Tensor, running_fake: Tensor) -> Tensor:
    return F.relu(real - running_fake).square().mean() + F.relu(running_real - fake).square().mean()


def _squared_slope(logits: Tensor, pixels: Tensor) -> Tensor:
    """The squared gradient of an image's summed logits, averaged over the batch, over the logits of an image."""
    (gradient,) = torch.autograd.grad(logits.sum(), pixels, create_graph=True)
    return widen(gradient).square().sum() / logits.numel()


def _mean_of_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


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
