"""Metrics as papers compute them otherwise: SSIM with a flat window or over the border, PSNR and LPIPS of floats."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import RequestError
from latentae.metrics.image import SSIM_TAPS, LPIPSMetric, MeanOfImages, full_precision, psnr

UNIFORM_WINDOW = 7


def uniform_ssim(reconstruction: Tensor, reference: Tensor) -> Tensor:
    """SSIM of each image with scikit-image's defaults: a flat 7 x 7 window, sample (co)variances, the valid region.

    Args:
        reconstruction, reference: uint8 (B, C, H, W).

    Returns:
        (B,) float64.
    """
    pairs = zip(reconstruction.double(), reference.double(), strict=True)
    return torch.stack([_uniform_ssim_of_one(x, y) for x, y in pairs])


def _uniform_ssim_of_one(x: Tensor, y: Tensor) -> Tensor:
    maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, C, H, W)
    mean_x, mean_y, xx, yy, xy = F.avg_pool2d(maps, UNIFORM_WINDOW, stride=1)
    sample = UNIFORM_WINDOW**2 / (UNIFORM_WINDOW**2 - 1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = sample * (xx - mean_x**2 + yy - mean_y**2)
    return (luminance * (2 * sample * (xy - mean_x * mean_y) + c2) / (variances + c2)).mean()


def padded_ssim(reconstruction: Tensor, reference: Tensor, data_range: tuple[float, float] | None) -> Tensor:
    """SSIM of each image by torchmetrics: its Gaussian window over the reflected border too.

    Args:
        reconstruction, reference: (B, C, H, W) of any dtype.
        data_range: black and white, to which both are clamped; None takes the range that each pair happens to have.

    Returns:
        (B,) float64.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pairs = zip(reconstruction.double(), reference.double(), strict=True)
    values = [structural_similarity_index_measure(x[None], y[None], data_range=data_range) for x, y in pairs]
    return torch.stack(values)  # type: ignore[arg-type]


class FloatPairs(MeanOfImages):
    """A mean over pairs of float batches (B, 3, H, W) in about [-1, 1]."""

    def update(self, reconstruction: Tensor, reference: Tensor) -> None:
        for images in (reconstruction, reference):
            if not images.is_floating_point() or images.shape != reference.shape:
                raise RequestError(
                    f"{type(self).__name__} got {reconstruction.dtype} of shape {tuple(reconstruction.shape)} and "
                    f"{reference.dtype} of shape {tuple(reference.shape)}; expected two float batches of one size."
                )
        self.collect(self.values(reconstruction, reference))


class FloatPSNR(FloatPairs):
    """Mean over images of the PSNR of floats in [-1, 1]."""

    higher_is_better = True

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return psnr(reconstruction, reference, data_range=2)


class FloatLPIPS(FloatPairs, LPIPSMetric):
    """LPIPS of floats in about [-1, 1], neither clamped nor rounded."""

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        network = self._network[0].to(reference.device)
        with full_precision(reference.device):
            return network(reconstruction, reference).flatten()  # (B,)


class UniformSSIM(MeanOfImages):
    """Mean over images of `uniform_ssim`."""

    higher_is_better = True
    smallest = UNIFORM_WINDOW

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return uniform_ssim(reconstruction, reference)


class PaddedSSIM(MeanOfImages):
    """Mean over images of `padded_ssim` of uint8 pairs, with range 255."""

    higher_is_better = True
    smallest = SSIM_TAPS

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return padded_ssim(reconstruction, reference, (0, 255))


class SignedSSIM(FloatPairs):
    """Mean over images of `padded_ssim` of floats, with range 2."""

    higher_is_better = True
    smallest = SSIM_TAPS

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return padded_ssim(reconstruction, reference, (-1, 1))


class OwnRangeSSIM(FloatPairs):
    """Mean over images of `padded_ssim` of floats, with the range that each pair happens to have."""

    higher_is_better = True
    smallest = SSIM_TAPS

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return padded_ssim(reconstruction, reference, None)
