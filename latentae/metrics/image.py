"""PSNR, SSIM and LPIPS of image pairs: pure functions first, then the torchmetrics Metrics that average them.

The Metrics take uint8 pairs only. A float in [-1, 1] and one in [0, 1] look alike, and mistaking one for the other
changes LPIPS by a factor of three and PSNR by 6 dB without a word; bytes have one range.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.errors import MissingExtra, RequestError
from latentae.files import sha256_file
from latentae.nn.lpips import lpips_network
from latentae.nn.pixels import to_float
from latentae.weights import find_weight_file, open_state_dict

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingExtra("Measuring image quality", "bench") from error

SSIM_TAPS = 11
SSIM_SIGMA = 1.5
_UNSCALED = [math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(-(SSIM_TAPS // 2), SSIM_TAPS // 2 + 1)]
GAUSSIAN = [weight / sum(_UNSCALED) for weight in _UNSCALED]
PIXELS_AT_A_TIME = {"cpu": 2**16, "cuda": 2**20}  # a CPU wants its caches to hold the maps, a GPU to be kept busy
LPIPS_BACKBONES = {"alex": "alexnet", "vgg": "vgg16"}  # net of the lpips package: its file in latentae.weights


def psnr(reconstruction: Tensor, reference: Tensor, data_range: float | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, over all its channels; infinite for identical images.

    Args:
        reconstruction, reference: (B, C, H, W), uint8, or floats with their ``data_range``.
        data_range: distance between black and white; 255 for uint8.

    Returns:
        (B,) float64.

    Raises:
        RequestError: shapes or dtypes differ, or floats come without a range.
    """
    data_range = pair_range(reconstruction, reference, data_range)
    dtype = torch.float32 if reference.dtype == torch.uint8 else torch.float64  # float32 holds squares of bytes exactly
    squares = (reconstruction.to(dtype) - reference.to(dtype)).square()
    return 10 * torch.log10(data_range**2 / squares.mean(dim=(1, 2, 3), dtype=torch.float64))


def ssim(reconstruction: Tensor, reference: Tensor, data_range: float | None = None) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), averaged over the valid region and the channels.

    An 11-tap Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population (co)variances: scikit-image's
    ``structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)``.

    Args and errors as `psnr`; height and width of at least 11.

    Returns:
        (B,) float64, 1 for identical images.
    """
    data_range = pair_range(reconstruction, reference, data_range)
    require_size("SSIM", reference, SSIM_TAPS)
    pairs = few_at_a_time(reconstruction, reference)
    return torch.cat([torch.mul(*ssim_maps(x, y, data_range)).mean((1, 2, 3)) for x, y in pairs])


def few_at_a_time(reconstruction: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (b, C, H, W) in float64, as many images as fit into `PIXELS_AT_A_TIME` but at least one."""
    pixels = PIXELS_AT_A_TIME.get(reference.device.type, 2**16)
    count = max(1, pixels // (reference.shape[-2] * reference.shape[-1]))
    for x, y in zip(reconstruction.split(count), reference.split(count), strict=True):
        yield x.double(), y.double()


def ssim_maps(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """The two factors of SSIM at every valid position: luminance, and contrast with structure.

    Args:
        x, y: (B, C, H, W) float64.

    Returns:
        Two of (B, C, H - 10, W - 10).
    """
    mean_x, mean_y, mean_squares, mean_product = _blur(torch.stack([x, y, x * x + y * y, x * y]))
    squares, product = mean_x**2 + mean_y**2, mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * product + c1) / (squares + c1)
    structure = (2 * (mean_product - product) + c2) / (mean_squares - squares + c2)
    return luminance, structure


def _blur(maps: Tensor) -> Tensor:
    """Gaussian means at the valid positions: (…, H, W) to (…, H - 10, W - 10)."""
    for dim in (-1, -2):
        # Added up shift by shift: in float64 on a CPU many times faster than a convolution.
        size = maps.shape[dim] - SSIM_TAPS + 1
        means = maps.narrow(dim, 0, size) * GAUSSIAN[0]
        for shift, weight in enumerate(GAUSSIAN[1:], 1):
            means.add_(maps.narrow(dim, shift, size), alpha=weight)
        maps = means
    return maps


def pair_range(reconstruction: Tensor, reference: Tensor, data_range: float | None) -> float:
    """The distance between black and white of a pair; refuses unequal shapes or dtypes and floats without a range."""
    if reconstruction.shape != reference.shape or reconstruction.dtype != reference.dtype or reference.ndim != 4:
        raise RequestError(
            f"The reconstruction is {_describe(reconstruction)} and the reference {_describe(reference)}; expected two "
            "batches of one shape (B, C, H, W) and one dtype."
        )
    if reference.dtype == torch.uint8:
        return 255.0 if data_range is None else data_range
    if data_range is None:
        raise RequestError(f"Images of dtype {reference.dtype} need data_range: 2 for [-1, 1], 1 for [0, 1].")
    return data_range


def require_size(metric: str, images: Tensor, smallest: int) -> None:
    """Refuse images (…, H, W) with a side below ``smallest`` pixels."""
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise RequestError(f"{metric} got images of {height}x{width}; it needs at least {smallest}x{smallest} pixels.")


def _describe(images: Tensor) -> str:
    return f"{images.dtype} of shape {tuple(images.shape)}"


def require_uint8_pair(reconstruction: Tensor, reference: Tensor) -> None:
    """Refuse anything but two equally large uint8 batches (B, 3, H, W)."""
    for images in (reconstruction, reference):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape != reference.shape:
            raise RequestError(
                f"A metric got {_describe(reconstruction)} and {_describe(reference)}; expected two uint8 batches "
                "(B, 3, H, W) of one size: see latentae.nn.pixels.to_uint8."
            )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast and no TF32: a feature network gives the same numbers wherever it is called from."""
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact:
        yield


class ExactSums(Metric):
    """A Metric whose states follow a surrounding module to its device but never to its dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)


