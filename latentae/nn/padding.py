"""Reflect padding for convolutions that were built with zeros.

Zeros beyond the border are an edge that networks turn into artefacts in corners and along borders (VIVAT, arXiv
2506.07863); fine-tuning with reflected features removes it. `set_padding_mode` changes a whole autoencoder in place.
"""

from typing import Any

import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from latentae.errors import RequestError

PADDING_MODES = ("zeros", "reflect")
PADDING_KEY = "latentae_padding_mode"  # of a configuration; without an underscore, so that stock diffusers warns of it


class PaddedDownsample(nn.Module):
    """diffusers' ``Downsample2D``, which pads the right and the bottom by hand, with a choice of how."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.padding_mode = "zeros"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="constant" if self.padding_mode == "zeros" else self.padding_mode))


def set_padding_mode(autoencoder: Any, mode: str) -> None:
    """Let every convolution of an image autoencoder pad by ``mode``, zeros or reflect, and note it in its config.

    Names of weights stay. A constant image then has constant features up to the border, in every network but those,
    such as DC-AE's decoder, whose channels become pixels. Reflection needs features of two pixels a side, so images
    of two latents a side.

    Raises:
        RequestError: no such mode, or convolutions of videos, or with weights of their own making.
    """
    name = type(autoencoder).__name__
    if mode not in PADDING_MODES:
        raise RequestError(f"padding_mode {mode!r} is unknown; expected {' or '.join(PADDING_MODES)}.")
    if any(isinstance(module, nn.Conv1d | nn.Conv3d) for module in autoencoder.modules()):
        raise RequestError(f"padding_mode is for image autoencoders, and {name} has convolutions of other kinds.")
    for module in list(autoencoder.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, Downsample2D) and child.use_conv and child.padding == 0 and child.norm is None:
                setattr(module, child_name, PaddedDownsample(child.conv))
    for module in autoencoder.modules():
        if isinstance(module, PaddedDownsample) or (isinstance(module, nn.Conv2d) and any(module.padding)):
            module.padding_mode = mode
    autoencoder.register_to_config(**{PADDING_KEY: mode})


def padding_mode(autoencoder: Any) -> str:
    """How the convolutions of an autoencoder pad, by its configuration."""
    return str(autoencoder.config.get(PADDING_KEY, "zeros"))
