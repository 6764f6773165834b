"""The contract of the design, over every preset at a fraction of its width.

Presets that differ in width or scale alone shrink to one configuration; the fast tier takes the first of them.
"""

import pytest
import torch
from diffusers import AutoencoderKL

import latentae
from latentae.errors import RequestError
from latentae.families.diffusion import DiffusionAutoencoder
from latentae.families.presets import PRESETS, create, find_preset

# every key by which a stock pipeline asks an image autoencoder for something (facts of diffusers 0.42)
PIPELINE_KEYS = [
    "block_out_channels", "encoder_block_out_channels", "in_channels", "out_channels", "latent_channels", "z_dim",
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "timestep_conditioning",
    "spatial_compression_ratio", "temporal_compression_ratio", "scale_factor_spatial",
]  # fmt: skip


def shrink_dcae(config):
    """The same stages, blocks and resampling, a sixteenth of the width."""
    small = dict(config, attention_head_dim=8, latent_channels=max(config["latent_channels"] // 16, 2))
    for half in ("encoder", "decoder"):
        small[f"{half}_block_out_channels"] = tuple(max(w // 16, 8) for w in config[f"{half}_block_out_channels"])
        small[f"{half}_layers_per_block"] = tuple(min(d, 1) for d in config[f"{half}_layers_per_block"])
    return small


def shrink_litevae(config):
    """The same levels and factors, few blocks, an eighth of the width or less."""
    widths = tuple(max(w // 32, 8) for w in config["decoder_block_out_channels"])
    return dict(
        config,
        latent_channels=4 if config["latent_channels"] < 16 else config["latent_channels"] // 4,
        extractor_channels=8,
        extractor_multipliers=(1, 2),
        aggregator_channels=8,
        aggregator_multipliers=(1, 2),
        layers_per_block=1,
        decoder_block_out_channels=widths,
        decoder_layers_per_block=0,
        norm_num_groups=8,
    )


def shrink_dito(config):
    """An encoder of the same compression and a denoiser of the same number of levels, both narrow with few blocks."""
    encoder = config.get("encoder_widths", (128, 256, 512, 512))
    return dict(
        config,
        encoder_widths=tuple(max(w // 32, 8) for w in encoder),
        encoder_layers=1,
        norm_num_groups=8,
        decoder_widths=(8, 16, 32, 32)[: len(config["decoder_widths"])],
        decoder_layers=1,
        num_inference_steps=2,
    )


def shrink_swycc(config):
    widths = (8, 8, 8, 16)
    return dict(config, widths=widths, layers=1, decoder_widths=widths[:3], decoder_layers=1, num_inference_steps=2)


def shrink_fourplane(config):
    widths = config.get("block_out_channels", (128, 256, 512, 512))
    channels = max(config.get("plane_channels", 8) // 4, 2)
    small = tuple(max(w // 32, 4) for w in widths)
    return dict(config, plane_channels=channels, block_out_channels=small, layers_per_block=1, norm_num_groups=4)


SHRINK = {
    "DCAE": shrink_dcae,
    "LiteVAE": shrink_litevae,
    "DiTo": shrink_dito,
    "SWYCC": shrink_swycc,
    "FourPlane": shrink_fourplane,
}


VQ = {"quantizer": {"kind": "vq", "codes": 64}}
FSQ = {"quantizer": {"kind": "fsq", "levels": [8, 5]}, "latent_channels": 2}


NORM_FREE = {
    "decoder_norm": "self_modulated",
    "output_type": "wavelet",
    "decoder_block_out_channels": (8, 16, 32),
}
KL_UVIT = {"latent_regularizer": "kl", "transformer_layers": 1, "adaptive_norm": True, "use_quant_conv": True}
VARIANTS = {
    "vq": ("dc-ae-tiny", VQ),
    "fsq": ("dc-ae-tiny", FSQ),
    "norm-free-wavelet": ("litevae-tiny", NORM_FREE),
    "kl-u-vit": ("dito-tiny", KL_UVIT),
    "noise-linear": ("swycc-tiny", {"latent_regularizer": "fixed_noise", "path": "linear", "prediction": "v"}),
}


def shrunk(name, **options):
    preset = find_preset(name)
    return {**SHRINK[preset.family](preset.config), **options}


def variants():
    """Names and options; those whose shrunk network another one has are slow."""
    seen = set()
    for name in PRESETS:
        network = repr(sorted({**shrunk(name), "scaling_factor": 1.0}.items()))
        yield pytest.param((name, {}), id=name, marks=[pytest.mark.slow] if network in seen else [])
        seen.add(network)
    for label, variant in VARIANTS.items():
        yield pytest.param(variant, id=f"{variant[0]}-{label}")


@pytest.fixture(scope="module", params=variants())
def autoencoder(request, randomise):
    name, options = request.param
    return randomise(create(name, **shrunk(name, **options)))


@pytest.fixture
def pixels(autoencoder):
    side = 2 * autoencoder.spatial_compression_ratio
    frames = (5,) if latentae.LatentCodec(autoencoder).is_video else ()
    return torch.rand(2, 3, *frames, side, side + autoencoder.spatial_compression_ratio) * 2 - 1


def test_shapes_and_spellings(autoencoder, pixels):
    output = autoencoder.encode(pixels)
    z = output.latent_dist.mode()
    assert z.shape == autoencoder.latent_shape(pixels.shape)
    assert torch.equal(output.latent, z)
    assert torch.equal(output.latents, z)
    (posterior,) = autoencoder.encode(pixels, return_dict=False)
    assert torch.equal(posterior.mode(), z)
    reconstruction = autoencoder.decode(z).sample
    assert reconstruction.shape == pixels.shape
    (again,) = autoencoder.decode(z, None, return_dict=False, generator=torch.Generator())
    assert torch.equal(again, reconstruction) != getattr(autoencoder, "samples", False)
    assert torch.equal(autoencoder(pixels).sample, reconstruction)


def test_latent_shape_rounds_up(autoencoder):
    ratio = autoencoder.spatial_compression_ratio
    assert autoencoder.latent_shape((1, 3, ratio + 1, 1)) == (1, autoencoder.latent_channels, 2, 1)


def test_sizes_that_do_not_fit_are_refused_with_the_multiple(autoencoder):
    ratio = autoencoder.spatial_compression_ratio
    for shape in ((1, 3, ratio + 1, ratio), (1, 4, ratio, ratio), (0, 3, ratio, ratio), (3, ratio, ratio)):
        with pytest.raises(RequestError, match=f"multiples of {ratio}"):
            autoencoder.encode(torch.zeros(shape))
    with pytest.raises(RequestError, match="expected"):
        autoencoder.decode(torch.zeros(1, autoencoder.latent_channels + 1, 2, 2))


def test_config_carries_every_key_of_the_pipelines(autoencoder):
    for key in PIPELINE_KEYS:
        assert key in autoencoder.config, key
    assert 2 ** (len(autoencoder.config.block_out_channels) - 1) == autoencoder.spatial_compression_ratio
    assert 2 ** (len(autoencoder.config.encoder_block_out_channels) - 1) == autoencoder.spatial_compression_ratio
    assert isinstance(autoencoder.config.shift_factor, float)


def test_save_and_load_keep_weights_and_only_real_arguments(autoencoder, pixels, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    cls = type(autoencoder)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).sample, autoencoder(pixels).sample)
    saved = cls.load_config(tmp_path)
    derived = set(PIPELINE_KEYS) - cls._init_arguments()
    assert not derived & set(saved)
    assert saved["_latentae_version"] == latentae.__version__
    rebuilt = cls.from_config(autoencoder.config)
    rebuilt.save_pretrained(tmp_path / "rebuilt")
    assert not derived & set(cls.load_config(tmp_path / "rebuilt"))


def test_real_arguments_stay_writable_and_derived_keys_follow(autoencoder, tmp_path):
    before = autoencoder.config.scaling_factor
    autoencoder.register_to_config(scaling_factor=0.25)
    assert autoencoder.config.scaling_factor == 0.25
    autoencoder.save_pretrained(tmp_path)
    assert latentae.load(tmp_path).config.scaling_factor == 0.25
    autoencoder.register_to_config(scaling_factor=before)


def test_classes_are_named_by_the_face(autoencoder):
    cls = type(autoencoder)
    assert cls.__module__ == "latentae"
    assert getattr(latentae, cls.__name__) is cls
    from diffusers import ModelMixin

    assert latentae.ModelMixin is ModelMixin


def test_batch_independence_and_slicing(autoencoder, pixels):
    with torch.no_grad():
        whole = autoencoder(pixels).sample
        alone = torch.cat([autoencoder(one).sample for one in pixels.split(1)])
        torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-3)
        autoencoder.enable_slicing()
        sliced = autoencoder(pixels).sample
        autoencoder.disable_slicing()
    torch.testing.assert_close(sliced, alone, atol=1e-4, rtol=1e-3)


def test_every_parameter_receives_a_gradient_also_with_checkpointing(autoencoder, pixels):
    def gradients():
        autoencoder.zero_grad()
        autoencoder(pixels).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in autoencoder.named_parameters()}

    plain = gradients()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    autoencoder.enable_gradient_checkpointing()
    assert autoencoder.is_gradient_checkpointing
    checkpointed = gradients()
    autoencoder.disable_gradient_checkpointing()
    autoencoder.zero_grad()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_bf16_weights_and_autocast_stay_near_fp32(autoencoder, pixels):
    with torch.no_grad():
        expected = autoencoder(pixels).sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = autoencoder(pixels).sample.float()
        half = type(autoencoder).from_config(autoencoder.config).eval()
        half.load_state_dict(autoencoder.state_dict())
        half = half.bfloat16()(pixels.bfloat16()).sample
    scale = expected.abs().max()
    assert half.dtype == torch.bfloat16
    for actual in (autocast, half.float()):
        assert actual.isfinite().all()
        assert (actual - expected).abs().mean() < 0.05 * scale


def test_captured_as_one_graph(autoencoder, pixels):
    with torch.no_grad():
        encode = torch.compile(lambda x: autoencoder.encode(x).latent, fullgraph=True, backend="eager")
        decode = torch.compile(lambda z: autoencoder.decode(z).sample, fullgraph=True, backend="eager")
        z = autoencoder.encode(pixels).latent
        torch.testing.assert_close(encode(pixels), z)
        torch.testing.assert_close(decode(z), autoencoder.decode(z).sample)
    torch._dynamo.reset()


def test_tiled_equals_untiled(autoencoder):
    """Tiles smaller than the receptive field, at sizes that leave slivers; exact, but for denoisers."""
    ratio = autoencoder.spatial_compression_ratio
    pixels = torch.rand(1, 3, 2 * ratio, 3 * ratio) * 2 - 1
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent
        expected = autoencoder.decode(z).sample
        autoencoder.enable_tiling(tile_sample_min_height=ratio // 2 + 3, tile_sample_min_width=ratio)
        tiled_z = autoencoder.encode(pixels).latent
        tiled = autoencoder.decode(z).sample
        autoencoder.disable_tiling()
    pairs = [(tiled_z, z)] if isinstance(autoencoder, DiffusionAutoencoder) else [(tiled_z, z), (tiled, expected)]
    for actual, wanted in pairs:
        assert actual.shape == wanted.shape
        assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_tiles_that_are_blended_keep_the_shape_and_one_tile_is_exact(autoencoder):
    ratio = autoencoder.spatial_compression_ratio
    pixels = torch.rand(1, 3, 2 * ratio, 4 * ratio) * 2 - 1
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent
        expected = autoencoder.decode(z).sample
        autoencoder.enable_tiling(2 * ratio + 1, 2 * ratio + 1)
        assert autoencoder.encode(pixels).latent.shape == z.shape
        assert autoencoder.decode(z).sample.shape == pixels.shape
        autoencoder.enable_tiling(4 * ratio, 4 * ratio)
        assert torch.equal(autoencoder.encode(pixels).latent, z)
        assert torch.equal(autoencoder.decode(z).sample, expected)
        autoencoder.disable_tiling()


def test_tiles_without_pixels_or_with_gaps_are_refused(autoencoder):
    for tile in ((-8, 64), (64, 0), (3.5, 64), ("64", 64), (64, 64, 65), (64, 64, 0), (64, 64, 64, -1)):
        with pytest.raises(RequestError, match="tile"):
            autoencoder.enable_tiling(*tile)
    assert not autoencoder.use_tiling


def test_tile_arguments_of_the_stock_classes_are_taken(autoencoder):
    autoencoder.enable_tiling(512, 512, 448, 448)
    assert autoencoder.use_tiling
    autoencoder.disable_tiling()
    assert not autoencoder.use_tiling


def test_creation_is_seeded_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    one, two, other = create("dc-ae-tiny"), create("dc-ae-tiny"), create("dc-ae-tiny", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(one.encoder.conv_out.weight, other.encoder.conv_out.weight)


def test_runs_as_the_vae_of_a_stable_diffusion_pipeline(autoencoder, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    channels = autoencoder.latent_channels
    unet = UNet2DConditionModel(
        sample_size=2, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    parts = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder, unet=unet.eval(), scheduler=DDIMScheduler(), requires_safety_checker=False, **parts
    )
    pipeline.set_progress_bar_config(disable=True)

    def image(pipe):
        side = 2 * autoencoder.spatial_compression_ratio
        prompt = torch.zeros(1, 4, 8)
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=prompt, height=side, width=side, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip

    expected = image(pipeline)
    side = 2 * autoencoder.spatial_compression_ratio
    assert expected.shape == (1, 3, side, side)
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False, **parts)
    again.set_progress_bar_config(disable=True)
    assert type(again.vae) is type(autoencoder)
    torch.testing.assert_close(image(again), expected, atol=1e-4, rtol=1e-3)
    assert isinstance(latentae.load(tmp_path), type(autoencoder))
    assert not isinstance(pipeline.vae, AutoencoderKL)


def test_indices_of_discrete_latents_there_and_back(autoencoder, pixels):
    if autoencoder.quantize is None:
        with pytest.raises(RequestError, match="continuous latents"):
            autoencoder.indices_of(torch.zeros(1, autoencoder.latent_channels, 1, 1))
        return
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent
        indices = autoencoder.indices_of(z)
        assert indices.shape == (len(z), *z.shape[2:])
        assert indices.unique().numel() > 1
        again = autoencoder.latents_of(indices)
        assert again.shape == z.shape
        assert torch.equal(autoencoder.indices_of(again), indices)
        torch.testing.assert_close(autoencoder.decode(again).sample, autoencoder.decode(z).sample)


def test_double_precision_stays_double(autoencoder, pixels):
    double = type(autoencoder).from_config(autoencoder.config).eval().double()
    double.load_state_dict(autoencoder.state_dict())
    with torch.no_grad():
        actual, expected = double(pixels.double()).sample, autoencoder(pixels).sample
        nudged = double(pixels.double() + 1e-12).sample
        torch.testing.assert_close(actual.float(), expected, atol=1e-4, rtol=1e-3)
        if autoencoder.quantize is not None:  # whose codes no nudge changes
            assert torch.equal(actual, nudged)
            actual, nudged = (double.encode(pixels.double() + nudge).latent for nudge in (0, 1e-12))
    assert 0 < (nudged - actual).abs().max() < 1e-9  # fp32 inside would round the nudge away or blow it up to 1e-7
