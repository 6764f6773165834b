"""LiteVAE: an autoencoder that encodes wavelets (Sadat et al., NeurIPS 2024, arXiv 2405.14477).

A multilevel 2D wavelet transform does most of what the first half of a VAE's encoder learns, at no cost. Of each level
the four bands (12 channels) pass a small U-Net of their own, the results are pooled to the size of the deepest level,
and one more U-Net turns them into the moments of a Gaussian posterior. The decoder is that of the Stable Diffusion VAE.

    pixels ─ DWT ─ level 1 (H/2) ─ U-Net ─ pool 4 ┐
              └─── level 2 (H/4) ─ U-Net ─ pool 2 ┼─ U-Net ─ mean, log variance (2C, H/8) ─ decoder ─ pixels
                └─ level 3 (H/8) ─ U-Net ─────────┘
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from latentae.errors import RequestError
from latentae.families.base import Autoencoder
from latentae.nn.exact_tiling import State, Step, run_steps, step_of, steps_of
from latentae.nn.precision import widen
from latentae.nn.sd_vae import Decoder, DecoderTiny
from latentae.nn.wavelet import dwt2, idwt2

WAVELET_MODE = "periodization"  # the border treatment in which every wavelet halves the image; Haar needs none
BANDS = 4  # low-pass, horizontal, vertical and diagonal details, in PyWavelets' order
NORM_GROUPS = 32  # at most, in the encoder
EPSILON = 1e-6


class NormSiLU(nn.GroupNorm):
    """SiLU of the group norm, with 32 groups or as many as divide the channels; of single pixels too."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(NORM_GROUPS, channels), channels, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(y, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float):
        super().__init__()
        self.norm1 = NormSiLU(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = NormSiLU(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x))
        y = self.conv2(self.dropout(self.norm2(y)))
        return y.add_(self.shortcut(x))


