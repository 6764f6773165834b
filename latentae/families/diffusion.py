"""What diffusion decoders share: a decoder that samples the image by Euler steps from noise, knowing the latents.

    pixels ─ encoder ─ regularise ─ latents ─ condition ─┐ once
                                  noise ─ denoise ─ … ─ denoise ─ pixels

A family gives ``encoder``, ``decoder`` (a `latentae.nn.unet.UNet`) and ``condition``. Decoding is a pure function of
the latents: without a generator every image starts from one canvas of noise, drawn on the CPU from a seed in the
config, as pipelines hardly ever pass a generator, nor a number of steps.
"""

import copy
import inspect
import re
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, IdentityDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentae.errors import RequestError
from latentae.families.base import Autoencoder
from latentae.nn.flow import Path, Prediction, clean_estimate, network_input, solve, times_of
from latentae.nn.precision import widen
from latentae.nn.tiling import blend_tiles

REGULARIZERS = ("layer_norm", "kl", "fixed_noise", "none")
PREDICTIONS = ("v", "x0", "pixels")
PATHS = ("linear", "cosine")
FOREIGN = 4.0  # a spread of latents so many times off the expected one is that of another autoencoder


class Condition(NamedTuple):
    """What the denoiser knows beside the noisy pixels, computed once for each image.

    ``map`` is (B, Cc, H / p, W / p) for patches of p pixels; ``latents`` modulate its norms, or are None; ``base`` is a
    first, deterministic image (B, 3, H, W), or None.
    """

    map: Tensor
    latents: Tensor | None = None
    base: Tensor | None = None


def _canvas(seed: int, height: int, width: int) -> Tensor:
    """Normal noise (1, 3, height, width) in float32 from the CPU's generator: the same on every device."""
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _canvas_operator() -> Any:
    """`_canvas` as an operator, as torch.compile cannot trace a generator.

    Its name holds that of the module: an exported file with this code has one beside the package's.
    """
    operator = torch.library.custom_op(re.sub(r"\W", "_", __name__) + "::noise_canvas", _canvas, mutates_args=())
    operator.register_fake(lambda seed, height, width: torch.empty(1, 3, height, width))
    return operator


noise_canvas = _canvas_operator()


