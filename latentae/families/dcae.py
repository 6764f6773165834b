"""DC-AE: deep compression autoencoders (arXiv 2410.10733) and DC-AE 1.5 (arXiv 2508.00413).

Pixels (B, 3, H, W) pass stages of residual blocks; between two stages the image halves and a parameter-free shortcut
moves space into channels, so that the trainable branch only learns the difference. Shallow stages are convolutions,
deep ones linear attention; the decoder mirrors the encoder. Latents are deterministic, (B, C, H/f, W/f), f32 to f128.

Configuration and parameter names are those of diffusers' ``AutoencoderDC``, so that folders open on both sides.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor

from latentae.errors import RequestError
from latentae.families.base import Autoencoder
from latentae.nn.attention import attend_to_sums, relu_attention_sums, relu_linear_attention
from latentae.nn.norms import RMSNorm2d
from latentae.nn.quantize import make_quantizer
from latentae.nn.resample import (
    average_groups,
    duplicate_to_pixels,
    nearest_upsample_conv3x3,
    pixels_of,
    space_to_channel_average,
)
from latentae.nn.tiling import run_in_tiles, spans

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}
LOCAL_STAGES = 3  # convolutional stages at 1/1, 1/2 and 1/4 of the image hold nearly all the memory


def make_norm(kind: str, channels: int) -> Any:
    if kind == "rms_norm":
        return RMSNorm2d(channels)
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels)
    raise RequestError(f"norm type {kind!r} is unknown to DC-AE; expected rms_norm or batch_norm.")


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))): the norm ends the branch, so a zero norm weight makes the block the identity."""

    def __init__(self, channels: int, norm: str = "rms_norm", act: str = "silu"):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm: Any = make_norm(norm, channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv1(x), inplace=not torch.is_grad_enabled())
        if isinstance(self.norm, RMSNorm2d):
            return self.norm(self.conv2(y), overwrite=True).add_(x)
        return self.norm(self.conv2(y)).add_(x)


class MultiscaleProjection(nn.Module):
    """Queries, keys and values averaged over a neighbourhood: depthwise, then one small matrix per head and role."""

    def __init__(self, channels: int, heads: int, kernel_size: int):
        super().__init__()
        self.proj_in = nn.Conv2d(
            3 * channels, 3 * channels, kernel_size, padding=kernel_size // 2, groups=3 * channels, bias=False
        )
        self.proj_out = nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * heads, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(qkv))


def everywhere(x: Tensor) -> tuple[slice, slice]:
    """All rows and columns of a map."""
    return slice(0, x.shape[-2]), slice(0, x.shape[-1])


