"""DISTS: how far structure and texture of VGG16's features differ, by the published weighing of its channels."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import MissingExtra, RequestError
from latentae.files import sha256_file
from latentae.metrics.image import MeanOfImages, full_precision
from latentae.weights import find_weight_file, open_state_dict

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # convolutions among torchvision's features
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONSTANT = 1e-6


class DISTS(MeanOfImages):
    """Mean over images of deep image structure and texture similarity (Ding et al. 2020), lower is better.

    Of RGB uint8 pairs at their own size; the paper shrinks images to 256 px first. The weighing of the channels is the
    published one, which torchmetrics brings; VGG16 is torchvision's file, found by `latentae.weights`, never
    downloaded.

    Args:
        weights: another VGG16 file (state dict of the torchvision network or of its ``features``), unchecked.

    Raises:
        MissingWeights: the VGG16 file is nowhere on this machine.
        MissingExtra: torchmetrics is too old.
    """

    higher_is_better = False

    def __init__(self, weights: str | Path | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        file = find_weight_file("vgg16", weights)
        self.weights_sha256 = sha256_file(file)
        # Out of the module tree, so that the network never enters a checkpoint or a cast.
        self._network = (_Network(open_state_dict(file)),)

    def values(self, reconstruction: Tensor, reference: Tensor) -> Tensor:
        network = self._network[0].to(reference.device)
        pairs = zip(reconstruction.split(1), reference.split(1), strict=True)  # the first features are large
        with full_precision(reference.device):
            return torch.cat([network(x.float() / 255, y.float() / 255) for x, y in pairs])


class _Network(torch.nn.Module):
    texture: Tensor
    structure: Tensor
    blur: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, vgg: Mapping[str, Tensor]) -> None:
        super().__init__()
        prefix = "features." if any(key.startswith("features.") for key in vgg) else ""
        for layer in (layer for stage in STAGES for layer in stage):
            for name in ("weight", "bias"):
                if f"{prefix}{layer}.{name}" not in vgg:
                    raise RequestError(f"The weight file is not torchvision's VGG16: it lacks {prefix}{layer}.{name}.")
                self.register_buffer(f"{name}_{layer}", vgg[f"{prefix}{layer}.{name}"])
        channels = _published_weighing()
        total = channels["alpha"].sum() + channels["beta"].sum()
        self.register_buffer("texture", (channels["alpha"] / total).double())  # (1, 3 + 64 + … + 512, 1, 1)
        self.register_buffer("structure", (channels["beta"] / total).double())
        taps = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", taps.outer(taps)[None, None])
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(IMAGENET_DEVIATION)[:, None, None])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), to (B,) float64."""
        textures, structures = [], []
        for a, b in zip(self._features(x), self._features(y)):
            a, b = a.double(), b.double()
            mean_a, mean_b = a.mean((2, 3), keepdim=True), b.mean((2, 3), keepdim=True)
            a, b = a - mean_a, b - mean_b
            variances = (a * a + b * b).mean((2, 3), keepdim=True)
            covariance = (a * b).mean((2, 3), keepdim=True)
            textures.append((2 * mean_a * mean_b + CONSTANT) / (mean_a**2 + mean_b**2 + CONSTANT))
            structures.append((2 * covariance + CONSTANT) / (variances + CONSTANT))
        similarity = self.texture * torch.cat(textures, 1) + self.structure * torch.cat(structures, 1)
        return 1 - similarity.sum((1, 2, 3))

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        yield images
        h = (images - self.mean) / self.deviation
        for index, stage in enumerate(STAGES):
            if index:
                kernel = self.blur.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), kernel, stride=2, padding=1, groups=h.shape[1]) + 1e-12).sqrt()
            for layer in stage:
                h = F.conv2d(h, getattr(self, f"weight_{layer}"), getattr(self, f"bias_{layer}"), padding=1).relu()
            yield h


def _published_weighing() -> dict[str, Tensor]:
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "functional" / "image" / "dists_models" / "weights.pt"
    if not file.exists():
        raise MissingExtra("DISTS", "bench")
    return torch.load(file, map_location="cpu", weights_only=True)