class DiffusionAutoencoder(Autoencoder):
    """Base of the families whose decoder samples.

    Their configurations share, beside the normalisation of every family:

    - ``latent_regularizer``: ``layer_norm`` without parameters over each image's latents, so that they have mean 0 and
      variance 1; ``kl``: a Gaussian posterior; ``fixed_noise``: one of the spread ``latent_noise_std``; ``none``.
    - ``prediction``: what the network predicts, ``v`` or ``x0``; ``pixels``: a plain decoder of the same network, from
      a canvas of zeros in one step.
    - ``path``: ``linear``, or ``cosine``, where the network's input has unit variance (`latentae.nn.flow`).
    - ``num_inference_steps``, ``time_shift_rho``: Euler steps at the times ``(1 - i / steps) ** rho``.
    - ``decode_seed``: of the canvas.
    - ``condition_mean``, ``condition_std``: statistics of the latents, channel by channel, by which the denoiser gets
      them standardised; for latents of an autoencoder that was there before.

    ``decode`` samples pixels of about [-1, 1]. Its ``generator`` is that of the noise, one for all images or a list
    with one for each; None gives every image the same canvas of the configured seed, so that ``decode(z)[i]`` is
    ``decode(z[i : i + 1])``. Its ``num_inference_steps`` are evaluations of the denoiser for each image; None for the
    configured number. It raises a RequestError for no steps, or another number of generators than of images.
    """

    scheduler: Any

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = None

    def _check_arguments(self, **arguments: Any) -> None:
        """Refuse a configuration that cannot be, once it is registered."""
        config = {**self._internal_dict, **arguments}
        for name, choices in (
            ("latent_regularizer", REGULARIZERS),
            ("prediction", PREDICTIONS),
            ("path", PATHS),
        ):
            if config[name] not in choices:
                raise RequestError(
                    f"{name} {config[name]!r} is unknown to {type(self).__name__}; expected {', '.join(choices)}."
                )
        _check_steps(config["num_inference_steps"])
        if not config["time_shift_rho"] > 0:
            raise RequestError(f"time_shift_rho is an exponent above 0, not {config['time_shift_rho']}.")
        if (config["condition_mean"] is None) != (config["condition_std"] is None):
            raise RequestError("condition_mean and condition_std go together: give both, or neither.")
        smallest = config["patch_size"] * 2 ** (len(config["decoder_widths"]) - 1)
        if self.spatial_compression_ratio % smallest:
            raise RequestError(
                f"The denoiser halves patches of {config['patch_size']} {len(config['decoder_widths']) - 1} times, but "
                f"images are multiples of {self.spatial_compression_ratio} only: use fewer decoder_widths."
            )
        for name in ("condition_mean", "condition_std"):
            if config[name] is not None and len(config[name]) != config["latent_channels"]:
                raise RequestError(
                    f"{name} has {len(config[name])} values for {config['latent_channels']} latent channels."
                )

    @property
    def samples(self) -> bool:  # type: ignore[override]
        """Whether the decoder samples; not if it predicts the pixels at once."""
        return self._internal_dict["prediction"] != "pixels"

    # Encoder side

    def posterior(self, moments: Tensor) -> Any:
        kind = self._internal_dict["latent_regularizer"]
        if kind == "kl":
            return DiagonalGaussianDistribution(moments)
        if kind == "fixed_noise":
            log_variance = 2 * float(np.log(self._internal_dict["latent_noise_std"]))
            return DiagonalGaussianDistribution(torch.cat([moments, torch.full_like(moments, log_variance)], dim=1))
        if kind == "layer_norm":  # of the whole image, after tiles are put together
            moments = F.layer_norm(widen(moments), moments.shape[1:]).to(moments.dtype)
        return IdentityDistribution(moments)

    # Decoder side

    def condition(self, z: Tensor, base: Tensor | None = None) -> Condition:
        """What the denoiser knows of latents (B, C, h, w); ``base`` is their `first_image`, if it is known."""
        raise NotImplementedError

    def first_image(self, z: Tensor, tile: tuple[int, int] | None = None) -> Tensor | None:
        """The deterministic image (B, 3, H, W) of families that have one, in tiles of latents, or at once."""
        return None

    def standardised(self, z: Tensor) -> Tensor:
        """Latents as the denoiser gets them: about of mean 0 and variance 1 in each channel."""
        mean, std = (self._internal_dict[f"condition_{name}"] for name in ("mean", "std"))
        if mean is None or std is None:
            return z
        mean, std = (torch.tensor(value, device=z.device).view(1, -1, 1, 1) for value in (mean, std))
        return ((widen(z) - mean) / std).to(z.dtype)

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The estimate of the clean pixels, (B, 3, H, W) in float32 or more, with gradient.

        Args:
            noisy: ``(1 - t) * pixels + t * noise``, whatever the path.
            t: times, (B,) in [0, 1].
        """
        prediction: Prediction = "v" if self._internal_dict["prediction"] == "v" else "x0"
        path: Path = self._internal_dict["path"]
        noisy, t = widen(noisy), widen(t)
        seen = network_input(noisy, t, path).to(condition.map.dtype)
        predicted = self.decoder(seen, t, condition.map, condition.latents)
        return clean_estimate(widen(predicted), noisy, t, prediction, path)

    def _decode_batch(self, z: Tensor, generator: Any, num_inference_steps: int | None) -> Tensor:
        steps = num_inference_steps if num_inference_steps is not None else self._internal_dict["num_inference_steps"]
        _check_steps(steps)
        if type(z) is Tensor and not (z.is_meta or torch.compiler.is_compiling()):  # which have no values to look at
            self._warn_of_foreign(z)
        ratio = self.spatial_compression_ratio
        noise = self._noise(z, generator)
        joined = torch.cat([z, F.pixel_unshuffle(noise, ratio).to(z.dtype)], dim=1)  # (B, C + 3 f², h, w)
        return self._one_by_one(partial(self._decode_joined, steps=steps), joined)

    def _noise(self, z: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Noise (B, 3, H, W) to start from: the whole image's, of which tiles and slices take their part."""
        ratio = self.spatial_compression_ratio
        height, width = z.shape[-2] * ratio, z.shape[-1] * ratio
        if not self.samples:
            return z.new_zeros(len(z), 3, height, width)
        if isinstance(generator, list) and len(generator) != len(z):
            raise RequestError(
                f"decode got {len(generator)} generators for {len(z)} images: give one for each, or one."
            )
        if any(not isinstance(one, torch.Generator) for one in _listed(generator)):
            raise RequestError(f"decode got {generator!r} for a generator: give a torch.Generator, a list, or None.")
        if generator is None:
            canvas = noise_canvas(self._internal_dict["decode_seed"], height, width)
            return canvas.to(z.device).expand(len(z), -1, -1, -1)
        return randn_tensor((len(z), 3, height, width), generator, device=z.device, dtype=torch.float32)

    def _decode_joined(self, joined: Tensor, steps: int) -> Tensor:
        ratio = self.spatial_compression_ratio
        sample = partial(self._sample, steps=steps)
        tile = self._tile_of(joined, ratio)
        if tile is None:
            return sample(joined)
        base = self.first_image(joined[:, : self.latent_channels], tile)
        if base is not None:
            joined = torch.cat([joined, F.pixel_unshuffle(base, ratio)], dim=1)
        height, width = self.tile_sample_stride_height, self.tile_sample_stride_width
        stride = self._positions(height, ratio), self._positions(width, ratio)
        return blend_tiles(sample, joined, tile, stride, up=ratio)

    def _sample(self, joined: Tensor, steps: int) -> Tensor:
        """Latents, behind them folded the noise of their pixels and perhaps their first image, to pixels."""
        z, folded = joined.split([self.latent_channels, joined.shape[1] - self.latent_channels], dim=1)
        noise, *base = F.pixel_shuffle(folded, self.spatial_compression_ratio).split(3, dim=1)
        return self.sample(z, noise, steps, *base)

    def sample(self, z: Tensor, noise: Tensor, steps: int, base: Tensor | None = None) -> Tensor:
        """The image that ``steps`` evaluations of the denoiser make of latents (B, C, h, w) and noise (B, 3, H, W).

        ``base`` is the latents' `first_image`, if it is known.
        """
        noise = widen(noise)
        denoise = partial(self.denoise, condition=self.condition(z, base))
        if not self.samples:
            return denoise(noise, noise.new_ones(len(noise))).to(z.dtype)
        times = times_of(steps, self._internal_dict["time_shift_rho"])
        if self.scheduler is None:
            return solve(denoise, noise, times).to(z.dtype)
        return _solve_with(copy.deepcopy(self.scheduler), denoise, noise, times).to(z.dtype)

    def set_scheduler(self, scheduler: Any | None) -> None:
        """Sample by a flow-matching scheduler of diffusers instead of Euler steps; None goes back to those.

        It is not saved with the model. Schedulers that take sigmas get the configured times, so that
        ``FlowMatchEulerDiscreteScheduler()`` gives what there is without it.

        Raises:
            RequestError: a scheduler for another kind of prediction than the velocity of a linear path.
        """
        if scheduler is not None:
            config = getattr(scheduler, "config", {})
            flow = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
            if not flow:
                kind = config.get("prediction_type", "other")
                raise RequestError(
                    f"{type(scheduler).__name__} is for {kind} predictions; diffusion decoders need one for flow "
                    "matching, such as FlowMatchEulerDiscreteScheduler."
                )
            if config.get("use_dynamic_shifting"):
                raise RequestError(
                    f"{type(scheduler).__name__} with use_dynamic_shifting takes its times from a denoiser of latents: "
                    "turn it off, or use shift."
                )
        self.scheduler = scheduler

    def _warn_of_foreign(self, z: Tensor) -> None:
        """Warn of latents whose spread says that they come from another autoencoder, or are still normalised."""
        config = self._internal_dict
        with torch.no_grad():
            if config["condition_std"] is not None or config["latent_regularizer"] == "layer_norm":
                expected = self.standardised(z)
            elif config["scaling_factor"] != 1.0:
                expected = (z - config["shift_factor"]) * config["scaling_factor"]
            else:
                return  # nothing is known of them
            spread = float(widen(expected).square().mean().sqrt())
        if not 1 / FOREIGN < spread < FOREIGN:
            warnings.warn(
                f"These latents are {spread:.3g} times as far spread as those that this {type(self).__name__} was "
                "trained on: they look like another autoencoder's, or were not taken back from the scale of a "
                "diffusion model (z / scaling_factor + shift_factor).",
                stacklevel=5,
            )


def _listed(generator: Any) -> list[Any]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


def _check_steps(steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RequestError(f"num_inference_steps is a whole number of at least 1, not {steps!r}.")


def _solve_with(scheduler: Any, denoise: Any, noise: Tensor, times: list[float]) -> Tensor:
    """The same as `solve` by a scheduler for the velocity ``noise - clean``."""
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.array(times[:-1]), device=noise.device)
    else:
        scheduler.set_timesteps(len(times) - 1, device=noise.device)
    noisy = noise
    for timestep in scheduler.timesteps:
        t = timestep / scheduler.config.num_train_timesteps
        clean = denoise(noisy, t.to(noisy.dtype).expand(len(noisy)))
        noisy = scheduler.step((noisy - clean) / t, timestep, noisy, return_dict=False)[0]
    return noisy
