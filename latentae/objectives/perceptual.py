"""Terms closer to what people see than a pixel distance: LPIPS, and MS-SSIM, which needs no weight file."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import MissingWeights, RequestError
from latentae.nn.lpips import lpips_network
from latentae.objectives.frequency import gaussian_blur
from latentae.objectives.terms import Step, Term
from latentae.weights import find_weight_file, open_state_dict


class LPIPS(Term):
    """Learned perceptual distance (Zhang et al., 2018, arXiv 1801.03924), version 0.1, on pixels in [-1, 1].

    The values are those of the ``lpips`` package. Its gradient is NaN where a whole feature vector is zero, as on
    constant images; here it is finite there and the same elsewhere. The network stays frozen in float32, is moved to
    the pixels' device on first use, and is no submodule: it is never in a checkpoint, and ``module.to(dtype)`` leaves
    it alone.

    Args:
        net: the backbone, ``vgg`` for training as the papers do, or ``alex``.
        path: a file with the backbone's weights; by default torchvision's official file where `latentae.weights` looks.
        frames: of clips, so many frames of each in a training step, drawn anew; None for all, which costs a forward and
            a backward pass of the backbone for each frame.

    Raises:
        MissingWeights: the file is nowhere; the message names it, the folders, the command, and how to do without.
        MissingExtra: the ``lpips`` package is not installed.
    """

    def __init__(
        self,
        weight: float = 1.0,
        net: Literal["vgg", "alex"] = "vgg",
        path: str | None = None,
        frames: int | None = None,
    ):
        super().__init__(weight, frames)
        try:
            file = find_weight_file({"vgg": "vgg16", "alex": "alexnet"}[net], path)
        except MissingWeights as error:
            raise MissingWeights(f"{error} Or train without it: --model.objective.lpips null.") from error
        self._network = (lpips_network(net, open_state_dict(file)),)  # a tuple hides it from nn.Module

    def measure(self, step: Step) -> Tensor:
        network: Any = self._network[0].to(step.target.device)
        with torch.no_grad():
            wanted = network.net(network.scaling_layer(step.target.float()))
        got = network.net(network.scaling_layer(step.reconstruction.float()))
        layers = [
            linear((_unit(a) - _unit(b)) ** 2).mean() for linear, a, b in zip(network.lins, got, wanted, strict=True)
        ]
        return torch.stack(layers).sum()


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) over their length along C, as lpips scales them; zero vectors pass through.

    The square root's derivative is infinite at zero, so those lengths are replaced before it.
    """
    energy = features.square().sum(dim=1, keepdim=True)  # (B, 1, h, w)
    length = torch.where(energy > 0, energy, 1.0).sqrt()
    return features / (length + 1e-10)


SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_TAPS, _SIGMA = 11, 1.5


class MSSSIM(Term):
    """1 - multi-scale structural similarity (Wang et al., 2003) of pixels in [-1, 1], averaged over colours.

    The Gaussian window has 11 taps of sigma 1.5, valid region only; scales are halved by 2×2 means. Five scales need
    161 pixels; smaller images take as many as fit, with the first weights of the five scaled to sum to 1. Negative
    similarities count as 1e-4, so that the powers have a gradient.

    Raises:
        RequestError: a side is shorter than the window.
    """

    def measure(self, step: Step) -> Tensor:
        a, b = step.reconstruction, step.target
        if min(a.shape[-2:]) < _TAPS:
            raise RequestError(f"MSSSIM needs sides of at least {_TAPS} pixels, got {a.shape[-2]}x{a.shape[-1]}.")
        scales = 1
        while scales < len(SCALE_WEIGHTS) and min(a.shape[-2:]) >> scales >= _TAPS:
            scales += 1
        weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=a.dtype, device=a.device)
        similarities = []
        for scale in range(scales):
            luminance, contrast = _similarity(a, b)
            last = scale == scales - 1
            similarities.append((luminance * contrast if last else contrast).mean(dim=(2, 3)))  # (B, 3)
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        powers = torch.stack(similarities, dim=-1).clamp(min=1e-4) ** (weights / weights.sum())  # (B, 3, scales)
        return 1 - powers.prod(dim=-1).mean()


def _similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The luminance and the contrast-structure maps of SSIM, for a range of 2."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    stacked = torch.cat([a, b, a * a, b * b, a * b], dim=1)  # (B, 5*3, H, W)
    mean_a, mean_b, aa, bb, ab = gaussian_blur(stacked, _TAPS, _SIGMA).chunk(5, dim=1)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return luminance, contrast
