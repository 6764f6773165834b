"""Diffusion decoders in training: what they learn, log, repeat and distil; their latents from elsewhere; refusals."""

import lpips
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import latentae
from latentae.cli.main import main
from latentae.errors import RequestError
from latentae.objectives import (
    KL,
    L1,
    L2,
    LPIPS,
    CosineTimes,
    Denoising,
    Equivariance,
    FlowMatching,
    Initial,
    LogitNormalTimes,
    NoiseSynchronization,
    Term,
)
from latentae.training.distillation import StepDistillation
from latentae.training.start import build_autoencoder

FLOW = {"flow": FlowMatching(weighting="x0")}
SWYCC = {**FLOW, "initial": Initial(L2())}
X0 = {"preset": "dito-tiny", "prediction": "x0"}


def fast(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def held_out():
    """Smooth images of other frequencies than those of the training folder, (4, 3, 32, 32)."""
    y, x = np.mgrid[:32, :32]
    images = [[np.sin(x / (4.5 + i) + y / (7.5 + c) + i + 0.5) for c in range(3)] for i in range(4)]
    return torch.tensor(np.array(images), dtype=torch.float32) * 0.94


def psnr(a, b):
    """Mean over images in dB, of pixels in [-1, 1], written out."""
    return (10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))).mean().item()


def mean_colour(pixels):
    return pixels.mean((2, 3), keepdim=True).expand_as(pixels)


def noise_of(seed):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Spy(Term):
    """Records the steps that it sees and weighs nothing."""

    def __init__(self):
        super().__init__(0.0)
        self.steps = []

    def measure(self, step):
        self.steps.append(step)
        return step.reconstruction.mean()


def count_calls(network):
    """The times that a denoiser is asked about, call by call."""
    times = []
    network.register_forward_pre_hook(lambda _, inputs: times.append(inputs[1].detach().clone()))
    return times


def train(runs, folder, run_dir, autoencoder, objective, steps, **options):
    options = {"optimizer": fast, "ema": 0.95, **options}
    data = runs.data(folder, batch_size=options.pop("batch_size", 8), dead_leaves=0.0)
    module = runs.module(options.pop("adversary", None), autoencoder=autoencoder, objective=objective, **options)
    return module, runs.fit(module, data, run_dir, steps)


# What is learnt


