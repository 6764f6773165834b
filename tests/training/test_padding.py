"""Reflect padding of every convolution: what it computes, and that runs, folders and later stages keep it."""

import copy
import json

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny, VQModel
from torch import nn

import latentae
from latentae.cli.main import main
from latentae.errors import RequestError
from latentae.loading import export, export_with_code
from latentae.nn.padding import PADDING_KEY, padding_mode, set_padding_mode
from latentae.training.start import build_autoencoder

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
}
TINY = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
TINY |= {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
INTERPOLATE = {"upsample_block_type": "interpolate", "downsample_block_type": "conv"}
AUTOENCODERS = {
    "kl": lambda: AutoencoderKL(**BLOCKS, latent_channels=2),
    "vq": lambda: VQModel(**BLOCKS, latent_channels=3, num_vq_embeddings=16),
    "tiny": lambda: AutoencoderTiny(**TINY),
    "dc-ae": lambda: latentae.create("dc-ae-tiny"),
    "sana": lambda: latentae.create("dc-ae-tiny", **INTERPOLATE),
    "litevae": lambda: latentae.create("litevae-tiny"),
    "self-modulated": lambda: latentae.create("litevae-tiny", decoder_norm="self_modulated"),
}


@pytest.fixture(params=AUTOENCODERS)
def pair(request, randomise):
    """The same autoencoder, padded with zeros and by reflection."""
    torch.manual_seed(0)
    zeros = randomise(AUTOENCODERS[request.param]().eval())
    reflect = copy.deepcopy(zeros)
    set_padding_mode(reflect, "reflect")
    return zeros, reflect


def outputs(autoencoder, pixels):
    with torch.no_grad():
        encoded = autoencoder.encode(pixels)
        latents = encoded.latents if not hasattr(encoded, "latent_dist") else encoded.latent_dist.mode()
        return latents, autoencoder.decode(latents).sample


def test_names_of_weights_stay_and_zeros_are_undone(pair):
    zeros, reflect = pair
    assert reflect.state_dict().keys() == zeros.state_dict().keys()
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    assert not torch.equal(outputs(reflect, pixels)[0], outputs(zeros, pixels)[0])
    set_padding_mode(reflect, "zeros")
    for actual, expected in zip(outputs(reflect, pixels), outputs(zeros, pixels)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_constant_image_has_no_border(pair):
    zeros, reflect = pair
    pixels = torch.full((1, 3, 64, 64), 0.7)
    latents, reconstruction = outputs(reflect, pixels)
    constant = latents - latents[..., 4:5, 4:5]
    assert constant.abs().max() < 1e-5 * latents.abs().max().clamp_min(1)
    if isinstance(reflect, latentae.DCAE):
        return  # channels that become pixels make patterns whose reflection is not their continuation
    ratio = 64 // latents.shape[-1]  # each phase of upsampling may differ, each period must not
    periods = reconstruction.unflatten(3, (-1, ratio)).unflatten(2, (-1, ratio))
    assert (periods - periods[:, :, :1, :, :1]).abs().max() < 1e-4
    other, _ = outputs(zeros, pixels)
    assert (other - other[..., 4:5, 4:5]).abs().max() > 1e-3


def test_the_interior_is_unchanged_and_the_border_is_reflected():
    """A net without norms or attention, whose receptive field ends before the middle."""
    torch.manual_seed(0)
    zeros = AutoencoderTiny(**TINY).eval()
    reflect = copy.deepcopy(zeros)
    set_padding_mode(reflect, "reflect")
    pixels = torch.rand(1, 3, 256, 256) * 2 - 1
    latents, other = outputs(zeros, pixels)[0], outputs(reflect, pixels)[0]
    middle, difference = (slice(None), slice(None), slice(16, -16), slice(16, -16)), (latents - other).abs()
    torch.testing.assert_close(latents[middle], other[middle], rtol=1e-5, atol=1e-6)
    assert difference[..., 0, :].max() > 1e-3
    assert difference[..., -1].max() > 1e-3


def test_the_downsampling_of_diffusers_reflects_too():
    autoencoder = AutoencoderKL(**BLOCKS)
    downsample = autoencoder.encoder.down_blocks[0].downsamplers[0]
    x = torch.randn(2, 8, 6, 10)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1), mode="reflect"), downsample.conv.weight, downsample.conv.bias, stride=2)
    zero_padded = downsample(x)
    set_padding_mode(autoencoder, "reflect")
    replaced = autoencoder.encoder.down_blocks[0].downsamplers[0]
    torch.testing.assert_close(replaced(x), expected)
    set_padding_mode(autoencoder, "zeros")
    torch.testing.assert_close(autoencoder.encoder.down_blocks[0].downsamplers[0](x), zero_padded)
    padded = [m for m in autoencoder.modules() if isinstance(m, nn.Conv2d) and any(m.padding)]
    assert len(padded) > 20


