"""The contract of every family: an autoencoder that is an ordinary diffusers model.

A family defines ``encoder`` and ``decoder`` modules and a few properties; this class gives it diffusers' own loading
and saving, the output type and the configuration keys that stock pipelines read, slicing and tiling.
"""

import inspect
import math
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, IdentityDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentae.errors import RequestError
from latentae.version import __version__

DEFAULT_TILE = 1024  # pixels along each side
DERIVED_KEYS = {
    *("block_out_channels", "encoder_block_out_channels", "in_channels", "out_channels", "latent_channels", "z_dim"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "timestep_conditioning"),
    *("spatial_compression_ratio", "temporal_compression_ratio", "scale_factor_spatial", "scale_factor_temporal"),
}
# what pipelines of diffusers have built in, by a part of their modules' names
FIXED_STATISTICS = {"stable_diffusion_xl": 4, "sd_xl": 4, "kolors": 4, "mochi": 12}  # channels
FIXED_RATIO = {"lumina": 8}
FOREIGN_KEYS = {"auto_map", "quantization_config"}  # that others may write into a configuration of ours


@dataclass
class EncoderOutput(BaseOutput):
    """What ``encode`` returns: the posterior under the three names by which stock pipelines ask for latents.

    ``latent_dist`` has ``sample(generator)`` and ``mode()``; ``latent`` and ``latents`` are the mode, (B, C, h, w).
    """

    latent_dist: Any

    @property
    def latent(self) -> Tensor:
        return self.latent_dist.mode()

    @property
    def latents(self) -> Tensor:
        return self.latent_dist.mode()


class NoTime(RequestError, AttributeError):
    """A pipeline of videos asks an autoencoder of images how many frames it has to a latent one."""


class PublishedConfig(FrozenDict):
    """What pipelines read of an autoencoder."""

    def __getattr__(self, name: str) -> Any:  # of what is not there
        if name == "scale_factor_temporal":
            raise NoTime(
                "This pipeline makes videos (it asks for scale_factor_temporal), and its vae is an autoencoder of "
                "images: take a pipeline of images, or an autoencoder of videos, such as FourPlane."
            )
        raise AttributeError(f"The configuration of this autoencoder has no {name}.")


