"""The frame of the claims: statistics against scipy, references against scikit-learn, arms that differ in one thing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from scipy.stats import ttest_rel
from sklearn.decomposition import PCA
from torch import nn

from latentae.bench.baselines import block_mean_baseline
from latentae.metrics.image import psnr


@pytest.fixture
def claims(tool, monkeypatch):
    """The modules beside the script."""
    tool("claims")
    for name in [name for name in sys.modules if name == "claims" or name.startswith("claims.")]:
        monkeypatch.delitem(sys.modules, name)
    import claims.dcae
    import claims.eqvae
    import claims.frame
    import claims.litevae
    import claims.pictures

    return claims


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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arms"), [("dcae", 3), ("litevae", 5), ("eqvae", 3)])
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
