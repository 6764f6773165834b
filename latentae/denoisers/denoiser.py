"""A transformer of diffusers as a velocity field over normalised latents, knowing the time and perhaps the class.

DiT (arXiv 2212.09748) has a table of classes, and one for "none", in each block. PixArt-α (2310.00426) and Sana
(2410.10629) read captions; here the class is a caption of one token. All predict the velocity of the linear path, as
SiT (2401.08740), and are saved as the stock classes that they are. `PlaneTransformer`, of tokens of planes, is ours.
"""

import math
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle, AdaLayerNormZero
from torch import Tensor, nn

from latentae.denoisers.planes import PlaneTransformer
from latentae.errors import RequestError

TRANSFORMERS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (DiTTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel, PlaneTransformer)
}
TIME_SCALE = 1000.0  # diffusers' transformers count their time in thousandths


class ClassEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Classes, and none of them, as captions of one token.

    Args:
        num_classes: label ``num_classes`` stands for none.
        channels: of the token.
    """

    @register_to_config
    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, channels)
        nn.init.normal_(self.table.weight)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,) to tokens (B, 1, channels)."""
        return self.table(labels)[:, None]


ClassEmbedder.__module__ = "latentae"  # what saved pipelines call its library, wherever this file is


class Denoiser(nn.Module):
    """The velocity ``noise - clean`` of noisy latents, ``(1 - t) * clean + t * noise``.

    Args:
        transformer: one of `TRANSFORMERS`, with as many channels out as in.
        class_embedder: for a transformer that reads captions.
        num_classes: labels are 0 to ``num_classes - 1``, and ``num_classes`` for none; 1 for unconditional data.
        latent_shape: (C, h, w) of the latents that it is for, or (N, C) of tokens of planes.

    Raises:
        RequestError: it cannot hold latents of that shape.
    """

    def __init__(
        self,
        transformer: Any,
        class_embedder: ClassEmbedder | None,
        num_classes: int,
        latent_shape: tuple[int, ...],
    ):
        super().__init__()
        self.transformer = transformer
        self.class_embedder = class_embedder
        self.num_classes = num_classes
        self.latent_shape = tuple(latent_shape)
        self.check_grid(self.latent_shape)
        for module in transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # in training every block would drop labels by itself

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity at ``noisy`` (B, C, h, w) and times t (B,), for classes (B,) or, by default, none.

        Of planes ``noisy`` is (B, N, C), and t may be (B, N).
        """
        labels = self.null_labels(len(noisy)) if labels is None else labels
        if self.class_embedder is None:
            return self.transformer(noisy, timestep=TIME_SCALE * t, class_labels=labels).sample
        return self.transformer(
            noisy, encoder_hidden_states=self.class_embedder(labels).to(noisy.dtype), timestep=TIME_SCALE * t
        ).sample

    def null_labels(self, count: int) -> Tensor:
        """Labels (count,) that stand for no class; of unconditional data, the only label that there is."""
        device = next(self.parameters()).device
        return torch.full((count,), self.num_classes if self.num_classes > 1 else 0, device=device)

    def check_grid(self, latent_shape: tuple[int, ...]) -> None:
        """Refuse latents (C, h, w), or (N, C) of planes, that the transformer cannot hold.

        Raises:
            RequestError: other channels or another size than it was built for, or sides that patches do not divide.
        """
        if isinstance(self.transformer, PlaneTransformer):
            layout = self.transformer.layout
            if tuple(latent_shape) != (layout.num_tokens, layout.channels):
                raise RequestError(
                    f"The denoiser was made for {layout.num_tokens} tokens of planes with {layout.channels} channels, "
                    f"these latents are {' x '.join(map(str, latent_shape))}: use clips of the size that it was "
                    "trained on."
                )
            return
        config, name = self.transformer.config, type(self.transformer).__name__
        channels, height, width = latent_shape
        if channels != config.in_channels:
            raise RequestError(
                f"The denoiser takes latents of {config.in_channels} channels, these have {channels}: they are of "
                "another autoencoder than it was made for."
            )
        if height % config.patch_size or width % config.patch_size:
            raise RequestError(
                f"The denoiser's patches of {config.patch_size} do not divide latents of {height} x {width}: choose "
                "another patch_size, or images of another size."
            )
        if name == "DiTTransformer2DModel" and height != width:
            raise RequestError(
                f"{name} can only hold square latents, these are {height} x {width}: choose square images, or the "
                "class PixArtTransformer2DModel or SanaTransformer2DModel."
            )
        if max(height, width) != config.sample_size:
            raise RequestError(
                f"The denoiser was made for latents of {config.sample_size} a side, these are {height} x {width}: "
                "choose images of another size, or start a denoiser of this one."
            )

    def describe(self) -> dict[str, Any]:
        """What `build_denoiser` needs to build it again, as plain JSON values."""
        config = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        return {
            "class_name": type(self.transformer).__name__,
            "config": config,
            "class_channels": self.class_embedder.config["channels"] if self.class_embedder else None,
            "num_classes": self.num_classes,
            "latent_shape": list(self.latent_shape),
        }


def build_denoiser(description: dict[str, Any]) -> Denoiser:
    """A denoiser with random weights from what `Denoiser.describe` gave; the global generator draws them.

    The weights are DiT's: the blocks begin as the identity and the velocity as zero. diffusers' own initialisation does
    neither, since it only loads trained weights.
    """
    transformer = TRANSFORMERS[description["class_name"]](**description["config"])
    if isinstance(transformer, PlaneTransformer):
        transformer.initialise()
    else:
        _initialise(transformer)
    embedder = None
    if description["class_channels"]:
        embedder = ClassEmbedder(description["num_classes"], description["class_channels"])
    return Denoiser(transformer, embedder, description["num_classes"], tuple(description["latent_shape"]))


def _initialise(transformer: nn.Module) -> None:
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:  # patches, as a linear layer
            _xavier_of_patches(module)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, AdaLayerNormSingle):
            nn.init.normal_(module.linear.weight, std=0.02)
        elif isinstance(module, AdaLayerNormZero) or name.endswith("attn2.to_out.0"):
            zeroed = module.linear if isinstance(module, AdaLayerNormZero) else module
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        elif name in ("proj_out", "proj_out_1", "proj_out_2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _xavier_of_patches(conv: nn.Conv2d) -> None:
    bound = math.sqrt(6 / (conv.weight[0].numel() + conv.out_channels))
    nn.init.uniform_(conv.weight, -bound, bound)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
