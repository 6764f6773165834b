"""Stock autoencoders of diffusers, images and videos, as contestants: every class goes through the whole benchmark."""

import diffusers
import numpy as np
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


@pytest.mark.slow
def test_stock_classes_are_measured_on_clips(tmp_path):
    """Those of videos whole, one of images frame by frame."""
    ratios = {"AutoencoderKLWan": 4, "AutoencoderKLLTXVideo": 8, "AutoencoderKLCogVideoX": 4, "AutoencoderKLCosmos": 8}
    for i in range(2):
        y, x, t = np.mgrid[:64, :64, :9]
        clip = np.stack([127 + 100 * np.sin((x + t) / (5 + c) + y / (9 + i)) for c in range(3)], -1)
        np.save(tmp_path / f"{i}.npy", clip.transpose(2, 0, 1, 3).astype(np.uint8))
    models = [(name, getattr(diffusers, name)(**STOCK[name][1])) for name in [*ratios, "AutoencoderKL"]]
    results = bench(tmp_path, models, size=64, frames=9, speed=False, rate_images=1)
    for model in results["models"]:
        name, sides = model["name"], (64 // model["spatial_ratio"]) ** 2
        assert model["temporal_ratio"] == ratios.get(name, 1)
        frames = 1 + 8 // ratios[name] if name in ratios else 9
        floats = model["latent_channels"] * frames * sides / (9 * 64**2)
        assert model["floats_per_pixel"] == pytest.approx(floats), name
        assert 3 < model["metrics"]["psnr"] < 60
        assert model["metrics"]["flicker"] >= 0
        assert model["rate"]["bits_per_pixel"] > 0
        assert model["latents"]["spectrum"]
        assert not model["failed"]
