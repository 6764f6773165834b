"""What a diffusion decoder trains on: one draw of time and noise per image, and the loss of what it makes of it.

`Denoising` always gives an estimate of the clean image. It is the step's reconstruction, so that LPIPS, adversaries and
every other term are those of the other families; `FlowMatching` is the diffusion loss, and `Initial` puts a term on the
first image of a family with two decoders.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.flow import add_noise
from latentae.nn.precision import widen
from latentae.objectives.draws import of_this_rank, per_image
from latentae.objectives.terms import Step, Term


class Times(ABC):
    """How the times of a step are drawn, between 0 (the image) and 1 (noise)."""

    @abstractmethod
    def draw(self, like: Tensor) -> Tensor:
        """Times in the shape of ``like``, (B,)."""


class UniformTimes(Times):
    """Evenly between 0 and 1, as DiTo."""

    def draw(self, like: Tensor) -> Tensor:
        return of_this_rank(torch.rand, like)


class LogitNormalTimes(Times):
    """The logistic function of a normal variable, which is more often in the middle, as ε-VAE and SSDD.

    Args:
        mean, std: of the normal variable.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if std <= 0:
            raise RequestError(f"LogitNormalTimes needs a std above 0, not {std}.")
        self.mean = mean
        self.std = std

    def draw(self, like: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * of_this_rank(torch.randn, like))


class CosineTimes(Times):
    """Evenly in the angle of the cosine path, whose sine and cosine scale noise and image: t = sin / (sin + cos)."""

    def draw(self, like: Tensor) -> Tensor:
        angle = of_this_rank(torch.rand, like) * (math.pi / 2)
        return angle.sin() / (angle.sin() + angle.cos())


class PureNoise(Times):
    """Always 1: for a decoder of one step."""

    def draw(self, like: Tensor) -> Tensor:
        return torch.ones_like(like)


@dataclass(frozen=True)
class Denoised:
    """What came of a draw: target and estimate of it, both (B, 3, H, W), times (B,), and a first image or None."""

    target: Tensor
    clean: Tensor
    times: Tensor
    base: Tensor | None


class Denoising:
    """Noise on the target at a random time, and the decoder's estimate of the target, knowing the latents.

    Args:
        times: how they are drawn; evenly by default.
        val_steps: of the samples that a validation in the midst of training looks at, all from the configured canvas;
            ``validate`` and the end of a run take the configured number of steps.

    Raises:
        RequestError: the autoencoder has no diffusion decoder, or ``val_steps`` is none.
    """

    def __init__(self, times: Times | None = None, val_steps: int = 4):
        if val_steps < 1:
            raise RequestError(f"model.denoising.val_steps is at least 1, not {val_steps}.")
        self.times = times or UniformTimes()
        self.val_steps = val_steps

    def check(self, autoencoder: Any) -> None:
        """Refuse an autoencoder that this cannot train, before the training begins."""
        if not getattr(autoencoder, "samples", False):
            kind = type(autoencoder).__name__
            plain = (
                f"this {kind} predicts the pixels at once" if hasattr(autoencoder, "denoise") else f"{kind} has none"
            )
            raise RequestError(
                f"model.denoising is for autoencoders with a diffusion decoder; {plain}: leave it out, or take a "
                "preset such as dito-b-f8c4."
            )

    def __call__(self, autoencoder: Any, latents: Tensor, target: Tensor, earliest: Tensor | None = None) -> Denoised:
        """Draw and denoise, with gradient.

        Args:
            latents: (B, C, h, w), and ``target``, what they must decode to, (B, 3, H, W).
            earliest: the least time of each image, (B,): a draw t becomes ``earliest + (1 - earliest) * t``.
        """
        t = self.times.draw(per_image(target))
        if earliest is not None:
            t = earliest + (1 - earliest) * t
        noise = of_this_rank(torch.randn, widen(target))
        condition = autoencoder.condition(latents)
        clean = autoencoder.denoise(add_noise(widen(target), noise, t), t, condition)
        return Denoised(target, clean, t, condition.base)


class FlowMatching(Term):
    """The squared error of a denoiser, each image weighed by its time.

    With the estimate x̂ of the image x, and λ = 2 log((1 - t) / t):

    ============= ================================== ===========================================================
    ``weighting`` ‖x̂ - x‖² times                     it is
    ============= ================================== ===========================================================
    v             1 / max(t, least_time)²            the squared error of the velocity: flow matching, as DiTo
    x0            1                                  that of the image
    sigmoid       exp(λ) / (1 + exp(λ - bias))       that of the noise, weighed by sigmoid(bias - λ), as Unified Latents
    ============= ================================== ===========================================================

    Args:
        least_time: where 1 / t² stops growing. Predicting the velocity needs no such limit, predicting the image does.
        bias: of the sigmoid.

    Raises:
        RequestError: the autoencoder in training has no diffusion decoder.
    """

    def __init__(
        self,
        weight: float = 1.0,
        weighting: Literal["v", "x0", "sigmoid"] = "v",
        least_time: float = 1e-3,
        bias: float = 0.0,
    ):
        super().__init__(weight)
        if least_time <= 0:
            raise RequestError(f"FlowMatching needs a least_time above 0, not {least_time}.")
        self.weighting = weighting
        self.least_time = least_time
        self.bias = bias

    def measure(self, step: Step) -> Tensor:
        return self.by_image(step).mean()

    def by_image(self, step: Step) -> Tensor:
        """The loss of each image, (B,)."""
        if step.times is None:
            raise RequestError("FlowMatching needs an autoencoder with a diffusion decoder, such as dito-b-f8c4.")
        error = (widen(step.reconstruction) - widen(step.target)).square().flatten(1).mean(1)
        return self.weights_at(step.times) * error

    def weights_at(self, t: Tensor) -> Tensor:
        """The factor of the squared error of the image at times t."""
        if self.weighting == "x0":
            return torch.ones_like(t)
        t = t.clamp(self.least_time, 1.0)
        if self.weighting == "v":
            return 1 / t.square()
        signal_to_noise = ((1 - t) / t).square()
        return signal_to_noise / (1 + signal_to_noise * torch.exp(torch.as_tensor(-self.bias)))


class Initial(Term):
    """A term on the first, deterministic image of an autoencoder with two decoders, such as SWYCC's.

    Args:
        term: what is measured between that image and the target; its own weight counts.

    Raises:
        RequestError: the autoencoder in training has no first image.
    """

    def __init__(self, term: Term):
        super().__init__(term.weight)
        self.term = term

    def measure(self, step: Step) -> Tensor:
        if step.base is None:
            raise RequestError("Initial needs an autoencoder with an initial decoder, such as swycc-f8c4.")
        return self.term.measure(replace(step, reconstruction=widen(step.base)))


class LossByTime:
    """Means of a loss over the tenths of time, collected over several steps."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, 10)

    def add(self, times: Tensor, losses: Tensor) -> None:
        """Take in times (B,) and the loss of each."""
        self._sums = self._sums.to(times.device)  # where adding needs no synchronisation
        tenth = (times.detach() * 10).long().clamp(0, 9)
        losses = losses.detach().float()
        self._sums.index_add_(1, tenth, torch.stack([losses, torch.ones_like(losses)]))

    def means(self, name: str) -> dict[str, float]:
        """``{name}_t0`` for times below 0.1 to ``{name}_t9``, of those that there were; the collection starts anew."""
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        return {f"{name}_t{i}": total / count for i, (total, count) in enumerate(zip(sums, counts)) if count}