def test_dito_learns_to_reconstruct(dito_run):
    """Above the mean colour by more than 4 dB on held-out images, and from their own latents, not from another's."""
    autoencoder, pixels = latentae.load(dito_run), held_out()
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent_dist.mode()
        decoded = {steps: autoencoder.decode(z, num_inference_steps=steps).sample for steps in (1, 4)}
    for steps, sample in decoded.items():
        assert psnr(sample, pixels) > psnr(mean_colour(pixels), pixels) + 4, steps
        assert psnr(sample.roll(1, 0), pixels) < psnr(mean_colour(pixels), pixels) + 2
    torch.testing.assert_close(z.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.square().mean((1, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)


def test_swycc_learns_both_of_its_images(runs, folder, tmp_path):
    _, steps = train(runs, folder, tmp_path, {"preset": "swycc-tiny"}, SWYCC, 60)
    assert set(steps[1]) == {"loss", "flow", "initial", "gradient_norm"}
    autoencoder, pixels = latentae.load(tmp_path), held_out()
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent_dist.mode()
        sample, first = autoencoder.decode(z, num_inference_steps=4).sample, autoencoder.condition(z).base
    for image in (sample, first):
        assert psnr(image, pixels) > psnr(mean_colour(pixels), pixels) + 4


def test_the_diffusion_loss_alone_trains_all_three_of_swycc_s_networks(runs, folder, tmp_path):
    before = latentae.create("swycc-tiny").state_dict()
    module, _ = train(runs, folder, tmp_path, {"preset": "swycc-tiny"}, FLOW, 2)
    moved = {
        name.split(".")[0] for name, p in module.autoencoder.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {"encoder", "initial_decoder", "decoder"}


def test_the_published_loss_of_the_velocity_falls(runs, folder, tmp_path):
    objective = {"flow": FlowMatching()}
    _, steps = train(runs, folder, tmp_path, {"preset": "dito-tiny"}, objective, 50, batch_size=4)
    losses = [steps[i]["flow"] for i in sorted(steps)]
    assert losses[0] > 1, "the velocity has the variance of noise and image"
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_glpto_trains_as_a_plain_autoencoder(runs, folder, tmp_path):
    description = {"preset": "dito-tiny", "prediction": "pixels", "num_inference_steps": 1}
    adversary = runs.adversary(adaptive=True, start_step=40)
    module, steps = train(runs, folder, tmp_path, description, {"l1": L1()}, 42, adversary=adversary, batch_size=4)
    assert module.denoising is None
    assert "adaptive_factor" in steps[41]
    autoencoder, pixels = latentae.load(tmp_path), held_out()
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent_dist.mode()
        found = autoencoder.decode(z).sample
        assert torch.equal(autoencoder.decode(z, generator=torch.Generator().manual_seed(5)).sample, found)
    assert psnr(found, pixels) > psnr(mean_colour(pixels), pixels) + 4


# What the terms and the adversary see


def test_terms_and_adversary_see_the_estimate_at_the_time_of_each_image(runs, folder, tmp_path):
    spy, seen = Spy(), []
    module = runs.module(
        runs.adversary(), autoencoder={"preset": "dito-tiny"}, objective={"flow": FlowMatching(), "spy": spy}
    )
    module.adversary.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    times, encodes = count_calls(module.autoencoder.decoder), []
    module.autoencoder.encoder.register_forward_hook(lambda *_: encodes.append(1))
    steps = runs.fit(module, runs.data(folder), tmp_path, 3)
    assert len(spy.steps) == len(times) == len(encodes) == 3, "one pass of each network a step"
    assert "discriminator" in steps[1]
    for i, step in enumerate(spy.steps):
        assert torch.equal(step.times, times[i])
        assert step.times.shape == (2,)
        own, real, fake = seen[3 * i : 3 * i + 3]
        assert torch.equal(own, step.reconstruction)
        assert torch.equal(fake, step.reconstruction)
        assert torch.equal(real, step.target)
        error = (step.reconstruction - step.target).square().mean((1, 2, 3)) / step.times.clamp_min(1e-3) ** 2
        assert steps[i + 1]["flow"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert len({float(t) for step in spy.steps for t in step.times}) == 6, "no time is drawn twice"


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_of_the_estimate_reaches_encoder_and_decoder(runs, folder, tmp_path):
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    backbone = {f"features.{key.split('.', 1)[1]}": value for key, value in network.net.state_dict().items()}
    torch.save(backbone, tmp_path / "alex.pth")
    spy, term = Spy(), LPIPS(0.5, net="alex", path=str(tmp_path / "alex.pth"))
    module = runs.module(
        autoencoder={"preset": "dito-tiny"},
        objective={"flow": FlowMatching(weight=0.0), "lpips": term, "spy": spy},
        term_gradients_every=1,
    )
    before = [p.clone() for p in module.autoencoder.encoder.parameters()]
    steps = runs.fit(module, runs.data(folder, size=64), tmp_path / "run", 1)
    with torch.no_grad():
        expected = network(spy.steps[0].reconstruction, spy.steps[0].target).mean().item()
    assert steps[1]["lpips"] == pytest.approx(expected, rel=1e-4)
    assert steps[1]["loss"] == pytest.approx(0.5 * expected, rel=1e-4)
    assert steps[1]["gradient_of_lpips"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, module.autoencoder.encoder.parameters(), strict=True))


@pytest.mark.parametrize("preset", ["dito-tiny", "swycc-tiny"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_every_precision_under_transforms_averaged_and_accumulated(runs, folder, tmp_path, preset, precision):
    spy = Spy()
    objective = {**(SWYCC if preset == "swycc-tiny" else FLOW), "spy": spy}
    module = runs.module(
        runs.adversary(adaptive=True),
        autoencoder={"preset": preset},
        objective=objective,
        latent_transforms=[Equivariance(0.7, scales=(0.5, 1.0)), NoiseSynchronization(0.5)],
        denoising=Denoising(LogitNormalTimes()),
        accumulate=2,
        gradient_checkpointing=True,
    )
    steps = runs.fit(module, runs.data(folder), tmp_path, 4, precision=precision)
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in steps.values())
    assert len(spy.steps) == 8
    assert {step.target.shape[2] for step in spy.steps} > {32}, "scaled targets of scaled latents"
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert all(step.target.shape == step.reconstruction.shape for step in spy.steps)
    assert all(step.times.dtype == step.reconstruction.dtype == wide for step in spy.steps)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    average, weights = saved["latentae_ema"], saved["state_dict"]
    assert any(not torch.equal(value, weights[f"autoencoder.{name}"]) for name, value in average.items())
    assert latentae.load(tmp_path).config.prediction == ("v" if preset == "dito-tiny" else "x0")


# What repeats


@pytest.mark.parametrize(("preset", "crash_at"), [("dito-tiny", 1), ("dito-tiny", 5), ("swycc-tiny", 3)])
def test_a_resumed_run_repeats_the_uninterrupted_one(runs, folder, tmp_path, preset, crash_at):
    def go(run_dir, **options):
        module = runs.module(
            runs.adversary(),
            autoencoder={"preset": preset, "latent_regularizer": "kl"},
            objective={**(SWYCC if preset == "swycc-tiny" else FLOW), "kl": KL(1e-6)},
            latent_transforms=[NoiseSynchronization(0.5)],
            denoising=Denoising(CosineTimes()),
            accumulate=2,
        )
        return runs.fit(module, runs.data(folder), run_dir, 4, **options)

    straight = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=crash_at)
    resumed = go(tmp_path / "resumed")
    assert {step: straight[step] for step in resumed} == resumed
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("straight", "resumed")
    )
    for key in ("state_dict", "latentae_ema"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("preset", ["dito-tiny", "swycc-tiny"])
def test_a_compiled_run_is_the_run(runs, folder, tmp_path, preset):
    """Through the whole of torch.compile but the code generation, which needs a compiler."""
    import torch._dynamo

    def go(name, compiled):
        objective = SWYCC if preset == "swycc-tiny" else FLOW
        module = runs.module(autoencoder={"preset": preset}, objective=objective, compile=compiled)
        return runs.fit(module, runs.data(folder), tmp_path / name, 2)

    expected = go("plain", False)
    with pytest.MonkeyPatch.context() as patch:
        original = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend="aot_eager"))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = go("compiled", True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-3)


# What is logged and validated


def test_the_loss_by_time_is_in_the_log(runs, folder, tmp_path):
    module = runs.module(autoencoder={"preset": "dito-tiny"}, objective=FLOW)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    runs.fit(module, runs.data(folder, batch_size=8), tmp_path / "run", 12, logger=logger, log_every_n_steps=6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/loss_t{i}" for i in range(10)} <= tags
    late = [scalar.value for scalar in events.Scalars("train/loss_t9")]
    assert len(late) <= 2
    assert min(late) > 0


def validate(runs, folder, run_dir, module):
    trainer = runs.trainer(run_dir, 0)
    (values,) = trainer.validate(module, runs.data(folder, val_fraction=0.5), verbose=False)
    return values


def test_validations_of_the_same_weights_are_equal(runs, folder, tmp_path):
    module = runs.module(
        autoencoder={"preset": "swycc-tiny"},
        objective=SWYCC,
        latent_transforms=[NoiseSynchronization(0.5)],
        ema=None,
    )
    first = validate(runs, folder, tmp_path, module)
    torch.manual_seed(123)
    second = validate(runs, folder, tmp_path, module)
    assert {"val/flow", "val/initial", "val/psnr", "val/ssim"} <= set(first)
    assert first == second
    with torch.no_grad():
        module.autoencoder.decoder.conv_out.bias += 0.1
    changed = validate(runs, folder, tmp_path, module)
    assert changed["val/psnr"] != first["val/psnr"]
    assert changed["val/flow"] != first["val/flow"]


def test_validation_takes_few_steps_in_between_and_all_at_the_end(runs, folder, tmp_path):
    module = runs.module(
        autoencoder={"preset": "dito-tiny", "num_inference_steps": 7}, objective=FLOW, denoising=Denoising(val_steps=3)
    )
    times = count_calls(module.autoencoder.decoder)
    data = runs.data(folder, val_fraction=0.5, batch_size=8)
    trainer = runs.trainer(tmp_path, 2, val_check_interval=2)
    trainer.fit(module, data)
    assert len(times) == 2 + (1 + 3), "two steps; one draw for the terms and three steps of a sample"
    assert [float(t[0]) for t in times[-3:]] == pytest.approx([1, 2 / 3, 1 / 3])
    times.clear()
    trainer.validate(module, data, verbose=False)
    assert len(times) == 1 + 7
    assert [float(t[0]) for t in times[-7:]] == pytest.approx([1 - i / 7 for i in range(7)])


def test_validation_does_not_change_the_run(runs, folder, tmp_path):
    def go(name, **options):
        module = runs.module(autoencoder={"preset": "dito-tiny"}, objective=FLOW)
        return runs.fit(module, runs.data(folder, val_fraction=0.2), tmp_path / name, 4, **options)

    assert go("without") == go("with", val_check_interval=1)


# One step


def distil(runs, folder, run_dir, teacher, steps, autoencoder=None, **options):
    return train(
        runs,
        folder,
        run_dir,
        autoencoder or {"pretrained": str(teacher)},
        {"flow": FlowMatching()},
        steps,
        **{
            "trainable": ["decoder"],
            "denoising": StepDistillation(str(teacher), steps=8),
            "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
            **options,
        },
    )


def distance(student, teacher, z):
    """The squared error of one step against eight of the teacher, over noises of which training has seen none."""
    with torch.no_grad():
        pairs = [(student.sample(z, noise_of(seed), 1), teacher.sample(z, noise_of(seed), 8)) for seed in range(3)]
    return np.mean([(a - b).square().mean().item() for a, b in pairs])


def test_a_student_does_in_one_step_what_its_teacher_does_in_eight(runs, folder, tmp_path, dito_run):
    module, _ = distil(runs, folder, tmp_path / "run", dito_run, 40)
    teacher = latentae.load(dito_run)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    student = latentae.load(tmp_path / "out")
    z = teacher.encode(held_out()).latent_dist.mode().detach()
    before, after = distance(teacher, teacher, z), distance(student, teacher, z)
    assert after < before / 3, f"{before} -> {after}"

    assert teacher.config.num_inference_steps == 4
    assert student.config.num_inference_steps == 1
    calls = count_calls(student.decoder)
    with torch.no_grad():
        student.decode(z)
    assert [float(t[0]) for t in calls] == [1.0]
    theirs = teacher.encoder.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in student.encoder.state_dict().items())
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    names = {f"autoencoder.{name}" for name in module.autoencoder.state_dict()}
    assert set(checkpoint["state_dict"]) == names, "no weights of the teacher"
    assert not any(p.requires_grad for p in module.denoising.teacher.parameters())
    own = latentae.load(dito_run).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in module.denoising.teacher.state_dict().items())


