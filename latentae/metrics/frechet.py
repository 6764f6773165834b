"""Fréchet distance of two sets of images (Heusel et al. 2017); with the published Inception weights it is FID or rFID.

Images go through a feature network batch by batch; only float64 sums of features and of their outer products stay, so
that memory does not grow with the number of images and the sums of several processes add up exactly.
"""

import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import MissingExtra, RequestError
from latentae.files import sha256_file
from latentae.metrics.image import ExactSums, full_precision
from latentae.nn.pixels import to_float
from latentae.weights import find_weight_file, open_state_dict

BIASED_BELOW = 10_000  # with fewer images the distance is noticeably too high, even between equal distributions


def frechet_distance(moments_1: tuple[int, Tensor, Tensor], moments_2: tuple[int, Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2) of two Gaussians given as (N, mean (d,), covariance (d, d)).

    With C = F F^T, tr (C1 C2)^(1/2) is the sum of the singular values of F1^T F2. Unlike the eigenvalues of C1 C2 these
    need no square root, which would turn rounding at 1e-16 into errors of 1e-8, two thousand times; and with N < d
    images F has only N - 1 columns.
    """
    (count_1, mean_1, covariance_1), (count_2, mean_2, covariance_2) = moments_1, moments_2
    root_1, root_2 = _root(covariance_1, count_1), _root(covariance_2, count_2)
    cross = torch.linalg.svdvals(root_1.T @ root_2).sum()
    difference = mean_1 - mean_2
    return float(difference @ difference + covariance_1.trace() + covariance_2.trace() - 2 * cross)


def _root(covariance: Tensor, count: int) -> Tensor:
    """F with F F^T = C, (d, rank), from the eigenvectors of C; N images give at most rank N - 1."""
    dimension = len(covariance)
    rank = min(count - 1, dimension)
    basis = torch.eye(dimension, dtype=covariance.dtype)
    if rank < dimension // 4:
        # A few random combinations of its columns span all of C (Halko, Martinsson and Tropp 2011): a small problem.
        probes = torch.randn(dimension, rank + 8, dtype=covariance.dtype, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(covariance @ probes)[0]
        covariance = basis.T @ covariance @ basis
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    return basis @ vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()


class FrechetDistance(ExactSums):
    """Fréchet distance between the features of reconstructions and of their originals.

    Args:
        network: maps uint8 images (B, 3, H, W) to features (B, ``dimension``); stands outside of the module tree, so
            that it never enters a checkpoint or a cast.
        dimension: number of features.
        keep_originals: ``reset`` forgets the reconstructions only, to measure several models on one set of originals.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    count_original: Tensor
    count_reconstruction: Tensor

    def __init__(
        self, network: torch.nn.Module, dimension: int, keep_originals: bool = False, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._network = (network.requires_grad_(False).eval(),)
        self.dimension, self.keep_originals = dimension, keep_originals
        for side in ("original", "reconstruction"):
            self.add_state(f"count_{side}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"sum_{side}", torch.zeros(dimension, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(
                f"outer_{side}", torch.zeros(dimension, dimension, dtype=torch.float64), dist_reduce_fx="sum"
            )

    def features(self, images: Tensor) -> Tensor:
        """What the network says of images, uint8 (B, 3, H, W): (B, d) float64.

        A network with ``takes_floats`` also gets floats in [-1, 1] as they are.
        """
        network = self._network[0].to(images.device)
        dtype_fits = images.dtype == torch.uint8 or (
            images.dtype == torch.float32 and getattr(network, "takes_floats", False)
        )
        if not dtype_fits or images.ndim != 4 or images.shape[1] != 3:
            raise RequestError(
                f"The Fréchet distance got {images.dtype} of shape {tuple(images.shape)}; expected uint8 (B, 3, H, W)."
            )
        with full_precision(images.device):
            return network(images).double()

    def update(self, images: Tensor, original: bool) -> None:
        """Add images, or their `features` (B, d), to the originals or to the reconstructions."""
        features = images if images.ndim == 2 else self.features(images)
        side = "original" if original else "reconstruction"
        getattr(self, f"count_{side}").add_(len(features))
        getattr(self, f"sum_{side}").add_(features.sum(0))
        getattr(self, f"outer_{side}").addmm_(features.T, features)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; values near -1e-5 for equal sets are rounding.

        Raises:
            RequestError: one side has fewer than two images.
        """
        counts = int(self.count_original), int(self.count_reconstruction)
        if min(counts) < 2:
            raise RequestError(
                f"A Fréchet distance needs at least two images on each side, got {counts[0]} and {counts[1]}."
            )
        distance = frechet_distance(self._moments("original"), self._moments("reconstruction"))
        return torch.tensor(distance, dtype=torch.float64)

    def distance_to(self, mean: Tensor, covariance: Tensor) -> float:
        """The distance of the reconstructions to a Gaussian that is known otherwise, float64 (d,) and (d, d).

        Raises:
            RequestError: there are fewer than two reconstructions.
        """
        if int(self.count_reconstruction) < 2:
            raise RequestError(f"A Fréchet distance needs at least two images, got {int(self.count_reconstruction)}.")
        known = (len(mean) + 1, mean, covariance)  # of full rank, for all we know
        return frechet_distance(self._moments("reconstruction"), known)

    def fresh(self) -> "FrechetDistance":
        """Another distance, still empty, by the same network."""
        return FrechetDistance(self._network[0], self.dimension)

    def _moments(self, side: str) -> tuple[int, Tensor, Tensor]:
        count = int(getattr(self, f"count_{side}"))
        mean = getattr(self, f"sum_{side}").cpu() / count
        covariance = (getattr(self, f"outer_{side}").cpu() - count * mean.outer(mean)) / (count - 1)
        return count, mean, covariance

    def reset(self) -> None:
        kept = {name: getattr(self, name) for name in self._defaults if name.endswith("_original")}
        super().reset()
        if self.keep_originals:
            for name, value in kept.items():
                setattr(self, name, value)


class FrechetInceptionDistance(FrechetDistance):
    """FID by torch-fidelity's definition: the 2015 TensorFlow Inception, its bilinear resize to 299, 2048 features.

    Between reconstructions and their own originals it is called rFID.

    Args:
        weights: another weight file of the same network, unchecked; then ``published`` is False and the number must
            not be called rFID.
        resize: ``tensorflow``, or ``half-pixel``: the bilinear resize and the scale of pytorch-fid, which differs in
            the second digit; takes floats in [-1, 1] too.
        precision: of the network, float32 or float64.

    Raises:
        MissingWeights: the published file is nowhere on this machine.
        MissingExtra: torch-fidelity is not installed.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        keep_originals: bool = False,
        resize: str = "tensorflow",
        precision: torch.dtype = torch.float32,
        **arguments: Any,
    ) -> None:
        file = find_weight_file("inception", weights)
        network = _inception(file, precision)
        super().__init__(_HalfPixel(network) if resize == "half-pixel" else network, 2048, keep_originals, **arguments)
        self.published = weights is None
        self.weights_sha256 = sha256_file(file)


class _First(torch.nn.Module):
    """The only entry of the tuple that a torch-fidelity extractor returns."""

    def __init__(self, extractor: torch.nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images)[0]


class _HalfPixel(torch.nn.Module):
    """The same network behind pytorch-fid's resize and scale, from uint8 or from floats in [-1, 1].

    The extractor's own resize is passed by where the first convolution takes its input.
    """

    takes_floats = True

    def __init__(self, network: _First) -> None:
        super().__init__()
        self.network = network
        first = network.extractor.Conv2d_1a_3x3
        first.register_forward_pre_hook(lambda module, arguments: (self.prepared,))  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        pixels = to_float(images) if images.dtype == torch.uint8 else images
        self.prepared = F.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)
        return self.network(images.new_zeros((len(images), 3, 1, 1), dtype=torch.uint8))


def _inception(weight_file: Path, precision: torch.dtype = torch.float32) -> _First:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtra("rFID", "bench") from error
    # torch-fidelity unpickles what it is given: it gets our own copy of tensors that were opened safely.
    copy = io.BytesIO()
    torch.save(open_state_dict(weight_file), copy)
    copy.seek(0)
    try:
        extractor = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copy)
    except RuntimeError as error:
        raise RequestError(
            f"{weight_file} is not a state dict of torch-fidelity's Inception: {str(error).splitlines()[0]}"
        ) from error
    # Its own option for float64 is without effect in torch-fidelity 0.4.
    extractor.to(precision).feature_extractor_internal_dtype = precision
    return _First(extractor)
