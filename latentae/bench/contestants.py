"""The models of a benchmark: opened before anything is measured, moved to their device one at a time, described."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentae.bench.codecs import ClassicalCodec, classical_codec
from latentae.bench.folders import ReconstructionFolder, describe_folder, reconstruction_folder
from latentae.bench.framewise import FramewiseCodec
from latentae.bench.planes import has_planes
from latentae.bench.speed import count_gmac, count_parameters, device_name
from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.loading import load_model, weights_hash

Model = str | Path | nn.Module | LatentCodec


@dataclass
class Contestant:
    """An opened model and its name; for ``clips``, an autoencoder of images goes frame by frame."""

    name: str
    model: nn.Module | LatentCodec | ClassicalCodec | ReconstructionFolder
    device: torch.device
    dtype: torch.dtype
    steps: int | None = None
    clips: bool = False

    def codec(self) -> LatentCodec | ClassicalCodec | ReconstructionFolder:
        """The model on its device, decoding in ``steps``; a codec is otherwise taken as it is."""
        codec = self.model
        if isinstance(codec, ClassicalCodec | ReconstructionFolder):
            return codec
        if not isinstance(codec, LatentCodec):
            codec = LatentCodec(codec, device=self.device, dtype=self.dtype)
        if self.clips and not codec.is_video:
            codec = FramewiseCodec.of(codec)
        return codec if self.steps is None else codec.with_inference_steps(self.steps)

    def identity(self) -> dict[str, Any]:
        """What tells this model from another of its name."""
        if isinstance(self.model, ClassicalCodec):
            return {"codec": self.model.name}
        if isinstance(self.model, ReconstructionFolder):
            return {"files_sha256": self.model.identity}
        inner = self.model.autoencoder if isinstance(self.model, LatentCodec) else self.model
        return {"weights_sha256": weights_hash(inner), "dtype": str(self.dtype), "steps": self.steps}


def open_contestants(
    models: Sequence[Model | tuple[str, Model]],
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    random_weights: bool,
    decode_steps: Sequence[int] = (),
    clips: bool = False,
) -> list[Contestant]:
    """Open every model, on the CPU, so that a misspelt name is found at once and not after the others were measured.

    One whose decoder samples is a contestant for each of ``decode_steps``. For ``clips`` a folder of reconstructions
    is none.

    Raises:
        RequestError: there is no model, two have one name, no decoder takes steps, or the device or the dtype is none.
        MissingWeights: a model is not on this machine.
    """
    where = _usable_device(device)
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise RequestError(f"dtype={dtype!r}; expected float32, bfloat16 or float16.")
    if not models:
        raise RequestError("There is no model to measure: name at least one.")
    contestants = []
    for entry in models:
        name, model = entry if isinstance(entry, tuple) else (None, entry)
        if isinstance(model, str | Path):
            name = name or str(model)
            opened: Any = classical_codec(str(model), clips=clips) or (None if clips else reconstruction_folder(model))
            opened = opened or load_model(model, random_weights=random_weights)
        else:
            opened = model
        inner = opened.autoencoder if isinstance(opened, LatentCodec) else opened
        contestants.append(Contestant(name or type(inner).__name__, opened, where, precision, clips=clips))
    if decode_steps:
        contestants = _by_steps(contestants, list(dict.fromkeys(decode_steps)))
    names = [contestant.name for contestant in contestants]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"Two models are called {name!r}: give them names, NAME=MODEL or (name, model).")
    return contestants


def _by_steps(contestants: list[Contestant], decode_steps: Sequence[int]) -> list[Contestant]:
    """Decoders that sample once for each number of steps, the others as they are."""
    found = []
    for contestant in contestants:
        codec: Any = contestant.model
        if not isinstance(codec, LatentCodec | ClassicalCodec | ReconstructionFolder):
            codec = LatentCodec(codec)
        for steps in decode_steps if codec.samples else [None]:
            label = f", {steps} step{'s' * (steps != 1)}" if codec.samples and len(decode_steps) > 1 else ""
            if steps is not None:
                codec.with_inference_steps(steps)  # refuses what is none
            found.append(replace(contestant, name=contestant.name + label, steps=steps))
    if all(contestant.steps is None for contestant in found):
        raise RequestError("None of these models decodes by steps: leave their number out (--decode-steps).")
    return found


def describe(
    codec: LatentCodec | ClassicalCodec | ReconstructionFolder, size: int, seed: int, frames: int | None = None
) -> dict[str, Any]:
    """What a model is, whatever the images are; arithmetic is counted for one image of ``size`` x ``size``, or a clip.

    Where the decoder samples, ``decoding`` says in how many steps and from the noise of which seed, else it is None.
    """
    if isinstance(codec, ReconstructionFolder):
        return describe_folder(codec)
    if isinstance(codec, ClassicalCodec):
        unknown = dict.fromkeys(("weights_sha256", "spatial_ratio", "latent_channels", "floats_per_pixel", "decoding"))
        nothing: dict[str, Any] = {key: {} for key in ("normalisation", "parameters", "gmac")}
        what = {"class": codec.format.upper(), "dtype": "uint8", "device": "cpu", "temporal_ratio": 1}
        return {**what, **unknown, **nothing}
    autoencoder = codec.autoencoder
    precision = str(codec.autocast or codec.dtype).removeprefix("torch.")
    return {
        "class": type(autoencoder).__name__,
        "weights_sha256": weights_hash(autoencoder),
        "dtype": f"autocast to {precision}" if codec.autocast else precision,
        "device": device_name(codec.device),
        "spatial_ratio": codec.spatial_ratio,
        "temporal_ratio": codec.temporal_ratio,
        "latent_channels": codec.latent_channels,
        "floats_per_pixel": codec.latent_channels / codec.spatial_ratio**2,
        **({"compression": autoencoder.compression} if has_planes(autoencoder) else {}),
        "normalisation": codec.normalisation,
        "decoding": {"steps": codec.num_inference_steps, "seed": seed} if codec.samples else None,
        "parameters": count_parameters(autoencoder),
        "gmac": count_gmac(codec, size, frames),
    }


def _usable_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
