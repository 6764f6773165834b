"""Terms on frequencies: two that look at the high ones only, as LiteVAE trains with, and one on the whole spectrum.

LiteVAE (Sadat et al., 2024, arXiv 2405.14477, section 4.4) publishes neither weights nor constants; open-litevae's
weights are 1.0 (Haar) and 0.5 (Gaussian). All maps are linear, so they are applied once, to the difference of pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.nn.wavelet import dwt2
from latentae.objectives.reconstruction import charbonnier
from latentae.objectives.terms import Step, Term


class HaarDetail(Term):
    """Charbonnier distance of the Haar detail bands (H, V, D), averaged over bands and levels.

    Level l is divided by 2^l, LiteVAE's scaling, so that a level's low-pass band stays in the range of the pixels.

    Args:
        levels: how many times the low-pass band is split again; the sides must be at least 2^levels.
        epsilon: of the Charbonnier distance, which is its least value.
    """

    def __init__(self, weight: float = 1.0, levels: int = 1, epsilon: float = 1e-3):
        super().__init__(weight)
        self.levels = levels
        self.epsilon = epsilon

    def measure(self, step: Step) -> Tensor:
        low = step.reconstruction - step.target
        levels = []
        for _ in range(self.levels):
            height, width = low.shape[-2] // 2 * 2, low.shape[-1] // 2 * 2  # an odd last row or column is left out
            low, *details = (band / 2 for band in dwt2(low[..., :height, :width]))
            levels.append(charbonnier(torch.stack(details), self.epsilon))
        return torch.stack(levels).mean()


class GaussianDetail(Term):
    """L1 distance of what a Gaussian blur removes, x - blur(x), with reflection at the border.

    Args:
        kernel_size: odd number of taps.
        sigma: standard deviation of the blur in pixels.
    """

    def __init__(self, weight: float = 1.0, kernel_size: int = 9, sigma: float = 2.0):
        super().__init__(weight)
        self.kernel_size = kernel_size
        self.sigma = sigma

    def measure(self, step: Step) -> Tensor:
        difference = step.reconstruction - step.target
        pad = self.kernel_size // 2
        padded = F.pad(difference, (pad, pad, pad, pad), mode="reflect")
        return (difference - gaussian_blur(padded, self.kernel_size, self.sigma)).abs().mean()


def gaussian_blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Separable Gaussian filter of (B, C, H, W), valid region only: (B, C, H - k + 1, W - k + 1)."""
    offsets = torch.arange(kernel_size, dtype=x.dtype, device=x.device) - kernel_size // 2
    taps = torch.exp(-offsets.square() / (2 * sigma**2))
    taps = taps / taps.sum()
    channels = x.shape[1]
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


class FocalFrequency(Term):
    """Squared error of the spectra, weighted towards the frequencies that are worst (Jiang et al., 2021, 2012.12821).

    With d the magnitude of the difference of the orthonormal 2D Fourier transforms, the mean of w d² for
    w = (d / max d)^α, constant in the gradient; the maximum is that of an image's channel. At α = 0 it is `L2`.

    Args:
        alpha: how much the weight concentrates; the paper's is 1.
    """

    def __init__(self, weight: float = 1.0, alpha: float = 1.0):
        super().__init__(weight)
        self.alpha = alpha

    def measure(self, step: Step) -> Tensor:
        spectrum = torch.fft.fft2(step.reconstruction - step.target, norm="ortho")
        energy = spectrum.real.square() + spectrum.imag.square()  # (B, 3, H, W), d²
        largest = energy.detach().amax(dim=(-2, -1), keepdim=True)
        focus = (energy.detach() / torch.where(largest > 0, largest, 1.0)) ** (self.alpha / 2)
        return (focus * energy).mean()
