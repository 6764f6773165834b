"""What a denoiser is trained by and used for: the error of its velocity, and Euler's steps from noise to latents."""

import torch
from torch import Tensor

from latentae.denoisers.denoiser import Denoiser
from latentae.nn.flow import add_noise, solve, times_of
from latentae.nn.precision import widen


def velocity_errors(
    denoiser: Denoiser,
    clean: Tensor,
    t: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The mean squared error of the velocity for each of the latents, (B,), with gradient.

    Args:
        clean: normalised latents (B, C, h, w), or tokens (B, N, C); and ``noise`` in the same shape.
        t: times, (B,).
        labels: classes, (B,); None for none.
        given: tokens that stay clean and do not count, (B, N), true where they are given.
    """
    if given is None:
        predicted = denoiser(add_noise(clean, noise, t), t, labels)
        return (widen(predicted) - widen(noise - clean)).square().flatten(1).mean(1)
    noisy = torch.where(given[..., None], clean, add_noise(clean, noise, t))
    predicted = denoiser(noisy, t[:, None] * ~given, labels)
    errors = (widen(predicted) - widen(noise - clean)).square().mean(2) * ~given  # (B, N)
    return errors.sum(1) / (~given).sum(1)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    known: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Normalised latents from noise (B, C, h, w), or tokens (B, N, C), by Euler's steps evenly spaced in time.

    Args:
        labels: classes, (B,); None for none.
        known: tokens in the shape of ``noise``, of which those that are ``given``, (B, N), stay as they are.
        guidance_scale: g of classifier-free guidance (arXiv 2207.12598), ``v_none + g * (v_class - v_none)``; at 1
            there is none, and half the cost.
    """

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        times = t
        if given is not None and known is not None:
            noisy, times = torch.where(given[..., None], known, noisy), t[:, None] * ~given
        if labels is None or guidance_scale == 1:
            velocity = denoiser(noisy, times, labels)
        else:
            both = torch.cat([labels, denoiser.null_labels(len(labels))])
            of_class, of_none = denoiser(torch.cat([noisy, noisy]), torch.cat([times, times]), both).chunk(2)
            velocity = of_none + guidance_scale * (of_class - of_none)
        clean = noisy - t.view(-1, *[1] * (noisy.ndim - 1)) * velocity
        return clean if given is None or known is None else torch.where(given[..., None], known, clean)

    return solve(denoise, noise, times_of(steps))
