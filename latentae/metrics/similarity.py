"""Similarities beyond SSIM that need no weights: MS-SSIM, GMSD and HaarPSI, each in float64."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.metrics.image import SSIM_TAPS, MeanOfImages, few_at_a_time, pair_range, require_size, ssim_maps

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SMALLEST = (SSIM_TAPS - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1  # the window still fits the coarsest scale
GMSD_CONSTANT = 170
HAARPSI_SCALES = 3
HAARPSI_CONSTANT, HAARPSI_ALPHA = 30, 4.2
HAARPSI_SMALLEST = 2 ** (HAARPSI_SCALES + 1)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def ms_ssim(reconstruction: Tensor, reference: Tensor, data_range: float | None = None) -> Tensor:
    """Multi-scale SSIM of each image (Wang et al. 2003): five scales, by 2x2 means, the paper's exponents.

    Contrast and structure at every scale, luminance at the coarsest, with the window of `latentae.metrics.image.ssim`;
    by channel, a negative factor counting as 0, then the mean over channels. A side that is odd repeats its last row.

    Args:
        reconstruction, reference: (B, C, H, W), uint8, or floats with their ``data_range``; sides of at least 161.
        data_range: distance between black and white; 255 for uint8.

    Returns:
        (B,) float64, 1 for identical images.

    Raises:
        RequestError: images are smaller, shapes or dtypes differ, or floats come without a range.
    """
    data_range = pair_range(reconstruction, reference, data_range)
    require_size("MS-SSIM", reference, MS_SSIM_SMALLEST)
    return torch.cat([_ms_ssim(x, y, data_range) for x, y in few_at_a_time(reconstruction, reference)])


def _ms_ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    product = x.new_ones(x.shape[:2])  # (B, C)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        luminance, structure = ssim_maps(x, y, data_range)
        is_coarsest = scale == len(MS_SSIM_WEIGHTS) - 1
        factor = (luminance * structure if is_coarsest else structure).mean((2, 3))
        product = product * factor.clamp(min=0) ** weight
        if not is_coarsest:
            x, y = _halve(x, "replicate"), _halve(y, "replicate")
    return product.mean(1)


def gmsd(reconstruction: Tensor, reference: Tensor, data_range: float | None = None) -> Tensor:
    """Gradient magnitude similarity deviation of each image (Xue et al. 2014), lower is better.

    The standard deviation over positions of the similarity of Prewitt gradients of the halved luma, constant 170.

    Args and errors as `ms_ssim`, with RGB images of any size.

    Returns:
        (B,) float64, 0 for identical images.
    """
    data_range = pair_range(reconstruction, reference, data_range)
    pairs = few_at_a_time(reconstruction, reference)
    return torch.cat([_gmsd(_to_yiq(x, data_range)[:, :1], _to_yiq(y, data_range)[:, :1]) for x, y in pairs])


def _gmsd(x: Tensor, y: Tensor) -> Tensor:
    maps = _halve(torch.cat([x, y]), "constant")  # (2B, 1, H / 2, W / 2)
    row = maps.new_tensor([1, 1, 1]) / 3
    column = maps.new_tensor([1, 0, -1])
    kernels = torch.stack([torch.outer(column, row), torch.outer(row, column)])[:, None]  # (2, 1, 3, 3)
    magnitude = F.conv2d(maps, kernels, padding=1).square().sum(1).sqrt()  # (2B, H / 2, W / 2)
    return _similarity(magnitude.chunk(2), GMSD_CONSTANT).std((1, 2), correction=0)


def haarpsi(reconstruction: Tensor, reference: Tensor, data_range: float | None = None) -> Tensor:
    """Haar wavelet-based perceptual similarity index of each image (Reisenhofer et al. 2018), higher is better.

    In YIQ, halved first; C = 30 and alpha = 4.2.

    Args and errors as `ms_ssim`, with RGB images and sides of at least 16.

    Returns:
        (B,) float64 from 0 to 1, 1 for identical images.
    """
    data_range = pair_range(reconstruction, reference, data_range)
    require_size("HaarPSI", reference, HAARPSI_SMALLEST)
    pairs = few_at_a_time(reconstruction, reference)
    return torch.cat([_haarpsi(_to_yiq(x, data_range), _to_yiq(y, data_range)) for x, y in pairs])


def _haarpsi(x: Tensor, y: Tensor) -> Tensor:
    maps = _halve(torch.cat([x, y]), "constant")  # (2B, 3, H / 2, W / 2)
    luma, chroma = maps[:, :1], maps[:, 1:]
    scales = [_haar(luma, 2 ** (scale + 1)).chunk(2) for scale in range(HAARPSI_SCALES)]  # 2 of (B, 2, H / 2, W / 2)
    by_scale = [_similarity(details, HAARPSI_CONSTANT) for details in scales[:-1]]
    means = F.avg_pool2d(F.pad(chroma, (0, 1, 0, 1)), 2, stride=1).abs().chunk(2)
    chroma_similarity = _similarity(means, HAARPSI_CONSTANT).mean(1, keepdim=True)
    similarity = torch.cat([torch.stack(by_scale).mean(0), chroma_similarity], 1)  # (B, 3, H / 2, W / 2)
    weights = torch.stack(scales[-1]).amax(0)  # the coarsest details of both directions, and their mean for colour
    weights = torch.cat([weights, weights.mean(1, keepdim=True)], 1)
    total = weights.sum((1, 2, 3))
    score = ((HAARPSI_ALPHA * similarity).sigmoid() * weights).sum((1, 2, 3)) / total
    return torch.where(total > 0, (score.logit() / HAARPSI_ALPHA) ** 2, 1.0)  # two black images are alike


def _haar(luma: Tensor, size: int) -> Tensor:
    """Magnitudes of both directions' Haar details of ``size`` pixels, (B, 1, H, W) to (B, 2, H, W)."""
    half = size // 2
    padded = F.pad(luma, (half - 1, half, half - 1, half))
    by_rows = F.avg_pool2d(padded, (half, size), stride=1) * half
    by_columns = F.avg_pool2d(padded, (size, half), stride=1) * half
    rows = by_rows[..., :-half, :] - by_rows[..., half:, :]
    columns = by_columns[..., :-half] - by_columns[..., half:]
    return torch.cat([rows, columns], 1).abs()


