"""LatentCodec against calling each stock class by hand."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    AutoencoderTiny,
    VQModel,
)
from PIL import Image

from latentae import LatentCodec
from latentae.codec import Latents
from latentae.errors import RequestError
from latentae.families.presets import create, find_preset
from latentae.nn.pixels import to_float


def kl(**changes):
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, **changes,
    )  # fmt: skip


def wan():
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


STOCK = {
    "kl": lambda: kl(scaling_factor=0.3, shift_factor=0.1),
    "kl-statistics": lambda: kl(scaling_factor=0.5, latents_mean=[1.0, 2, 3, 4], latents_std=[2.0, 2, 4, 4]),
    "dc": lambda: AutoencoderDC(**{**find_preset("dc-ae-tiny").config, "scaling_factor": 0.7}),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
    "vq": lambda: VQModel(
        block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "ours": lambda: create("dc-ae-tiny", scaling_factor=0.7),
}  # fmt: skip
RATIO = {"kl": 4, "kl-statistics": 4, "dc": 8, "tiny": 4, "vq": 2, "ours": 8}


@pytest.fixture(params=list(STOCK))
def named(request):
    torch.manual_seed(0)
    return request.param, STOCK[request.param]().eval()


def encode_by_hand(name, autoencoder, pixels):
    output = autoencoder.encode(pixels)
    if name in ("kl", "kl-statistics"):
        z = output.latent_dist.mode()
    else:
        z = output.latents if name in ("tiny", "vq") else output.latent
    if name == "kl-statistics":
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in ([1.0, 2, 3, 4], [2.0, 2, 4, 4]))
        return z, (z - mean) * 0.5 / std
    scale, shift = {"kl": (0.3, 0.1), "dc": (0.7, 0), "ours": (0.7, 0), "vq": (0.18215, 0)}.get(name, (1.0, 0.0))
    return z, (z - shift) * scale


def test_is_the_class_with_its_own_normalisation(named):
    name, autoencoder = named
    codec = LatentCodec(autoencoder)
    assert codec.spatial_ratio == RATIO[name]
    image = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        raw, normalised = encode_by_hand(name, autoencoder, to_float(image))
        latents = codec.encode(image)
        torch.testing.assert_close(latents.tensor, normalised)
        torch.testing.assert_close(codec.denormalise(latents.tensor), raw, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(latents.tensor), autoencoder.decode(raw).sample, atol=1e-4, rtol=1e-4)
    assert codec.latent_channels == raw.shape[1]


@pytest.mark.parametrize("size", [(32, 32), (33, 41), (1, 7), (63, 5)])
def test_any_size_comes_back(named, size):
    name, autoencoder = named
    codec = LatentCodec(autoencoder)
    latents = codec.encode(torch.rand(1, 3, *size) * 2 - 1)
    assert latents.tensor.shape[-2:] == tuple(-(-side // RATIO[name]) for side in size)
    assert codec.decode(latents).shape == (1, 3, *size)


def test_padding_is_by_reflection(tiny_dcae):
    codec = LatentCodec(tiny_dcae)
    image = torch.rand(1, 3, 20, 24) * 2 - 1
    reflected = torch.nn.functional.pad(image, (0, 0, 0, 4), mode="reflect")
    torch.testing.assert_close(codec.encode(image).tensor, codec.encode(reflected).tensor)


@pytest.mark.parametrize(
    "make", [wan, lambda: AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1)]
)
def test_video_autoencoders_take_clips_and_images(make):
    torch.manual_seed(0)
    codec = LatentCodec(make())
    assert codec.is_video
    assert codec.temporal_ratio == 4
    clip = codec.encode(torch.randint(0, 256, (1, 3, 6, 35, 40), dtype=torch.uint8))
    assert clip.tensor.shape[2:] == (3, 5, 5)  # six frames are padded to 1 + 2 * 4
    assert codec.decode(clip).shape == (1, 3, 6, 35, 40)
    image = codec.encode(torch.rand(1, 3, 16, 17))
    assert image.tensor.shape[2:] == (1, 2, 3)
    assert codec.decode(image).shape == (1, 3, 16, 17)


def test_statistics_in_buffers_and_for_each_frame():
    from diffusers import AutoencoderKLCosmos, AutoencoderKLLTXVideo

    ltx = AutoencoderKLLTXVideo(
        block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), latent_channels=8, scaling_factor=0.5,
    ).eval()  # fmt: skip
    ltx.latents_mean.fill_(3.0)
    ltx.latents_std.fill_(2.0)
    z = torch.randn(1, 8, 2, 3, 3)
    torch.testing.assert_close(LatentCodec(ltx).normalise(z), (z - 3) * 0.5 / 2)
    cosmos = AutoencoderKLCosmos(
        latent_channels=2, latents_mean=list(range(8)), latents_std=[2.0] * 8, encoder_block_out_channels=(8, 8),
        decode_block_out_channels=(8, 8), attention_resolutions=(), resolution=16, num_layers=1, patch_size=2,
    )  # fmt: skip
    z = torch.zeros(1, 2, 3, 1, 1)  # four frames of statistics for each of two channels
    expected = -torch.tensor([[0.0, 1, 2], [4, 5, 6]]) / 2
    torch.testing.assert_close(LatentCodec(cosmos).normalise(z).flatten(2)[0], expected)


def test_temporal_ratio_of_video_shaped_image_autoencoders():
    from diffusers import AutoencoderKLQwenImage

    qwen = AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    assert LatentCodec(qwen).temporal_ratio == 4


def test_devices_that_are_not_there(tiny_dcae):
    with pytest.raises(RequestError, match="not a device"):
        LatentCodec(tiny_dcae, device="foo")
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="no cuda device"):
            LatentCodec(tiny_dcae, device="cuda")
    with pytest.raises(RequestError, match="channels_last"):
        LatentCodec(wan(), channels_last=True)


def test_per_channel_statistics_of_a_5d_class():
    autoencoder = wan().eval()
    codec = LatentCodec(autoencoder)
    pixels = torch.rand(1, 3, 5, 16, 16)
    mean, std = (torch.tensor(autoencoder.config[key]).view(1, 16, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (autoencoder.encode(pixels).latent_dist.mode() - mean) / std
    torch.testing.assert_close(codec.encode(pixels).tensor, expected)


def test_samples_follow_the_generator_and_the_posterior():
    codec = LatentCodec(kl(scaling_factor=1.0))
    pixels = torch.rand(1, 3, 32, 32)
    one, two = (codec.encode(pixels, sample=True, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.tensor, two.tensor)
    assert not torch.equal(one.tensor, codec.encode(pixels).tensor)


def test_posterior_is_raw_and_differentiable(named):
    _, autoencoder = named
    codec = LatentCodec(autoencoder)
    pixels = torch.rand(1, 3, 16, 16, requires_grad=True)
    codec.posterior(pixels).mode().sum().backward()
    assert pixels.grad.abs().max() > 0


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}, {"channels_last": True}])
def test_precision_and_layout_stay_near_fp32(options):
    expected = LatentCodec(kl(scaling_factor=0.5))
    other = LatentCodec(kl(scaling_factor=0.5), **options)
    other.autoencoder.load_state_dict(expected.autoencoder.state_dict())
    image = torch.randint(0, 256, (1, 3, 30, 30), dtype=torch.uint8)
    a, b = expected.reconstruct(image), other.reconstruct(image)
    assert b.dtype == torch.float32
    assert (a - b).abs().max() < 0.05 * a.abs().max()


def test_tiling_is_switched_on_where_there_is_any(tiny_dcae):
    LatentCodec(tiny_dcae, tiling=True)
    assert tiny_dcae.use_tiling
    with pytest.raises(RequestError, match="VQModel has no tiling"):
        LatentCodec(STOCK["vq"](), tiling=True)


@pytest.mark.slow
def test_compiled_gives_the_same(tiny_dcae):
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = LatentCodec(tiny_dcae).reconstruct(image)
    torch.testing.assert_close(LatentCodec(tiny_dcae, compile=True).reconstruct(image), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 2, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_other_shapes_are_refused(tiny_dcae, shape):
    with pytest.raises(RequestError, match=r"expected \(B, 3, H, W\)"):
        LatentCodec(tiny_dcae).encode(torch.zeros(shape))


def test_only_autoencoders_are_wrapped():
    with pytest.raises(RequestError, match="not an autoencoder"):
        LatentCodec(torch.nn.Linear(1, 1))


def test_latents_carry_the_size(tiny_dcae):
    assert LatentCodec(tiny_dcae).encode(torch.zeros(1, 3, 9, 10)).height == 9
    assert Latents(torch.zeros(1), 9, 10).frames is None


def test_whole_numbers_that_are_not_bytes_are_refused():
    codec = LatentCodec(create("dc-ae-tiny"))
    with pytest.raises(RequestError, match=r"pixels of torch\.int64; expected uint8, or floats in \[-1, 1\]"):
        codec.encode(torch.zeros(1, 3, 16, 16, dtype=torch.long))


@pytest.mark.parametrize("given", [np.zeros((1, 3, 8, 8), np.uint8), Image.new("RGB", (8, 8)), [0.0]])
def test_what_is_no_tensor_is_refused_with_how_to_make_one(given):
    with pytest.raises(RequestError, match=f"got a {type(given).__name__}; expected a tensor"):
        LatentCodec(create("dc-ae-tiny")).encode(given)