def test_the_target_is_the_teacher_s_sample_of_the_student_s_noise(dito_run):
    teacher, student = latentae.load(dito_run), latentae.load(dito_run)
    seen = []
    student.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    z = teacher.encode(held_out()).latent_dist.mode().detach()
    one = StepDistillation(teacher, steps=5)(student, z, held_out())
    noise, t, *_ = seen[0]
    assert torch.equal(t, torch.ones(4))
    assert torch.equal(one.times, t)
    with torch.no_grad():
        torch.testing.assert_close(one.target, teacher.sample(z, noise, 5), rtol=0, atol=1e-6)
        torch.testing.assert_close(one.clean, student.sample(z, noise, 1), rtol=0, atol=1e-6)
    assert one.clean.requires_grad
    assert not one.target.requires_grad


def test_a_resumed_distillation_repeats(runs, folder, tmp_path, dito_run):
    _, straight = distil(runs, folder, tmp_path / "straight", dito_run, 4, batch_size=2)
    distil(runs, folder, tmp_path / "resumed", dito_run, 2, batch_size=2)
    _, resumed = distil(runs, folder, tmp_path / "resumed", dito_run, 4, batch_size=2)
    assert {step: straight[step] for step in resumed} == resumed


def test_swycc_distils_with_its_first_image_as_it_was(runs, folder, tmp_path):
    latentae.create("swycc-tiny").save_pretrained(tmp_path / "teacher")
    module, _ = distil(runs, folder, tmp_path / "run", tmp_path / "teacher", 2, batch_size=2)
    before = latentae.create("swycc-tiny").state_dict()
    moved = {
        name.split(".")[0] for name, p in module.autoencoder.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {"decoder"}
    assert module.autoencoder.config.num_inference_steps == 1


# Latents of another autoencoder


def make_kl(**options):
    """An autoencoder of random weights whose latents have the spread that its scaling factor says."""
    torch.manual_seed(7)
    widths = (8, 16, 16, 16)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model = AutoencoderKL(**{**blocks, "block_out_channels": widths, "norm_num_groups": 4, **options}).eval()
    if model.config.in_channels == 3:
        with torch.no_grad():
            spread = model.encode(held_out()).latent_dist.mode().std().item()
            last = model.encoder.conv_out if model.quant_conv is None else model.quant_conv
            for parameter in last.parameters():
                parameter[: len(parameter) // 2] /= spread * model.config.scaling_factor
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"latent_channels": 4, "scaling_factor": 0.18215},
        {"latent_channels": 6, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
        {
            "latent_channels": 3,
            "latents_mean": [0.1, -0.2, 0.3],
            "latents_std": [5.0, 6.0, 4.0],
            "mid_block_add_attention": False,
            "layers_per_block": 2,
        },
    ],
)
def test_a_decoder_for_the_latents_of_an_autoencoder_kl(runs, folder, tmp_path, options):
    teacher = make_kl(**options)
    teacher.save_pretrained(tmp_path / "teacher")
    description = {"preset": "dito-tiny", "encoder_of": str(tmp_path / "teacher")}
    module, steps = train(runs, folder, tmp_path / "run", description, FLOW, 3, trainable=["decoder"], batch_size=2)
    assert np.isfinite(steps[3]["flow"])
    student = latentae.load(tmp_path / "run")
    with torch.no_grad():
        ours, theirs = (model.encode(held_out()).latent_dist for model in (student, teacher))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.std, theirs.std, rtol=1e-6, atol=1e-6)
    expected = {"scaling_factor": 0.18215, "shift_factor": 0.0, "latents_mean": None, "latents_std": None, **options}
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_channels"):
        found = student.config[key]
        assert (list(found) if isinstance(found, (list, tuple)) else found) == expected[key], key
    assert not any(p.requires_grad for name, p in module.autoencoder.named_parameters() if "decoder" not in name)


