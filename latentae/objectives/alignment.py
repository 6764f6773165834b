"""Alignment of latents with the features of a frozen vision network, as VA-VAE trains with."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.errors import MissingExtra, MissingWeights, RequestError
from latentae.objectives.terms import Step, Term


class Alignment(Term):
    """VA-VAE's two margin losses between latents and the features of a vision model (arXiv 2501.01423, section 3).

    The latents z pass a learned 1×1 convolution without bias to as many channels as the features f have; with unit
    vectors at the positions i and j of an image,

    - marginal cosine similarity: mean over i of max(0, 1 - m1 - cos(z_i, f_i));
    - marginal distance matrix similarity: mean over i, j of max(0, \\|cos(z_i, z_j) - cos(f_i, f_j)\\| - m2).

    The value is their sum. VA-VAE multiplies it by an adaptive ratio of gradient norms at the encoder's last layer; the
    weight here is a constant. Memory grows with the square of the number of latent positions.

    The convolution trains with the autoencoder and is in its checkpoints. The vision network stays frozen in float32
    and is no submodule: it is never in a checkpoint.

    Args:
        encoder: the vision network: a module that maps pixels (B, 3, size, size) in [-1, 1] to features (B, D, h, w),
            or the name of a model, ``timm/NAME`` for timm, any other hub id or folder for transformers, whose patch
            tokens are taken. As in VA-VAE, its input stays in [-1, 1]; a module may normalise it as it likes.
        latent_channels: of the autoencoder.
        size: pixels are resized to its square first; features of another grid than the latents' are resized to that.
        cosine_margin: m1.
        distance_margin: m2.

    Raises:
        MissingExtra: ``timm`` or ``transformers`` is not installed.
        MissingWeights: there is no such model on this machine and the hub does not give it.
        RequestError: the module does not give a map of features.
    """

    needs_reconstruction = False
    takes_clips = False

    def __init__(
        self,
        encoder: str | nn.Module,
        latent_channels: int,
        weight: float = 0.1,
        size: int = 224,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
    ):
        super().__init__(weight)
        network = encoder if isinstance(encoder, nn.Module) else open_vision_model(encoder)
        self._network = (network.eval().requires_grad_(False),)  # a tuple hides it from nn.Module
        self.size = size
        self.cosine_margin = cosine_margin
        self.distance_margin = distance_margin
        channels = self.features(torch.zeros(1, 3, size, size)).shape[1]
        self.projection = nn.Conv2d(latent_channels, channels, 1, bias=False)

    def features(self, pixels: Tensor) -> Tensor:
        """What the vision network makes of pixels (B, 3, H, W) in [-1, 1]: (B, D, h, w), without gradient."""
        network: Any = self._network[0].to(pixels.device)
        with torch.no_grad():
            resized = F.interpolate(pixels.float(), (self.size, self.size), mode="bilinear", antialias=True)
            features = network(resized)
        if not isinstance(features, Tensor) or features.ndim != 4:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise RequestError(
                f"Alignment needs an encoder that maps pixels to features (B, D, h, w); {type(network).__name__} gave "
                f"{shape}: wrap it in a module that does."
            )
        return features

    def measure(self, step: Step) -> Tensor:
        if step.latents is None:
            raise RequestError("Alignment compares latents, and this step offers none: give Step its latents.")
        latents = self.projection(step.latents.to(self.projection.weight.dtype))  # (B, D, h, w)
        features = self.features(step.target).to(latents.dtype)
        if features.shape[2:] != latents.shape[2:]:
            features = F.interpolate(features, latents.shape[2:], mode="bilinear", antialias=True)
        z, f = (F.normalize(x.flatten(2), dim=1) for x in (latents, features))  # (B, D, h*w), of length 1 along D
        cosine = F.relu(1 - self.cosine_margin - (z * f).sum(dim=1)).mean()
        distances = (z.mT @ z - f.mT @ f).abs()  # (B, h*w, h*w)
        return cosine + F.relu(distances - self.distance_margin).mean()


def open_vision_model(name: str) -> nn.Module:
    """A pretrained vision transformer as a module from pixels to the map of its patch tokens.

    Args and errors as in `Alignment`.
    """
    try:
        if name.startswith("timm/"):
            import timm

            model: Any = timm.create_model(f"hf-hub:{name}", pretrained=True, num_classes=0)
            return PatchTokens(model, model.forward_features)
        import transformers

        model = transformers.AutoModel.from_pretrained(name)
    except ImportError as error:
        raise MissingExtra(f"Alignment with {name}", "align") from error
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"The vision model {name} of model.objective is no folder and cannot be fetched from the hub "
            f"({' '.join(str(error).split())[:200]}): give a folder, or leave the term out."
        ) from error
    model = getattr(model, "vision_model", model)  # of CLIP and SigLIP, whose other half reads text
    return PatchTokens(model, lambda pixels: model(pixel_values=pixels).last_hidden_state)


class PatchTokens(nn.Module):
    """The tokens (B, prefix + h*w, D) of a square image as a map (B, D, h, w); convolutional maps pass through.

    Class and register tokens come first; there are fewer of them than would make the next square.
    """

    def __init__(self, model: nn.Module, tokens_of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model = model
        self.tokens_of = tokens_of

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.tokens_of(pixels)
        if tokens.ndim == 4:
            return tokens
        side = int(tokens.shape[1] ** 0.5)
        return tokens[:, -(side**2) :].mT.unflatten(2, (side, side))
