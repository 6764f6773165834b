"""DC-AE against stock diffusers and against what the authors' own code computed."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

from latentae import DCAE
from latentae.families.presets import PRESETS, create, find_preset
from latentae.loading import convert_efficientvit, dcae_from_weights, export

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "efficientvit.json").read_text())
WIDTHS = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (16, 32, 64, 64, 128, 128))
DCAE_PRESETS = [name for name in PRESETS if PRESETS[name].family == "DCAE"]

# millions of parameters of encoder and decoder: the published models' own files
PUBLISHED_MILLIONS = {
    "dc-ae-f32c32-in-1.0": (123.17, 200.18),
    "dc-ae-f64c128-in-1.0": (264.55, 412.35),
    "dc-ae-f128c512-in-1.0": (415.66, 705.02),
    "dc-ae-f32c32-sana-1.0": (153.03, 159.22),
    "dc-ae-lite-f32c32": (153.03, 268.15),
    "dc-ae-f32c128-1.5": (228.61, 295.00),
    "dc-ae-f64c128-1.5": (306.48, 408.26),
}


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_agree(ours, stock, size):
    pixels = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        z = stock.encode(pixels).latent
        assert relative(ours.encode(pixels).latent, z) < 1e-5
        assert relative(ours.decode(z).sample, stock.decode(z).sample) < 1e-5


@pytest.mark.parametrize("name", DCAE_PRESETS)
def test_parameters_are_those_of_the_stock_class(name):
    with torch.device("meta"):
        ours, stock = create(name), AutoencoderDC(**find_preset(name).config)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, stock)]
    assert shapes[0] == shapes[1]
    if name in PUBLISHED_MILLIONS:
        for half, millions in zip((ours.encoder, ours.decoder), PUBLISHED_MILLIONS[name]):
            assert sum(p.numel() for p in half.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    "name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0", "dc-ae-lite-f32c32", "dc-ae-f32c128-1.5"]
)
@pytest.mark.parametrize("size", [(64, 64), (160, 96)])
def test_reduced_models_agree_with_stock_in_both_directions(name, size, randomise, tmp_path):
    config = {**find_preset(name).config, **WIDTHS, "latent_channels": 32}
    stock = randomise(AutoencoderDC(**config)).eval()
    stock.save_pretrained(tmp_path / "stock")
    assert_agree(DCAE.from_pretrained(tmp_path / "stock"), stock, size)
    ours = randomise(DCAE(**config), seed=1).eval()
    export(ours, tmp_path / "exported")
    assert_agree(ours, AutoencoderDC.from_pretrained(tmp_path / "exported"), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0"])
def test_full_size_models_agree_with_stock(name, randomise):
    ours = randomise(create(name))
    stock = AutoencoderDC(**find_preset(name).config).eval()
    stock.load_state_dict(ours.state_dict(), assign=True)
    assert_agree(ours, stock, (64, 96))


@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_authors_checkpoints_convert_and_compute_what_their_code_computed(name, golden_tool):
    golden = GOLDEN[name]
    autoencoder = dcae_from_weights(convert_efficientvit(golden_tool.formula_weights(golden["shapes"]))).eval()
    with torch.no_grad():
        z = autoencoder.encode(golden_tool.formula_pixels()).latent
        samples = golden_tool.samples(z, autoencoder.decode(z).sample)
    for key in ("latents", "pixels"):
        assert relative(torch.tensor(samples[key]), torch.tensor(golden[key])) < 1e-5


@pytest.mark.parametrize("name", [n for n in DCAE_PRESETS if PRESETS[n].hub_id])
def test_the_configuration_is_read_off_published_shapes(name):
    from latentae.loading import infer_dcae_config

    with torch.device("meta"):
        weights = create(name).state_dict()
    inferred, published = infer_dcae_config(weights), dict(find_preset(name).config)
    published.pop("scaling_factor")  # models that share an architecture differ in it
    for key, value in published.items():
        found = inferred[key]
        if isinstance(found, tuple):  # a stage of depth zero leaves no trace
            depths = published[f"{key.split('_')[0]}_layers_per_block"]
            expected = (value,) * len(found) if isinstance(value, str) else value
            found, value = ([v for v, depth in zip(stages, depths) if depth] for stages in (found, expected))
        assert found == value, key


@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0", "dc-ae-f32c128-1.5"])
def test_weights_that_come_and_go_with_hooks(name, randomise):
    """Offloading and layerwise casting hook the leaves: every weight must be used by the module that owns it."""
    from accelerate import cpu_offload

    config = {**find_preset(name).config, **WIDTHS, "latent_channels": 16}
    model = randomise(DCAE(**config)).eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).sample
        cast = DCAE(**config).eval()
        cast.load_state_dict(model.state_dict())
        cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert (cast(pixels).sample - expected).abs().mean() < 0.05 * expected.abs().max()
        cpu_offload(model, "cpu")
        assert relative(model(pixels).sample, expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers_per_block": (1, 1)}, "encoder_layers_per_block has 2 entries"),
        ({"upsample_block_type": "nearest"}, "expected pixel_shuffle or interpolate"),
        ({"decoder_act_fns": "gelu"}, "decoder_act_fns 'gelu' is unknown"),
        ({"decoder_norm_types": "layer_norm"}, "expected rms_norm or batch_norm"),
        ({"encoder_block_types": "Transformer"}, "expected ResBlock or EfficientViTBlock"),
        ({"encoder_block_out_channels": (16, 16, 24, 32)}, "multiple"),
        ({"latent_channels": 7}, "multiple"),
    ],
)
def test_configurations_that_cannot_be_built_are_explained(change, message):
    from latentae.errors import RequestError

    with pytest.raises(RequestError, match=message):
        create("dc-ae-tiny", **change)


def test_batch_norm_trains_as_stock_does(randomise):
    config = {**find_preset("dc-ae-f32c32-in-1.0").config, **WIDTHS}
    ours, stock = DCAE(**config), AutoencoderDC(**config)
    randomise(ours)
    stock.load_state_dict(ours.state_dict())
    pixels = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours.train()(pixels).sample, stock.train()(pixels).sample, atol=1e-4, rtol=1e-3)
    for a, b in zip(ours.buffers(), stock.buffers()):
        torch.testing.assert_close(a, b)
    assert_agree(ours.eval(), stock.eval(), (64, 64))


def test_residual_branches_start_at_zero():
    autoencoder = create("dc-ae-tiny")
    block = autoencoder.encoder.down_blocks[1][0]
    x = torch.randn(1, 16, 8, 8)
    assert torch.equal(block(x), x)


def test_a_prefix_of_structured_latents_decodes_as_zeros_behind_it_do(randomise):
    config = {**find_preset("dc-ae-f32c128-1.5").config, **WIDTHS, "latent_channels": 16}
    ours, stock = randomise(DCAE(**config)).eval(), AutoencoderDC(**config).eval()
    stock.load_state_dict(ours.state_dict())
    z = torch.randn(1, 16, 2, 2)
    masked = z.clone()
    masked[:, 6:] = 0
    with torch.no_grad():
        assert relative(ours.decode(z[:, :6]).sample, stock.decode(masked).sample) < 1e-5


def test_tiling_is_right_at_f128_where_the_stock_class_is_not(randomise):
    config = {**find_preset("dc-ae-f128c512-in-1.0").config, "latent_channels": 16, "attention_head_dim": 8}
    for half in ("encoder", "decoder"):
        config[f"{half}_block_out_channels"] = (8, 8, 16, 16, 32, 32, 64, 64)
        config[f"{half}_layers_per_block"] = (0, 1, 1, 1, 1, 1, 1, 1)
    autoencoder = randomise(DCAE(**config)).eval()
    pixels = torch.rand(1, 3, 1024, 1024)
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent
        autoencoder.enable_tiling(512, 512, 448, 448)
        tiled = autoencoder.encode(pixels).latent
    assert tiled.shape == (1, 16, 8, 8)
    assert relative(tiled, z) < 1e-5


def test_attention_survives_half_precision_autocast_where_stock_overflows(randomise):
    """The sums over all pixels exceed 65504; ours are taken in fp32 also under autocast."""
    from latentae.families.dcae import LinearAttention

    stock = SanaMultiscaleLinearAttention(
        32, 32, attention_head_dim=8, norm_type="rms_norm", kernel_sizes=(5,), residual_connection=True
    )
    ours = LinearAttention(32, 8, (5,), "rms_norm")
    randomise(ours)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(1, 32, 48, 48) * 500
    with torch.no_grad():
        expected = stock(x)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not stock(x).isfinite().all()
            actual = ours(x).float()
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()
