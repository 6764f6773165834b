"""The checkpoint of a latent diffusion: a denoiser, the normalisation of its latents, and whose latents they are.

It is a Lightning checkpoint that opens with ``torch.load(weights_only=True)`` and holds

- ``latentae_diffusion``: what `describe_diffusion` gives;
- ``latentae_ema``: the averaged weights of the `Denoiser` as a whole state dict; absent without averaging;
- ``state_dict``: the raw weights under ``denoiser.``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.denoisers import Denoiser, build_denoiser
from latentae.errors import MissingWeights, RequestError
from latentae.loading.opening import DIFFUSION_KEY, LAST_CHECKPOINT
from latentae.weights import open_state_dict

FORMAT = 1


@dataclass
class LatentDiffusion:
    """A denoiser and what its latents are.

    Args:
        denoiser: in eval mode, of normalised latents ``(z - mean) / std`` with raw ``z``.
        mean, std: of each latent channel, float32 (C,).
        autoencoder: what `latentae.load` opens, if it was known in training; its weights' hash beside it.
        labels: names of the classes, where they have any.
    """

    denoiser: Denoiser
    mean: Tensor
    std: Tensor
    autoencoder: str | None = None
    autoencoder_sha256: str | None = None
    labels: dict[int, str] | None = None

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) to what the denoiser sees."""
        return (latents - self._of(self.mean, latents)) / self._of(self.std, latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """What the denoiser sees, or `sample` gives, (B, C, h, w), to raw latents."""
        return latents * self._of(self.std, latents) + self._of(self.mean, latents)

    @staticmethod
    def _of(values: Tensor, latents: Tensor) -> Tensor:
        return values.to(latents).view(-1, 1, 1)

    def describe(self) -> dict[str, Any]:
        """What it is, as plain JSON values."""
        channels, height, width = self.denoiser.latent_shape
        return {
            "class": type(self.denoiser.transformer).__name__,
            "latents": f"{channels} x {height} x {width}",
            "classes": self.denoiser.num_classes if self.denoiser.num_classes > 1 else "none: unconditional",
            "parameters": sum(parameter.numel() for parameter in self.denoiser.parameters()),
            "latents_mean": [round(value, 4) for value in self.mean.tolist()],
            "latents_std": [round(value, 4) for value in self.std.tolist()],
            "autoencoder": self.autoencoder,
            "autoencoder_weights_sha256": self.autoencoder_sha256,
        }


def describe_diffusion(diffusion: LatentDiffusion) -> dict[str, Any]:
    """All of a latent diffusion but the weights, in types that ``weights_only`` opens."""
    return {
        "format": FORMAT,
        "denoiser": diffusion.denoiser.describe(),
        "normalisation": {"mean": diffusion.mean.tolist(), "std": diffusion.std.tolist()},
        "autoencoder": diffusion.autoencoder,
        "autoencoder_weights_sha256": diffusion.autoencoder_sha256,
        "labels": diffusion.labels,
    }


def is_diffusion_run(path: str | Path) -> bool:
    """Whether a run folder or a checkpoint holds a denoiser, without reading its tensors."""
    checkpoint = _checkpoint(path)
    if not checkpoint.is_file() or checkpoint.suffix != ".ckpt":
        return False
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever opens it next says what is wrong with it
        return False
    return isinstance(state, dict) and DIFFUSION_KEY in state


def load_diffusion(path: str | Path) -> LatentDiffusion:
    """Open a run of ``latentae fit`` that trained a denoiser, or a checkpoint of one; averaged weights if it has them.

    Raises:
        MissingWeights: there is no checkpoint.
        RequestError: it holds no denoiser, or one of a later format.
    """
    checkpoint = _checkpoint(path)
    if not checkpoint.is_file():
        raise MissingWeights(f"{path} is no run and no checkpoint of a latent diffusion: there is no {checkpoint}.")
    state = open_state_dict(checkpoint)
    if not isinstance(state, dict) or DIFFUSION_KEY not in state:
        raise RequestError(
            f"{path} holds no denoiser: give a run of 'latentae fit' whose recipe has model.denoiser, such as "
            "diffusion/tiny."
        )
    about = state[DIFFUSION_KEY]
    if about["format"] != FORMAT:
        raise RequestError(f"{path} has format {about['format']} of a latent diffusion; this version reads {FORMAT}.")
    denoiser = build_denoiser(about["denoiser"])
    weights = state.get("latentae_ema") or {
        key.removeprefix("denoiser."): value
        for key, value in state["state_dict"].items()
        if key.startswith("denoiser.")
    }
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"{path} does not hold the weights of the denoiser that it describes: {reason}") from error
    return LatentDiffusion(
        denoiser=denoiser.eval(),
        mean=torch.tensor(about["normalisation"]["mean"]),
        std=torch.tensor(about["normalisation"]["std"]),
        autoencoder=about["autoencoder"],
        autoencoder_sha256=about["autoencoder_weights_sha256"],
        labels=about["labels"],
    )


def _checkpoint(path: str | Path) -> Path:
    return Path(path) / LAST_CHECKPOINT if Path(path).is_dir() else Path(path)
