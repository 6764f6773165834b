"""Four-plane factorised video autoencoder (Suhail, Esteves, Sigal, Makadia, arXiv 2412.04452).

A causal 3D convolutional encoder gives a volume of features, which is pooled along time to spatial planes and along
height and width to two spatio-temporal ones. Each plane has a Gaussian posterior of its own. The decoder spreads the
planes over the volume again, concatenates and fuses them. Latents grow with the faces of a clip, not its volume.

    pixels ─ causal 3D encoder ─ features (T', H', W') ┬─ mean over parts of the time ─ xy1, xy2 (H', W') ┐
                                                       ├─ mean over the height ─ xt (T', W') ─────────────┼ spread,
                                                       └─ mean over the width ── yt (T', H') ─────────────┘ fuse
                                                                                 pixels ─ 3D decoder ─────────┘

The public text gives the planes, mean pooling and concatenation as the better choices; all widths are ours. The nets
are those of the Stable Diffusion VAE with a third dimension: `latentae.loading.inflation` takes its weights over.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentae.errors import RequestError
from latentae.families.base import Autoencoder, EncoderOutput
from latentae.nn.exact_tiling import run_steps, steps_of, steps_of_block
from latentae.nn.planes import PlaneLayout
from latentae.nn.precision import widen

__all__ = ["FourPlane", "PlaneGaussian", "PlaneLayout", "time_weights"]

TIME_WEIGHTS = ("halves", "hat", "endpoints", "uniform")
EPSILON = 1e-6
TIME_FEATURES = 8  # sines and cosines of the place in the clip


class Conv3d(nn.Conv3d):
    """A convolution that repeats the first frame before it, as often as its kernel is long: nothing sees the future.

    Args:
        causal: or half of the frames before the first and half after the last, which are repeated.
        stride: along time; ``spatial_stride`` along height and width.
        pads: whether the sides have a border of zeros.
    """

    def __init__(
        self, channels_in: int, channels_out: int, causal: bool, stride: int = 1, spatial_stride: int = 1, pads: int = 1
    ):
        super().__init__(
            channels_in, channels_out, 3, stride=(stride, spatial_stride, spatial_stride), padding=(0, pads, pads)
        )
        self.frames = (2, 0) if causal else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, *self.frames), mode="replicate"))


class FrameNorm(nn.GroupNorm):
    """The group norm of each frame by itself: (B, C, T, H, W) to the same."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        return super().forward(frames).unflatten(0, (len(x), -1)).transpose(1, 2)


class ResBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, causal: bool):
        super().__init__()
        self.norm1 = FrameNorm(groups, channels_in)
        self.conv1 = Conv3d(channels_in, channels_out, causal)
        self.norm2 = FrameNorm(groups, channels_out)
        self.conv2 = Conv3d(channels_out, channels_out, causal)
        same = channels_in == channels_out
        self.conv_shortcut = nn.Identity() if same else nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y))) + self.conv_shortcut(x)