class LinearAttention(nn.Module):
    """x + norm(proj(relu linear attention)), over one scale of queries, keys and values or several.

    ``to_q``, ``to_k`` and ``to_v`` are thirds of one projection whose channels run head by head, [q k v] in each: the
    names are those of published checkpoints, the roles are only defined after concatenation.
    """

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm: str):
        super().__init__()
        self.head_dim = head_dim
        self.tile: int | None = None
        self.halo = max(kernel_sizes, default=1) // 2
        heads = channels // head_dim
        inner = heads * head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(inner, heads, k) for k in kernel_sizes)
        self.to_out = nn.Linear(inner * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out: Any = make_norm(norm, channels)
        nn.init.zeros_(self.norm_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.tile is not None and x.shape[-2] * x.shape[-1] > self.tile**2:
            return self._in_tiles(x, self.tile)
        q, k, v = self._heads(x, *everywhere(x))
        return self._out(x, relu_linear_attention(q, k, v))

    def _in_tiles(self, x: Tensor, tile: int) -> Tensor:
        """The same, since what the attention needs of keys and values are sums: these first, then the queries."""
        places = list(product(*(spans(size, tile, self.halo) for size in x.shape[-2:])))
        context: Tensor | float = 0.0
        total: Tensor | float = 0.0
        for (rows, inner_rows), (columns, inner_columns) in places:
            _, k, v = self._heads(x[..., rows, columns], inner_rows, inner_columns)
            sums = relu_attention_sums(k, v)
            context, total = context + sums[0], total + sums[1]
        assert isinstance(context, Tensor)
        assert isinstance(total, Tensor)
        result = torch.empty_like(x)
        for (rows, inner_rows), (columns, inner_columns) in places:
            piece = x[..., rows, columns]
            q, _, _ = self._heads(piece, inner_rows, inner_columns)
            inner = piece[..., inner_rows, inner_columns]
            down, right = rows.start + inner_rows.start, columns.start + inner_columns.start
            part = result[..., down : down + inner.shape[-2], right : right + inner.shape[-1]]
            part.copy_(self._out(inner, attend_to_sums(q, context, total)))
        return result

    def _heads(self, x: Tensor, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, S*heads, N, D) of the N pixels of these rows and columns."""
        pixels = x.permute(0, 2, 3, 1)
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1)  # (B, H, W, 3C)
        if self.to_qkv_multiscale:
            maps = qkv.permute(0, 3, 1, 2)
            scales = [scale(maps).permute(0, 2, 3, 1) for scale in self.to_qkv_multiscale]
            qkv = torch.cat([qkv, *scales], dim=-1)  # (B, H, W, S*3C)
        qkv = qkv[:, rows, columns].flatten(1, 2).unflatten(-1, (-1, 3 * self.head_dim))  # (B, N, S*heads, 3D)
        return qkv.transpose(1, 2).chunk(3, dim=-1)

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and what it attends to, (B, S*heads, HW, D)."""
        batch, _, height, width = x.shape
        y = y.to(x.dtype).transpose(1, 2).reshape(batch, height, width, -1)  # (B, H, W, S*C)
        y = self.to_out(y).permute(0, 3, 1, 2)  # (B, C, H, W)
        return self.norm_out(y).add_(x)


class GLUMBConv(nn.Module):
    """x + norm(inverted bottleneck with a gated depthwise convolution in the middle)."""

    def __init__(self, channels: int, expand_ratio: int = 4):
        super().__init__()
        hidden = expand_ratio * channels
        self.tile: int | None = None
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = RMSNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.tile is not None and x.shape[-2] * x.shape[-1] > self.tile**2:
            return run_in_tiles(self._forward, x, (self.tile, self.tile), halo=1)  # eight times C is the widest tensor
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv_inverted(x), inplace=not torch.is_grad_enabled())
        y, gate = self.conv_depth(y).chunk(2, dim=1)
        return self.norm(self.conv_point(F.silu(gate) * y), overwrite=True).add_(x)


class EfficientViTBlock(nn.Module):
    """Linear attention for the whole image, then a gated convolution for the neighbourhood."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm: str):
        super().__init__()
        self.attn = LinearAttention(channels, head_dim, kernel_sizes, norm)
        self.conv_out = GLUMBConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


def require_multiple(what: str, value: int, divisor: int) -> None:
    if value % divisor:
        raise RequestError(
            f"DC-AE cannot group channels for its shortcuts: {what} need {value} to be a multiple of {divisor}."
        )


class DownBlock(nn.Module):
    """Halve the image: a convolution plus the space-to-channel average of its input."""

    def __init__(self, channels_in: int, channels_out: int, unshuffle: bool, shortcut: bool = True):
        super().__init__()
        require_multiple("stage widths going down", 4 * channels_in, channels_out if shortcut else 1)
        self.channels_out = channels_out
        self.unshuffle = unshuffle
        self.shortcut = shortcut
        if unshuffle:
            self.conv = nn.Conv2d(channels_in, channels_out // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        return y.add_(space_to_channel_average(x, self.channels_out)) if self.shortcut else y


class UpsampleConv2d(nn.Conv2d):
    """Nearest upsampling by two, then the 3x3 convolution that the weights say, computed as one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode != "zeros":
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        return nearest_upsample_conv3x3(x, self.weight, self.bias)


class UpBlock(nn.Module):
    """Double the image: a convolution plus the duplicated, channel-to-space rearranged input."""

    def __init__(self, channels_in: int, channels_out: int, interpolate: bool, shortcut: bool = True):
        super().__init__()
        require_multiple("stage widths going up", 4 * channels_out, channels_in if shortcut else 1)
        self.channels_out = channels_out
        self.interpolate = interpolate
        self.shortcut = shortcut
        self.conv: nn.Conv2d
        if interpolate:
            self.conv = UpsampleConv2d(channels_in, channels_out, 3, padding=1)
        else:
            self.conv = nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) if self.interpolate else F.pixel_shuffle(self.conv(x), 2)
        if self.shortcut:
            pixels_of(y).add_(duplicate_to_pixels(x, self.channels_out))
        return y


