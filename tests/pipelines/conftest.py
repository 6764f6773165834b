"""A small denoiser whose every weight matters, and tiny autoencoders, ours and stock."""

import diffusers
import pytest
import torch

import latentae
from latentae.denoisers import create_denoiser
from latentae.loading.diffusion import LatentDiffusion

CHANNELS = 4
LABELS = {0: "cat, felis catus", 1: "dog", 2: "white crane"}

AUTOENCODERS = {
    "dc-ae-tiny": lambda: latentae.create("dc-ae-tiny"),
    "litevae-tiny": lambda: latentae.create("litevae-tiny"),
    "dito-tiny": lambda: latentae.create("dito-tiny"),
    "AutoencoderKL": lambda: diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        scaling_factor=0.5,
        shift_factor=0.1,
    ),
    "AutoencoderDC": lambda: diffusers.AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ),
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "AutoencoderKLWan": lambda: diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ),
}


@pytest.fixture
def autoencoder():
    def make(name, seed=0):
        torch.manual_seed(seed)
        return AUTOENCODERS[name]().eval()

    return make


@pytest.fixture
def diffusion():
    """Makes a latent diffusion with random weights and statistics."""

    def make(preset="dit-tiny", num_classes=3, channels=CHANNELS, size=(4, 4), labels=None, one_scale=False):
        description = {"preset": preset, "num_layers": 2}
        denoiser = create_denoiser(description, (channels, *size), num_classes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        std = torch.full((channels,), 1 / 0.41407) if one_scale else torch.rand(channels, generator=generator) + 0.5
        mean = torch.zeros(channels) if one_scale else torch.randn(channels, generator=generator)
        return LatentDiffusion(denoiser.eval(), mean, std, labels=labels)

    return make


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No bars between the dots."""
    monkeypatch.setattr(diffusers.DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
