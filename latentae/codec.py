"""LatentCodec: any autoencoder, ours or a stock diffusers class, as pixels to normalised latents and back.

The classes differ in the field that ``encode`` fills, in normalisation, in 4 or 5 dimensions and in the sizes they
take. The codec hides that, so that benchmarks, stores and pipelines speak to one thing.
"""

import copy
import dataclasses
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import IdentityDistribution
from torch import Tensor, nn

from latentae.errors import RequestError
from latentae.families.base import Autoencoder
from latentae.nn.padding import padding_mode
from latentae.nn.pixels import pad_to_multiple, to_float


@dataclasses.dataclass(frozen=True)
class Latents:
    """Normalised latents together with the size of what they encode.

    ``tensor`` is (B, C, h, w), or (B, C, t, h, w) from a video autoencoder; ``height`` and ``width`` are those of the
    pixels before padding; ``frames`` is None for images; ``posterior`` is the distribution of the raw latents, where
    they come from an encoder.
    """

    tensor: Tensor
    height: int
    width: int
    frames: int | None = None
    posterior: Any = dataclasses.field(default=None, repr=False, compare=False)


def spatial_ratio(autoencoder: Any) -> int:
    """Pixels per latent along one side."""
    config = autoencoder.config
    if own := config.get("spatial_compression_ratio") or config.get("scale_factor_spatial"):
        return int(own)
    if "spatial_compression_ratio" in vars(autoencoder):
        return int(autoencoder.spatial_compression_ratio)
    if "temperal_downsample" in config:  # diffusers' spelling
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def temporal_ratio(autoencoder: Any) -> int:
    """Frames per latent frame, after the first; 1 for images."""
    config = autoencoder.config
    own = config.get("temporal_compression_ratio") or config.get("scale_factor_temporal")
    if not own and "temperal_downsample" in config:
        return 2 ** sum(config["temperal_downsample"])
    return int(own or vars(autoencoder).get("temporal_compression_ratio") or 1)


def is_video(autoencoder: Any) -> bool:
    """Whether it works on videos: its encoder has a convolution in three dimensions."""
    encoder = getattr(autoencoder, "encoder", autoencoder)
    return any(isinstance(module, nn.Conv3d) for module in encoder.modules())


def fitting_frames(autoencoder: Any, frames: int) -> int:
    """The next number of frames, from ``frames`` on, that the autoencoder takes."""
    if hasattr(autoencoder, "padded_frames"):  # which has windows
        return autoencoder.padded_frames(frames)
    return frames + -(frames - 1) % temporal_ratio(autoencoder)


