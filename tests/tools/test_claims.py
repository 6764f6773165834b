"""The frame of the claims: statistics against scipy, references against scikit-learn, arms that differ in one thing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from scipy.stats import ttest_rel, wasserstein_distance
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import nn

from latentae.bench.baselines import block_mean_baseline
from latentae.families.presets import find_preset
from latentae.metrics.image import psnr


def test_paired_difference_is_students(claims):
    a, b = [20.1, 21.3, 19.8], [19.6, 20.2, 19.5]
    expected = ttest_rel(a, b).confidence_interval(0.95)
    difference = claims.frame.paired_difference(a, b)
    assert difference.low == pytest.approx(expected.low, abs=1e-3)
    assert difference.high == pytest.approx(expected.high, abs=1e-3)
    assert claims.frame.paired_difference(a, [1.0, 2.0, float("-inf")]) is None


def toy_arm(claims, name="toy"):
    """A number that gradient descent takes to 3; with seed-dependent start."""

    class Number(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(float(start)))

    def loss(module, seed, step):
        return (module.value - 3) ** 2 * (float("nan") if module.value > 1e3 else 1)

    return claims.frame.Arm(name, Number, loss)


def test_arms_get_the_best_of_three_rates_and_one_run_per_seed(claims):
    evaluated = []

    def evaluate(module):
        evaluated.append(float(module.value.detach()))
        return {"psnr": -abs(evaluated[-1] - 3)}

    plan = claims.frame.Plan(steps=8, search_steps=8, learning_rates=(1e-3, 0.5, 1e6), evaluations=4, seeds=(0, 1, 2))
    [outcome] = claims.frame.run_arms([toy_arm(claims)], plan, evaluate, evaluate, "psnr")
    assert outcome.search[1e6] is None  # diverged
    assert outcome.learning_rate == max((1e-3, 0.5), key=lambda rate: outcome.search[rate])
    assert [run.seed for run in outcome.runs] == [0, 1, 2]
    for run in outcome.runs:
        assert run.steps == [0, 2, 4, 6, 8]
        assert run.values[0] == {"psnr": -abs(run.seed - 3)}  # untrained
        assert run.seconds == sorted(run.seconds)
    json.dumps(outcome.as_json(["psnr"]), allow_nan=False)


def test_a_threshold_asks_for_size_and_for_certainty(claims):
    frame = claims.frame

    def outcome(name, finals):
        runs = [frame.Run(i, 0.1, [0], [0.0], [{"psnr": value}]) for i, value in enumerate(finals)]
        return frame.Outcome(name, 1, {0.1: 0.0}, runs)

    base = outcome("base", [20.0, 21.0, 22.0])
    threshold = frame.Threshold("x", "psnr", "new", "base", least=0.3)
    assert threshold.judge([base, outcome("new", [20.5, 21.4, 22.6])])["shown"]
    assert not threshold.judge([base, outcome("new", [20.1, 21.1, 22.1])])["shown"]  # certain but small
    assert not threshold.judge([base, outcome("new", [19.5, 22.0, 23.0])])["shown"]  # large but uncertain


def test_references_against_scikit_learn(claims):
    pictures = claims.pictures
    training, held_out = pictures.stream(0, 60, 64), pictures.held_out_pictures(2, 64)
    assert pictures.pca(training, held_out, 8, 2)["psnr_photos"] == pytest.approx(
        sklearn_pca_psnr(training, held_out["photos"], 8, 2), abs=0.02
    )
    images = [image.permute(1, 2, 0).numpy() for image in held_out["leaves"]]
    expected = block_mean_baseline(images, 8).psnr
    assert pictures.block_mean(held_out, 8)["psnr_leaves"] == pytest.approx(expected, abs=1e-6)
    whole = pictures.from_blocks(pictures.to_blocks(training.float(), 8), training.shape, 8)
    assert torch.equal(whole, training.float())


def sklearn_pca_psnr(training, images, factor, components):
    def blocks(pixels):
        b, _, h, w = pixels.shape
        grid = pixels.numpy().reshape(b, 3, h // factor, factor, w // factor, factor)
        return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * factor**2).astype(np.float64)

    model = PCA(components).fit(blocks(training))
    decoded = model.inverse_transform(model.transform(blocks(images)))
    b, _, h, w = images.shape
    grid = decoded.reshape(b, h // factor, w // factor, 3, factor, factor).transpose(0, 3, 1, 4, 2, 5)
    rounded = np.floor(grid.reshape(images.shape).clip(0, 255) + 0.5).astype(np.uint8)
    return psnr(torch.from_numpy(rounded), images).mean().item()


def test_the_stream_is_frozen_and_apart_from_the_test(claims):
    pictures = claims.pictures
    long, short = pictures.stream(0, 12, 32), pictures.stream(0, 4, 32)
    assert torch.equal(long[:4], short)
    assert not torch.equal(pictures.stream(1, 4, 32), short)
    assert not torch.equal(pictures.leaves_of(pictures.TEST_SEED, 1, 32), pictures.leaves_of(pictures.TUNE_SEED, 1, 32))


def test_arms_of_dcae_differ_in_their_shortcuts_only(claims):
    dcae = claims.dcae
    arms = [dcae.deep_stages(name, 5) for name in (dcae.NONE, dcae.POOL, dcae.DCAE_SHORTCUT)]
    for other in arms[1:]:
        for (name, a), (same, b) in zip(arms[0].state_dict().items(), other.state_dict().items(), strict=True):
            assert name == same
            assert torch.equal(a, b)
    features = torch.randn(1, dcae.SHALLOW[-1], 16, 8)
    latents = [arm.encode(features) for arm in arms]
    assert all(z.shape == (1, 128, 2, 1) for z in latents)
    assert F.pixel_unshuffle(torch.zeros(1, dcae.LOW_CHANNELS, 16, 8), 8).shape == latents[0].shape  # the free code
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])


def test_the_shortcuts_alone_without_convolutions(claims):
    """With all convolutions zero, only what bypasses them is left."""
    dcae = claims.dcae
    arms = {name: dcae.deep_stages(name, 0) for name in (dcae.NONE, dcae.POOL, dcae.DCAE_SHORTCUT)}
    for arm in arms.values():
        for parameter in arm.parameters():
            parameter.data.zero_()
    features = torch.randn(2, dcae.SHALLOW[-1], 16, 16)
    assert arms[dcae.NONE](features).abs().max() == 0
    # copies and means of whole channels cancel, until 384 channels become 128 latents: triples of channels
    pooled = F.avg_pool2d(features, 8).repeat_interleave(8, dim=1)  # (2, 384, 2, 2)
    expected = pooled.unflatten(1, (128, 3)).mean(2).repeat_interleave(3, 1).unflatten(1, (48, 8)).mean(2)
    torch.testing.assert_close(arms[dcae.POOL](features), F.interpolate(expected, scale_factor=8.0))
    x = features
    for _ in range(3):
        x = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 2)).mean(2)
    x = x.unflatten(1, (128, 3)).mean(2)
    torch.testing.assert_close(arms[dcae.DCAE_SHORTCUT].encode(features), x)
    x = x.repeat_interleave(3, 1)
    for _ in range(3):
        x = F.pixel_shuffle(x.repeat_interleave(2, 1), 2)
    torch.testing.assert_close(arms[dcae.DCAE_SHORTCUT](features), x)


def test_splitting_the_f8_model_changes_nothing(claims, randomise):
    f8 = randomise(claims.dcae.f8_model()).eval()
    pixels = torch.rand(1, 3, 32, 24) * 2 - 1
    x = claims.dcae.features_of(f8, pixels)
    z = f8.encoder.conv_out(x) + x.unflatten(1, (2, -1)).mean(2)
    torch.testing.assert_close(z, f8.encode(pixels).latent_dist.mode())
    x = f8.decoder.conv_in(z) + z.repeat_interleave(24, 1)
    torch.testing.assert_close(claims.dcae.pixels_of(f8, x), f8.decode(z).sample)


def test_the_null_of_litevae_holds_what_haar_holds(claims):
    """At every level the null's 12 channels are an orthogonal map, block by block, of LiteVAE's bands."""
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    haar = claims.litevae.litevae_encoder(claims.litevae.Encoder)
    null = claims.litevae.litevae_encoder(claims.litevae.UnshuffleEncoder)
    for level, (a, b) in enumerate(zip(haar.bands(pixels), null.bands(pixels), strict=True), 1):
        assert a.shape == b.shape == (1, 12, 64 >> level, 64 >> level)
        a, b = (bands.flatten(2)[0] for bands in (a, b))  # (12, positions)
        mixing = b @ torch.linalg.pinv(a)
        torch.testing.assert_close(mixing @ a, b)
        torch.testing.assert_close(mixing @ mixing.T, 4 * torch.eye(12, dtype=torch.float64))


def test_the_encoders_of_litevae_cost_what_their_names_say(claims):
    costs = {name: claims.litevae.cost(claims.litevae.build_encoder(name), 64) for name in NAMES_OF_LITEVAE}
    whole, parameters, macs, lite, null = costs.values()
    assert parameters["millions"] == pytest.approx(lite["millions"], rel=0.03)
    assert macs["giga_macs"] == pytest.approx(lite["giga_macs"], rel=0.03)
    assert null["millions"] == lite["millions"]
    assert whole["millions"] / lite["millions"] == pytest.approx(34.16 / 6.75, rel=0.05)
    assert whole["giga_macs"] / lite["giga_macs"] == pytest.approx(136.36 / 37.84, rel=0.05)


NAMES_OF_LITEVAE = (
    "SD-VAE encoder",
    "SD-VAE, LiteVAE's parameters",
    "SD-VAE, LiteVAE's MACs",
    "LiteVAE",
    "LiteVAE, unshuffle for Haar",
)


def test_a_loss_that_is_allowed_is_judged_by_the_whole_interval(claims):
    def outcome(name, finals):
        runs = [claims.frame.Run(seed, 1e-3, [0], [0.0], [{"psnr": value}]) for seed, value in enumerate(finals)]
        return claims.frame.Outcome(name, 1, {1e-3: 0.0}, runs)

    threshold = claims.frame.Threshold("a loses little", "psnr", "a", "b", least=-0.3)
    b = outcome("b", [20.0, 20.0, 20.0])
    assert threshold.judge([outcome("a", [19.9, 19.92, 19.88]), b])["shown"]
    assert not threshold.judge([outcome("a", [20.3, 19.5, 19.9]), b])["shown"], "the mean is -0.1, the interval wide"


def test_drops_of_eqvae_are_shares_of_the_plain_error(claims):
    def outcome(rotation, scale, psnr):
        values = {"rotation_error": rotation, "scale_error": scale, "psnr": psnr}
        values |= {f"{name}_standardised": values[name] / 2 for name in ("rotation_error", "scale_error")}
        return claims.frame.Outcome(
            "x", 1, {1e-3: 0.0}, [claims.frame.Run(s, 1e-3, [0], [0.0], [values]) for s in (0, 1)]
        )

    changes = claims.eqvae.changes_of(outcome(0.3, 0.4, 25.0), outcome(0.6, 0.5, 25.2))
    assert changes["rotation_error_drop"] == pytest.approx(0.5)
    assert changes["scale_error_drop_standardised"] == pytest.approx(0.2)
    assert changes["psnr_change"] == pytest.approx(-0.2)
    assert [verdict["shown"] for verdict in claims.eqvae.thresholds(changes)] == [True, False, True, False, True]


def test_calibration_of_a_posterior_that_is_known(claims):
    """Originals and samples from the same Gaussian: calibrated, with twice the error of its mean, for any K."""
    torch.manual_seed(0)
    mean = torch.randn(200, 3, 16, 16)
    original = mean + 0.3 * torch.randn_like(mean)
    for count in (2, 8):
        figures = claims.realism.calibration(mean + 0.3 * torch.randn(count, *mean.shape), original)
        assert figures["calibration"] == pytest.approx(1, abs=0.02)
        assert figures["error_of_mean"] == pytest.approx(0.09, rel=0.02)
        assert figures["error"] == pytest.approx(0.18, rel=0.02)
    narrow = claims.realism.calibration(mean + 0.1 * torch.randn(4, *mean.shape), original)
    assert narrow["calibration"] == pytest.approx(1 / 9, rel=0.05)


def test_haar_distance_against_scipy_and_pywavelets(claims):
    torch.manual_seed(0)
    original, made = torch.randn(3, 3, 16, 8), torch.randn(3, 3, 16, 8) ** 3
    expected = []
    a, b = made.double().numpy(), original.double().numpy()
    for _ in range(2):
        a, details = pywt.dwt2(a, "haar")
        b, wanted = pywt.dwt2(b, "haar")
        pairs = zip(details, wanted, strict=True)
        expected += [wasserstein_distance(x.ravel(), y.ravel()) / np.abs(y).mean() for x, y in pairs]
    assert claims.realism.haar_distance(made, original, levels=2) == pytest.approx(np.mean(expected), rel=1e-5)
    assert claims.realism.haar_distance(torch.zeros_like(original), original) == pytest.approx(1)


def test_the_impostors_are_as_rough_as_the_originals(claims):
    realism = claims.realism
    torch.manual_seed(0)
    original = torch.randn(8, 3, 64, 64)
    smooth = F.avg_pool2d(original, 3, stride=1, padding=1)
    noise = torch.randn_like(smooth) * realism.matching_noise(smooth, original)
    assert realism.roughness(smooth + noise) == pytest.approx(realism.roughness(original), rel=0.02)
    sharp = realism.unsharp(smooth, realism.matching_amount(smooth, original))
    assert realism.roughness(sharp) == pytest.approx(realism.roughness(original), rel=1e-4)
    assert realism.matching_noise(original, smooth) == 0
    rows = original.diff(dim=-2).square().mean() + original.diff(dim=-1).square().mean()
    assert realism.roughness(original) == pytest.approx(rows.item() / 2)


def test_the_classifier_finds_what_there_is(claims):
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(256, 3, 18, 18), 3, stride=1)
    seen, unseen = images[:128], images[128:]
    noisy = [part + 0.2 * torch.randn_like(part) for part in (seen, unseen)]
    assert claims.realism.held_out_auc((seen, noisy[0]), (unseen, noisy[1]), seed=0, steps=40) > 0.95
    swapped = (seen.flip(0), unseen.flip(0))
    assert claims.realism.held_out_auc((seen, swapped[0]), (unseen, swapped[1]), seed=0, steps=40) == pytest.approx(0.5)


def test_auc_is_scikit_learns(claims):
    rng = np.random.default_rng(0)
    real, made = rng.integers(0, 9, 40) + 1.0, rng.integers(0, 9, 50) + 0.0  # with ties
    expected = roc_auc_score([1] * 40 + [0] * 50, np.concatenate([real, made]))
    assert claims.realism.auc(torch.from_numpy(real), torch.from_numpy(made)) == pytest.approx(expected)


@pytest.fixture
def components(claims):
    """The frozen encoder of the claim about diffusion decoders, and what it was fitted on."""
    training = claims.pictures.stream(0, 60, 32)
    return claims.samplers.PrincipalComponents(training), training


def test_the_frozen_encoder_is_scikit_learns_pca(claims, components):
    encoder, training = components
    blocks = claims.pictures.to_blocks(training.float() / 127.5 - 1, 8).numpy()
    model = PCA(4).fit(blocks)
    codes = encoder(training.float() / 127.5 - 1)
    assert codes.flatten(2).transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx([1] * 4, rel=1e-4)
    back = claims.pictures.to_blocks(encoder.invert(codes), 8).numpy()
    expected = model.inverse_transform(model.transform(blocks))
    assert np.abs(back - expected).mean() < 0.02 * np.abs(expected).mean()  # a randomised basis against an exact one
    assert encoder.spread**2 == pytest.approx(np.square(blocks - expected).mean(), rel=1e-3)


def test_samplers_begin_alike_and_only_decoders_train(claims, components):
    samplers = claims.samplers
    modules = {name: samplers.build(name, components[0], 3) for name in samplers.TRAINED}
    modules[samplers.GAN] = modules[samplers.GAN].autoencoder
    for group in ((samplers.REGRESSION, samplers.GAN, samplers.DITO), (samplers.SWYCC_ARM, samplers.RESIDUAL)):
        for name in group[1:]:
            pairs = zip(modules[group[0]].decoder.parameters(), modules[name].decoder.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for module in modules.values() for p in module.encoder.parameters())


def test_a_perfect_denoiser_of_the_residual_gives_the_pixels(claims, components, monkeypatch):
    encoder, training = components
    module = claims.samplers.build(claims.samplers.RESIDUAL, encoder, 0)
    pixels = training[:2].float() / 127.5 - 1
    z = encoder(pixels)
    base = module.initial_decoder(z).detach()
    residual = (pixels - base) / module.residual_std
    monkeypatch.setattr(module, "denoise", lambda noisy, t, condition: residual)
    made = module.decode(z, num_inference_steps=3).sample
    torch.testing.assert_close(made, pixels, atol=1e-5, rtol=0)
    loss = claims.samplers.diffusion_loss(module, z, pixels)
    expected = claims.samplers.INITIAL_WEIGHT * F.mse_loss(base, pixels).item()
    assert loss.item() == pytest.approx(expected)  # nothing else is left


def test_generator_and_discriminator_share_no_gradient(claims, components):
    samplers = claims.samplers
    module = samplers.build(samplers.GAN, components[0], 0)
    pixels = components[1][:2].float() / 127.5 - 1
    samplers.adversarial_loss(module, pixels).backward()
    found = [p.grad for p in module.adversary.discriminator.parameters()]
    made = module.autoencoder.decode(components[0](pixels)).sample.detach()
    fresh = samplers.build(samplers.GAN, components[0], 0).adversary
    loss, _ = fresh.discriminator_loss(pixels, made)
    for a, b in zip(found, torch.autograd.grad(loss, fresh.discriminator.parameters()), strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is not None for p in module.autoencoder.decoder.parameters())


def test_a_student_of_one_step_has_nothing_to_learn(claims, components, monkeypatch):
    samplers = claims.samplers
    teacher = samplers.build(samplers.SWYCC_ARM, components[0], 0)
    pixels = components[1][:2]
    for steps, nothing in ((1, True), (3, False)):
        monkeypatch.setattr(samplers, "TEACHER_STEPS", steps)
        student = samplers.Student(teacher)
        assert (student.loss(pixels.float() / 127.5 - 1, 5).item() < 1e-10) is nothing
        assert (student.agreement({"photos": pixels})["agreement"] == float("inf")) is nothing
    trained = {name.split(".")[1] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    assert student.autoencoder.config["num_inference_steps"] == 1


def test_samplers_are_judged_seed_by_seed(claims):
    samplers, judge = claims.samplers, claims.diffusion_decoder.thresholds
    good = {"calibration": 1.1, "error_ratio": 2.1, "auc": 0.7}
    figures = {name: {seed: dict(good) for seed in range(3)} for name in samplers.SAMPLERS}
    figures[samplers.NOISE] = {seed: {"auc": 0.8} for seed in range(3)}
    assert all(verdict["shown"] for verdict in judge(figures))
    figures[samplers.DITO][1] = {"calibration": 0.79, "error_ratio": 2.31, "auc": 0.8}
    assert [verdict["shown"] for verdict in judge(figures)] == [False] * 3 + [True] * 6


def test_the_spaces_of_dcae_speed_have_the_papers_tokens(claims):
    speed = claims.dcae_speed
    tokens = {name: space.tokens(512) for name, space in (speed.SPACES | speed.CONTROLS).items()}
    assert list(tokens.values()) == [1024, 256, 64, 256, 64]
    for space in speed.SPACES.values():
        if space.autoencoder != "sd-vae":
            config = find_preset(space.autoencoder).config
            assert config["latent_channels"] == space.channels
            assert 2 ** (len(config["encoder_block_out_channels"]) - 1) == space.factor


def test_multiplications_of_a_dit_by_hand(claims):
    """Linear layers see every token, attention every pair, the conditioning each image once."""
    speed = claims.dcae_speed
    for name, space in (speed.SPACES | speed.CONTROLS).items():
        counted = speed.measured({name: speed.sampling_step("dit-tiny", space, speed.QUICK)}, 1)["giga_macs"][name]
        width, layers, tokens = 128, 4, space.tokens(64)
        values = space.channels * space.patch**2
        of_tokens = tokens * (2 * values * width + layers * 12 * width**2)
        pairs = layers * 2 * tokens**2 * width
        embedding = 256 * width + width**2  # of the time, in every block, and once more for the output
        of_images = layers * (embedding + 6 * width**2) + embedding + 2 * width**2
        assert counted * 1e9 == pytest.approx(of_tokens + pairs + of_images)


def test_other_patches_share_the_blocks_and_change_nothing_else(claims):
    speed = claims.dcae_speed
    space = speed.SPACES[speed.F32]
    whole = speed.denoiser_of("dit-tiny", space, speed.QUICK)
    for parameter in whole.transformer.transformer_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shared = speed.denoiser_of("dit-tiny", space, speed.QUICK, whole.transformer.transformer_blocks)
    for part in (whole, shared):
        torch.nn.init.ones_(part.transformer.proj_out_2.weight)
    noise, t = torch.randn(1, *space.shape(64)), torch.tensor([0.5])
    torch.testing.assert_close(shared(noise, t), whole(noise, t))


def test_whole_images_are_steps_and_one_decoding(claims):
    speed = claims.dcae_speed
    names = [*speed.SPACES, *speed.CONTROLS]
    step = {"seconds": {n: [1.0, 9.0, 2.0] for n in names}, "giga_macs": {n: 10.0 for n in names}}
    step["seconds"][speed.F64] = [0.1, 0.1, 0.1]
    decoding = {"seconds": {n: [8.0, 8.0, 9.0] for n in speed.SPACES}, "giga_macs": {n: 50.0 for n in speed.SPACES}}
    decoding["giga_macs"][speed.F64] = 250.0
    rows = speed.whole_images({"step dit-tiny": step, "decoding": decoding}, speed.QUICK)
    [row] = [r for r in rows if r["space"] == speed.F64 and r["evaluations"] == 30]
    assert row["seconds"] == pytest.approx(30 * 0.1 + 8)
    assert row["speedup"] == pytest.approx((30 * 2 + 8) / 11)
    assert row["speedup_by_arithmetic"] == pytest.approx(350 / 550)
    controls = [r for r in rows if r["space"] in speed.CONTROLS]
    assert all(r["speedup"] == 1 for r in controls), "they decode as SD-VAE does"


def test_training_of_dcae_speed_trains(claims, monkeypatch):
    speed = claims.dcae_speed
    denoisers, original = [], speed.denoiser_of
    monkeypatch.setattr(speed, "denoiser_of", lambda *a: denoisers.append(original(*a)) or denoisers[-1])
    step = speed.training_step(speed.SPACES[speed.F32], speed.QUICK)
    before = [p.clone() for p in denoisers[0].parameters()]
    step()
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, denoisers[0].parameters(), strict=True))
    assert all(p.grad is None for p in denoisers[0].parameters())


@pytest.mark.slow
def test_dcae_speed_from_end_to_end(tool, tmp_path):
    script, file = tool("claims").__file__, tmp_path / "speed.json"
    options = ["--quick", "--threads", "1", "--json", str(file)]
    done = subprocess.run([sys.executable, script, "dcae-speed", *options], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("dcae-speed: ")
    result = json.loads(file.read_text())["dcae-speed"]
    figures = result["figures"]
    assert {"training", "step dit-tiny", "decoding"} == set(figures)
    assert all(value > 0 for key in ("training", "decoding") for value in figures[key]["peak_bytes"].values())
    assert len(figures["decoding"]["seconds"]["DC-AE f64 p1"]) == 3
    assert file.with_suffix(".png").stat().st_size > 10_000
    if not torch.cuda.is_available():
        refused = subprocess.run(
            [sys.executable, script, "dcae-speed", "--tier", "gpu"], capture_output=True, text=True
        )
        assert refused.returncode == 2
        assert "needs a CUDA device" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arms"), [("dcae", 3), ("litevae", 5), ("eqvae", 3), ("diffusion-decoder", 5)])
def test_the_command_from_end_to_end(name, arms, tool, tmp_path):
    script = tool("claims").__file__
    options = ["--quick", "--threads", "1", "--json", str(tmp_path / "new" / f"{name}.json")]
    done = subprocess.run([sys.executable, script, name, *options], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith(f"{name}: ")
    result = json.loads((tmp_path / "new" / f"{name}.json").read_text())[name]
    assert len(result["arms"]) == arms
    assert all(len(arm["final"]["psnr"]) == 3 for arm in result["arms"].values())
    assert any(reference.startswith("block mean f8") for reference in result["references"])
    assert (tmp_path / "new" / f"{name}.png").stat().st_size > 10_000
    if name == "eqvae":
        assert {"rotation_error_drop", "scale_error_drop", "psnr_change"} < set(result)
        model = AutoencoderDC.from_pretrained(tmp_path / "new" / "eqvae-models" / "eq-seed2")
        assert model.config.latent_channels == 4
    refused = subprocess.run([sys.executable, script, name, "--tier", "gpu"], capture_output=True, text=True)
    assert refused.returncode == 2
