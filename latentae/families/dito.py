"""DiTo: a diffusion autoencoder trained by one loss (Chen et al., ICML 2025, arXiv 2501.18593).

The encoder is that of latent diffusion, its latents are normalised by a layer norm without parameters, and the decoder
is a diffusion model of pixels: the U-Net of the consistency decoder, which sees the latents upsampled beside the noisy
image and predicts the velocity. The same networks with ``prediction: pixels`` are the paper's baseline, GLPTo, which
needs perceptual and adversarial losses.
"""

from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentae.families.diffusion import Condition, DiffusionAutoencoder
from latentae.nn.sd_vae import Encoder
from latentae.nn.unet import UNet


class DiTo(DiffusionAutoencoder):
    """Convolutional encoder, layer norm, and a denoiser that sees the upsampled latents.

    Args:
        latent_channels: channels of the latents.
        encoder_widths: of the encoder, from full resolution down; every one but the last halves the size.
        encoder_layers: residual blocks of each width.
        mid_block_add_attention: attention in the encoder's middle, which the authors' code has and the paper has not;
            its cost is quadratic in the pixels.
        use_quant_conv: a 1x1 convolution after the encoder, as in most published ``AutoencoderKL``.
        norm_num_groups: groups of the encoder's norms.
        decoder_widths, decoder_layers: of the denoiser's levels.
        patch_size: pixels along a side that are one position of the denoiser's first level.
        transformer_layers: transformer blocks in the denoiser's middle, which make it a U-ViT; 0 for none.
        adaptive_norm: the latents also scale and shift the denoiser's norms, position by position.
        latent_regularizer, latent_noise_std: see `DiffusionAutoencoder`, as of all that follow.
        prediction, path: of the denoiser.
        num_inference_steps, time_shift_rho, decode_seed: of sampling.
        condition_mean, condition_std: of the latents that the denoiser gets.
        scaling_factor, shift_factor: normalised latents are ``(z - shift_factor) * scaling_factor``.
        latents_mean, latents_std: the same, channel by channel.

    Raises:
        RequestError: an unknown choice, or widths that do not fit the compression.
    """

    _no_split_modules: Any = ["ResBlock", "ResnetBlock2D", "TransformerBlock", "Attention"]
    _repeated_blocks: Any = ["ResBlock"]
    _group_offload_block_modules = ["encoder", "quant_conv", "decoder"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        encoder_widths: tuple[int, ...] = (128, 256, 512, 512),
        encoder_layers: int = 2,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = False,
        norm_num_groups: int = 32,
        decoder_widths: tuple[int, ...] = (128, 256, 512, 512),
        decoder_layers: int = 3,
        patch_size: int = 1,
        transformer_layers: int = 0,
        adaptive_norm: bool = False,
        latent_regularizer: str = "layer_norm",
        latent_noise_std: float = 0.08,
        prediction: str = "v",
        path: str = "linear",
        num_inference_steps: int = 50,
        time_shift_rho: float = 1.0,
        decode_seed: int = 0,
        condition_mean: tuple[float, ...] | None = None,
        condition_std: tuple[float, ...] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        super().__init__()
        self._check_arguments()
        double = latent_regularizer == "kl"
        self.encoder = Encoder(
            3,
            latent_channels,
            ("DownEncoderBlock2D",) * len(encoder_widths),
            encoder_widths,
            encoder_layers,
            norm_num_groups,
            double_z=double,
            mid_block_add_attention=mid_block_add_attention,
        )
        moments = 2 * latent_channels if double else latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_quant_conv else None
        self.decoder = UNet(
            3,
            latent_channels,
            decoder_widths,
            decoder_layers,
            patch_size,
            transformer_layers,
            latent_channels if adaptive_norm else 0,
        )

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** (len(self._internal_dict["encoder_widths"]) - 1)

    def _encode(self, x: Tensor) -> Tensor:
        moments = super()._encode(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def condition(self, z: Tensor, base: Tensor | None = None) -> Condition:
        z = self.standardised(z)
        scale = self.spatial_compression_ratio // self._internal_dict["patch_size"]
        upsampled = F.interpolate(z, scale_factor=float(scale), mode="nearest")
        return Condition(upsampled, z if self._internal_dict["adaptive_norm"] else None)


DiTo.__module__ = "latentae"
