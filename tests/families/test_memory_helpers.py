"""diffusers' and accelerate's helpers for memory and precision on every family, as far as a CPU runs them.

Offloading moves weights between two devices; here both are the CPU, but every hook fires in its place, and one that
fires too late or not at all leaves weights where they cannot be computed with: on the meta device, or in eight bits.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import HookRegistry

import latentae
from latentae.families.diffusion import DiffusionAutoencoder
from latentae.families.presets import PRESETS

VARIANTS = {
    "litevae-tiny": [{}, {"use_post_quant_conv": True}, {"decoder_norm": "self_modulated", "output_type": "wavelet"}],
    "dito-tiny": [{}, {"latent_regularizer": "kl", "use_quant_conv": True, "adaptive_norm": True}],
    "dc-ae-tiny": [{}, {"quantizer": {"kind": "vq", "codes": 16}}],
}
FAST = {"dc-ae-tiny", "litevae-tiny", "fourplane-tiny"}
CASES = [
    pytest.param(
        (name, options),
        id="-".join([name, *options]),
        marks=[] if name in FAST and not options else [pytest.mark.slow],
    )
    for name in PRESETS
    if name.endswith("-tiny")
    for options in VARIANTS.get(name, [{}])
]


@pytest.fixture(scope="module", params=CASES)
def made(request, randomise):
    name, options = request.param
    if options.get("output_type") == "wavelet":
        options = {**options, "decoder_block_out_channels": (8, 16, 32)}
    return randomise(latentae.create(name, **options))


@pytest.fixture
def autoencoder(made):
    """A copy, since helpers leave hooks behind."""
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def pixels(made):
    frames = (5,) if made.is_video else ()
    return torch.rand(2, 3, *frames, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def expected(made, pixels):
    return through(made, pixels)


@torch.no_grad()
def through(autoencoder, pixels):
    """By ``encode`` and ``decode``, which is how pipelines call it, and whose hooks are not those of ``forward``."""
    z = autoencoder.encode(pixels).latent_dist.mode()
    return autoencoder.decode(z).sample


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def close_in_tiles(autoencoder, actual, expected):
    """Tiles of a denoiser are blended, of all else exact."""
    assert actual.isfinite().all()
    assert actual.shape == expected.shape
    if not isinstance(autoencoder, DiffusionAutoencoder):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_model_offload_moves_the_model_when_encode_or_decode_is_called(autoencoder, pixels, expected):
    """What ``pipe.enable_model_cpu_offload`` puts on each component; the bare methods must fire its hook."""
    autoencoder, hook = cpu_offload_with_hook(autoencoder, execution_device="cpu")
    fired = []
    inner = hook.hook.pre_forward
    hook.hook.pre_forward = lambda module, *args, **kwargs: fired.append(1) or inner(module, *args, **kwargs)
    close(through(autoencoder, pixels), expected)
    assert len(fired) == 2
    hook.offload()
    remove_hook_from_module(autoencoder, recurse=True)


def test_sequential_offload_leaves_nothing_on_the_meta_device(autoencoder, pixels, expected):
    """``enable_sequential_cpu_offload``: weights are on the meta device but in the forward of their own module."""
    cpu_offload(autoencoder, execution_device=torch.device("cpu"), offload_buffers=True)
    assert {parameter.device.type for parameter in autoencoder.parameters()} == {"meta"}
    close(through(autoencoder, pixels), expected)
    assert {parameter.device.type for parameter in autoencoder.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(autoencoder, pixels, expected, kind, tmp_path):
    """With groups on disk, weights that no hook brings back are empty."""
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    autoencoder.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(tmp_path), **blocks
    )
    hooked = [module for module in autoencoder.modules() if hasattr(module, "_diffusers_hook")]
    assert hooked
    assert any(module._diffusers_hook.get_hook("group_offloading") for module in hooked)
    close(through(autoencoder, pixels), expected)
    autoencoder.enable_tiling(16, 16)
    tiled = through(autoencoder, pixels)
    close_in_tiles(autoencoder, tiled, expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting_holds_weights_in_eight_bits(autoencoder, pixels, expected, compute):
    autoencoder.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    eight = [p for p in autoencoder.parameters() if p.dtype == torch.float8_e4m3fn]
    assert sum(p.numel() for p in eight) > 0.8 * sum(p.numel() for p in autoencoder.parameters())
    actual = through(autoencoder, pixels.to(compute))
    assert actual.dtype == compute
    assert actual.isfinite().all()
    if autoencoder.quantize is None:  # whose codes flip
        assert (actual.float() - expected).abs().mean() < 0.5 * expected.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_the_keyword_of_diffusers(made, pixels, expected, dtype, tmp_path):
    made.save_pretrained(tmp_path)
    half = type(made).from_pretrained(tmp_path, torch_dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    actual = through(half, pixels.to(dtype))
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    if made.quantize is None:
        assert (actual.float() - expected).abs().mean() < 0.05 * expected.abs().max()


def test_channels_last(autoencoder, pixels, expected):
    if autoencoder.is_video:  # whose weights are of four and of five dimensions, which torch does not take together
        actual = through(autoencoder, pixels.contiguous(memory_format=torch.channels_last_3d))
    else:
        autoencoder.to(memory_format=torch.channels_last)
        actual = through(autoencoder, pixels.contiguous(memory_format=torch.channels_last))
    close(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_repeated_blocks_compile_each_once(autoencoder, pixels, expected):
    assert autoencoder._repeated_blocks
    autoencoder.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64):  # one for each width and size
        close(through(autoencoder, pixels), expected)
        autoencoder.enable_tiling(16, 16)
        close_in_tiles(autoencoder, through(autoencoder, pixels), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_tiles_in_a_compiled_call(autoencoder, pixels, expected):
    """Not as one graph: a tile that ends at a norm is none."""
    autoencoder.enable_tiling(16, 16)
    compiled = torch.compile(lambda pixels: through(autoencoder, pixels), backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64):
        close_in_tiles(autoencoder, compiled(pixels), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_halves_compile_in_place(autoencoder, pixels, expected):
    names = set(autoencoder.state_dict())
    autoencoder.encoder.compile(fullgraph=True, backend="eager")
    autoencoder.decoder.compile(fullgraph=True, backend="eager")
    close(through(autoencoder, pixels), expected)
    assert set(autoencoder.state_dict()) == names
    torch._dynamo.reset()


def test_switches_in_every_spelling_and_through_a_pipeline(autoencoder, pixels, expected):
    from diffusers import StableDiffusionPipeline

    autoencoder.enable_tiling(tile_sample_min_width=512, tile_sample_min_height=512)  # as Sana's message tells users
    assert (autoencoder.tile_sample_min_height, autoencoder.tile_sample_min_width) == (512, 512)
    autoencoder.disable_tiling()
    pipeline = StableDiffusionPipeline(
        vae=autoencoder, unet=None, text_encoder=None, tokenizer=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    assert autoencoder.use_tiling
    assert autoencoder.use_slicing
    close(through(autoencoder, pixels), expected, atol=1e-4)


def test_split_over_devices_by_accelerate(made, pixels, expected, tmp_path):
    """``device_map`` asks for modules that must stay whole."""
    assert made._no_split_modules
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path, device_map={"": "cpu"})
    close(through(again, pixels), expected)


def test_no_hook_is_left_after_layerwise_casting_is_asked_of_a_copy(made):
    assert not any(isinstance(getattr(module, "_diffusers_hook", None), HookRegistry) for module in made.modules())
