"""Autoencoders of images as contestants in a benchmark of clips: frame by frame."""

from typing import Any

import torch
from torch import Tensor

from latentae.codec import LatentCodec, Latents
from latentae.nn.pixels import frames_of


class FramewiseCodec(LatentCodec):
    """An autoencoder of images that takes and gives clips, whose latents (B, C, T, h, w) have one frame for each.

    Samples of the posterior are drawn anew for every frame; a decoder that samples starts from the same noise in all
    frames of a clip, as in `latentae.store.reconstruction`.
    """

    @classmethod
    def of(cls, codec: LatentCodec) -> "FramewiseCodec":
        """The same model, device and precision."""
        framewise = cls.__new__(cls)
        vars(framewise).update(vars(codec))
        return framewise

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, sample: bool = False, generator: Any = None) -> Latents:
        """Pixels (B, 3, T, H, W) to normalised latents; ``generator`` is one for all, or one for each clip."""
        frames, (height, width) = pixels.shape[2], pixels.shape[-2:]
        latents = super().encode(frames_of(pixels), sample=sample, generator=_each(generator, frames))
        posterior = FramePosterior(latents.posterior, frames)
        return Latents(clips_of(latents.tensor, frames), height, width, frames, posterior)

    @torch.no_grad()
    def decode(
        self, latents: Latents | Tensor, *, generator: Any = None, num_inference_steps: int | None = None
    ) -> Tensor:
        """Latents of clips to pixels (B, 3, T, H, W)."""
        if num_inference_steps is not None:
            return self.with_inference_steps(num_inference_steps).decode(latents, generator=generator)
        z = latents.tensor if isinstance(latents, Latents) else latents
        frames, images = z.shape[2], frames_of(z)
        of_frames = Latents(images, latents.height, latents.width) if isinstance(latents, Latents) else images
        generators = [_again(g) for g in _each(generator, frames)] if isinstance(generator, list) else generator
        return clips_of(super().decode(of_frames, generator=generators), frames)


class FramePosterior:
    """The distribution of the latents of all frames as one of clips."""

    def __init__(self, posterior: Any, frames: int):
        self.posterior, self.frames = posterior, frames

    def mode(self) -> Tensor:
        return clips_of(self.posterior.mode(), self.frames)

    def sample(self, generator: Any = None) -> Tensor:
        return clips_of(self.posterior.sample(_each(generator, self.frames)), self.frames)

    def __getattr__(self, name: str) -> Any:
        """``mean`` and ``logvar``, (B, C, T, h, w), where there are any, and ``deterministic``."""
        value = getattr(self.posterior, name)
        return clips_of(value, self.frames) if isinstance(value, Tensor) else value


def clips_of(images: Tensor, frames: int) -> Tensor:
    """The inverse of `frames_of`: (B * T, C, H, W) to (B, C, T, H, W)."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)


def _each(generator: Any, frames: int) -> Any:
    return [one for one in generator for _ in range(frames)] if isinstance(generator, list) else generator


def _again(generator: torch.Generator) -> torch.Generator:
    """Another one that draws the same."""
    return torch.Generator(generator.device).set_state(generator.get_state())