class UNet(nn.Module):
    """A U-Net without resampling: blocks that widen, blocks in the middle, blocks that narrow and take the skips.

    Shape: (B, channels_in, h, w) to (B, channels_out, h, w).
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __init__(
        self, channels_in: int, channels_out: int, width: int, multipliers: Sequence[int], layers: int, dropout: float
    ):
        super().__init__()
        widths = [width * multiplier for multiplier in multipliers for _ in range(layers)]
        self.conv_in = nn.Conv2d(channels_in, width, 3, padding=1)
        self.down_blocks = nn.ModuleList(ResBlock(a, b, dropout) for a, b in zip([width, *widths], widths))
        self.mid_blocks = nn.ModuleList(ResBlock(widths[-1], widths[-1], dropout) for _ in range(2))
        narrowing = widths[::-1]
        before = [widths[-1], *narrowing]
        self.up_blocks = nn.ModuleList(ResBlock(a + b, b, dropout) for a, b in zip(before, narrowing))
        self.conv_out = nn.Conv2d(width * multipliers[0], channels_out, 3, padding=1)

    def forward(self, x: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """``tile``: run in tiles of this height and width; None for the whole at once."""
        if tile is not None:
            return run_steps(self.steps(), x, tile)
        x = self.conv_in(x)
        skips = []
        for block in self.down_blocks:
            x = self._run(block, x)
            skips.append(x)
        for block in self.mid_blocks:
            x = self._run(block, x)
        for block in self.up_blocks:
            x = torch.cat([x, skips.pop()], dim=1)  # here, where nothing else holds the two: the block is at its widest
            x = self._run(block, x)
        return self.conv_out(x)

    def steps(self) -> list[Step]:
        """The same for tiles: the state is all skips that are still to come and, last, what the next block gets."""

        def replace(block: nn.Module, *state: Tensor) -> State:
            return *state[:-1], block(state[-1])

        def keep(block: nn.Module, *state: Tensor) -> State:
            return *state, block(state[-1])

        def join(block: nn.Module, *state: Tensor) -> State:
            *skips, skip, x = state
            return *skips, block(torch.cat([x, skip], dim=1))

        widening = [keep] * (len(self.down_blocks) - 1)
        ways = [replace, replace, *widening, keep, replace, *[join] * len(self.up_blocks), replace]
        blocks = [self.conv_in, *self.down_blocks, *self.mid_blocks, *self.up_blocks, self.conv_out]
        return [step_of(block, partial(way, block)) for way, block in zip(ways, blocks, strict=True)]

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x)
        return block(x)


class Encoder(nn.Module):
    """Wavelet bands of each level, a feature extractor for each, and the aggregator of all their features.

    Shape: pixels (B, 3, H, W) to moments (B, 2C, H/f, W/f), means first, with f two to the number of levels.
    """

    def __init__(self, levels: int, wavelet: str, band_scale: float, extractor: dict[str, Any], aggregator: UNet):
        super().__init__()
        self.wavelet = wavelet
        self.band_scale = band_scale
        self.extractors = nn.ModuleList(UNet(**extractor) for _ in range(levels))
        self.aggregator = aggregator

    def bands(self, pixels: Tensor) -> Iterator[Tensor]:
        """The bands of level 1, 2, …: (B, 4 * 3, H/2^l, W/2^l), scaled so that low-pass ones keep the pixels' range."""
        low = widen(pixels)
        for level in range(1, len(self.extractors) + 1):
            low, *details = dwt2(low, self.wavelet, WAVELET_MODE)
            bands = torch.cat([low, *details], dim=1).mul_(self.band_scale**level).to(pixels.dtype)
            yield bands.contiguous(memory_format=torch.channels_last)  # in which convolutions on CPUs are faster

    def forward(self, pixels: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """``tile``: of pixels, in which the U-Nets run; None for the whole image at once."""
        levels = len(self.extractors)
        tiles = [tile and (tile[0] >> level, tile[1] >> level) for level in range(1, levels + 1)]
        features = [
            F.avg_pool2d(self.extractors[i](bands, tiles[i]), 2 ** (levels - 1 - i))
            for i, bands in enumerate(self.bands(pixels))
        ]
        return self.aggregator(torch.cat(features, dim=1), tiles[-1]).contiguous()


class SelfModulatedConv2d(nn.Conv2d):
    """A 3x3 convolution with weights of unit norm: s_i w / |s_i w| times a gain, with a learnt scale s_i per input.

    The norm is over input channels and kernel positions, for each output channel. Nothing depends on the data, so that
    it is a plain convolution once it is trained: `folded_weight`.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)
        self.input_scale = nn.Parameter(torch.ones(channels_in))
        self.gain = nn.Parameter(torch.ones(1))

    def folded_weight(self) -> Tensor:
        weight = widen(self.weight) * widen(self.input_scale).view(1, -1, 1, 1)
        power = weight.square().sum(dim=(1, 2, 3), keepdim=True)
        return (weight * torch.rsqrt(power + 1e-8) * widen(self.gain)).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.folded_weight(), self.bias)


class PlainConv2d(nn.Conv2d):
    """What a self-modulated convolution becomes."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)


class NormFreeBlock(nn.Module):
    """shortcut(x) + conv(silu(conv(silu(x)))): the decoder's residual block without its norms."""

    def __init__(self, channels_in: int, channels_out: int, convolution: Any):
        super().__init__()
        self.conv1 = convolution(channels_in, channels_out)
        self.conv2 = convolution(channels_out, channels_out)
        self.conv_shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.conv1(F.silu(x)))).add_(self.conv_shortcut(x))


