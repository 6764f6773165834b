"""Decoders that sample, as drop-in VAEs: reproducible noise, batches, tiles, steps, schedulers, foreign latents."""

import math
import shutil
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import latentae
from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.families.presets import create

NAMES = ["dito-tiny", "swycc-tiny"]
U_VIT = {"transformer_layers": 1, "adaptive_norm": True}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NAMES)
def model(request, randomise):
    return randomise(create(request.param))


def latents(batch=3, height=3, width=4, channels=4):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(5))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def psnr(a, b):
    return float(20 * torch.log10((b.max() - b.min()) / (a - b).square().mean().sqrt()))


# Noise


def test_without_a_generator_every_image_starts_from_the_canvas_of_the_configured_seed(model):
    z = latents()
    torch.manual_seed(1)
    first = model.decode(z).sample
    torch.manual_seed(2)
    assert torch.equal(model.decode(z).sample, first)
    for i in range(len(z)):
        torch.testing.assert_close(model.decode(z[i : i + 1]).sample, first[i : i + 1], atol=1e-5, rtol=0)
    # the canvas is what the CPU's generator gives for this seed, whatever the device of the latents
    canvas = torch.randn(1, 3, 24, 32, generator=seeded(0))
    torch.testing.assert_close(
        model.sample(z, canvas.expand(3, -1, -1, -1), 2), model.decode(z, num_inference_steps=2).sample
    )
    model.register_to_config(decode_seed=1)
    assert (model.decode(z).sample - first).abs().mean() > 1e-3


def test_one_generator_and_lists_of_generators(model):
    z = latents()
    listed = model.decode(z, generator=[seeded(i) for i in (3, 4, 3)]).sample
    for i, seed in enumerate((3, 4, 3)):
        alone = model.decode(z[i : i + 1], generator=seeded(seed)).sample
        torch.testing.assert_close(listed[i : i + 1], alone, atol=1e-5, rtol=0)
    generator = seeded(3)
    joint = model.decode(z, generator=generator).sample
    assert torch.equal(model.decode(z, generator=seeded(3)).sample, joint)
    assert not torch.equal(model.decode(z, generator=generator).sample, joint), "a generator goes on"
    for wrong in ([], [seeded(0)], [seeded(0)] * 4):
        with pytest.raises(RequestError, match=f"{len(wrong)} generators for 3 images"):
            model.decode(z, generator=wrong)


@pytest.mark.parametrize("generators", [None, "one", "list"])
def test_slices_are_the_whole(model, generators):
    z = latents()
    make = {None: lambda: None, "one": lambda: seeded(7), "list": lambda: [seeded(i) for i in range(3)]}[generators]
    whole = model.decode(z, generator=make()).sample
    model.enable_slicing()
    torch.testing.assert_close(model.decode(z, generator=make()).sample, whole, atol=1e-5, rtol=0)


def test_tiles_take_their_part_of_one_canvas(model, monkeypatch):
    z = latents(2, 5, 9)
    noise = model.decode(z, generator=seeded(1)).sample  # only for its shape
    assert noise.shape == (2, 3, 40, 72)
    canvas = torch.randn(2, 3, 40, 72, generator=seeded(1))
    monkeypatch.setattr(model, "sample", lambda z, noise, steps, base=None: noise)
    model.enable_tiling(16, 24, 8, 16)
    torch.testing.assert_close(model.decode(z, generator=seeded(1)).sample, canvas, atol=1e-5, rtol=0)


def test_tiled_images_stay_near_the_untiled_one(model):
    z = latents(1, 8, 16)
    whole = model.decode(z).sample
    model.enable_tiling(64, 128)
    assert torch.equal(model.decode(z).sample, whole), "one tile"
    model.enable_tiling(64, 80, 64, 48)
    tiled = model.decode(z).sample
    model.disable_tiling()
    other = model.decode(z, generator=seeded(9)).sample
    assert not torch.equal(tiled, whole)
    assert psnr(tiled, whole) > psnr(other, whole) + 3


