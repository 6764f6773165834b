"""Distances between pixels, averaged over all of them."""

import torch
from torch import Tensor

from latentae.objectives.terms import Step, Term


class L1(Term):
    """Mean absolute error of pixels in [-1, 1]."""

    def measure(self, step: Step) -> Tensor:
        return (step.reconstruction - step.target).abs().mean()


class L2(Term):
    """Mean squared error of pixels in [-1, 1]; PSNR is ``10 log10(4 / L2)``."""

    def measure(self, step: Step) -> Tensor:
        return (step.reconstruction - step.target).square().mean()


class Charbonnier(Term):
    """The differentiable L1, mean of sqrt(d² + ε²) (Charbonnier et al., 1994); its least value is ε.

    Args:
        epsilon: width of the quadratic floor, in pixel units of [-1, 1].
    """

    def __init__(self, weight: float = 1.0, epsilon: float = 1e-3):
        super().__init__(weight)
        self.epsilon = epsilon

    def measure(self, step: Step) -> Tensor:
        return charbonnier(step.reconstruction - step.target, self.epsilon)


def charbonnier(difference: Tensor, epsilon: float) -> Tensor:
    return torch.sqrt(difference.square() + epsilon**2).mean()