class Autoencoder(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Base of all families.

    A subclass registers its arguments with ``@register_to_config``, sets ``self.encoder`` (pixels to moments) and
    ``self.decoder`` (latents to pixels), and defines ``spatial_compression_ratio`` and ``latent_channels``.

    To run in tiles they are called with ``tile`` too, height and width in pixels of their input, and give the same
    result; in ``forward``, as the hooks of offloading see nothing else.

    A deterministic family may set ``self.quantize``, a quantiser of `latentae.nn.quantize`: ``encode`` still gives
    continuous latents and ``decode`` quantises what it is given, as in diffusers' ``VQModel``.
    """

    _supports_gradient_checkpointing = True
    _group_offload_block_modules = ["encoder", "quantize", "decoder"]

    encoder: Any
    decoder: Any
    _internal_dict: Any
    temporal_compression_ratio = 1
    is_video = False
    samples = False
    """Whether `decode` draws the image from noise, in a number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_to_config(_latentae_version=__version__)
        self.quantize: Any = None
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_height = self.tile_sample_min_width = DEFAULT_TILE
        self.tile_sample_stride_height = self.tile_sample_stride_width = _default_stride(DEFAULT_TILE)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent along height and width."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that ``decode`` takes."""
        return self._internal_dict["latent_channels"]

    @property
    def compression(self) -> str:
        """How much and to what, such as f8c4."""
        return f"f{self.spatial_compression_ratio}c{self.latent_channels}"

    def latent_shape(self, pixel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of pixels of shape (B, 3, H, W); sizes round up, as the codec pads them."""
        batch, _, height, width = pixel_shape
        ratio = self.spatial_compression_ratio
        return batch, self.latent_channels, -(-height // ratio), -(-width // ratio)

    @property
    def config(self) -> FrozenDict:
        """The arguments of ``__init__`` and, derived from them, every key that stock pipelines read.

        ``save_pretrained`` writes the former only.

        Raises:
            RequestError: it is read by a pipeline that has another compression, or other channels, built in.
        """
        config = {**self._internal_dict, **self._derived_config()}
        self._check_reader(sys._getframe(1).f_globals.get("__name__", ""), config["latents_mean"] is not None)
        return PublishedConfig(config)

    def _check_reader(self, module: str, has_statistics: bool) -> None:
        """Some pipelines ask for nothing and would give a picture of another size, or fail in their last step."""
        package, _, name = module.rpartition(".")
        if not package.startswith("diffusers.pipelines"):
            return
        ratio = next((ratio for part, ratio in FIXED_RATIO.items() if part in name), None)
        if ratio not in (None, self.spatial_compression_ratio):
            raise RequestError(
                f"{name} of diffusers has {ratio} pixels a latent built in, and this {type(self).__name__} has "
                f"{self.spatial_compression_ratio}, so that pictures would have another size: use another pipeline."
            )
        channels = next((channels for part, channels in FIXED_STATISTICS.items() if part in name), None)
        if has_statistics and channels not in (None, self.latent_channels):
            stated = self._internal_dict.get("latents_mean") is not None  # FourPlane publishes them anyway
            fix = "or state scaling_factor in their place (register_to_config(latents_mean=None, latents_std=None))"
            raise RequestError(
                f"{name} of diffusers takes latents_mean and latents_std to have {channels} channels, and this "
                f"{type(self).__name__} has {self.latent_channels}: use another pipeline, "
                f"{fix if stated else f'or an autoencoder whose latents have {channels} channels'}."
            )

    def _derived_config(self) -> dict[str, Any]:
        ratio, channels = self.spatial_compression_ratio, self.latent_channels
        stages = int(math.log2(ratio)) + 1  # pipelines compute the ratio as 2 ** (len(block_out_channels) - 1)
        derived = {
            "block_out_channels": (0,) * stages,
            "encoder_block_out_channels": (0,) * stages,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": channels,
            "z_dim": channels,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "latents_mean": None,
            "latents_std": None,
            "force_upcast": False,
            "timestep_conditioning": False,
            "spatial_compression_ratio": ratio,
            "temporal_compression_ratio": self.temporal_compression_ratio,
            "scale_factor_spatial": ratio,
        }
        if self.is_video:
            derived["scale_factor_temporal"] = self.temporal_compression_ratio
        return {key: value for key, value in derived.items() if key not in self._internal_dict}

    @classmethod
    def _init_arguments(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters) - {"self"}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Take from a configuration what ``__init__`` knows: derived keys of ``config`` never reach a saved file.

        Keys of ours that only `latentae.load` acts upon stay, so that diffusers says that it ignores them.

        Raises:
            RequestError: keys that this version does not know.
        """
        known, ours = cls._init_arguments(), ("_", "latentae_")
        kept = {key: value for key, value in config_dict.items() if key in known or key.startswith(ours)}
        if unknown := set(config_dict) - set(kept) - DERIVED_KEYS - FOREIGN_KEYS:
            raise RequestError(_unknown_keys(cls, sorted(unknown), config_dict.get("_latentae_version")))
        return super().extract_init_dict(kept, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Put values into the configuration, which `save_pretrained` writes.

        Raises:
            RequestError: a normalisation that cannot be: no scaling factor, or statistics of other channels.
        """
        before = getattr(self, "_internal_dict", None)
        super().register_to_config(**kwargs)
        try:
            self._check_normalisation()
        except RequestError:
            self._internal_dict = before
            raise

    def _check_normalisation(self) -> None:
        config = self._internal_dict
        for key, least in (("scaling_factor", 0.0), ("shift_factor", -math.inf)):
            value = config.get(key, 1.0)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least < value < math.inf:
                kind, neutral = ("positive number", 1.0) if least == 0 else ("number", 0.0)
                raise RequestError(
                    f"{key} of {type(self).__name__} is {value!r} and must be a {kind}, as pipelines compute with it: "
                    f"write {neutral} there (in config.json, of a folder), which leaves latents as they are; then "
                    "'latentae export --data' measures it."
                )
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None and std is None:
            return
        if mean is None or std is None or not len(mean) == len(std) == self.latent_channels or not min(std) > 0:
            lengths = [None if values is None else len(values) for values in (mean, std)]
            raise RequestError(
                f"latents_mean and latents_std of {type(self).__name__} need one value for each of its "
                f"{self.latent_channels} latent channels, deviations above 0; they have {lengths[0]} and {lengths[1]}: "
                "give both, or neither."
            )

    @property
    def latents_mean(self) -> Tensor:
        """Means by which pipelines of videos normalise latents, (C,)."""
        mean = self.config["latents_mean"]
        return torch.tensor(mean if mean is not None else [float(self.config["shift_factor"])] * self.latent_channels)

    @property
    def latents_std(self) -> Tensor:
        """Standard deviations by which pipelines of videos normalise latents, beside the scaling factor, (C,)."""
        std = self.config["latents_std"]
        return torch.tensor(std if std is not None else [1.0] * self.latent_channels)

    @property
    def temperal_downsample(self) -> list[bool]:
        """For each halving of height and width, whether it halves time: the spelling of QwenImage's pipelines.

        Raises:
            RequestError: there are no statistics, which are all that these pipelines read.
        """
        if self.config["latents_mean"] is None:
            raise RequestError(
                f"Pipelines of QwenImage normalise latents by latents_mean and latents_std, which this "
                f"{type(self).__name__} does not state: register_to_config(latents_mean=[0.0] * "
                f"{self.latent_channels}, latents_std=[1.0] * {self.latent_channels}) leaves latents as they are."
            )
        return self._temporal_levels()

    def _temporal_levels(self) -> list[bool]:
        return [False] * int(math.log2(self.spatial_compression_ratio))

    def posterior(self, moments: Tensor) -> Any:
        """The distribution that the encoder's output stands for; a point for deterministic families."""
        return IdentityDistribution(moments)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Any]:
        """Pixels (B, 3, H, W) in [-1, 1] to the posterior of their latents (B, C, H/f, W/f).

        Clips of one frame, (B, 3, 1, H, W), are images too, and their latents (B, C, 1, H/f, W/f).

        Raises:
            RequestError: height or width is not a multiple of the compression ratio (`LatentCodec` pads), or a video.
        """
        is_frame = x.ndim == 5 and x.shape[2] == 1
        x = x.squeeze(2) if is_frame else x
        ratio = self.spatial_compression_ratio
        channels = self._internal_dict.get("in_channels", 3)
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % ratio or x.shape[3] % ratio or 0 in x.shape:
            raise RequestError(
                f"encode got pixels of shape {tuple(x.shape)}{self._of_video(x)}; expected (B, {channels}, H, W) with "
                f"H and W multiples of {ratio}: pad them, or use latentae.LatentCodec, which pads and crops back."
            )
        moments = self._one_by_one(self._encode, x)
        posterior = self.posterior(moments.unsqueeze(2) if is_frame else moments)
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        temb: Tensor | None = None,
        return_dict: bool = True,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        **ignored_by_deterministic_families: Any,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w) to pixels (B, 3, f*h, f*w), about [-1, 1]; of one frame both with an axis of time.

        Args:
            temb: ignored; some video pipelines pass a timestep in its place.
            generator, num_inference_steps: for families whose decoder samples: see `DiffusionAutoencoder`.

        Returns:
            ``sample``, and ``commit_loss`` of a codebook.

        Raises:
            RequestError: the latents have another number of dimensions or channels.
        """
        is_frame = z.ndim == 5 and z.shape[2] == 1
        z = z.squeeze(2) if is_frame else z
        self._check_latents(z)
        commit_loss = None
        if self.quantize is not None:
            z, commit_loss = self.quantize(z)
        pixels = self._decode_batch(z, generator, num_inference_steps)
        pixels = pixels.unsqueeze(2) if is_frame else pixels
        return DecoderOutput(sample=pixels, commit_loss=commit_loss) if return_dict else (pixels,)

    def _decode_batch(self, z: Tensor, generator: Any, num_inference_steps: int | None) -> Tensor:
        """Latents that were checked to pixels; a family whose decoder samples looks at the other two arguments."""
        return self._one_by_one(self._decode, z)

    def _check_latents(self, z: Tensor) -> None:
        fits = z.ndim in ((4, 5) if self.is_video else (4,)) and self._accepts_channels(z.shape[1])
        if not fits or 0 in z.shape or not z.is_floating_point():
            shapes = f"(B, {self.latent_channels}, h, w)"
            if self.is_video:
                shapes = f"(B, {self.latent_channels}, T, h, w), or of images {shapes}"
            raise RequestError(
                f"decode got latents of shape {tuple(z.shape)} in {z.dtype}{self._of_video(z)}; expected floats "
                f"{shapes}{self._of_others(z)}."
            )

    def _of_video(self, x: Tensor) -> str:
        """What is wrong with five dimensions, if that is wrong."""
        if x.ndim != 5 or self.is_video:
            return ""
        return f", a video's, but {type(self).__name__} is an autoencoder of images (FourPlane is one of videos)"

    def _of_others(self, z: Tensor) -> str:
        """What to do about another number of channels, if it is another."""
        if z.ndim not in (4, 5) or self._accepts_channels(z.shape[1]):
            return ""
        return (
            f": {z.shape[1]} channels are another autoencoder's, and a denoiser for this one has in_channels "
            f"{self.latent_channels}"
        )

    def indices_of(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of a discrete autoencoder to the indices (B, h, w) of their codes."""
        return self._quantizer().indices_of(latents)

    def latents_of(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) to latents (B, C, h, w) that `decode` quantises to just these codes."""
        return self._quantizer().latents_of(indices)

    def _quantizer(self) -> Any:
        if self.quantize is None:
            raise RequestError(f"This {type(self).__name__} has continuous latents: it was made without a quantizer.")
        return self.quantize

    def _accepts_channels(self, channels: int) -> bool:
        return channels == self.latent_channels

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct pixels (B, 3, H, W): encode, take the mode (or a sample), decode."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict, generator=generator)

    def _one_by_one(self, function: Any, batch: Tensor) -> Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([function(one) for one in batch.split(1)])
        return function(batch)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Bound the memory of large images: anything larger than a tile runs tile by tile.

        The result is that of the whole image, but for the denoiser of DiTo and SWYCC, where overlaps are blended: as
        each tile has norms and attention of its own, tone and texture may differ slightly, with larger tiles less so.
        Group norms of the whole image cost time, as tiles run again for the statistics of each: to have less of that,
        up to 6 GiB are kept on a CPU, 2 on a GPU (`latentae.nn.exact_tiling`). While gradients are recorded, which
        ``torch.no_grad`` prevents, there are no tiles.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile in pixels, rounded down to what the family
                can cut; by default 1024.
            tile_sample_stride_height, tile_sample_stride_width: pixels from one blended tile to the next, the rest
                of a tile is overlap; by default three quarters of a tile. Exact tiles take their overlap from the
                receptive field instead.

        Raises:
            RequestError: a tile of no pixels, or a stride that is not between one pixel and the tile.
        """
        height = DEFAULT_TILE if tile_sample_min_height is None else tile_sample_min_height
        width = DEFAULT_TILE if tile_sample_min_width is None else tile_sample_min_width
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) >= 1):
            raise RequestError(f"A tile has whole numbers of pixels, at least one, not {height!r} x {width!r}.")
        down = _default_stride(height) if tile_sample_stride_height is None else tile_sample_stride_height
        right = _default_stride(width) if tile_sample_stride_width is None else tile_sample_stride_width
        if not (1 <= down <= height and 1 <= right <= width):
            raise RequestError(
                f"The stride of tiles is between one pixel and the tile of {height} x {width}, not {down} x {right}."
            )
        self.use_tiling = True
        self.tile_sample_min_height, self.tile_sample_min_width = height, width
        self.tile_sample_stride_height, self.tile_sample_stride_width = down, right

    def _tile_of(self, x: Tensor, scale: int = 1) -> tuple[int, int] | None:
        """Height and width of the tiles in which pixels, or features of ``scale`` pixels a side, run; None for at once.

        Never in tiles while gradients are recorded: all activations are held anyway, and statistics of tiles have none.
        """
        height, width = self.tile_sample_min_height, self.tile_sample_min_width
        recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if not self.use_tiling or recorded or (x.shape[-2] * scale <= height and x.shape[-1] * scale <= width):
            return None
        return self._positions(height, scale), self._positions(width, scale)

    def _positions(self, pixels: int, scale: int) -> int:
        """Pixels as positions of ``scale`` pixels, cut to a multiple of the compression ratio."""
        ratio = self.spatial_compression_ratio
        return max(pixels // ratio, 1) * ratio // scale

    def _encode(self, x: Tensor) -> Tensor:
        return run_half(self.encoder, x, self._tile_of(x))

    def _decode(self, z: Tensor) -> Tensor:
        return run_half(self.decoder, z, self._tile_of(z, self.spatial_compression_ratio))

    def folded(self) -> "Autoencoder":
        """The autoencoder in the form for use after training, which computes the same; itself if that is its form.

        Families whose weights training reparametrises give a new model with plain ones. `export` writes this form.
        """
        return self


def run_half(half: nn.Module, x: Tensor, tile: tuple[int, int] | None) -> Tensor:
    """At once, or in tiles by modules that know of them."""
    return half(x) if tile is None else half(x, tile)


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _unknown_keys(cls: type[Autoencoder], unknown: list[str], written_by: str | None) -> str:
    """Why a configuration with these keys is refused."""
    names = ", ".join(unknown)
    if _release(str(written_by)) > _release(__version__):
        return (
            f"This {cls.__name__} was written by latentae {written_by}, and this is {__version__}, which does not know "
            f"its {names}: upgrade with 'pip install --upgrade latentae'."
        )
    near = get_close_matches(unknown[0], cls._init_arguments(), n=1)
    hint = f"did you mean {near[0]}?" if near else "remove what is not an argument of the class."
    return f"The configuration has keys that {cls.__name__} does not know, {names}: {hint}"


def count_halves(autoencoder: nn.Module) -> dict[str, int]:
    """Parameters of ``encoder`` and ``decoder``, where a model has such halves; a first decoder counts as decoder."""
    counts: dict[str, int] = {}
    for half, names in {"encoder": ("encoder",), "decoder": ("initial_decoder", "decoder")}.items():
        modules = [getattr(autoencoder, name, None) for name in names]
        if any(isinstance(module, nn.Module) for module in modules):
            counts[half] = sum(p.numel() for m in modules if isinstance(m, nn.Module) for p in m.parameters())
    return counts


def _default_stride(tile: int) -> int:
    return max(tile * 3 // 4, 1)