class NormFreeDecoder(nn.Module):
    """The decoder of the Stable Diffusion VAE, its normed residual blocks replaced by norm-free ones.

    Only the attention in the middle keeps its norm. Shape: (B, C, h, w) to (B, out_channels, f*h, f*w).
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        widths: Sequence[int],
        layers: int,
        norm_groups: int,
        attention: bool,
        convolution: Any,
    ):
        super().__init__()
        width = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        blocks: list[nn.Module] = [NormFreeBlock(width, width, convolution)]
        if attention:
            blocks.append(
                Attention(
                    width, heads=1, dim_head=width, norm_num_groups=norm_groups, eps=EPSILON, residual_connection=True,
                    bias=True, upcast_softmax=True, _from_deprecated_attn_block=True,
                )
            )  # fmt: skip
        blocks.append(NormFreeBlock(width, width, convolution))
        self.middle = len(blocks)
        for i, wider in enumerate(reversed(widths)):
            if i > 0:
                blocks += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
            for _ in range(layers + 1):
                blocks.append(NormFreeBlock(width, wider, convolution))
                width = wider
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """``tile``: of latents, in which all after the middle runs; None for the whole at once."""
        x = self.conv_in(z)
        if tile is not None:
            for block in self.blocks[: self.middle]:
                x = block(x)
            out = nn.Sequential(nn.SiLU(), self.conv_out)
            return run_steps(steps_of([*self.blocks[self.middle :], out]), x, tile, kept=0)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return self.conv_out(F.silu(x))


class LiteVAE(Autoencoder):
    """Wavelet autoencoder with a Gaussian posterior.

    Args:
        in_channels: channels of the pixels.
        latent_channels: channels of the latents.
        levels: of the wavelet transform; the compression ratio is two to their number.
        wavelet: any discrete wavelet of PyWavelets, by name; the paper's is Haar.
        band_scale: the bands of level l are multiplied by ``band_scale ** l``; one half keeps the low-pass bands in
            the pixels' range.
        extractor_channels, extractor_multipliers: width of the feature extractors, and its factors block by block.
        aggregator_channels, aggregator_multipliers: the same of the aggregator.
        layers_per_block: residual blocks for each factor.
        dropout: inside the encoder's residual blocks.
        decoder_norm: ``group``: diffusers' own ``Decoder``, whose weights are those of ``AutoencoderKL``;
            ``self_modulated``: norm-free blocks of self-modulated convolutions; ``none``: the same after `folded`;
            ``tiny``: diffusers' ``DecoderTiny``, whose weights are those of ``AutoencoderTiny`` (TAESD).
        decoder_block_out_channels: the decoder's widths, from full resolution down, one for each level and one more.
        decoder_layers_per_block: residual blocks of each width, less one; for ``tiny`` their number at each width.
        norm_num_groups: groups of the decoder's norms.
        mid_block_add_attention: whether the decoder has attention in the middle.
        use_post_quant_conv: whether a 1x1 convolution precedes the decoder, as in most published ``AutoencoderKL``.
        output_type: ``pixels``, or ``wavelet``: the decoder gives the four bands of level 1, at half the size and
            with one width less, and the inverse transform gives the pixels.
        scaling_factor, shift_factor: normalised latents are ``(z - shift_factor) * scaling_factor``.
        latents_mean, latents_std: the same, channel by channel.
        force_upcast: whether pipelines in half precision decode in fp32, for decoders that overflow.

    Raises:
        RequestError: an unknown wavelet, decoder norm or output type, or another number of decoder widths or layers.
    """

    _no_split_modules: Any = ["ResBlock", "ResnetBlock2D", "NormFreeBlock", "Attention", "AutoencoderTinyBlock"]
    _repeated_blocks: Any = ["ResBlock"]
    _group_offload_block_modules = ["post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 12,
        levels: int = 3,
        wavelet: str = "haar",
        band_scale: float = 0.5,
        extractor_channels: int = 32,
        extractor_multipliers: tuple[int, ...] = (1, 2, 3),
        aggregator_channels: int = 32,
        aggregator_multipliers: tuple[int, ...] = (1, 2, 3),
        layers_per_block: int = 2,
        dropout: float = 0.0,
        decoder_norm: str = "group",
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        decoder_layers_per_block: int | tuple[int, ...] = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        use_post_quant_conv: bool = False,
        output_type: str = "pixels",
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        super().__init__()
        _check_choice("decoder_norm", decoder_norm, ("group", "self_modulated", "none", "tiny"))
        _check_choice("output_type", output_type, ("pixels", "wavelet"))
        dwt2(torch.zeros(1, 1, 2, 2, device="cpu"), wavelet, WAVELET_MODE)  # refuses what is no wavelet
        stages = levels if output_type == "wavelet" else levels + 1
        if len(decoder_block_out_channels) != stages:
            raise RequestError(
                f"A LiteVAE of {levels} levels that gives {output_type} has {stages} decoder widths, but "
                f"decoder_block_out_channels has {len(decoder_block_out_channels)}: {list(decoder_block_out_channels)}."
            )
        layers: Any = decoder_layers_per_block
        if (0 if isinstance(layers, int) else len(layers)) != (stages if decoder_norm == "tiny" else 0):
            raise RequestError(
                "decoder_layers_per_block is one number, or with decoder_norm tiny one for each of the "
                f"{stages} decoder widths; got {layers} with decoder_norm {decoder_norm}."
            )
        bands = BANDS * in_channels
        shared = dict(layers=layers_per_block, dropout=dropout)
        extractor = dict(
            channels_in=bands, channels_out=bands, width=extractor_channels, multipliers=extractor_multipliers, **shared
        )
        aggregator = UNet(
            levels * bands, 2 * latent_channels, aggregator_channels, aggregator_multipliers, layers_per_block, dropout
        )
        self.encoder = Encoder(levels, wavelet, band_scale, extractor, aggregator)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        out_channels = bands if output_type == "wavelet" else in_channels
        if decoder_norm == "group":
            self.decoder = Decoder(
                latent_channels,
                out_channels,
                ("UpDecoderBlock2D",) * stages,
                decoder_block_out_channels,
                layers,
                norm_num_groups,
                mid_block_add_attention=mid_block_add_attention,
            )
        elif decoder_norm == "tiny":
            self.decoder = DecoderTiny(
                latent_channels,
                out_channels,
                tuple(reversed(layers)),
                tuple(reversed(decoder_block_out_channels)),
                upsampling_scaling_factor=2,
                act_fn="relu",
                upsample_fn="nearest",
            )
        else:
            self.decoder = NormFreeDecoder(
                latent_channels,
                out_channels,
                decoder_block_out_channels,
                layers,
                norm_num_groups,
                mid_block_add_attention,
                SelfModulatedConv2d if decoder_norm == "self_modulated" else PlainConv2d,
            )

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** self._internal_dict["levels"]

    def posterior(self, moments: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(moments)

    def _decode(self, z: Tensor) -> Tensor:
        if len(z) * z.shape[-2] * z.shape[-1] == 1:  # torch takes the norm of a single latent for a mistake
            return self._decode(z.repeat(2, 1, 1, 1))[:1]
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        decoded = super()._decode(z)
        if self._internal_dict["output_type"] == "pixels":
            return decoded
        cA, cH, cV, cD = (widen(decoded) / self._internal_dict["band_scale"]).chunk(BANDS, dim=1)
        return idwt2(cA, cH, cV, cD, self._internal_dict["wavelet"], WAVELET_MODE).to(decoded.dtype)

    def folded(self) -> "LiteVAE":
        """A copy with plain convolutions in place of self-modulated ones, which computes the same; or itself."""
        if self._internal_dict["decoder_norm"] != "self_modulated":
            return self
        weights = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, SelfModulatedConv2d):
                weights[f"{name}.weight"] = module.folded_weight()
                del weights[f"{name}.input_scale"], weights[f"{name}.gain"]
        plain: Any = type(self).from_config({**self._internal_dict, "decoder_norm": "none"})
        plain.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
        return plain.train(self.training)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RequestError(f"{name} {value!r} is unknown to LiteVAE; expected {', '.join(choices)}.")


LiteVAE.__module__ = "latentae"
