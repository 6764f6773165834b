"""The latents of a training step: drawn from the posterior, and cut to a prefix of their channels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentae.errors import RequestError


def draw_latents(posterior: Any, rank: int = 0, world_size: int = 1) -> Tensor:
    """A sample of the posterior, with gradient; its mode where it has no spread.

    The noise is drawn for the batches of all ranks, of which each takes its own part: N ranks draw what one rank with
    an N times larger batch draws.
    """
    mean = posterior.mode()
    if not hasattr(posterior, "std"):
        return mean
    noise = torch.randn(world_size * len(mean), *mean.shape[1:], device=mean.device, dtype=mean.dtype)
    return mean + posterior.std * noise.chunk(world_size)[rank]


@dataclass(frozen=True)
class ChannelPrefix:
    """Structured latents (DC-AE 1.5, arXiv 2508.00413): the decoder learns from the first channels alone.

    For each batch a number c of channels is drawn, the same on all ranks, and the others are set to zero, which for a
    decoder without shortcut equals cutting its first convolution to c channels. Any of these prefixes then decodes.

    Args:
        channels: the numbers to draw from; notes on the paper give 16, 20, 24, … 128 for 128 channels.
        always_full: also decode all channels in every step, at about twice the cost: the loss is the mean of both.
    """

    channels: list[int]
    always_full: bool = False

    def check(self, autoencoder: Any) -> None:
        """Refuse an autoencoder whose decoder takes no prefix.

        Raises:
            RequestError: it does not, or there is no such number of channels.
        """
        accepts = getattr(autoencoder, "_accepts_channels", None)
        if accepts is None or not accepts(1):
            raise RequestError(
                f"model.channel_prefix needs a decoder that takes the first channels alone, which this "
                f"{type(autoencoder).__name__} does not: take a preset such as dc-ae-f64c128-1.5, or set "
                "model.autoencoder.decoder_in_shortcut and encoder_out_shortcut to false."
            )
        total = autoencoder.latent_channels
        if not self.channels or not all(0 < count <= total for count in self.channels):
            raise RequestError(f"model.channel_prefix.channels must lie between 1 and {total}, got {self.channels}.")

    def __call__(self, latents: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) with channels set to zero, and the pixels to reconstruct; (2B, …) with the full ones."""
        count = self.channels[int(torch.randint(len(self.channels), ()))]
        kept = torch.arange(latents.shape[1], device=latents.device) < count
        prefix = latents * kept.view(1, -1, 1, 1)
        if not self.always_full:
            return prefix, pixels
        return torch.cat([prefix, latents]), torch.cat([pixels, pixels])


def compile_networks(*networks: nn.Module) -> None:
    """Compile networks in place on first use; the names of their weights stay."""
    for network in networks:
        network.compile()
