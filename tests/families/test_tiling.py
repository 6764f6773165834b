"""Images of any shape through tiles: long strips, odd sides, sides below the ratio."""

import pytest
import torch

import latentae
from latentae.families.diffusion import DiffusionAutoencoder
from latentae.families.presets import PRESETS

IMAGES = [name for name in PRESETS if name.endswith("-tiny") and not latentae.create(name).is_video]
SIZES = [(64, 1000), (1000, 64), (33, 257), (3, 301), (130, 131)]


@pytest.fixture(scope="module", params=IMAGES)
def codec(request, randomise):
    return latentae.LatentCodec(randomise(latentae.create(request.param)), tiling=True)


@pytest.mark.filterwarnings("ignore:These latents are:UserWarning")
@pytest.mark.parametrize("size", SIZES)
def test_any_aspect_ratio_keeps_its_size(codec, size):
    """Tiles of 96 px, which no side is a multiple of; exact families give what they give without tiles."""
    autoencoder = codec.autoencoder
    y, x = (torch.arange(side)[:, None] / 40 for side in size)
    pixels = torch.stack([torch.sin(y * (1 + i) + x.T * (2 - i)) for i in range(3)])[None]
    autoencoder.enable_tiling(96, 96)
    latents = codec.encode(pixels)
    assert tuple(latents.tensor.shape) == autoencoder.latent_shape(tuple(pixels.shape))
    decoded = codec.decode(latents)
    assert decoded.shape == pixels.shape
    assert decoded.isfinite().all()
    autoencoder.disable_tiling()
    whole = codec.encode(pixels)
    expected = codec.decode(latents)
    autoencoder.enable_tiling()
    torch.testing.assert_close(latents.tensor, whole.tensor, atol=1e-4, rtol=1e-4)
    if not isinstance(autoencoder, DiffusionAutoencoder):
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)
    else:  # blended: near, and nearer than to another image
        error = (decoded - expected).square().mean()
        assert error < 0.5 * (decoded - expected.flip(2, 3)).square().mean()
    torch.testing.assert_close(codec.encode(pixels).tensor, whole.tensor, msg="one tile of 1024 is exact")


@pytest.mark.parametrize("size", [(17, 150), (150, 17)])
def test_clips_of_any_shape_and_length(randomise, size):
    autoencoder = randomise(latentae.create("fourplane-tiny"))
    codec = latentae.LatentCodec(autoencoder, tiling=True)
    autoencoder.enable_tiling(32, 32)
    frames = 2 * autoencoder.config.window_frames + 3
    pixels = torch.rand(1, 3, frames, *size) * 2 - 1
    latents = codec.encode(pixels)
    assert latents.frames == frames
    decoded = codec.decode(latents)
    assert decoded.shape == pixels.shape
    assert decoded.isfinite().all()