def make_blocks(
    kind: str, depth: int, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm: str, act: str
) -> list[nn.Module]:
    if kind == "ResBlock":
        return [ResBlock(channels, norm, act) for _ in range(depth)]
    if kind == "EfficientViTBlock":
        return [EfficientViTBlock(channels, head_dim, kernel_sizes, norm) for _ in range(depth)]
    raise RequestError(f"block type {kind!r} is unknown to DC-AE; expected ResBlock or EfficientViTBlock.")


def per_stage(value: str | Sequence[str], stages: int) -> Sequence[str]:
    return (value,) * stages if isinstance(value, str) else value


OURS = ("quantizer", "latents_mean", "latents_std")  # arguments that AutoencoderDC has not
PER_STAGE = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
CHOICES = {
    "upsample_block_type": ("pixel_shuffle", "interpolate"),
    "downsample_block_type": ("pixel_unshuffle", "conv"),
    "decoder_conv_act_fn": tuple(ACTIVATIONS),
    "decoder_act_fns": tuple(ACTIVATIONS),
}


def check_stages(stages: int, config: dict[str, Any]) -> None:
    """Refuse a configuration whose entries do not name what they should, or not once for each stage."""
    per_stage_keys = {f"{half}_{key}" for half in ("encoder", "decoder") for key in PER_STAGE}
    per_stage_keys |= {"decoder_norm_types", "decoder_act_fns"}
    for key, value in config.items():
        if key in per_stage_keys and not isinstance(value, str) and len(value) != stages:
            raise RequestError(f"DC-AE has {stages} stages, but {key} has {len(value)} entries: {list(value)}.")
        for entry in [value] if isinstance(value, str) else value if key in CHOICES else []:
            if entry not in CHOICES.get(key, (entry,)):
                raise RequestError(f"{key} {entry!r} is unknown to DC-AE; expected {' or '.join(CHOICES[key])}.")