def test_layer_norm_is_of_the_whole_image_at_any_size_tiled_or_not(randomise):
    model = randomise(create("dito-tiny"))
    for height, width in ((8, 8), (24, 40), (72, 40)):
        pixels = torch.rand(2, 3, height, width) * 2 - 1
        z = model.encode(pixels).latent
        reference = torch.nn.LayerNorm(z.shape[1:], elementwise_affine=False)
        torch.testing.assert_close(z, reference(model.encoder(pixels)))
        torch.testing.assert_close(z.mean((1, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
        model.enable_tiling(24, 24)
        torch.testing.assert_close(
            model.encode(pixels).latent.std((1, 2, 3), correction=0), torch.ones(2), atol=1e-3, rtol=0
        )
        model.disable_tiling()


# Steps


def test_the_conditioner_runs_once_and_the_denoiser_once_a_step(model, monkeypatch):
    runs = {"condition": 0, "decoder": 0}
    condition = model.condition

    def counted(*arguments):
        runs["condition"] += 1
        return condition(*arguments)

    monkeypatch.setattr(model, "condition", counted)
    model.decoder.register_forward_hook(lambda *_: runs.update(decoder=runs["decoder"] + 1))
    for steps in (1, 5):
        runs.update(condition=0, decoder=0)
        model.decode(latents(1), num_inference_steps=steps)
        assert runs == {"condition": 1, "decoder": steps}
    runs.update(decoder=0)
    model.decode(latents(1))
    assert runs["decoder"] == model.config.num_inference_steps


def test_steps_of_the_argument_and_of_the_configuration(model, tmp_path):
    z = latents()
    three = model.decode(z, num_inference_steps=3).sample
    assert not torch.equal(three, model.decode(z).sample)
    model.register_to_config(num_inference_steps=3)
    assert torch.equal(model.decode(z).sample, three)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(latentae.load(tmp_path).decode(z).sample, three, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0, 1.5, "4"])
def test_what_is_no_number_of_steps_is_refused(model, steps):
    with pytest.raises(RequestError, match="whole number of at least 1"):
        model.decode(latents(), num_inference_steps=steps)
    with pytest.raises(RequestError, match="whole number of at least 1"):
        create("dito-tiny", num_inference_steps=steps)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_steps_are_those_of_a_loop_and_of_diffusers_scheduler(steps, rho, randomise):
    """The velocity straight from the network, in float64; then FlowMatchEulerDiscreteScheduler with explicit sigmas."""
    model = randomise(create("dito-tiny", time_shift_rho=rho)).double()
    z = latents().double()
    up = z.repeat_interleave(4, 2).repeat_interleave(4, 3)  # f8 in patches of 2
    noise = torch.randn(1, 3, 24, 32, generator=seeded(0)).double().expand(3, -1, -1, -1)
    times = [(1 - i / steps) ** rho for i in range(steps + 1)]
    x = noise
    for t, after in pairwise(times):
        velocity = model.decoder(x, torch.full((3,), t).double(), up)  # noise - image
        x = x - (t - after) * velocity
    actual = model.decode(z, num_inference_steps=steps).sample
    torch.testing.assert_close(actual, x, atol=1e-9, rtol=0)

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1])
    x = noise.float()
    model.float()
    for timestep in scheduler.timesteps:
        velocity = model.decoder(x, (timestep / 1000).expand(3), up.float())
        x = scheduler.step(velocity, timestep, x).prev_sample
    torch.testing.assert_close(model.decode(z.float(), num_inference_steps=steps).sample, x, atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_on_the_cosine_path_steps_are_those_of_ddim(steps, randomise):
    """DDIM between angles, in the variables of a variance-preserving path, with the image as the network gives it."""
    model = randomise(create("swycc-tiny")).double()
    z = latents().double()
    patches = F.pixel_unshuffle(model.initial_decoder(z), 2)
    y = torch.randn(1, 3, 24, 32, generator=seeded(0)).double().expand(3, -1, -1, -1)
    times = [1 - i / steps for i in range(steps + 1)]
    angles = [math.atan2(t, 1 - t) for t in times]
    for t, angle, after in zip(times, angles, angles[1:]):
        image = model.decoder(y, torch.full((3,), t).double(), patches)
        noise = (y - math.cos(angle) * image) / math.sin(angle)
        y = math.cos(after) * image + math.sin(after) * noise
    torch.testing.assert_close(model.decode(z, num_inference_steps=steps).sample, y, atol=1e-9, rtol=0)


# Schedulers


def gaussian(model, monkeypatch, std=0.3):
    """Make the image of every latent Gaussian: the exact sampler multiplies the noise by ``std``."""

    def denoise(noisy, t, condition):
        t = t.view(-1, 1, 1, 1)
        return std**2 * (1 - t) / (std**2 * (1 - t) ** 2 + t**2) * noisy

    monkeypatch.setattr(model, "denoise", denoise)
    return std * torch.randn(1, 3, 24, 32, generator=seeded(0)).expand(3, -1, -1, -1)


def test_the_flow_matching_scheduler_gives_what_there_is_without_it(model, tmp_path):
    for rho in (1.0, 2.0):
        model.register_to_config(time_shift_rho=rho)
        expected = model.decode(latents(), num_inference_steps=5).sample
        model.set_scheduler(FlowMatchEulerDiscreteScheduler())
        for _ in range(2):  # it keeps no state from one call to the next
            actual = model.decode(latents(), num_inference_steps=5).sample
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        model.set_scheduler(None)
    model.set_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert not torch.allclose(model.decode(latents(), num_inference_steps=5).sample, expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert latentae.load(tmp_path).scheduler is None


def test_schedulers_of_higher_order_come_nearer_to_the_exact_sample(model, monkeypatch):
    exact = gaussian(model, monkeypatch)
    errors = {}
    for name, scheduler in {
        "euler": None,
        "heun": FlowMatchHeunDiscreteScheduler(),
        "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }.items():
        model.set_scheduler(scheduler)
        errors[name] = float((model.decode(latents(), num_inference_steps=20).sample - exact).square().mean().sqrt())
    assert errors["euler"] < 0.05
    assert errors["heun"] < 0.3 * errors["euler"]
    assert errors["unipc"] < 0.5 * errors["euler"]


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDIMScheduler(), "DDIMScheduler is for epsilon"),
        (EulerDiscreteScheduler(prediction_type="v_prediction"), "for v_prediction"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (object(), "object is for other"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(model, scheduler, named):
    with pytest.raises(RequestError, match=named):
        model.set_scheduler(scheduler)
    assert model.scheduler is None


# Latents of others


def test_latents_of_another_scale_are_warned_about_with_the_cause(randomise):
    dito = randomise(create("dito-tiny", scaling_factor=0.18215))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dito.decode(dito.encode(torch.rand(2, 3, 32, 32) * 2 - 1).latent)
        dito.decode(latents() * 2)
    for factor in (5.5, 0.1):  # never divided, divided twice
        with pytest.warns(UserWarning, match="another autoencoder's, or were not taken back from the scale"):
            dito.decode(latents() * factor)
    kl = randomise(create("dito-tiny", latent_regularizer="kl", scaling_factor=0.1, shift_factor=3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl.decode(latents() * 10 + 3)
        LatentCodec(kl).decode(latents())
    with pytest.warns(UserWarning, match="DiTo"):
        kl.decode(latents() * 100)
    unknown = randomise(create("swycc-tiny"))  # of which no scale is known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unknown.decode(latents() * 100)


def test_statistics_of_an_autoencoder_that_was_there_before(randomise):
    mean, std = (1.0, -2.0, 0.5, 9.0), (5.0, 0.1, 1.0, 3.0)
    model = randomise(create("dito-tiny", condition_mean=mean, condition_std=std))
    plain = create("dito-tiny")
    plain.load_state_dict(model.state_dict())
    z = latents()
    shift, scale = (torch.tensor(value).view(1, 4, 1, 1) for value in (mean, std))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = model.decode(z * scale + shift).sample
    torch.testing.assert_close(actual, plain.decode(z).sample, atol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match="times as far spread"):
        model.decode(z)


# Precision, compilers, sizes, the plain decoder of the same networks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(model, dtype):
    z = latents()
    expected = model.decode(z).sample
    actual = model.to(dtype).decode(z.to(dtype)).sample
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    tolerance = 0.01 if dtype == torch.float16 else 0.05
    assert (actual.float() - expected).abs().mean() < tolerance * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compiled_by_inductor(randomise):
    model = randomise(create("dito-tiny", decoder_widths=(8,)))
    z = latents()
    expected = model.decode(z, num_inference_steps=2).sample
    compiled = torch.compile(lambda z: model.decode(z, num_inference_steps=2).sample, fullgraph=True)
    torch.testing.assert_close(compiled(z), expected, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_the_image_is_the_same_on_a_gpu(model):
    z = latents()
    expected = model.decode(z, generator=[seeded(i) for i in range(3)]).sample
    on_gpu = model.cuda().decode(z.cuda(), generator=[seeded(i) for i in range(3)]).sample.cpu()
    assert psnr(on_gpu, expected) > 40


@pytest.mark.parametrize("options", [{}, U_VIT], ids=["unet", "u-vit"])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_of_image(name, options, randomise):
    codec = LatentCodec(randomise(create(name, **options)))
    for height, width in ((41, 59), (8, 8), (1, 9), (24, 136)):
        pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        encoded = codec.encode(pixels)
        assert encoded.tensor.shape == (1, 4, -(-height // 8), -(-width // 8))
        decoded = codec.decode(encoded)
        assert decoded.shape == pixels.shape
        assert decoded.isfinite().all()


def test_f16_with_sixteen_channels(randomise):
    model = randomise(create("dito-tiny", encoder_widths=(8, 8, 8, 8, 16), latent_channels=16, patch_size=4))
    z = model.encode(torch.rand(1, 3, 48, 80) * 2 - 1).latent
    assert z.shape == (1, 16, 3, 5)
    assert model.decode(z).sample.shape == (1, 3, 48, 80)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"latent_regularizer": "tanh"}, "latent_regularizer 'tanh' is unknown to DiTo; expected layer_norm, kl"),
        ({"prediction": "eps"}, "prediction 'eps' is unknown"),
        ({"path": "vp"}, "path 'vp' is unknown"),
        ({"patch_size": 8}, "use fewer decoder_widths"),
        ({"time_shift_rho": 0.0}, "exponent above 0, not 0.0"),
        ({"condition_std": (1.0,) * 4}, "go together"),
        ({"condition_mean": (0.0,) * 3, "condition_std": (1.0,) * 4}, "condition_mean has 3 values for 4"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options, complaint):
    with pytest.raises(RequestError, match=complaint):
        create("dito-tiny", **options)


def test_the_same_networks_as_a_plain_decoder_do_not_sample(randomise):
    model = randomise(create("dito-tiny", prediction="pixels", num_inference_steps=1))
    assert not model.samples
    z = latents()
    expected = model.decode(z).sample
    up = z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(expected, model.decoder(torch.zeros(3, 3, 24, 32), torch.ones(3), up))
    assert torch.equal(model.decode(z, generator=seeded(3), num_inference_steps=7).sample, expected)
    model.enable_tiling(16, 16)
    assert model.decode(z).sample.shape == expected.shape


# The codec


def test_the_codec_passes_generators_and_steps(model):
    codec = LatentCodec(model)
    assert codec.samples
    assert codec.num_inference_steps == model.config.num_inference_steps
    z = latents()
    four = model.decode(z, generator=[seeded(i) for i in range(3)], num_inference_steps=6).sample
    generators = [seeded(i) for i in range(3)]
    assert torch.equal(codec.decode(z, generator=generators, num_inference_steps=6), four)
    fixed = codec.with_inference_steps(6)
    assert (fixed.num_inference_steps, codec.num_inference_steps) == (6, model.config.num_inference_steps)
    assert torch.equal(fixed.decode(z, generator=[seeded(i) for i in range(3)]), four)
    for steps in (0, -2, True, 2.5):
        with pytest.raises(RequestError, match="at least 1"):
            codec.decode(z, num_inference_steps=steps)


def test_steps_are_refused_where_nothing_is_sampled(tiny_dcae):
    from diffusers import AutoencoderKL

    plain = create("dito-tiny", prediction="pixels", num_inference_steps=1)
    for autoencoder in (tiny_dcae, plain, AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))):
        codec = LatentCodec(autoencoder)
        assert codec.num_inference_steps is None
        with pytest.raises(RequestError, match=f"{type(autoencoder).__name__} decodes at once, not by steps"):
            codec.decode(latents(), num_inference_steps=4)


def test_diffusers_own_consistency_decoder_is_a_sampler_too():
    from diffusers import ConsistencyDecoderVAE

    torch.manual_seed(0)
    stock = ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 16, 16, 16), encoder_down_block_types=("DownEncoderBlock2D",) * 4,
        decoder_block_out_channels=(8, 16, 16, 16), decoder_layers_per_block=1, encoder_layers_per_block=1,
        decoder_norm_num_groups=4, encoder_norm_num_groups=4, latent_channels=4,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 4,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 4,
    )  # fmt: skip
    codec = LatentCodec(stock)
    assert (codec.samples, codec.num_inference_steps, codec.spatial_ratio) == (True, 2, 8)
    pixels = torch.rand(2, 3, 41, 32) * 2 - 1
    first, again = (codec.reconstruct(pixels, generator=[seeded(0), seeded(1)]) for _ in range(2))
    assert first.shape == pixels.shape
    assert torch.equal(first, again)