def test_the_denoiser_gets_foreign_latents_standardised(tmp_path):
    make_kl(latent_channels=4, scaling_factor=0.25, shift_factor=0.5).save_pretrained(tmp_path)
    student = build_autoencoder({"preset": "dito-tiny", "encoder_of": str(tmp_path)})
    z = torch.randn(2, 4, 4, 4) * 4 + 0.5
    seen = student.condition(z).map
    torch.testing.assert_close(seen[:, :, ::4, ::4], (z - 0.5) * 0.25)


# Refusals


def test_what_cannot_be_denoised_is_refused(runs, folder, tmp_path):
    with pytest.raises(RequestError, match=r"model\.denoising is for autoencoders with a diffusion decoder; DCAE has"):
        runs.module(denoising=Denoising())
    with pytest.raises(RequestError, match="FlowMatching needs an autoencoder with a diffusion decoder"):
        runs.fit(runs.module(objective={"flow": FlowMatching()}), runs.data(folder), tmp_path / "a", 1)
    module = runs.module(autoencoder={"preset": "dito-tiny"}, objective=SWYCC)
    with pytest.raises(RequestError, match="Initial needs an autoencoder with an initial decoder"):
        runs.fit(module, runs.data(folder), tmp_path / "b", 1)
    with pytest.raises(RequestError, match="NoiseSynchronization is for diffusion decoders, which DCAE has not"):
        runs.module(latent_transforms=[NoiseSynchronization()])


