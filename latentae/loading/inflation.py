"""The weights of an image autoencoder taken over into a video autoencoder of the same widths."""

from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.families.fourplane import FourPlane


def inflate(video: FourPlane, image: Any) -> list[str]:
    """Take the weights of an image autoencoder over into a video one, which then does to images just what that does.

    A 2D kernel becomes the last frame's part of a causal 3D kernel, or the middle one of the decoder's; the others are
    zero. All planes' heads start as the image's; of the decoder's embeddings xy1's does and the others start at zero,
    so that a still clip is decoded to its image.

    Args:
        video: of the same widths and layers.
        image: diffusers' ``AutoencoderKL``.

    Returns:
        The names of the video autoencoder's weights that were taken over.

    Raises:
        RequestError: another class, or weights of other shapes.
    """
    if type(image).__name__ != "AutoencoderKL" or not video.config["spatial_planes"]:
        raise RequestError(
            f"inflate takes an AutoencoderKL into a FourPlane with planes, not {type(image).__name__} into one with "
            f"spatial_planes {video.config['spatial_planes']}."
        )
    source, target = image.state_dict(), video.state_dict()
    taken: dict[str, Tensor] = {}
    for name, weight in source.items():
        if name.startswith(("encoder.conv_out", "decoder.conv_in", "quant_conv", "post_quant_conv")):
            continue
        wanted = target.get(name)
        if wanted is not None and wanted.ndim == 5:
            inflated = torch.zeros_like(wanted)
            frame = -1 if name.startswith("encoder.") or wanted.shape[2] == 1 else wanted.shape[2] // 2
            if inflated[:, :, frame].shape == weight.shape:
                inflated[:, :, frame] = weight
            weight = inflated if inflated[:, :, frame].shape == weight.shape else weight
        if wanted is None or wanted.shape != weight.shape:
            has = "it has no such weight" if wanted is None else f"of shape {tuple(wanted.shape)}"
            raise RequestError(f"inflate: {name} is of shape {tuple(weight.shape)}, in the video autoencoder {has}.")
        taken[name] = weight
    taken |= _inflated_heads(video, image)
    video.load_state_dict({**target, **taken})
    return list(taken)


def _inflated_heads(video: FourPlane, image: Any) -> dict[str, Tensor]:
    """The last convolution of the encoder with what follows it, and the first of the decoder with what precedes it."""
    out, into = image.encoder.conv_out, image.decoder.conv_in
    weight, bias = out.weight.detach(), out.bias.detach()
    if image.quant_conv is not None:
        mix = image.quant_conv.weight.detach()[:, :, 0, 0]
        weight, bias = torch.einsum("om,mihw->oihw", mix, weight), mix @ bias + image.quant_conv.bias.detach()
    taken: dict[str, Tensor] = {}
    for name in video.encoder.heads:
        taken |= {f"encoder.heads.{name}.weight": weight, f"encoder.heads.{name}.bias": bias}
    identity = torch.eye(into.in_channels)[:, :, None, None]
    mixed = (identity, torch.zeros(into.in_channels))
    if image.post_quant_conv is not None:
        mixed = (image.post_quant_conv.weight.detach(), image.post_quant_conv.bias.detach())
    for name in video.decoder.embeds:
        used = float(name == "xy1")
        values = (*mixed, used * into.weight.detach(), used * into.bias.detach())
        taken |= {
            f"decoder.embeds.{name}.{key}": value
            for key, value in zip(("0.weight", "0.bias", "1.weight", "1.bias"), values)
        }
    return taken
