"""LiteVAE against the paper's counts, PyWavelets and torch.nn.functional, closed forms, and diffusers' decoder."""

import math

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import latentae
from latentae import LiteVAE
from latentae.errors import RequestError
from latentae.families.presets import create, find_preset

TINY = find_preset("litevae-tiny").config
STOCK_TINY = dict(
    latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=TINY["decoder_block_out_channels"], layers_per_block=1, norm_num_groups=8,
)  # fmt: skip


def smooth(height, width, batch=1):
    """Pixels of slow waves, each channel its own."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    one = torch.stack([0.8 * torch.sin(x * (1 + c) + y + c) * torch.cos(y / (1 + c)) for c in range(3)])
    return one.expand(batch, -1, -1, -1).clone()


# millions, of the paper's tables 2, 4 and 20
@pytest.mark.parametrize(("size", "published"), [("s", 1.03), ("b", 6.75), ("m", 32.75), ("l", 41.42)])
def test_encoders_have_the_published_number_of_parameters(size, published):
    with torch.device("meta"):
        autoencoder = create(f"litevae-{size}-f8c12")
    millions = sum(p.numel() for p in autoencoder.encoder.parameters()) / 1e6
    assert millions == pytest.approx(published, rel=0.01)
    assert autoencoder.latent_shape((1, 3, 256, 256)) == (1, 12, 32, 32)
    if size == "b":
        aggregator = sum(p.numel() for p in autoencoder.encoder.aggregator.parameters()) / 1e6
        assert aggregator == pytest.approx(1.69, rel=0.01)


def test_the_decoder_is_sd_vaes():
    with torch.device("meta"):
        ours, stock = create("litevae-b-f8c4", use_post_quant_conv=True), AutoencoderKL.from_config(
            dict(
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
            )
        )  # fmt: skip
    shapes = [
        {key: value.shape for key, value in model.state_dict().items() if key.startswith(("decoder.", "post_quant"))}
        for model in (ours, stock)
    ]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.decoder.parameters()) / 1e6 == pytest.approx(49.49, abs=0.005)


def reference_unet(weights, prefix, x, multipliers, layers):
    """The block of the facts, from the state dict alone: norm, SiLU, conv; skips popped in reverse; no resampling."""

    def conv(name, x):
        weight = weights[f"{prefix}{name}.weight"]
        return F.conv2d(x, weight, weights[f"{prefix}{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        weight, bias = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]
        groups = max(g for g in range(1, 33) if len(weight) % g == 0 and 32 % g == 0)
        grouped = x.reshape(len(x), groups, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
        scaled = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        return scaled * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    def silu(x):
        return x / (1 + torch.exp(-x))

    def block(name, x):
        y = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", x)))
        y = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", y)))
        return y + (conv(f"{name}.shortcut", x) if f"{prefix}{name}.shortcut.weight" in weights else x)

    x = conv("conv_in", x)
    skips = []
    count = len(multipliers) * layers
    for i in range(count):
        x = block(f"down_blocks.{i}", x)
        skips.append(x)
    for i in range(2):
        x = block(f"mid_blocks.{i}", x)
    for i in range(count):
        x = block(f"up_blocks.{i}", torch.cat([x, skips.pop()], 1))
    return conv("conv_out", x)


@pytest.mark.parametrize(("wavelet", "levels"), [("haar", 3), ("haar", 4), ("db2", 3)])
def test_the_encoder_equals_pywavelets_and_plain_functions(wavelet, levels, randomise):
    widths = (8, 16, 16, 32, 32)[: levels + 1]
    config = dict(TINY, levels=levels, wavelet=wavelet, decoder_block_out_channels=widths, extractor_multipliers=(1, 3))
    autoencoder = randomise(LiteVAE(**config)).eval().double()
    pixels = torch.rand(2, 3, 64, 32).double() * 2 - 1
    weights = autoencoder.encoder.state_dict()
    features = []
    for level in range(1, levels + 1):
        low, *others = pywt.wavedec2(pixels.numpy(), wavelet, mode="periodization", level=level)
        bands = torch.from_numpy(np.concatenate([low, *others[0]], axis=1)) / 2**level
        feature = reference_unet(weights, f"extractors.{level - 1}.", bands, (1, 3), 1)
        size = 2 ** (levels - level)
        batch, channels, height, width = feature.shape
        feature = feature.reshape(batch, channels, height // size, size, width // size, size).mean((3, 5))
        features.append(feature)
    expected = reference_unet(weights, "aggregator.", torch.cat(features, 1), TINY["aggregator_multipliers"], 1)
    with torch.no_grad():
        posterior = autoencoder.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.mean, expected[:, :4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.logvar, expected[:, 4:].clamp(-30, 20), rtol=1e-9, atol=1e-9)


def test_low_pass_bands_stay_in_the_range_of_the_pixels():
    autoencoder = create("litevae-tiny")
    for bands in autoencoder.encoder.bands(torch.full((1, 3, 16, 16), 0.7)):
        torch.testing.assert_close(bands[:, :3], torch.full_like(bands[:, :3], 0.7))
        assert bands[:, 3:].abs().max() < 1e-6


def test_training_and_evaluation_compute_the_same(randomise):
    autoencoder = randomise(create("litevae-b-f8c4", extractor_channels=16, aggregator_channels=16, **_narrow()))
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    recorded = autoencoder.encode(pixels).latent
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.encode(pixels).latent, recorded.detach(), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(autoencoder.encode(pixels).latent, recorded.detach(), rtol=1e-4, atol=1e-5)


def _narrow():
    return {key: TINY[key] for key in ("decoder_block_out_channels", "decoder_layers_per_block", "norm_num_groups")}


def test_gradients_are_those_of_finite_differences(randomise):
    autoencoder = randomise(create("litevae-tiny", levels=1, decoder_block_out_channels=(8, 8))).double()
    pixels = (torch.rand(1, 3, 4, 4).double() * 2 - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: autoencoder.encode(x).latent_dist.parameters, pixels, atol=1e-6)


def test_the_decoder_of_a_stock_vae_can_be_taken_over(randomise):
    stock = randomise(AutoencoderKL(**STOCK_TINY)).eval()
    ours = create("litevae-tiny", use_post_quant_conv=True)
    halves = {k: v for k, v in stock.state_dict().items() if k.startswith(("decoder.", "post_quant_conv."))}
    missing, unexpected = ours.load_state_dict(halves, strict=False)
    assert not unexpected
    assert all(key.startswith("encoder.") for key in missing)
    z = torch.randn(2, 4, 5, 3)
    with torch.no_grad():
        assert torch.equal(ours.decode(z).sample, stock.decode(z).sample)


def test_self_modulated_convolutions_follow_the_formula():
    from latentae.families.litevae import SelfModulatedConv2d

    conv = SelfModulatedConv2d(5, 7).double()
    for parameter in conv.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 5, 6, 4).double()
    weight = torch.empty_like(conv.weight)
    for j in range(7):
        scaled = [conv.input_scale[i] * conv.weight[j, i] for i in range(5)]
        norm = math.sqrt(sum((w**2).sum().item() for w in scaled) + 1e-8)
        weight[j] = torch.stack(scaled).detach() / norm
    expected = conv.gain * F.conv2d(x, weight, padding=1) + conv.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_self_modulated_convolutions_fold_into_plain_ones(dtype, tolerance, randomise, tmp_path):
    autoencoder = randomise(create("litevae-tiny", decoder_norm="self_modulated")).to(dtype)
    folded = autoencoder.folded()
    z = torch.randn(2, 4, 6, 4, dtype=dtype)
    with torch.no_grad():
        expected, actual = autoencoder.decode(z).sample, folded.decode(z).sample
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()
    assert folded.config.decoder_norm == "none"
    assert {type(m) for m in folded.modules() if isinstance(m, torch.nn.Conv2d)}.isdisjoint(
        {type(m) for m in autoencoder.modules() if hasattr(m, "gain")}
    )
    assert not any("gain" in key or "input_scale" in key for key in folded.state_dict())
    assert folded.folded() is folded
    assert autoencoder.config.decoder_norm == "self_modulated"


def test_export_writes_the_folded_form(randomise, tmp_path):
    from latentae.loading import export

    autoencoder = randomise(create("litevae-tiny", decoder_norm="self_modulated"))
    export(autoencoder, tmp_path)
    opened = latentae.load(tmp_path)
    assert opened.config.decoder_norm == "none"
    pixels = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(opened(pixels).sample, autoencoder(pixels).sample, rtol=1e-4, atol=1e-5)


def test_the_wavelet_decoder_gives_the_bands_of_level_one(randomise):
    config = dict(TINY, output_type="wavelet", decoder_block_out_channels=(8, 16, 32))
    autoencoder = randomise(LiteVAE(**config)).eval().double()
    z = torch.randn(2, 4, 3, 5).double()
    with torch.no_grad():
        bands = autoencoder.decoder(z).numpy()
        pixels = autoencoder.decode(z).sample
    assert bands.shape == (2, 12, 12, 20)
    low, *details = np.split(2 * bands, 4, axis=1)
    np.testing.assert_allclose(pixels.numpy(), pywt.idwt2((low, tuple(details)), "haar"), atol=1e-12)
    assert pixels.shape == (2, 3, 24, 40)


@pytest.mark.parametrize("change", [{}, {"decoder_norm": "self_modulated"}, {"use_post_quant_conv": True}])
def test_weights_that_come_and_go_with_hooks(change, randomise):
    """Offloading and layerwise casting hook the leaves: every weight must be used by the module that owns it."""
    from accelerate import cpu_offload

    config = {**TINY, **change}
    autoencoder = randomise(LiteVAE(**config)).eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = autoencoder(pixels).sample
        cast = LiteVAE(**config).eval()
        cast.load_state_dict(autoencoder.state_dict())
        cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert (cast(pixels).sample - expected).abs().mean() < 0.05 * expected.abs().max()
        cpu_offload(autoencoder, "cpu")
        torch.testing.assert_close(autoencoder(pixels).sample, expected)


def test_posterior_and_normalisation(tmp_path):
    autoencoder = create("litevae-tiny")
    pixels = torch.rand(2, 3, 16, 16)
    posterior = autoencoder.encode(pixels).latent_dist
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    ).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    autoencoder.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    autoencoder.save_pretrained(tmp_path)
    codec = latentae.LatentCodec(latentae.load(tmp_path))
    z = codec.encode(pixels).tensor
    mean, std = (torch.tensor(autoencoder.config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(z, (posterior.mode().detach() - mean) / std, rtol=1e-5, atol=1e-6)


def test_any_size_through_the_codec():
    codec = latentae.LatentCodec(create("litevae-tiny"))
    for height, width in ((1, 1), (7, 30), (33, 41)):
        pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        latents = codec.encode(pixels)
        assert latents.tensor.shape == (1, 4, -(-height // 8), -(-width // 8))
        assert codec.decode(latents).shape == pixels.shape


def test_blended_tiles_stay_near_the_untiled_result(randomise):
    """Norms see a tile instead of the image: the larger the tile, the smaller the difference. Sizes fit no tile."""
    autoencoder = randomise(create("litevae-tiny"))
    pixels = smooth(200, 264)
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent
        expected = autoencoder.decode(z).sample
        for tile, allowed in ((96, 0.25), (192, 0.125)):
            autoencoder.enable_tiling(tile, tile)
            for actual, wanted in ((autoencoder.encode(pixels).latent, z), (autoencoder.decode(z).sample, expected)):
                assert actual.shape == wanted.shape
                assert (actual - wanted).square().mean().sqrt() < allowed * wanted.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wavelet": "har"}, "har"),
        ({"decoder_norm": "batch"}, "decoder_norm 'batch' is unknown to LiteVAE; expected group"),
        ({"output_type": "wavelets"}, "output_type 'wavelets' is unknown"),
        ({"decoder_block_out_channels": (8, 16)}, "has 4 decoder widths"),
        ({"output_type": "wavelet"}, "has 3 decoder widths"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(RequestError, match=message):
        create("litevae-tiny", **change)


def test_a_size_that_the_levels_do_not_divide_is_refused():
    with pytest.raises(RequestError, match="multiples of 8"):
        create("litevae-tiny").encode(torch.zeros(1, 3, 64, 60))