def test_what_cannot_be_distilled_is_refused(runs, dito_run):
    distillation, start = StepDistillation(str(dito_run)), {"pretrained": str(dito_run)}
    for trainable in (None, ["encoder"], ["decoder", "encoder.conv_out"]):
        with pytest.raises(RequestError, match=r"the encoder must not train: set model\.trainable to \[decoder\]"):
            runs.module(autoencoder=start, denoising=distillation, trainable=trainable)
    other = {"preset": "dito-tiny", "use_quant_conv": True}
    with pytest.raises(RequestError, match="the encoder must not train"):
        runs.module(autoencoder=other, denoising=distillation, trainable=["decoder", "quant_conv"])
    for options, shape in [
        ({"latent_channels": 3}, "f8c3"),
        ({"encoder_widths": (8, 8, 16), "decoder_widths": (16, 32)}, "f4c4"),
    ]:
        with pytest.raises(RequestError, match=f"decodes f8c4 latents, the autoencoder in training {shape}"):
            runs.module(autoencoder={**X0, **options}, denoising=distillation, trainable=["decoder"])
    for teacher in (latentae.create("dc-ae-tiny"), latentae.create("dito-tiny", prediction="pixels")):
        with pytest.raises(RequestError, match=r"teacher of StepDistillation needs a diffusion decoder"):
            StepDistillation(teacher)
    with pytest.raises(RequestError, match="decodes the latents of another encoder"):
        runs.module(autoencoder=X0, denoising=distillation, trainable=["decoder"])
    glpto = {"preset": "dito-tiny", "prediction": "pixels"}
    with pytest.raises(RequestError, match="this DiTo predicts the pixels at once"):
        runs.module(autoencoder=glpto, denoising=Denoising())
    with pytest.raises(RequestError, match="at least one step of the teacher, not 0"):
        StepDistillation(str(dito_run), steps=0)