class FrameAttention(Attention):
    """Self-attention within each frame."""

    def __init__(self, channels: int, groups: int):
        super().__init__(
            channels, heads=1, dim_head=channels, norm_num_groups=groups, eps=EPSILON, residual_connection=True,
            bias=True, upcast_softmax=True, _from_deprecated_attn_block=True,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        return super().forward(frames).unflatten(0, (len(x), -1)).transpose(1, 2)


class MidBlock(nn.Module):
    """A residual block, attention and one more."""

    def __init__(self, channels: int, groups: int, attention: bool, causal: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups, causal) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Half the height and width, and with ``stride`` 2 half the frames after the first."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = Conv3d(channels, channels, causal=True, stride=stride, spatial_stride=2, pads=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width, and with ``factor`` 2 twice the frames after the first."""

    doubles = True

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.conv = Conv3d(channels, channels, causal=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=(self.factor, 2, 2), mode="nearest")
        return self.conv(x[:, :, self.factor - 1 :])


class Level(nn.Module):
    """Residual blocks of one width, and what changes the size after them."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, causal: bool):
        super().__init__()
        widths = [channels_in, *[channels_out] * layers]
        self.resnets = nn.ModuleList(ResBlock(a, b, groups, causal) for a, b in pairwise(widths))

    def parts(self) -> list[nn.Module]:
        return [*self.resnets, *getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts():
            x = part(x)
        return x


class Half(nn.Module):
    """What encoder and decoder share: activations may be computed anew in the backward pass."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x)
        return block(x)


class Encoder(Half):
    """Pixels (B, 3, T, H, W) to features, and features to the moments of each plane, or of a volume without planes."""

    def __init__(
        self, pixels: int, latents: int, planes: int, widths: Sequence[int], layers: int, groups: int,
        attention: bool, temporal_levels: Sequence[bool],
    ):  # fmt: skip
        super().__init__()
        self.conv_in = Conv3d(pixels, widths[0], causal=True)
        self.down_blocks: Any = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            level = Level(before, width, layers, groups, causal=True)
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width, 2 if temporal_levels[i] else 1)])
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups, attention, causal=True)
        self.conv_norm_out = FrameNorm(groups, widths[-1])
        names = [*(f"xy{k + 1}" for k in range(planes)), "xt", "yt"] if planes else []
        self.heads = nn.ModuleDict({name: nn.Conv2d(widths[-1], 2 * latents, 3, padding=1) for name in names})
        self.conv_out = None if planes else Conv3d(widths[-1], 2 * latents, causal=True)

    def trunk(self, x: Tensor, tile: tuple[int, int] | None) -> Tensor:
        """Pixels to features (B, D, T', H', W'); all before the middle in tiles, if there is a size for them."""
        if tile is not None:
            levels = [step for level in self.down_blocks for step in steps_of_block(level, level.parts())]
            x = run_steps([*steps_of([self.conv_in]), *levels], x, tile)
        else:
            x = self.conv_in(x)
            for level in self.down_blocks:
                x = self._run(level, x)
        return F.silu(self.conv_norm_out(self._run(self.mid_block, x)))

    def forward(self, x: Tensor, head: str | None = None, tile: tuple[int, int] | None = None) -> Tensor:
        """Pixels to features; or features, pooled to the plane ``head`` or the ``volume``, to its moments.

        Both are here, as the hooks of offloading see nothing else. ``tile``: of pixels; None for whole frames.
        """
        if head is None:
            return self.trunk(x, tile)
        return self.conv_out(x) if head == "volume" and self.conv_out is not None else self.heads[head](x)


