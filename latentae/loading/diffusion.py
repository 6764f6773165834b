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
from latentae.nn.planes import PlaneLayout
from latentae.weights import open_state_dict

FORMAT = 1


@dataclass
class LatentDiffusion:
    """A denoiser and what its latents are.

    Args:
        denoiser: in eval mode, of normalised latents ``(z - mean) / std`` with raw ``z``.
        mean, std: of each latent channel, float32 (C,); of planes of each channel of their volume, ((K + 2)·C,).
        autoencoder: what `latentae.load` opens, if it was known in training; its weights' hash beside it.
        labels: names of the classes, where they have any.
        given: which spatial planes it has seen given in training: ``first``, ``both``, or none of these.
    """

    denoiser: Denoiser
    mean: Tensor
    std: Tensor
    autoencoder: str | None = None
    autoencoder_sha256: str | None = None
    labels: dict[int, str] | None = None
    given: tuple[str, ...] = ()

    @property
    def layout(self) -> PlaneLayout | None:
        """Of the planes of one clip; None where latents are not planes."""
        return getattr(self.denoiser.transformer, "layout", None)

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents to what the denoiser sees: (B, C, h, w) to the same, volumes of planes to tokens (B, N, C)."""
        if self.layout is not None:
            latents = self.layout.unpack(latents, "volume")
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """What the denoiser sees, or `sample` gives, to raw latents, as the autoencoder decodes them."""
        mean, std = self._statistics(latents)
        raw = latents * std + mean
        return raw if self.layout is None else self.layout.pack(raw, "volume")

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in a shape that goes with what the denoiser sees."""
        mean, std = self.mean.to(latents), self.std.to(latents)
        if self.layout is None:
            return mean.view(-1, 1, 1), std.view(-1, 1, 1)
        return self.layout.of_tokens(mean), self.layout.of_tokens(std)  # (N, C)

    def describe(self) -> dict[str, Any]:
        """What it is, as plain JSON values."""
        layout = self.layout
        latents = " x ".join(map(str, self.denoiser.latent_shape))
        if layout is not None:
            latents = (
                f"{layout.num_tokens} tokens of {layout.channels} channels, planes of {layout.t} x {layout.h} x "
                f"{layout.w} with {layout.planes} spatial"
            )
        return {
            "class": type(self.denoiser.transformer).__name__,
            "latents": latents,
            **({"given planes": ", ".join(self.given) or "none"} if layout else {}),
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
        "given": list(diffusion.given),
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
        given=tuple(about.get("given", ())),
    )


def _checkpoint(path: str | Path) -> Path:
    return Path(path) / LAST_CHECKPOINT if Path(path).is_dir() else Path(path)
