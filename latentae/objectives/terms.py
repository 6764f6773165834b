"""The frame of every loss term: what a training step offers to it, and the weighted sum of named terms.

A new term is one subclass of `Term` with a ``measure(step)``; a recipe names the class and nothing else changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentae.errors import RequestError
from latentae.nn.pixels import frames_of
from latentae.nn.precision import widen


@dataclass(frozen=True)
class Step:
    """What one training step offers to the terms.

    Attributes:
        target: the pixels to reconstruct, (B, 3, H, W) or clips (B, 3, T, H, W), in [-1, 1].
        reconstruction: what the decoder made of them, same shape, about [-1, 1], with gradient; empty where no term of
            the objective needs it.
        posterior: the distribution from ``encode(pixels).latent_dist``, with gradient; None where a term needs none.
        latents: what was decoded, (B, C, h, w) or (B, C, t, h, w), unscaled, with gradient; None where a term needs
            none.
        encoded: the pixels that the posterior is of; None where they are the target.
        times: of a diffusion decoder, whose estimate at the time of each image the reconstruction is, (B,).
        base: the first image of a family with two decoders, (B, 3, H, W).
    """

    target: Tensor
    reconstruction: Tensor
    posterior: Any = None
    latents: Tensor | None = None
    encoded: Tensor | None = None
    times: Tensor | None = None
    base: Tensor | None = None

    def at_least_float32(self) -> "Step":
        """The same step with half precision pixels widened; float64 stays."""
        return replace(self, target=widen(self.target), reconstruction=widen(self.reconstruction))

    def in_frames(self, count: int | None = None) -> "Step":
        """The same step with the frames of its clips as images of a larger batch; images as they are.

        Args:
            count: so many frames, drawn anew at each call, the same of all clips; None for all.
        """
        if self.target.ndim == 4:
            return self
        frames = self.target.shape[2]
        chosen = slice(None) if count is None or count >= frames else torch.randperm(frames)[:count].sort().values
        parts = (self.target, self.reconstruction)
        target, made = (frames_of(part[:, :, chosen]) if part.ndim == 5 else part for part in parts)
        return replace(self, target=target, reconstruction=made)


class Term(nn.Module, ABC):
    """One summand of the objective: a scalar, averaged over batch, channels and space, in float32 even under autocast.

    Of clips it measures the frames, as images of a larger batch.

    Args:
        weight: its factor in the sum; the logged value is unweighted.

    Attributes:
        needs_reconstruction: whether the value depends on the decoder; a step without such a term does not decode.
        takes_clips: whether clips go through it; else they are refused.
        frames: so many frames of each clip are measured in training, drawn anew in each step; None for all.
    """

    needs_reconstruction = True
    takes_clips = True

    def __init__(self, weight: float = 1.0, frames: int | None = None):
        super().__init__()
        if frames is not None and frames < 1:
            raise RequestError(f"{type(self).__name__} measures frames={frames} of a clip; expected at least 1.")
        self.weight = weight
        self.frames = frames

    def forward(self, step: Step) -> Tensor:
        """The unweighted value, a scalar tensor."""
        if self.needs_reconstruction and step.target.shape != step.reconstruction.shape:
            raise RequestError(
                f"{type(self).__name__} compares pixels of one shape; the target has {tuple(step.target.shape)} and "
                f"the reconstruction {tuple(step.reconstruction.shape)}."
            )
        if step.target.ndim == 5 and not self.takes_clips:
            raise RequestError(
                f"{type(self).__name__} is for images, and these are clips: leave the term out of model.objective."
            )
        if self.needs_reconstruction:
            step = step.in_frames(self.frames if self.training else None)
        with torch.autocast(step.target.device.type, enabled=False):
            return self.measure(step.at_least_float32())

    def weight_in(self, step: Step) -> float:
        """The factor of the value in the sum; it depends on the step where a published reduction does."""
        return self.weight

    @abstractmethod
    def measure(self, step: Step) -> Tensor:
        """The unweighted value of a step whose pixels are float32 or float64."""


class Objective(nn.ModuleDict):
    """The weighted sum of named terms."""

    def __init__(self, terms: Mapping[str, Term]):
        super().__init__(terms)

    @property
    def needs_reconstruction(self) -> bool:
        terms: Any = self.values()
        return any(term.needs_reconstruction for term in terms)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, with gradient, and every term's unweighted value by name, detached."""
        values = {name: term(step) for name, term in self.items()}
        weights = self.weights_in(step)
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return total, {name: value.detach() for name, value in values.items()}

    def weights_in(self, step: Step) -> dict[str, float]:
        """The factor of every term's value in the sum, by name."""
        terms: Any = self.items()
        return {name: term.weight_in(step) for name, term in terms}