def posterior_of(output: Any) -> Any:
    """The distribution in what an autoencoder's ``encode`` returned, with ``mode()`` and ``sample(generator)``.

    Stock classes call it ``latent_dist``, or give bare ``latents`` (AutoencoderTiny, VQModel) or ``latent``.
    """
    for field in ("latent_dist", "latents", "latent"):
        if (found := getattr(output, field, None)) is not None:
            return IdentityDistribution(found) if isinstance(found, Tensor) else found
    return IdentityDistribution(output)


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that torch does not know, or has not here, before a model is moved to it."""
    try:
        kind = torch.device(device).type if device is not None else "cpu"
    except RuntimeError:
        raise RequestError(f"{device!r} is not a device: expected cpu, cuda, cuda:1, mps or the like.") from None
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise RequestError(
            f"This machine has no {kind} device that torch can use: choose another --device, such as cpu."
        )


class LatentCodec:
    """An autoencoder as pixels to normalised latents and back, at any size.

    Normalised latents are ``(z - shift_factor) * scaling_factor``, or per channel
    ``(z - latents_mean) * scaling_factor / latents_std``, whichever the model's configuration states: what a diffusion
    model sees.

    Args:
        autoencoder: ours or a stock diffusers autoencoder, moved and put into eval mode in place.
        device, dtype: where and in which precision it runs; by default as it is.
        autocast: run under autocast with this dtype instead of converting the weights.
        compile: compile encode and decode with torch.compile on first use.
        channels_last: hold weights and pixels in channels-last memory (images only).
        tiling: run large images tile by tile.

    Raises:
        RequestError: the model has no encode and decode, or no tiling where it is asked for.
    """

    def __init__(
        self,
        autoencoder: Any,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        channels_last: bool = False,
        tiling: bool = False,
    ):
        if not (hasattr(autoencoder, "encode") and hasattr(autoencoder, "decode") and hasattr(autoencoder, "config")):
            raise RequestError(
                f"{type(autoencoder).__name__} is not an autoencoder: it needs encode, decode and config."
            )
        # diffusers' own ``to`` warns on every change of dtype that an empty list of modules should stay in fp32
        check_device(device)
        if getattr(autoencoder, "_keep_in_fp32_modules", None):
            autoencoder.to(device=device, dtype=dtype)
        else:
            nn.Module.to(autoencoder, device=device, dtype=dtype)
        self.autoencoder = autoencoder.eval()
        self.autocast = autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last and any(isinstance(module, nn.Conv3d) for module in autoencoder.modules()):
            raise RequestError(
                f"{type(autoencoder).__name__} works on videos, which have no channels_last: leave it off."
            )
        if channels_last:
            self.autoencoder.to(memory_format=torch.channels_last)
        if tiling:
            if not hasattr(autoencoder, "use_tiling"):
                raise RequestError(f"{type(autoencoder).__name__} has no tiling; leave tiling off.")
            self.autoencoder.enable_tiling()
        self._encode = torch.compile(self.autoencoder.encode) if compile else self.autoencoder.encode
        self._decode = torch.compile(self.autoencoder.decode) if compile else self.autoencoder.decode

        config = self.autoencoder.config
        self.spatial_ratio = spatial_ratio(autoencoder)
        self.temporal_ratio = temporal_ratio(autoencoder)
        self.latent_channels = int(config.get("latent_channels") or config["z_dim"])
        self.is_video = is_video(autoencoder)
        decode_arguments = inspect.signature(self.autoencoder.decode).parameters
        self._takes_generator = "generator" in decode_arguments
        # all of ours take a number of steps; of stock classes only those whose decoder samples
        self.samples: bool = getattr(autoencoder, "samples", "num_inference_steps" in decode_arguments)
        self._default_steps = decode_arguments["num_inference_steps"].default if self.samples else None
        self._steps: int | None = None
        self._fixed_arguments = {"num_frames": 1} if "num_frames" in decode_arguments else {}

    @property
    def device(self) -> torch.device:
        """Where it computes; what offloads weights holds them elsewhere in between."""
        for module in self.autoencoder.modules() if hasattr(self.autoencoder, "_hf_hook") else ():
            if device := getattr(getattr(module, "_hf_hook", None), "execution_device", None):
                return torch.device(device)
        return next(self.autoencoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    @property
    def num_inference_steps(self) -> int | None:
        """How often a decoder that samples runs its denoiser for each image; None for all others."""
        if not self.samples:
            return None
        return self._steps or self.autoencoder.config.get("num_inference_steps") or self._default_steps

    def with_inference_steps(self, steps: int) -> "LatentCodec":
        """The same codec, whose decoder takes this number of steps.

        Raises:
            RequestError: no step, or a decoder that does not sample.
        """
        if not self.samples:
            raise RequestError(
                f"{type(self.autoencoder).__name__} decodes at once, not by steps: leave their number out "
                "(num_inference_steps, --decode-steps)."
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise RequestError(f"num_inference_steps is a whole number of at least 1, not {steps!r}.")
        codec = copy.copy(self)
        codec._steps = steps
        return codec

    @property
    def normalisation(self) -> dict[str, Any]:
        """The model's scaling_factor, shift_factor, latents_mean and latents_std, as plain JSON values."""
        config = self.autoencoder.config
        if hasattr(self.autoencoder, "bn"):
            raise RequestError(
                f"{type(self.autoencoder).__name__} normalises latents after folding them into patches, which the "
                "codec does not do: use codec.posterior for its raw latents."
            )
        buffers = dict(self.autoencoder.named_buffers())  # where LTX holds what others hold in the config
        mean, std = (config.get(key, buffers.get(key)) for key in ("latents_mean", "latents_std"))
        if mean is None and config.get("scaling_factor", 1.0) is None:
            raise RequestError(
                f"The configuration of this {type(self.autoencoder).__name__} has scaling_factor null, and no "
                "latents_mean and latents_std: write the number there, 1.0 if its latents are not to be scaled."
            )
        return {
            "scaling_factor": float(config.get("scaling_factor") or 1.0),
            "shift_factor": float(config.get("shift_factor") or 0.0),
            "latents_mean": None if mean is None else [float(m) for m in mean],
            "latents_std": None if std is None else [float(s) for s in std],
        }

    def posterior(self, pixels: Tensor) -> Any:
        """The distribution of raw latents, with ``mode()`` and ``sample(generator)``; differentiable.

        Args:
            pixels: floats in [-1, 1], (B, 3, H, W), or (B, 3, T, H, W) for video autoencoders, with sides that are
                multiples of the ratio.
        """
        with self._precision():
            return posterior_of(self._encode(pixels.to(self.device, self.dtype, memory_format=self._format(pixels))))

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, ...) to what a diffusion model sees, in fp32."""
        shift, scale = self._shift_and_scale(z)
        return (z.float() - shift) * scale

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`, in fp32."""
        shift, scale = self._shift_and_scale(z)
        return z.float() / scale + shift

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Latents:
        """Pixels of any size to normalised latents.

        Args:
            pixels: uint8, or floats in [-1, 1]; (B, 3, H, W), or (B, 3, T, H, W) for video autoencoders, which take
                images too. Sizes that are no multiple of the ratio are padded at the bottom, the right and the end.
            sample: draw from the posterior instead of taking its mode.

        Raises:
            RequestError: no tensor, not three channels, a video for an image autoencoder, or nothing at all.
        """
        if not isinstance(pixels, Tensor):
            raise RequestError(
                f"encode got a {type(pixels).__name__}; expected a tensor (B, 3, H, W): of an image "
                "torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]."
            )
        if pixels.ndim not in ((4, 5) if self.is_video else (4,)) or pixels.shape[1] != 3 or 0 in pixels.shape:
            shapes = "(B, 3, H, W)" + (" or (B, 3, T, H, W)" if self.is_video else "")
            raise RequestError(f"encode got pixels of shape {tuple(pixels.shape)}; expected {shapes}.")
        if not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            raise RequestError(f"encode got pixels of {pixels.dtype}; expected uint8, or floats in [-1, 1].")
        if padding_mode(self.autoencoder) == "reflect" and min(pixels.shape[-2:]) <= self.spatial_ratio:
            raise RequestError(
                f"Reflect padding needs images of more than {self.spatial_ratio} pixels a side, not "
                f"{pixels.shape[-2]} x {pixels.shape[-1]}: leave these out, or enlarge them."
            )
        frames = pixels.shape[2] if pixels.ndim == 5 else None
        height, width = pixels.shape[-2:]
        pixels = pixels.to(self.device)
        pixels = to_float(pixels) if pixels.dtype == torch.uint8 else pixels
        posterior = self.posterior(self._pad(pixels))
        z = posterior.sample(generator) if sample else posterior.mode()
        return Latents(self.normalise(z), height, width, frames, posterior)

    @torch.no_grad()
    def decode(
        self,
        latents: Latents | Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Normalised latents to pixels: fp32, about [-1, 1] (not clamped), cropped to the size that was encoded.

        Args:
            latents: what `encode` gave, or a bare tensor, which decodes to its full size.
            generator: for decoders that sample: one, or a list with one for each image. None leaves the noise to the
                model; ours have a seed of their own, so that the same latents give the same image.
            num_inference_steps: for decoders that sample; None for `num_inference_steps` of the codec.

        Raises:
            RequestError: steps for a decoder that does not sample, none, or another number of generators than images.
        """
        if num_inference_steps is not None:
            return self.with_inference_steps(num_inference_steps).decode(latents, generator=generator)
        z = latents.tensor if isinstance(latents, Latents) else latents
        self._check_latents(z)
        pixels = self.decode_raw(self.denormalise(z.to(self.device)), generator=generator)
        if not isinstance(latents, Latents):
            return pixels
        if pixels.ndim == 5:
            pixels = pixels[:, :, 0] if latents.frames is None else pixels[:, :, : latents.frames]
        return pixels[..., : latents.height, : latents.width]

    @torch.no_grad()
    def decode_raw(self, z: Tensor, *, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Raw latents, such as of `posterior` or of a denoiser with a normalisation of its own, to pixels of full size.

        Otherwise as `decode`.
        """
        self._check_latents(z)
        z = z.to(self.device, self.dtype)
        arguments = {**self._fixed_arguments, **({"generator": generator} if self._takes_generator else {})}
        if self._steps:
            arguments["num_inference_steps"] = self._steps
        with self._precision():
            output = self._decode(z, **arguments)
        return (output.sample if hasattr(output, "sample") else output).float()

    def _check_latents(self, z: Tensor) -> None:
        """Refuse what a stock class would fail on somewhere inside; ours look for themselves."""
        dimensions = (4, 5) if self.is_video else (4,)
        if isinstance(self.autoencoder, Autoencoder) or (z.ndim in dimensions and z.shape[1] == self.latent_channels):
            return
        of_video = ", a video's" if z.ndim == 5 and not self.is_video else ""
        raise RequestError(
            f"decode got latents of shape {tuple(z.shape)}{of_video}; "
            f"{type(self.autoencoder).__name__} takes those of {self.latent_channels} channels in "
            f"{' or '.join(map(str, dimensions))} dimensions: are they another autoencoder's?"
        )

    def reconstruct(
        self, pixels: Tensor, *, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Pixels through the mode of their latents and back, same shape, fp32; ``generator`` as of `decode`."""
        return self.decode(self.encode(pixels), generator=generator)

    def _pad(self, pixels: Tensor) -> Tensor:
        if self.is_video and pixels.ndim == 4:
            pixels = pixels.unsqueeze(2)  # (B, 3, 1, H, W)
        pixels = pad_to_multiple(pixels, self.spatial_ratio)
        if self.is_video and (missing := self.padded_frames(pixels.shape[2]) - pixels.shape[2]):
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, missing), mode="replicate")  # (B, 3, 1 + k t, H, W)
        return pixels

    def padded_frames(self, frames: int) -> int:
        """The next number of frames that the autoencoder takes."""
        return fitting_frames(self.autoencoder, frames)

    def _shift_and_scale(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        values = self.normalisation
        if values["latents_mean"] is None or values["latents_std"] is None:
            return values["shift_factor"], values["scaling_factor"]
        shape = (1, -1) + (1,) * (z.ndim - 2)
        mean, std = (torch.tensor(values[key], device=z.device) for key in ("latents_mean", "latents_std"))
        if z.ndim == 5 and mean.numel() > z.shape[1]:  # Cosmos: one value for each channel and latent frame
            mean, std = (value.view(1, z.shape[1], -1, 1, 1)[:, :, : z.shape[2]] for value in (mean, std))
            return mean, values["scaling_factor"] / std
        return mean.view(shape), values["scaling_factor"] / std.view(shape)

    def _format(self, pixels: Tensor) -> torch.memory_format:
        return self.memory_format if pixels.ndim == 4 else torch.contiguous_format

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()