def _similarity(pair: Sequence[Tensor], constant: float) -> Tensor:
    x, y = pair
    return (2 * x * y + constant) / (x.square() + y.square() + constant)


def _to_yiq(images: Tensor, data_range: float) -> Tensor:
    """RGB (B, 3, H, W) of any range to YIQ of range 255 in float64."""
    matrix = torch.tensor(YIQ, dtype=torch.float64, device=images.device) * (255 / data_range)
    return torch.einsum("yc,bchw->byhw", matrix, images.double())


def _halve(maps: Tensor, border: str) -> Tensor:
    """Means of 2x2 pixels; where a side is odd, its last row or column meets a copy of itself or zeros."""
    return F.avg_pool2d(F.pad(maps, (0, maps.shape[-1] % 2, 0, maps.shape[-2] % 2), mode=border), 2)


class MSSSIM(MeanOfImages):
    """Mean over images of the MS-SSIM of RGB uint8 pairs of at least 161 pixels."""

    higher_is_better = True
    smallest = MS_SSIM_SMALLEST

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return ms_ssim(reconstruction, reference)


class GMSD(MeanOfImages):
    """Mean over images of the gradient magnitude similarity deviation of RGB uint8 pairs."""

    higher_is_better = False

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return gmsd(reconstruction, reference)


class HaarPSI(MeanOfImages):
    """Mean over images of the Haar wavelet-based perceptual similarity index of RGB uint8 pairs."""

    higher_is_better = True
    smallest = HAARPSI_SMALLEST

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return haarpsi(reconstruction, reference)
