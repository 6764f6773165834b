"""SWYCC, "sample what you can't compress": a deterministic decoder, and a diffusion one on top of it
(Birodkar et al., arXiv 2409.02529).

    pixels ─ encoder ─ latents ─ initial decoder ─ coarse image ─┐
                                              noise ─ refine ─ … ─ pixels

Encoder, initial decoder and the denoiser that refines its image train together: the initial decoder by squared error
and a perceptual loss, the denoiser, which predicts the image itself, by the diffusion loss, whose gradient reaches the
encoder through the coarse image. The paper's public text gives neither widths nor weights: every number here that is
marked so is ours.
"""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentae.families.base import run_half
from latentae.families.diffusion import Condition, DiffusionAutoencoder
from latentae.nn.exact_tiling import run_steps, steps_of
from latentae.nn.unet import GroupNorm, UNet


class PlainBlock(nn.Module):
    """shortcut(x) + conv(gelu(norm(conv(gelu(norm(x))))))."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.gelu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.gelu(self.norm2(y)))


class Stack(nn.Sequential):
    """Modules in a row, whose residual blocks may be computed anew in the backward pass."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def forward(self, x: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """``tile``: of the input, in which all runs; None for the whole at once."""
        if tile is not None:
            return run_steps(steps_of(self), x, tile)
        for module in self:
            if self.gradient_checkpointing and x.requires_grad and isinstance(module, PlainBlock):
                x = self._gradient_checkpointing_func(module, x)
            else:
                x = module(x)
        return x


def _encoder(channels_out: int, widths: tuple[int, ...], layers: int) -> Stack:
    """Pixels to moments: residual blocks of each width, a convolution of stride 2 after all but the last."""
    modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
        modules += [PlainBlock(before if layer == 0 else width, width) for layer in range(layers)]
        if level < len(widths) - 1:
            modules.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
    return Stack(*modules, GroupNorm(widths[-1]), nn.GELU(), nn.Conv2d(widths[-1], channels_out, 3, padding=1))


def _initial_decoder(latent_channels: int, widths: tuple[int, ...], layers: int) -> Stack:
    """The encoder's mirror image, which goes up by depth to space."""
    narrowing = widths[::-1]
    modules: list[nn.Module] = [nn.Conv2d(latent_channels, narrowing[0], 3, padding=1)]
    for level, (before, width) in enumerate(pairwise([narrowing[0], *narrowing])):
        modules += [PlainBlock(before if layer == 0 else width, width) for layer in range(layers)]
        if level < len(widths) - 1:
            modules += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
    return Stack(*modules, GroupNorm(widths[0]), nn.GELU(), nn.Conv2d(widths[0], 3, 3, padding=1))


class SWYCC(DiffusionAutoencoder):
    """Convolutional encoder, initial decoder, and a denoiser that sees its image.

    Args:
        latent_channels: channels of the latents, whose number is the paper's only regulariser.
        widths, layers: of encoder and initial decoder, from full resolution down; every width but the last halves the
            size. Not from the paper.
        decoder_widths, decoder_layers: of the denoiser's levels. Not from the paper.
        patch_size: pixels along a side that are one position of the denoiser's first level. Not from the paper.
        transformer_layers: transformer blocks in the denoiser's middle. Not from the paper.
        adaptive_norm: the latents also scale and shift the denoiser's norms. Not from the paper.
        latent_regularizer, latent_noise_std: see `DiffusionAutoencoder`, as of all that follow.
        prediction, path: of the denoiser; the paper predicts the image. The path is not from the paper.
        num_inference_steps, time_shift_rho, decode_seed: of sampling. Not from the paper.
        condition_mean, condition_std: of the latents that the decoders get.
        scaling_factor, shift_factor: normalised latents are ``(z - shift_factor) * scaling_factor``.
        latents_mean, latents_std: the same, channel by channel.

    Raises:
        RequestError: an unknown choice, or widths that do not fit the compression.
    """

    _no_split_modules: Any = ["PlainBlock", "ResBlock", "TransformerBlock"]
    _repeated_blocks: Any = ["PlainBlock", "ResBlock"]
    _group_offload_block_modules = ["encoder", "initial_decoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (128, 256, 256, 512),
        layers: int = 2,
        decoder_widths: tuple[int, ...] = (128, 256, 256, 512),
        decoder_layers: int = 2,
        patch_size: int = 1,
        transformer_layers: int = 0,
        adaptive_norm: bool = False,
        latent_regularizer: str = "none",
        latent_noise_std: float = 0.08,
        prediction: str = "x0",
        path: str = "cosine",
        num_inference_steps: int = 4,
        time_shift_rho: float = 1.0,
        decode_seed: int = 0,
        condition_mean: tuple[float, ...] | None = None,
        condition_std: tuple[float, ...] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        super().__init__()
        self._check_arguments()
        self.encoder = _encoder(latent_channels * (2 if latent_regularizer == "kl" else 1), widths, layers)
        self.initial_decoder = _initial_decoder(latent_channels, widths, layers)
        self.decoder = UNet(
            3,
            3 * patch_size**2,
            decoder_widths,
            decoder_layers,
            patch_size,
            transformer_layers,
            latent_channels if adaptive_norm else 0,
        )

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** (len(self._internal_dict["widths"]) - 1)

    def first_image(self, z: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        return run_half(self.initial_decoder, self.standardised(z), tile)

    def condition(self, z: Tensor, base: Tensor | None = None) -> Condition:
        base = self.first_image(z) if base is None else base
        z = self.standardised(z)
        patches = F.pixel_unshuffle(base, self._internal_dict["patch_size"])
        return Condition(patches, z if self._internal_dict["adaptive_norm"] else None, base)


SWYCC.__module__ = "latentae"
