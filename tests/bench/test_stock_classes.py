"""Stock autoencoders of diffusers, images and videos, as contestants: every class goes through the whole benchmark."""

import diffusers
import pytest

from latentae.bench.run import bench

KL = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    latent_channels=4,
)
FOUR = (8, 8, 8, 8)
# class, its compression along a side, arguments
STOCK = {
    "AutoencoderKL": (2, KL),
    "AsymmetricAutoencoderKL": (
        2,
        {
            **{key: value for key, value in KL.items() if key != "block_out_channels"},
            "down_block_out_channels": (8, 8),
            "up_block_out_channels": (8, 8),
        },
    ),
    "AutoencoderTiny": (8, dict(encoder_block_out_channels=FOUR, decoder_block_out_channels=FOUR)),
    "VQModel": (2, {**KL, "num_vq_embeddings": 32}),
    "AutoencoderDC": (
        2,
        {
            "latent_channels": 4,
            "attention_head_dim": 8,
            **{f"{half}_block_types": ("ResBlock", "ResBlock") for half in ("encoder", "decoder")},
            **{f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")},
            **{f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")},
            **{f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")},
        },
    ),
    "ConsistencyDecoderVAE": (
        8,
        dict(
            encoder_block_out_channels=FOUR,
            encoder_down_block_types=("DownEncoderBlock2D",) * 4,
            encoder_norm_num_groups=4,
            latent_channels=4,
            decoder_block_out_channels=FOUR,
            decoder_down_block_types=("ResnetDownsampleBlock2D",) * 4,
            decoder_up_block_types=("ResnetUpsampleBlock2D",) * 4,
            decoder_norm_num_groups=4,
            decoder_layers_per_block=1,
        ),
    ),
    "AutoencoderKLWan": (8, dict(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)),
    "AutoencoderKLLTXVideo": (
        32,
        dict(
            latent_channels=8,
            block_out_channels=FOUR,
            decoder_block_out_channels=FOUR,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        ),
    ),
    "AutoencoderKLCogVideoX": (
        8,
        dict(
            block_out_channels=FOUR,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
        ),
    ),
    "AutoencoderKLCosmos": (
        8,
        dict(
            encoder_block_out_channels=FOUR,
            decode_block_out_channels=FOUR,
            attention_resolutions=(8,),
            num_layers=1,
            latent_channels=16,
            resolution=64,
        ),
    ),
}


@pytest.mark.slow
def test_every_stock_class_is_measured(photo_folder):
    models = [(name, getattr(diffusers, name)(**arguments)) for name, (_, arguments) in STOCK.items()]
    results = bench(photo_folder, models, size=64, limit=2, speed=False)
    for model in results["models"]:
        ratio, _ = STOCK[model["name"]]
        assert model["spatial_ratio"] == ratio
        assert 3 < model["metrics"]["psnr"] < 60, model["name"]
        assert model["rate"]["bits_per_pixel"] > 0
        assert model["latents"]["std"]
        assert not model["failed"]
