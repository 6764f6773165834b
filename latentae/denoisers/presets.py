"""Denoisers in named sizes, published or ours."""

from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch

from latentae.denoisers.denoiser import TRANSFORMERS, Denoiser, build_denoiser
from latentae.errors import RequestError
from latentae.nn.planes import PlaneLayout


def _dit(layers: int, heads: int, head_dim: int, **arguments: Any) -> dict[str, Any]:
    return {
        "class_name": "DiTTransformer2DModel",
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        **arguments,
    }


def _pixart(layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    width = heads * head_dim
    return _dit(layers, heads, head_dim, cross_attention_dim=width, caption_channels=width) | {
        "class_name": "PixArtTransformer2DModel",
        "use_additional_conditions": False,
    }


def _sana(layers: int, heads: int, cross_heads: int, cross_head_dim: int) -> dict[str, Any]:
    width = cross_heads * cross_head_dim
    return _dit(layers, heads, 32, caption_channels=width) | {
        "class_name": "SanaTransformer2DModel",
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": width,
    }


def _planes(layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    return {**_dit(layers, heads, head_dim), "class_name": "PlaneTransformer"}


PRESETS: dict[str, dict[str, Any]] = {
    "dit-tiny": _dit(4, 4, 32),
    "dit-probe": _dit(6, 6, 32),
    "dit-s": _dit(12, 6, 64),
    "dit-b": _dit(12, 12, 64),
    "dit-l": _dit(24, 16, 64),
    "dit-xl": _dit(28, 16, 72),
    "pixart-tiny": _pixart(4, 4, 32),
    "pixart-xl": _pixart(28, 16, 72),
    "sana-tiny": _sana(4, 4, 4, 32),
    "sana-600m": _sana(28, 36, 16, 72),
    "sana-1.6b": _sana(20, 70, 20, 112),
    "planes-tiny": _planes(4, 4, 32),
    "planes-s": _planes(12, 6, 64),
    "planes-b": _planes(12, 12, 64),
    "planes-l": _planes(24, 16, 64),
    "planes-xl": _planes(28, 16, 72),
}
# these follow from the latents and the classes
OURS = ("in_channels", "out_channels", "sample_size", "num_embeds_ada_norm", "layout")


def denoiser_presets() -> list[str]:
    """The names of all presets."""
    return list(PRESETS)


def create_denoiser(
    description: dict[str, Any], latent_shape: tuple[int, ...] | PlaneLayout, num_classes: int = 1, seed: int = 0
) -> Denoiser:
    """A denoiser with random weights.

    Args:
        description: ``{"preset": NAME, **changed arguments}``, or ``{"class_name": NAME, **arguments}`` of one of
            diffusers' classes: DiTTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel. Patches are of
            1 unless ``patch_size`` says otherwise. Channels, size and classes follow from the other arguments.
            ``planes-…`` and PlaneTransformer are for planes, and only these.
        latent_shape: (C, h, w), or the layout of planes.
        num_classes: 1 for unconditional data.
        seed: of the weights; the global generator stays as it was.

    Raises:
        RequestError: an unknown preset, class or argument, or latents that it cannot hold.
    """
    arguments = dict(description)
    name = arguments.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise RequestError(f"There is no denoiser {name!r}; {_nearest(name, list(PRESETS))}")
    arguments = {**PRESETS.get(name, {}), **arguments}
    kind = str(arguments.pop("class_name", None))
    if kind not in TRANSFORMERS:
        raise RequestError(
            f"The denoiser names no preset, and no class that fits: {_nearest(kind, list(TRANSFORMERS))}"
        )
    of_planes = isinstance(latent_shape, PlaneLayout)
    if (kind == "PlaneTransformer") != of_planes:
        what, fitting = ("planes", "planes-s") if of_planes else ("images", "dit-s")
        raise RequestError(f"{kind} does not fit the latents, which are of {what}: take a denoiser such as {fitting}.")
    known = [key for key in signature(TRANSFORMERS[kind].__init__).parameters if key not in ("self", *OURS)]
    for key in arguments:
        if key not in known:
            raise RequestError(f"{kind} has no argument {key!r} of its own; {_nearest(key, known)}")
    if isinstance(latent_shape, PlaneLayout):
        layout = latent_shape
        shape: tuple[int, ...] = (layout.num_tokens, layout.channels)
        config = {**arguments, "layout": [layout.t, layout.h, layout.w, layout.planes, layout.channels]}
    else:
        shape = latent_shape
        channels, height, width = latent_shape
        given = {"patch_size": 1, **arguments}
        config = {**given, "in_channels": channels, "out_channels": channels, "sample_size": max(height, width)}
    if kind in ("DiTTransformer2DModel", "PlaneTransformer"):
        config["num_embeds_ada_norm"] = num_classes
    built = {
        "class_name": kind,
        "config": config,
        "class_channels": arguments.get("caption_channels"),
        "num_classes": num_classes,
        "latent_shape": list(shape),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_denoiser(built)


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