def test_a_plain_objective_on_a_sampler_is_said(runs, capsys):
    runs.module(autoencoder={"preset": "dito-tiny"}, objective={"l2": L2()})
    assert "the objective no FlowMatching term" in capsys.readouterr().err
    runs.module(autoencoder={"preset": "dito-tiny"}, objective={"flow": FlowMatching()})
    assert not capsys.readouterr().err


def test_encoders_that_dito_cannot_have_are_refused(tmp_path):
    make_kl(latent_channels=4).save_pretrained(tmp_path / "kl")
    make_kl(act_fn="gelu").save_pretrained(tmp_path / "gelu")
    make_kl(in_channels=4, out_channels=4).save_pretrained(tmp_path / "rgba")
    latentae.create("dc-ae-tiny").save_pretrained(tmp_path / "dcae")
    for preset, name, options, message in [
        ("dito-tiny", "dcae", {}, "of the class DCAE; DiTo can have the encoder of an AutoencoderKL"),
        ("dito-tiny", "gelu", {}, "an encoder of DownEncoderBlock2D with gelu for 3 channels"),
        ("dito-tiny", "rgba", {}, "with silu for 4 channels; DiTo can have one of DownEncoderBlock2D"),
        ("dito-tiny", "kl", {"latent_channels": 3}, "latent_channels is 3, but 4 in encoder_of"),
        ("dito-tiny", "kl", {"latent_regularizer": "none"}, "latent_regularizer is none, but kl in encoder_of"),
        ("swycc-tiny", "kl", {}, "encoder_of needs a preset of DiTo"),
        ("dito-tiny", "kl", {"encoder_off": "x"}, "did you mean encoder_of"),
    ]:
        with pytest.raises(RequestError, match=message):
            build_autoencoder({"preset": preset, "encoder_of": str(tmp_path / name), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.denoising.val_steps=0"], "model.denoising.val_steps is at least 1, not 0."),
        (["--model.denoising.times=LogitNormalTimes", "--model.denoising.times.std=0"], "a std above 0, not 0.0."),
        (["--model.denoising={class_path: StepDistillation, init_args: {teacher: nowhere}}"], "no preset 'nowhere'"),
        (["--model.denoising.times=LogitNormal"], "model.denoising.times names a class; 'LogitNormal' is unknown"),
    ],
)
def test_what_cannot_be_made_is_one_sentence_of_ours(tmp_path, folder, capsys, options, message):
    small = ["--model.autoencoder={preset: dito-tiny}", "--data.path", str(folder), "--run_dir", str(tmp_path / "run")]
    small += ["--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    assert main(["fit", "--config", "dito/b-f8c4", *small, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors


# Recipes


def smaller(tmp_path, folder):
    return [
        "--run_dir", str(tmp_path / "run"), "--data.path", str(folder), "--data.size", "32", "--data.batch_size", "2",
        "--data.workers", "0", "--data.val_fraction", "0.3", "--trainer.max_steps", "2", "--trainer.devices", "1",
        "--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    ]  # fmt: skip


RECIPES = {
    "dito/b-f8c4": ["--model.autoencoder={preset: dito-tiny}", "--model.latent_transforms+=NoiseSynchronization"],
    "dito/b-f8c4-lpips": ["--model.autoencoder={preset: dito-tiny}", "--model.objective.lpips=L1"],
    "glpto/b-f8c4": [
        "--model.autoencoder={preset: dito-tiny, prediction: pixels}",
        "--model.objective.lpips=L2",
        "--model.adversary.discriminator.channels=32",
        "--model.adversary.discriminator.layers=1",
        "--model.adversary.start_step=1",
    ],
    "swycc/f8c4": ["--model.autoencoder={preset: swycc-tiny}", "--model.objective.initial_lpips.term={class_path: L1}"],
    "dito/distill-one-step": [
        "--model.autoencoder.pretrained={dito}",
        "--model.denoising.teacher={dito}",
        "--model.objective.lpips=L1",
    ],
    "dito/onto-sd-vae-phase1": [
        "--model.autoencoder={preset: dito-tiny, encoder_of: {kl}}",
        "--model.objective.lpips=L1",
    ],
}


# the others' parts are in those of the fast tier
SLOW_RECIPES = ("dito/b-f8c4-lpips", "dito/onto-sd-vae-phase1", "glpto/b-f8c4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_RECIPES else []) for name in RECIPES]
)
def test_the_recipes_run_at_a_small_size(tmp_path, folder, dito_run, name, capsys):
    """As shipped, but for LPIPS, whose weights are not here, smaller networks and one device."""
    make_kl(latent_channels=4).save_pretrained(tmp_path / "kl")
    places = {"{dito}": str(dito_run), "{kl}": str(tmp_path / "kl")}
    changes = RECIPES[name]
    for key, value in places.items():
        changes = [change.replace(key, value) for change in changes]
    assert main(["fit", "--config", name, *smaller(tmp_path, folder), *changes]) == 0
    assert "psnr" in capsys.readouterr().out
    autoencoder = latentae.load(tmp_path / "run")
    assert autoencoder.config.num_inference_steps == (1 if "one-step" in name else 2 if "swycc" in name else 4)


def test_both_stages_onto_another_autoencoder(tmp_path, folder):
    """`latentae stages` in this process: the second stage finds teacher and start in the run of the first."""
    from latentae.training.recipes import find_stages
    from latentae.training.stages import read_stages

    make_kl(latent_channels=4).save_pretrained(tmp_path / "kl")
    own = ["--model.autoencoder.preset", "dito-tiny", "--model.autoencoder.encoder_of", str(tmp_path / "kl")]
    options = [*smaller(tmp_path, folder)[2:], *own, "--model.objective.lpips", "L1"]
    common = [f"{name}={value}" for name, value in zip(options[::2], options[1::2], strict=True)]
    first, second = read_stages(find_stages("dito/onto-sd-vae"), tmp_path / "runs", common)
    for stage in (first, second):
        assert main(["fit", *stage.arguments]) == 0
    sampler, one_step = latentae.load(first.run_dir), latentae.load(second.run_dir)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "kl").encoder.state_dict()
    for model in (sampler, one_step):
        assert all(torch.equal(value, theirs[key]) for key, value in model.encoder.state_dict().items())
    assert (sampler.config.num_inference_steps, one_step.config.num_inference_steps) == (4, 1)
    assert not torch.equal(sampler.decoder.conv_out.weight, one_step.decoder.conv_out.weight)