class Decoder(Half):
    """Planes of latents, or a volume of them, to features, and features to pixels (B, 3, T, H, W)."""

    def __init__(
        self, pixels: int, latents: int, planes: int, widths: Sequence[int], layers: int, groups: int,
        attention: bool, temporal_levels: Sequence[bool],
    ):  # fmt: skip
        super().__init__()
        narrowing = list(reversed(widths))
        names = [*(f"xy{k + 1}" for k in range(planes)), "xt", "yt"] if planes else []
        self.embeds = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(latents, latents, 1), nn.Conv2d(latents, narrowing[0], 3, padding=1))
                for name in names
            }
        )
        self.conv_in = None if planes else Conv3d(latents, narrowing[0], causal=False)
        self.time = nn.Linear(TIME_FEATURES, narrowing[0], bias=False)
        nn.init.zeros_(self.time.weight)
        self.mid_block = MidBlock(narrowing[0], groups, attention, causal=False)
        self.up_blocks: Any = nn.ModuleList()
        for i, (before, width) in enumerate(zip([narrowing[0], *narrowing], narrowing)):
            level = Level(before, width, layers + 1, groups, causal=False)
            if i < len(widths) - 1:
                level.upsamplers = nn.ModuleList([Upsample(width, 2 if temporal_levels[-1 - i] else 1)])
            self.up_blocks.append(level)
        self.conv_norm_out = FrameNorm(groups, widths[0])
        self.conv_out = Conv3d(widths[0], pixels, causal=False)

    def fuse(self, planes: dict[str, Tensor], layout: PlaneLayout) -> Tensor:
        """Planes spread over the volume and fused: (B, D, T', H', W').

        A 1x1x1 convolution of the concatenated planes is the sum of what it makes of each. So each plane has a
        convolution of its own, before it is spread: the same at a fraction of the cost.
        """
        parts = [layout.spread(name, self.embeds[name](plane)) for name, plane in planes.items()]
        return self.place(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])

    def place(self, x: Tensor) -> Tensor:
        """Features that also know where in the clip they are."""
        place = torch.linspace(0, 1, x.shape[2], device=x.device) if x.shape[2] > 1 else x.new_zeros(1)
        angles = torch.pi * place.float()[:, None] * 2.0 ** torch.arange(TIME_FEATURES // 2, device=x.device)
        features = self.time(torch.cat([angles.sin(), angles.cos() - 1], dim=1).to(x.dtype))  # (T', D)
        return x + features.t()[None, :, :, None, None]

    def trunk(self, x: Tensor, tile: tuple[int, int] | None) -> Tensor:
        """Features to pixels; all after the middle in tiles, if there is a size for them."""
        x = self._run(self.mid_block, x)
        if tile is not None:
            levels = [step for level in self.up_blocks for step in steps_of_block(level, level.parts())]
            out = nn.Sequential(self.conv_norm_out, nn.SiLU(), self.conv_out)
            return run_steps([*levels, *steps_of([out])], x, tile)
        for level in self.up_blocks:
            x = self._run(level, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(
        self, x: Any, layout: PlaneLayout | None = None, enter: bool = False, tile: tuple[int, int] | None = None
    ) -> Tensor:
        """Features to pixels; or with ``enter`` planes of a layout, or a volume, to features.

        ``tile``: of features; None for whole frames.
        """
        if not enter:
            return self.trunk(x, tile)
        return self.fuse(x, layout) if layout is not None else self.place(self.conv_in(x))  # type: ignore[misc]


class PlaneGaussian:
    """The posterior of planes: independent Gaussians of the tokens, whose draws are given as volumes.

    ``mean``, ``logvar``, ``std`` and ``var`` are of the tokens, (B, windows * N, C): each latent counts once.

    Args:
        moments: means and log variances, (B, windows * N, 2C).
        layout: of the planes of one window.
        image: whether draws are without the axis of time, (B, (K + 2)·C, h, w).
    """

    def __init__(self, moments: Tensor, layout: PlaneLayout, image: bool = False):
        self.layout, self.image = layout, image
        self.mean, logvar = moments.chunk(2, dim=2)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = (0.5 * self.logvar).exp(), self.logvar.exp()

    def mode(self) -> Tensor:
        """(B, (K + 2)·C, T', H', W'), the windows one after the other."""
        return self._volume(self.mean)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.at(noise)

    def at(self, noise: Tensor) -> Tensor:
        """The draw of standard normal noise in the shape of ``mean``, as a volume."""
        return self._volume(self.mean + self.std * noise)

    @property
    def moments(self) -> Tensor:
        """Means and log variances as volumes, one after the other: (B, 2·(K + 2)·C, T', H', W')."""
        return torch.cat([self._volume(self.mean), self._volume(self.logvar)], dim=1)

    @classmethod
    def of_moments(cls, moments: Tensor, layout: PlaneLayout) -> "PlaneGaussian":
        """The posterior of a clip of one window, from its `moments`."""
        return cls(torch.cat([layout.unpack(half, "volume") for half in moments.chunk(2, dim=1)], dim=2), layout)

    def _volume(self, tokens: Tensor) -> Tensor:
        windows = tokens.split(self.layout.num_tokens, dim=1)
        volume = torch.cat([self.layout.pack(window, "volume") for window in windows], dim=2)
        return volume[:, :, 0] if self.image else volume


def time_weights(kind: str, planes: int, frames: int) -> Tensor:
    """How much each latent frame counts in each spatial plane, (planes, frames); rows sum to 1.

    ``halves``: the plane's own part of the time; ``hat``: falling linearly from the plane's place in time to that of
    its neighbours; ``uniform``: all alike.
    """
    if kind == "uniform" or (kind == "hat" and planes == 1):
        weights = torch.ones(planes, frames)
    elif kind == "halves":
        start = torch.arange(frames) / frames
        first, last = (torch.arange(planes)[:, None] / planes, (torch.arange(planes)[:, None] + 1) / planes)
        weights = (torch.minimum(start + 1 / frames, last) - torch.maximum(start, first)).clamp(min=0)
    else:
        place = torch.arange(frames) / max(frames - 1, 1) * (planes - 1)
        weights = (1 - (place - torch.arange(planes)[:, None]).abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class FourPlane(Autoencoder):
    """Video autoencoder whose latents are planes.

    ``encode`` and ``decode`` speak of latents as a volume, (B, (K + 2)·C, T', H', W'), in which each plane is constant
    along the axis that it lacks, so that it is an ordinary video autoencoder for pipelines and codecs, and
    ``latents_mean`` and ``latents_std`` of the configuration count plane by plane and channel by channel. `layout` and
    `PlaneLayout.unpack` give the tokens, of which there are K·H'W' + T'(H' + W'). Images have one plane.

    Clips longer than ``window_frames`` are encoded window by window, each with planes of its own, and decoded with
    blended seams.

    Args:
        in_channels: channels of the pixels.
        plane_channels: C, of each plane.
        spatial_planes: K; 2 for four planes, 1 for the tri-plane, and 0 for a volume of latents, the control.
        time_weights: which frames a spatial plane is the mean of: ``halves``, ``hat`` or ``uniform``, see
            `time_weights`; ``endpoints``: xy1 is of the first frame and xy2 of the last, each encoded by itself, so
            that they are known without the frames between.
        temporal_compression: frames per latent frame after the first: 1, 2, 4 …
        block_out_channels: widths from full resolution down; each but the last is halved in height and width.
        layers_per_block: residual blocks of each width, one more in the decoder.
        norm_num_groups: groups of the norms.
        mid_block_add_attention: whether both halves have attention within frames in the middle.
        window_frames: of the longest clip that is encoded at once.
        window_overlap: frames that neighbouring windows share.
        scaling_factor, shift_factor: normalised latents are ``(z - shift_factor) * scaling_factor``.
        latents_mean, latents_std: the same for each of the volume's channels.

    Raises:
        RequestError: unknown weights, endpoints of other than one or two planes, a temporal compression that the
            levels do not have, or windows that cannot be.
    """

    _no_split_modules: Any = ["ResBlock", "FrameAttention"]
    _repeated_blocks: Any = ["ResBlock"]
    is_video = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        plane_channels: int = 8,
        spatial_planes: int = 2,
        time_weights: str = "halves",
        temporal_compression: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        window_frames: int = 17,
        window_overlap: int = 4,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        levels = len(block_out_channels) - 1
        halvings = temporal_compression.bit_length() - 1
        if temporal_compression < 1 or 2**halvings != temporal_compression or halvings > levels:
            raise RequestError(
                f"temporal_compression {temporal_compression} is not 1, 2, … {2**levels}: each of the {levels} levels "
                "that halve height and width may halve the time."
            )
        if time_weights not in TIME_WEIGHTS:
            raise RequestError(f"time_weights {time_weights!r} is unknown; expected {', '.join(TIME_WEIGHTS)}.")
        if time_weights == "endpoints" and spatial_planes > 2:
            raise RequestError(f"A clip has two endpoints, not {spatial_planes}: choose spatial_planes 1 or 2.")
        if (window_frames - 1) % temporal_compression or not 0 <= window_overlap < window_frames:
            raise RequestError(
                f"window_frames {window_frames} must be 1 more than a multiple of temporal_compression "
                f"{temporal_compression}, and window_overlap {window_overlap} less than that and not negative."
            )
        temporal_levels = self._temporal_levels()
        shared = (
            in_channels, plane_channels, spatial_planes, block_out_channels, layers_per_block, norm_num_groups,
            mid_block_add_attention, temporal_levels,
        )  # fmt: skip
        self.encoder = Encoder(*shared)
        self.decoder = Decoder(*shared)

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** (len(self._internal_dict["block_out_channels"]) - 1)

    @property
    def temporal_compression_ratio(self) -> int:  # type: ignore[override]
        return self._internal_dict["temporal_compression"]

    @property
    def latent_channels(self) -> int:
        """Channels of the volume that ``decode`` takes: those of all planes."""
        planes = self._internal_dict["spatial_planes"]
        return self._internal_dict["plane_channels"] * (planes + 2 if planes else 1)

    def _derived_config(self) -> dict[str, Any]:
        """Also statistics that change nothing, where there are none: some pipelines of videos read nothing else."""
        config = self._internal_dict
        if config["latents_mean"] is not None:
            return super()._derived_config()
        statistics = {"latents_mean": config["shift_factor"], "latents_std": 1.0}
        return {
            **super()._derived_config(),
            **{key: (value,) * self.latent_channels for key, value in statistics.items()},
        }

    def _temporal_levels(self) -> list[bool]:
        levels = len(self._internal_dict["block_out_channels"]) - 1
        halvings = self.temporal_compression_ratio.bit_length() - 1
        return [i >= levels - halvings for i in range(levels)]

    @property
    def compression(self) -> str:
        """Such as t4f8, 4 planes of c8."""
        config = self._internal_dict
        planes = f", {config['spatial_planes'] + 2} planes of " if config["spatial_planes"] else ""
        return f"t{self.temporal_compression_ratio}f{self.spatial_compression_ratio}{planes}c{config['plane_channels']}"

    def layout(self, pixel_shape: tuple[int, ...]) -> PlaneLayout:
        """Of the planes of pixels (B, 3, T, H, W) or (B, 3, H, W), no longer than a window; sizes round up."""
        frames, height, width = (1, *pixel_shape[2:])[-3:]
        ratio, config = self.spatial_compression_ratio, self._internal_dict
        if not config["spatial_planes"]:
            raise RequestError("This FourPlane was made without planes (spatial_planes 0): its latents are a volume.")
        if frames > config["window_frames"]:
            raise RequestError(
                f"A clip of {frames} frames has planes of its own for each window of {config['window_frames']}: ask "
                "for the layout of one window, or make the autoencoder with more window_frames."
            )
        return PlaneLayout(
            self._latent_frames(frames), -(-height // ratio), -(-width // ratio), config["spatial_planes"],
            config["plane_channels"],
        )  # fmt: skip

    def latent_shape(self, pixel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of pixels (B, 3, T, H, W): (B, C, T', h, w); of images (B, 3, H, W): (B, C, h, w); rounded up as padded."""
        ratio, window = self.spatial_compression_ratio, self._internal_dict["window_frames"]
        sides = tuple(-(-side // ratio) for side in pixel_shape[-2:])
        if len(pixel_shape) == 4:
            return pixel_shape[0], self.latent_channels, *sides
        frames = self.padded_frames(pixel_shape[2])
        count = 1 if frames <= window else len(self._starts(frames))
        return pixel_shape[0], self.latent_channels, count * self._latent_frames(min(frames, window)), *sides

    def padded_frames(self, frames: int) -> int:
        """The next number of frames that fits: whole latent frames, and of a long clip whole windows."""
        ratio, window = self.temporal_compression_ratio, self._internal_dict["window_frames"]
        if frames <= window:
            return frames + -(frames - 1) % ratio
        return frames + -(frames - window) % self._stride_frames

    @property
    def _stride_frames(self) -> int:
        return self._internal_dict["window_frames"] - self._internal_dict["window_overlap"]

    def _latent_frames(self, frames: int) -> int:
        return -(-(frames - 1) // self.temporal_compression_ratio) + 1

    def _starts(self, frames: int) -> range:
        return range(0, frames - self._internal_dict["window_frames"] + 1, self._stride_frames)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Any]:
        """Pixels (B, 3, T, H, W) in [-1, 1] to the posterior of their planes, of draws (B, C, T', h, w).

        Images (B, 3, H, W) are clips of one frame, and their draws (B, C, h, w).

        Raises:
            RequestError: sides or frames that do not fit the ratios and windows (`LatentCodec` pads).
        """
        is_image = x.ndim == 4
        x = x.unsqueeze(2) if is_image else x
        ratio, channels = self.spatial_compression_ratio, self._internal_dict["in_channels"]
        fits = x.ndim == 5 and x.shape[1] == channels and 0 not in x.shape
        if not fits or x.shape[3] % ratio or x.shape[4] % ratio or self.padded_frames(x.shape[2]) != x.shape[2]:
            near = f", the next is {self.padded_frames(x.shape[2])}" if x.ndim == 5 and x.shape[2] else ""
            raise RequestError(
                f"encode got pixels of shape {tuple(x.shape)}; expected (B, {channels}, T, H, W) with H and W "
                f"multiples of {ratio} and T frames that fit the temporal ratio {self.temporal_compression_ratio} and "
                f"the windows{near}: pad them, or use latentae.LatentCodec, which pads and crops back."
            )
        window = self._internal_dict["window_frames"]
        clips = [x] if x.shape[2] <= window else [x[:, :, start : start + window] for start in self._starts(x.shape[2])]
        volumes = [self._one_by_one(self._encode, clip) for clip in clips]
        posterior: Any
        if self._internal_dict["spatial_planes"]:
            posterior = PlaneGaussian(torch.cat(volumes, dim=1), self.layout(tuple(clips[0].shape)), is_image)
        else:
            moments = torch.cat(volumes, dim=2)
            posterior = DiagonalGaussianDistribution(moments[:, :, 0] if is_image else moments)
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, temb: Tensor | None = None, return_dict: bool = True, **ignored: Any
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, T', h, w) to pixels (B, 3, T, f*h, f*w), about [-1, 1]; of images both without time.

        Args:
            temb, ignored: some video pipelines pass a timestep, and generators for decoders that sample.

        Raises:
            RequestError: another shape, or several windows of which the last is not whole.
        """
        self._check_latents(z)
        is_image = z.ndim == 4
        z = z.unsqueeze(2) if is_image else z
        frames = self._latent_frames(self._internal_dict["window_frames"])
        if z.shape[2] > frames and z.shape[2] % frames:
            fitting = [str((count * frames - 1) * self.temporal_compression_ratio + 1) for count in (1, 2, 3)]
            raise RequestError(
                f"decode got latents of {z.shape[2]} frames; those of a long clip are whole windows of {frames}: ask "
                f"a pipeline for num_frames {', '.join(fitting)} … (several windows overlap, so that fewer come out)."
            )
        clips = [self._one_by_one(self._decode, window) for window in z.split(frames, dim=2)]
        pixels = clips[0] if len(clips) == 1 else self._blend(clips)
        pixels = pixels[:, :, 0] if is_image else pixels
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def _blend(self, clips: list[Tensor]) -> Tensor:
        """Windows one after the other, fading over the frames that neighbours share."""
        overlap = self._internal_dict["window_overlap"]
        joined = [clips[0]]
        fade = (torch.arange(overlap, device=clips[0].device, dtype=clips[0].dtype) + 1) / (overlap + 1)
        for clip in clips[1:]:
            if overlap:
                before, fading = joined[-1][:, :, :-overlap], joined[-1][:, :, -overlap:]
                mixed = torch.lerp(fading, clip[:, :, :overlap], fade.view(1, 1, -1, 1, 1))
                joined[-1:] = [before, mixed]
            joined.append(clip[:, :, overlap:])
        return torch.cat(joined, dim=2)

    def _encode(self, x: Tensor) -> Tensor:
        """One window of pixels to moments: of tokens (B, N, 2C), or of a volume (B, 2C, T', h, w)."""
        features = self._features(x)
        if self.encoder.conv_out is not None:
            return self.encoder(features, head="volume")
        config, layout = self._internal_dict, self.layout(tuple(x.shape))
        if layout.t == 1:
            pooled = {"xy1": features[:, :, 0]}
        else:
            if config["time_weights"] == "endpoints":
                ends = [features[:, :, 0], self._features(x[:, :, -1:])[:, :, 0]]
            else:
                weights = time_weights(config["time_weights"], layout.planes, layout.t)
                ends = list(torch.einsum("bcthw,kt->kbchw", features, weights.to(features)))
            pooled = {f"xy{k + 1}": plane for k, plane in enumerate(ends[: layout.planes])}
            pooled |= {"xt": features.mean(3), "yt": features.mean(4)}
        planes = {name: self.encoder(plane, head=name) for name, plane in pooled.items()}
        return layout.join(planes)

    def _features(self, x: Tensor) -> Tensor:
        return self.encoder(x, tile=self._tile_of(x))

    def _decode(self, z: Tensor) -> Tensor:
        """One window of latents to pixels."""
        if self.decoder.conv_in is not None:
            features = self.decoder(z, enter=True)
        else:
            config = self._internal_dict
            t, h, w = z.shape[2:]
            layout = PlaneLayout(t, h, w, config["spatial_planes"], config["plane_channels"])
            tokens = layout.unpack(widen(z), "volume").to(z.dtype)
            features = self.decoder(layout.split(tokens), layout, enter=True)
        return self.decoder(features, tile=self._tile_of(z, self.spatial_compression_ratio))

    @apply_forward_hook
    def encode_frames(self, frames: Tensor, plane: str = "xy1") -> Tensor:
        """A spatial plane of each frame by itself, as ``endpoints`` has xy1 of the first frame and xy2 of the last.

        Args:
            frames: (B, 3, H, W) in [-1, 1].
            plane: whose head, ``xy1`` or ``xy2``.

        Returns:
            Means of the plane, (B, C, h, w); of xy1 `FourPlane.encode` of an image gives the same.
        """
        features = self._features(frames.unsqueeze(2))[:, :, 0]
        return self.encoder(features, head=plane).chunk(2, dim=1)[0]


FourPlane.__module__ = "latentae"
