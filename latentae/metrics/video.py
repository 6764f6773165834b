"""Figures of clips: those of images over frames, two of how errors move, and the Fréchet video distance.

The Fréchet video distance (Unterthiner et al. 2018) is the Fréchet distance of I3D features of clips of 16 frames.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.files import sha256_file
from latentae.metrics.frechet import FrechetDistance
from latentae.metrics.image import full_precision
from latentae.nn.pixels import frames_of
from latentae.weights import find_weight_file

CLIP_FRAMES = 16
I3D_FEATURES = 400


def over_frames(measure: Callable[[Tensor, Tensor], Tensor], reconstruction: Tensor, reference: Tensor) -> Tensor:
    """A figure of images, such as `psnr`, as the mean over the frames of each clip.

    The PSNR of a frame that came out as it went in is infinite: such frames stay out of their clip's mean, which is
    infinite only where all of them did.

    Args:
        measure: of two batches (N, 3, H, W), one number for each image, (N,).
        reconstruction, reference: (B, 3, T, H, W), uint8.

    Returns:
        (B,) float64.

    Raises:
        RequestError: other shapes or dtypes.
    """
    _require_clips(reconstruction, reference)
    values = measure(frames_of(reconstruction), frames_of(reference)).double().view(len(reference), -1)  # (B, T)
    finite = values.isfinite()
    mean = values.where(finite, 0.0).sum(1) / finite.sum(1).clamp(min=1)
    return torch.where(finite.any(1), mean, values[:, 0])


def difference_psnr(reconstruction: Tensor, reference: Tensor) -> Tensor:
    """The PSNR of what changes from frame to frame, in dB: low where a reconstruction flickers or stands still.

    With Δ the differences of successive frames, ``10 log10(255² / mean((Δ reconstruction - Δ reference)²))`` over all
    the T - 1 differences of a clip; infinite where none is wrong.

    Args:
        reconstruction, reference: (B, 3, T, H, W), uint8.

    Returns:
        (B,) float64.

    Raises:
        RequestError: other shapes or dtypes, or fewer than two frames.
    """
    _require_clips(reconstruction, reference, frames=2)
    error = (reconstruction.float() - reference.float()).diff(dim=2)  # whole numbers, exact in float32
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3, 4), dtype=torch.float64))


def flicker(reconstruction: Tensor, reference: Tensor) -> Tensor:
    """How much the brightness of a reconstruction wavers, in grey levels of 255: 0 for none.

    With e_t the mean of reconstruction - reference over the pixels and colours of frame t, the standard deviation of
    e_1 … e_T over time, ``sqrt(mean((e_t - mean(e))²))``. A clip that is too bright throughout does not flicker.

    Args and errors as `difference_psnr`.
    """
    _require_clips(reconstruction, reference, frames=2)
    error = reconstruction.float() - reference.float()
    return error.mean(dim=(1, 3, 4), dtype=torch.float64).std(dim=1, correction=0)  # of (B, T)


def _require_clips(reconstruction: Tensor, reference: Tensor, frames: int = 1) -> None:
    for clips in (reconstruction, reference):
        fits = clips.dtype == torch.uint8 and clips.ndim == 5 and clips.shape == reference.shape
        if not fits or clips.shape[2] < frames:
            raise RequestError(
                f"A figure of clips got {reconstruction.dtype} of shape {tuple(reconstruction.shape)} and "
                f"{reference.dtype} of shape {tuple(reference.shape)}; expected two uint8 batches (B, 3, T, H, W) of "
                f"one size and at least {frames} frames."
            )


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
