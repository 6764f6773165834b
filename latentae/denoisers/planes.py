"""A transformer over the planes of a video's latents, each position a token of the one sequence.

As DiT (arXiv 2212.09748): blocks of attention and MLP whose norms the time and the class modulate, beginning as the
identity. What is of planes: an embedding of each plane's kind, rotary positions along time, height and width (RoPE,
2104.09864, in three axes), and a time for each token, so that planes which are given stay clean while the others are
drawn, as in the image-to-video mode of LTX-Video (2501.00103).
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from latentae.errors import RequestError
from latentae.nn.planes import PlaneLayout

TIME_CHANNELS = 256
ROPE_BASE = 100.0  # grids of latents have tens of positions, not the thousands of texts for which it is 10,000


class PlaneBlock(nn.Module):
    """x + gate * attention(modulated norm(x)), and the same with an MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        """Tokens (B, N, D), their condition (B, 1 or N, D), and cosines and sines (2, N, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.to_qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        q, k = (
            rotate(F.rms_norm(z.float(), z.shape[-1:], norm.weight.float(), norm.eps), rotation).to(v.dtype)
            for z, norm in ((q, self.norm_q), (k, self.norm_k))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate1 * self.to_out(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlaneTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The velocity of noisy tokens of planes.

    Args:
        layout: ``[t, h, w, planes, channels]`` of the `PlaneLayout` of the tokens.
        num_layers, num_attention_heads, attention_head_dim: of the blocks, as DiT's.
        mlp_ratio: of the MLPs' width.
        num_embeds_ada_norm: classes; the next label stands for none.

    Raises:
        RequestError: a head that is too narrow for three axes.
    """

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    @register_to_config
    def __init__(
        self,
        layout: list[int],
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_embeds_ada_norm: int = 1,
    ):
        super().__init__()
        if attention_head_dim < 6:
            raise RequestError(
                f"attention_head_dim is at least 6, two for each of three axes, not {attention_head_dim}."
            )
        self.layout = PlaneLayout(*layout)
        width = num_attention_heads * attention_head_dim
        self.proj_in = nn.Linear(self.layout.channels, width)
        self.planes = nn.Embedding(self.layout.planes + 2, width)
        self.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, width)
        self.classes = nn.Embedding(num_embeds_ada_norm + 1, width)
        self.transformer_blocks = nn.ModuleList(
            PlaneBlock(width, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, self.layout.channels)
        self.register_buffer("rotation", rotation_of(self.layout.ids, attention_head_dim), persistent=False)
        self.register_buffer("types", self.layout.types, persistent=False)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Tokens (B, N, C) to their velocity.

        Args:
            timestep: from 0 (clean) to 1000 (noise), (B,), or (B, N) for each token.
            class_labels: (B,).
        """
        x = self.proj_in(hidden_states) + self.planes(self.types)
        times = timestep if timestep.ndim == 2 else timestep[:, None]
        embedded = self.timestep_embedder(self.time_proj(times.flatten()).to(x.dtype)).unflatten(0, times.shape)
        condition = embedded + self.classes(class_labels)[:, None]  # (B, 1 or N, D)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition, self.rotation)
            else:
                x = block(x, condition, self.rotation)
        shift, scale = self.modulation_out(F.silu(condition)).chunk(2, dim=-1)
        velocity = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def initialise(self) -> None:
        """DiT's weights: blocks begin as the identity, and the velocity as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.timestep_embedder.linear_1, self.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        blocks: Any = self.transformer_blocks
        for block in blocks:
            nn.init.zeros_(block.modulation.weight)
        for layer in (self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)


PlaneTransformer.__module__ = "latentae"  # what saved pipelines call its library, wherever this file is


def rotation_of(positions: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines of the angles of positions (N, 3): (2, N, d), a third of the pairs for each axis.

    What three axes do not share evenly is not rotated.
    """
    pairs = head_dim // 6
    frequencies = ROPE_BASE ** (-torch.arange(pairs) / pairs)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (N, 3 * pairs)
    angles = F.pad(angles, (0, head_dim // 2 - 3 * pairs))
    angles = F.pad(angles.repeat_interleave(2, dim=1), (0, head_dim % 2))  # (N, d)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring pairs of channels of x (B, heads, N, d) turned by their angles, in float32."""
    cosines, sines = rotation
    even = x.shape[-1] // 2 * 2
    pairs = x[..., :even].float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    turned = F.pad(turned, (0, x.shape[-1] - even))
    return (x.float() * cosines + turned * sines).to(x.dtype)
