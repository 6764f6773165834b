"""The halves of the Stable Diffusion VAE, and the decoder of its small sister TAESD, which run in tiles exactly.

Weights and results are those of diffusers' ``Encoder``, ``Decoder`` and ``DecoderTiny``. With ``tile``, height and
width in pixels of what goes in, all but the middle, whose attention sees the whole image, runs in tiles.
"""

from typing import Any

import torch
from diffusers.models.autoencoders import vae
from torch import Tensor, nn

from latentae.nn.exact_tiling import Step, run_steps, steps_of, steps_of_block


class Encoder(vae.Encoder):
    """Pixels (B, 3, H, W) to moments (B, C, H/f, W/f)."""

    down_blocks: Any

    def forward(self, sample: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        if tile is None:
            return super().forward(sample)
        steps = steps_of([self.conv_in])
        for block in self.down_blocks:
            steps += steps_of_block(block, [*block.resnets, *(block.downsamplers or ())])
        x = run_steps(steps, sample, tile)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class Decoder(vae.Decoder):
    """Latents (B, C, h, w) to pixels (B, 3, f*h, f*w)."""

    up_blocks: Any

    def forward(self, sample: Tensor, tile: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        if tile is None:
            return super().forward(sample)
        x = self.mid_block(self.conv_in(sample))
        steps = []
        for block in self.up_blocks:
            steps += steps_of_block(block, [*block.resnets, *(block.upsamplers or ())])
        out = nn.Sequential(self.conv_norm_out, self.conv_act, self.conv_out)
        return run_steps([*steps, *steps_of([out])], x, tile)


class DecoderTiny(vae.DecoderTiny):
    """Latents (B, C, h, w) to pixels (B, 3, f*h, f*w), without norms and attention."""

    def forward(self, x: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        if tile is None:
            return super().forward(x)
        clamp = Step(lambda z: (torch.tanh(z / 3) * 3,), 0)
        pixels = Step(lambda y: (y.mul(2).sub(1),), 0)
        return run_steps([clamp, *steps_of(self.layers), pixels], x, tile, kept=0)