def test_folders_keep_it_and_stock_diffusers_says_that_it_does_not(pair, tmp_path, caplog):
    zeros, reflect = pair
    stock = type(zeros).__name__
    assert export(zeros, tmp_path / "zeros") == {"DCAE": "AutoencoderDC"}.get(stock, stock)
    assert PADDING_KEY not in json.loads((tmp_path / "zeros/config.json").read_text())
    assert export(reflect, tmp_path / "reflect") == stock
    assert json.loads((tmp_path / "reflect/config.json").read_text())[PADDING_KEY] == "reflect"
    assert "stock diffusers pads with zeros" in (tmp_path / "reflect/README.md").read_text()

    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    expected = outputs(reflect, pixels)
    caplog.clear()
    logger = diffusers.utils.logging.get_logger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    opened = latentae.load(tmp_path / "reflect")
    assert not caplog.text
    for actual, wanted in zip(outputs(opened, pixels), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    type(reflect).from_pretrained(tmp_path / "reflect")
    logger.removeHandler(caplog.handler)
    assert PADDING_KEY in caplog.text
    assert "will be ignored" in caplog.text


def test_a_run_and_its_later_stages_keep_it(runs, folder, tmp_path, capsys):
    torch.manual_seed(0)
    AutoencoderKL(**BLOCKS, latent_channels=2).save_pretrained(tmp_path / "stock")
    description = {"pretrained": str(tmp_path / "stock"), "padding_mode": "reflect"}
    module = runs.module(autoencoder=description, ema=None)
    assert module.autoencoder.encoder.conv_in.padding_mode == "reflect"
    runs.fit(module, runs.data(folder), tmp_path / "run", 2)
    opened = latentae.load(tmp_path / "run")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    for actual, expected in zip(outputs(opened, pixels), outputs(module.autoencoder.eval(), pixels)):
        assert torch.equal(actual, expected)

    plain = {"pretrained": str(tmp_path / "stock"), "init_from": str(tmp_path / "run")}
    assert padding_mode(build_autoencoder({"pretrained": str(tmp_path / "run")})) == "reflect"
    assert padding_mode(build_autoencoder(plain)) == "reflect"
    assert padding_mode(build_autoencoder({**plain, "padding_mode": "zeros"})) == "zeros"
    taken = build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(tmp_path / "run")})
    assert taken.decoder.conv_in.padding_mode == "reflect"

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    out = capsys.readouterr().out
    assert "latentae.load(" in out
    assert "reflect padding" in out
    assert torch.equal(outputs(latentae.load(tmp_path / "exported"), pixels)[1], outputs(opened, pixels)[1])


def test_dcae_with_reflection_tiles_exactly(randomise):
    autoencoder = randomise(latentae.create("dc-ae-tiny"))
    set_padding_mode(autoencoder, "reflect")
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    expected = outputs(autoencoder, pixels)
    autoencoder.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    for actual, wanted in zip(outputs(autoencoder, pixels), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_one_sentence(tmp_path):
    autoencoder = latentae.create("dc-ae-tiny")
    with pytest.raises(RequestError, match="'mirror' is unknown; expected zeros or reflect"):
        set_padding_mode(autoencoder, "mirror")
    wan = AutoencoderKLWan(base_dim=8, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    with pytest.raises(RequestError, match="other kinds"):
        set_padding_mode(wan, "reflect")
    set_padding_mode(autoencoder, "reflect")
    with pytest.raises(RequestError, match="more than 8 pixels a side, not 8 x 30"):
        latentae.LatentCodec(autoencoder).encode(torch.zeros(1, 3, 8, 30))
    assert latentae.LatentCodec(autoencoder).reconstruct(torch.zeros(1, 3, 9, 30)).shape == (1, 3, 9, 30)
    with pytest.raises(RequestError, match="no part of the code"):
        export_with_code(autoencoder, tmp_path)
    assert not any(tmp_path.iterdir())
