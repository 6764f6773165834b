"""The latents of a training step, drawn from the posterior; and what compiles the networks of one."""

from typing import Any

import torch
from torch import Tensor, nn


def draw_latents(posterior: Any, rank: int = 0, world_size: int = 1) -> Tensor:
    """A sample of the posterior, with gradient; its mode where it has no spread.

    The noise is drawn for the batches of all ranks, of which each takes its own part: N ranks draw what one rank with
    an N times larger batch draws.
    """
    mean = posterior.mode()
    if not hasattr(posterior, "std"):
        return mean
    noise = torch.randn(world_size * len(mean), *posterior.std.shape[1:], device=mean.device, dtype=mean.dtype)
    return latents_at(posterior, noise.chunk(world_size)[rank])


def latents_at(posterior: Any, noise: Tensor) -> Tensor:
    """The draw of standard normal noise: in the shape of the latents, or of the tokens of planes."""
    if hasattr(posterior, "at"):  # of planes
        return posterior.at(noise)
    return posterior.mode() + posterior.std * noise if hasattr(posterior, "std") else posterior.mode()


def compile_networks(*networks: nn.Module) -> None:
    """Compile networks in place on first use; the names of their weights stay."""
    for network in networks:
        network.compile()