def count_local_stages(block_types: Sequence[str]) -> int:
    """How many of the shallow stages have a finite receptive field and are worth tiling."""
    stages = 0
    while stages < min(LOCAL_STAGES, len(block_types) - 1) and block_types[stages] == "ResBlock":
        stages += 1
    return stages


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Stage(nn.Sequential):
    """Blocks of one resolution, whose activations may be computed anew in the backward pass."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x


class Encoder(nn.Module):
    """conv_in, then per stage: blocks, down; conv_out with an averaging shortcut. (B, 3, H, W) to (B, C, H/f, W/f)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        head_dim: int,
        block_types: Sequence[str],
        widths: Sequence[int],
        depths: Sequence[int],
        qkv_multiscales: Sequence[Sequence[int]],
        unshuffle: bool,
        out_shortcut: bool,
    ):
        super().__init__()
        self.conv_in: nn.Module
        if depths[0] > 0:
            self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        else:  # no stage at full resolution: the first convolution already halves the image
            self.conv_in = DownBlock(in_channels, widths[1], unshuffle, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            stage = make_blocks(block_types[i], depth, width, head_dim, qkv_multiscales[i], "rms_norm", "silu")
            if i < len(widths) - 1 and depth > 0:
                stage.append(DownBlock(width, widths[i + 1], unshuffle))
            self.down_blocks.append(Stage(*stage))
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)
        self.latent_channels = latent_channels
        self.out_shortcut = out_shortcut
        require_multiple("latents of the encoder", widths[-1], latent_channels if out_shortcut else 1)

        self.local_stages = count_local_stages(block_types)
        radius = 1 + sum((2 * depth + 1) * 2**i for i, depth in enumerate(depths[: self.local_stages]))
        self.local_halo = round_up(radius, 2**self.local_stages)  # in pixels

    def forward(self, x: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """``tile``: in pixels, in which the local stages run; None for the whole image at once."""
        if tile is None:
            return self.deep(self.local(x))
        ratio = 2**self.local_stages
        height, width = (max(side // ratio, 1) * ratio for side in tile)
        return self.deep(run_in_tiles(self.local, x, (height, width), self.local_halo, down=ratio))

    def local(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for stage in self.down_blocks[: self.local_stages]:
            x = stage(x)
        return x

    def deep(self, x: Tensor) -> Tensor:
        for stage in self.down_blocks[self.local_stages :]:
            x = stage(x)
        y = self.conv_out(x)
        if self.out_shortcut:
            y = y + average_groups(x, self.latent_channels)
        return y.contiguous()


class Decoder(nn.Module):
    """conv_in with a duplicating shortcut, then per stage: up, blocks; norm, act, conv_out. The encoder's mirror."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        head_dim: int,
        block_types: Sequence[str],
        widths: Sequence[int],
        depths: Sequence[int],
        qkv_multiscales: Sequence[Sequence[int]],
        norms: Sequence[str],
        acts: Sequence[str],
        interpolate: bool,
        in_shortcut: bool,
        out_act: str,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        require_multiple("latents of the decoder", widths[-1], latent_channels if in_shortcut else 1)
        self.in_shortcut = in_shortcut
        self.in_repeats = widths[-1] // latent_channels
        self.up_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            stage = make_blocks(block_types[i], depth, width, head_dim, qkv_multiscales[i], norms[i], acts[i])
            if i < len(widths) - 1 and depth > 0:
                stage.insert(0, UpBlock(widths[i + 1], width, interpolate))
            self.up_blocks.append(Stage(*stage))
        self.ratio = 2 ** (len(widths) - 1)
        width = widths[0] if depths[0] > 0 else widths[1]
        self.norm_out = RMSNorm2d(width)
        self.out_act = ACTIVATIONS[out_act]
        self.conv_out: nn.Module
        if depths[0] > 0:
            self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)
        else:
            self.conv_out = UpBlock(width, in_channels, interpolate, shortcut=False)

        self.local_stages = count_local_stages(block_types)
        radius = 2 + sum((2 * depth + 2) * 2**i for i, depth in enumerate(depths[: self.local_stages]))
        self.local_halo = round_up(radius, 2**self.local_stages)  # in pixels

    def forward(self, z: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """``tile``: in latents, of the part of the image in which the local stages run; None for the whole at once."""
        if tile is None:
            return self.local(self.deep(z))
        ratio = 2**self.local_stages  # pixels of a feature before the local stages
        height, width = (max(side * self.ratio // ratio, 1) for side in tile)
        return run_in_tiles(self.local, self.deep(z), (height, width), self.local_halo // ratio, up=ratio)

    def deep(self, z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(z)
        if self.in_shortcut:
            x = x + z.repeat_interleave(self.in_repeats, dim=1)
        for stage in reversed(self.up_blocks[self.local_stages :]):
            x = stage(x)
        return x

    def local(self, x: Tensor) -> Tensor:
        for stage in reversed(self.up_blocks[: self.local_stages]):
            x = stage(x)
        return self.conv_out(self.out_act(self.norm_out(x))).contiguous()


class DCAE(Autoencoder):
    """Deep compression autoencoder.

    The arguments are those of diffusers' ``AutoencoderDC``; one entry per stage, from full resolution down, and the
    compression ratio is two to the number of stages less one. A depth of zero at full resolution folds that stage
    into the first and the last convolution.

    Args:
        in_channels: channels of the pixels.
        latent_channels: channels of the latents.
        attention_head_dim: width of an attention head.
        encoder_block_types, decoder_block_types: ``ResBlock`` or ``EfficientViTBlock``, for all stages or one each.
        encoder_block_out_channels, decoder_block_out_channels: width of each stage.
        encoder_layers_per_block, decoder_layers_per_block: blocks in each stage.
        encoder_qkv_multiscales, decoder_qkv_multiscales: kernel sizes of the extra attention scales of each stage.
        upsample_block_type: ``pixel_shuffle`` or ``interpolate``.
        downsample_block_type: ``pixel_unshuffle`` or ``conv``.
        decoder_norm_types, decoder_act_fns: of the decoder's blocks, for all stages or one each.
        encoder_out_shortcut, decoder_in_shortcut: shortcuts around the latent; DC-AE 1.5 has none, and only then do
            the first channels of a latent stand alone (`decode` takes any prefix of them).
        decoder_conv_act_fn: activation before the last convolution.
        scaling_factor: one over the root mean square of the latents.
        quantizer: makes the latents discrete: ``{"kind": "vq", "codes": 8192}`` or ``{"kind": "fsq", "levels": [8, 5,
            5, 5]}``, with any argument of `VectorQuantizer` or `FSQ`; ``AutoencoderDC`` has no such thing.
        latents_mean, latents_std: normalised latents are ``(z - mean) * scaling_factor / std``, channel by channel;
            ``AutoencoderDC`` has no such thing either.
    """

    _no_split_modules: Any = ["ResBlock", "EfficientViTBlock"]
    _repeated_blocks: Any = ["ResBlock", "EfficientViTBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: str | tuple[str, ...] = "ResBlock",
        decoder_block_types: str | tuple[str, ...] = "ResBlock",
        encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: str | tuple[str, ...] = "rms_norm",
        decoder_act_fns: str | tuple[str, ...] = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float = 1.0,
        quantizer: dict[str, Any] | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        unset = {key for key in OURS if self._internal_dict[key] is None}  # then the configuration is AutoencoderDC's
        self._internal_dict = FrozenDict({k: v for k, v in self._internal_dict.items() if k not in unset})
        if quantizer is not None:
            self.quantize = make_quantizer(quantizer, latent_channels)
        stages = len(encoder_block_out_channels)
        check_stages(stages, {key: value for key, value in self._internal_dict.items() if not key.startswith("_")})
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            attention_head_dim,
            per_stage(encoder_block_types, stages),
            encoder_block_out_channels,
            encoder_layers_per_block,
            encoder_qkv_multiscales,
            unshuffle=downsample_block_type == "pixel_unshuffle",
            out_shortcut=encoder_out_shortcut,
        )
        self.decoder = Decoder(
            in_channels,
            latent_channels,
            attention_head_dim,
            per_stage(decoder_block_types, stages),
            decoder_block_out_channels,
            decoder_layers_per_block,
            decoder_qkv_multiscales,
            per_stage(decoder_norm_types, stages),
            per_stage(decoder_act_fns, stages),
            interpolate=upsample_block_type == "interpolate",
            in_shortcut=decoder_in_shortcut,
            out_act=decoder_conv_act_fn,
        )

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** (len(self._internal_dict["encoder_block_out_channels"]) - 1)

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        super().enable_tiling(*args, **kwargs)
        self._tile_wide_blocks(max(min(self.tile_sample_min_height, self.tile_sample_min_width) // 8, 8))

    def disable_tiling(self) -> None:
        super().disable_tiling()
        self._tile_wide_blocks(None)

    def _tile_wide_blocks(self, tile: int | None) -> None:
        for module in self.modules():
            if isinstance(module, GLUMBConv | LinearAttention):
                module.tile = tile

    def _decode(self, z: Tensor) -> Tensor:
        missing = self.latent_channels - z.shape[1]
        return super()._decode(F.pad(z, (0, 0, 0, 0, 0, missing)) if missing else z)

    def _accepts_channels(self, channels: int) -> bool:
        structured = not self._internal_dict["decoder_in_shortcut"]  # DC-AE 1.5: any prefix decodes
        prefix = structured and self.quantize is None and 0 < channels < self.latent_channels
        return channels == self.latent_channels or prefix


DCAE.__module__ = "latentae"