class MeanOfImages(ExactSums):
    """The mean over images of one number per image pair; states add up, so that processes merge exactly.

    Values that are not finite (the PSNR of identical images) would make the mean meaningless: they stay out of it and
    are counted in ``excluded``. The mean of no images is NaN.
    """

    is_differentiable = False
    full_state_update = False
    smallest = 1  # side in pixels of the images that it takes
    total: Tensor
    count: Tensor
    excluded: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("excluded", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        """(B,) numbers of a pair of uint8 batches (B, 3, H, W)."""
        raise NotImplementedError

    def update(self, reconstruction: Tensor, reference: Tensor) -> None:
        require_uint8_pair(reconstruction, reference)
        self.collect(self.values(reconstruction, reference))

    def collect(self, values: Tensor) -> None:
        """Add numbers (B,) that `values` gave."""
        values = values.to(self.total)
        finite = values.isfinite()
        self.total += values[finite].sum()
        self.count += finite.sum()
        self.excluded += (~finite).sum()

    def compute(self) -> Tensor:
        return self.total / self.count


class PSNR(MeanOfImages):
    """Mean over images of the PSNR of RGB uint8 pairs in dB (not the PSNR of the pooled error)."""

    higher_is_better = True

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return psnr(reconstruction, reference)


class SSIM(MeanOfImages):
    """Mean over images of the SSIM of RGB uint8 pairs."""

    higher_is_better = True
    smallest = SSIM_TAPS

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        return ssim(reconstruction, reference)


class LPIPSMetric(MeanOfImages):
    """Mean over images of LPIPS 0.1 (Zhang et al. 2018) of RGB uint8 pairs, lower is better.

    The ``lpips`` package with its linear heads; the backbone is torchvision's file, found by `latentae.weights`, never
    downloaded. The network stands outside of the module tree, so that it never enters a checkpoint or a cast.

    Args:
        net: ``alex`` or ``vgg``.
        weights: another backbone file (state dict of the torchvision network or of its ``features``), unchecked.

    Raises:
        MissingWeights: the backbone file is nowhere on this machine.
        MissingExtra: the ``lpips`` package is not installed.
    """

    higher_is_better = False

    def __init__(self, net: str = "alex", weights: str | Path | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        if net not in LPIPS_BACKBONES:
            raise RequestError(f"LPIPS has no net {net!r}: choose {' or '.join(LPIPS_BACKBONES)}.")
        self.net = net
        file = find_weight_file(LPIPS_BACKBONES[net], weights)
        self.weights_sha256 = sha256_file(file)
        self._network = (lpips_network(net, open_state_dict(file)),)

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        network = self._network[0].to(reference.device)
        with full_precision(reference.device):
            return network(to_float(reconstruction), to_float(reference)).flatten()  # (B,)
