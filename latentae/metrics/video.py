"""Fréchet video distance (Unterthiner et al. 2018): the Fréchet distance of I3D features of clips of 16 frames."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.files import sha256_file
from latentae.metrics.frechet import FrechetDistance
from latentae.metrics.image import full_precision
from latentae.weights import find_weight_file

CLIP_FRAMES = 16
I3D_FEATURES = 400


class FrechetVideoDistance(FrechetDistance):
    """FVD by StyleGAN-V's definition: I3D of Kinetics-400, its 400 values before the softmax, frames resized to 224.

    Videos are cut into windows of 16 frames from the first frame on, without overlap; a rest is left out. Between
    reconstructions and their own originals it is called rFVD. Both are noticeably too high with few windows.

    Args:
        weights: another TorchScript file of this interface, unchecked; then ``published`` is False and the number must
            not be called rFVD. Such a file is a program: take it only from where you would take code.
        keep_originals: ``reset`` forgets the reconstructions only, to measure several models on one set of originals.

    Raises:
        MissingWeights: the published file is nowhere on this machine.
        RequestError: the file is no TorchScript.
    """

    def __init__(self, weights: str | Path | None = None, keep_originals: bool = False, **arguments: Any) -> None:
        file = find_weight_file("i3d", weights)
        super().__init__(_I3D(_open_script(file)), I3D_FEATURES, keep_originals, **arguments)
        self.published = weights is None
        self.weights_sha256 = sha256_file(file)

    def features(self, videos: Tensor) -> Tensor:
        """What the network says of the windows of videos, uint8 (B, 3, T, H, W): (B * (T // 16), 400) float64.

        Raises:
            RequestError: other tensors, or fewer than 16 frames.
        """
        if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[1] != 3 or videos.shape[2] < CLIP_FRAMES:
            raise RequestError(
                f"The Fréchet video distance got {videos.dtype} of shape {tuple(videos.shape)}; expected uint8 "
                f"(B, 3, T, H, W) of at least {CLIP_FRAMES} frames."
            )
        network = self._network[0].to(videos.device)
        windows = videos.unfold(2, CLIP_FRAMES, CLIP_FRAMES)  # (B, 3, T // 16, H, W, 16)
        windows = windows.permute(0, 2, 1, 5, 3, 4).flatten(0, 1)  # (B * (T // 16), 3, 16, H, W)
        with full_precision(videos.device):
            # One by one: a window at 224 px has a third of a gigabyte of activations.
            return torch.cat([network(window[None]) for window in windows]).double()


class _I3D(torch.nn.Module):
    """Windows of bytes to features, by the options of the published file."""

    def __init__(self, script: torch.nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, windows: Tensor) -> Tensor:
        return self.script(windows.float(), rescale=True, resize=True, return_features=True)


def _open_script(file: Path) -> torch.nn.Module:
    try:
        return torch.jit.load(file, map_location="cpu")
    except RuntimeError as error:
        raise RequestError(f"{file} is no TorchScript file ({str(error).splitlines()[0]}): fetch it again.") from error
