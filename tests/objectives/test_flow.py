"""Times against their distributions, weights against the published losses, terms on the first image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import latentae
from latentae.errors import RequestError
from latentae.families.diffusion import Condition
from latentae.objectives import (
    L1,
    L2,
    CosineTimes,
    Denoising,
    FlowMatching,
    Initial,
    LogitNormalTimes,
    LossByTime,
    NoiseSynchronization,
    Objective,
    PureNoise,
    Step,
    UniformTimes,
    check_transforms,
)

MANY = torch.empty(20_000, dtype=torch.float64)
DISTRIBUTIONS = {
    "uniform": (UniformTimes(), stats.uniform().cdf),
    "logit-normal": (LogitNormalTimes(), lambda t: stats.norm().cdf(np.log(t / (1 - t)))),
    "shifted": (LogitNormalTimes(-0.4, 1.5), lambda t: stats.norm(-0.4, 1.5).cdf(np.log(t / (1 - t)))),
    "cosine": (CosineTimes(), lambda t: np.arctan2(t, 1 - t) / (np.pi / 2)),
}


class Still:
    """A denoiser that estimates what it is told to, and keeps what it was given."""

    samples = True

    def __init__(self, estimate=None, base=None):
        self.estimate, self.base = estimate, base

    def condition(self, latents):
        return Condition(latents, None, self.base)

    def denoise(self, noisy, t, condition):
        self.seen = SimpleNamespace(noisy=noisy, t=t, condition=condition)
        return noisy if self.estimate is None else self.estimate


def draw(denoising, target, earliest=None, **options):
    autoencoder = Still(**options)
    return denoising(autoencoder, torch.zeros(len(target), 4, 1, 1), target, earliest), autoencoder.seen


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_times_are_drawn_from_their_distribution(kind):
    times, cdf = DISTRIBUTIONS[kind]
    drawn = times.draw(MANY)
    assert drawn.shape == MANY.shape
    assert drawn.dtype == MANY.dtype
    assert 0 <= drawn.min() < drawn.max() <= 1
    assert stats.kstest(drawn.numpy(), cdf).pvalue > 1e-3


def test_pure_noise_is_always_one():
    assert torch.equal(PureNoise().draw(MANY), torch.ones_like(MANY))


def test_images_are_noised_at_times_of_their_own():
    target = random(2000, 3, 2, 2)
    denoised, seen = draw(Denoising(), target)
    t = seen.t.view(-1, 1, 1, 1)
    noise = (seen.noisy - (1 - t) * target) / t
    assert stats.kstest(noise[seen.t > 0.01].flatten().numpy(), stats.norm().cdf).pvalue > 1e-3
    assert stats.kstest(seen.t.numpy(), stats.uniform().cdf).pvalue > 1e-3
    assert torch.equal(denoised.times, seen.t)
    assert torch.equal(denoised.target, target)
    assert torch.equal(denoised.clean, seen.noisy)


def test_half_precision_targets_get_noise_and_times_of_float32():
    _, seen = draw(Denoising(), torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16))
    assert seen.noisy.dtype == seen.t.dtype == torch.float32


def test_noise_synchronisation_draws_times_after_the_latents_own():
    """Of images with noisy latents, 1 - t is a product of two uniform numbers, so that -log(1 - t) is Gamma(2)."""
    transform = NoiseSynchronization(prob=0.3)
    latents, target = random(20_000, 4, 1, 1), random(20_000, 3, 1, 1, seed=1)
    noisy, same = transform(latents, target)
    tau = transform.earliest
    assert same is target
    hit = tau > 0
    assert hit.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(noisy[~hit], latents[~hit])
    assert stats.kstest(tau[hit].numpy(), stats.uniform().cdf).pvalue > 1e-3
    t = tau[hit].double().view(-1, 1, 1, 1)
    noise = ((noisy[hit] - (1 - t) * latents[hit]) / t)[t.flatten() > 0.01]
    assert stats.kstest(noise.flatten().numpy(), stats.norm().cdf).pvalue > 1e-3
    spread = noisy[hit & (tau > 0.45) & (tau < 0.55)].std().item()
    assert spread == pytest.approx(0.5**0.5, abs=0.03), "the same path as the pixels', of unit latents"

    _, seen = draw(Denoising(), target, tau)
    assert (seen.t >= tau).all()
    assert stats.kstest(-torch.log1p(-seen.t[hit]).numpy(), stats.gamma(2).cdf).pvalue > 1e-3
    assert stats.kstest(seen.t[~hit].numpy(), stats.uniform().cdf).pvalue > 1e-3
    middle = hit & (tau > 0.49) & (tau < 0.51)
    after = (seen.t[middle] - tau[middle]) / (1 - tau[middle])
    assert stats.kstest(after.numpy(), stats.uniform().cdf).pvalue > 1e-3


def test_noise_synchronisation_is_for_diffusion_decoders():
    check_transforms([NoiseSynchronization()], latentae.create("dito-tiny"))
    for name, options in [("dc-ae-tiny", {}), ("dito-tiny", {"prediction": "pixels", "num_inference_steps": 1})]:
        with pytest.raises(RequestError, match="NoiseSynchronization is for diffusion decoders"):
            check_transforms([NoiseSynchronization()], latentae.create(name, **options))
    for prob in (0, 1.1):
        with pytest.raises(RequestError, match=r"prob in \(0, 1\]"):
            check_transforms([NoiseSynchronization(prob)], latentae.create("dito-tiny"))


def step(times, seed=0):
    """Images, estimates of them, and the noise and velocity that both stand for at the times."""
    target, estimate = random(len(times), 3, 4, 4, seed=seed), random(len(times), 3, 4, 4, seed=seed + 1)
    noise, t = random(len(times), 3, 4, 4, seed=seed + 2), times.view(-1, 1, 1, 1)
    noisy = (1 - t) * target + t * noise
    return SimpleNamespace(
        step=Step(target, estimate, times=times),
        velocity=(noise - target, (noisy - estimate) / t),
        noise=(noise, (noisy - (1 - t) * estimate) / t),
    )


TIMES = torch.tensor([0.002, 0.1, 0.5, 0.8, 0.999], dtype=torch.float64)


def test_the_weights_are_those_of_the_published_losses():
    case = step(TIMES)
    value = FlowMatching()(case.step)
    torch.testing.assert_close(value, F.mse_loss(*case.velocity))
    plain = F.mse_loss(case.step.reconstruction, case.step.target)
    torch.testing.assert_close(FlowMatching(weighting="x0")(case.step), plain)
    log_snr = 2 * torch.log((1 - TIMES) / TIMES)
    for bias in (0.0, 1.5, -2.0):
        of_noise = (case.noise[0] - case.noise[1]).square().mean((1, 2, 3))
        expected = (torch.sigmoid(bias - log_snr) * of_noise).mean()
        torch.testing.assert_close(FlowMatching(weighting="sigmoid", bias=bias)(case.step), expected)


def test_weights_are_finite_at_both_ends():
    ends = torch.tensor([0.0, 1e-9, 1.0])
    assert FlowMatching(weighting="v", least_time=0.05).weights_at(ends).tolist() == pytest.approx([400, 400, 1])
    assert FlowMatching(weighting="x0").weights_at(ends).tolist() == [1, 1, 1]
    found = FlowMatching(weighting="sigmoid", bias=1.0).weights_at(ends)
    assert found.isfinite().all()
    assert found[2] == 0
    assert found[0].item() == pytest.approx(np.e, rel=1e-3), "exp(bias) where the image is clean"
    with pytest.raises(RequestError, match="least_time above 0, not 0"):
        FlowMatching(least_time=0)


def test_half_precision_does_not_reach_the_loss():
    case = step(TIMES.float())
    half = Step(case.step.target.bfloat16(), case.step.reconstruction.bfloat16(), times=case.step.times.float())
    wide = Step(half.target.float(), half.reconstruction.float(), times=half.times)
    with torch.autocast("cpu", torch.bfloat16):
        value = FlowMatching()(half)
    assert value.dtype == torch.float32
    assert value.item() == FlowMatching()(wide).item()


def test_the_first_image_has_terms_of_its_own():
    target, estimate, base = (random(2, 3, 4, 4, seed=seed) for seed in range(3))
    objective = Objective({"l2": L2(2.0), "initial_l1": Initial(L1(0.5)), "initial_l2": Initial(L2())})
    total, values = objective(Step(target, estimate, base=base, times=torch.tensor([0.1, 0.2])))
    assert values["initial_l1"].item() == pytest.approx(F.l1_loss(base, target).item())
    assert values["initial_l2"].item() == pytest.approx(F.mse_loss(base, target).item())
    expected = 2 * F.mse_loss(estimate, target) + 0.5 * F.l1_loss(base, target) + F.mse_loss(base, target)
    assert total.item() == pytest.approx(expected.item())
    with pytest.raises(RequestError, match=r"Initial needs .* an initial decoder, such as swycc-f8c4"):
        Initial(L2())(Step(target, estimate))
    with pytest.raises(RequestError, match=r"FlowMatching needs .* a diffusion decoder, such as dito-b-f8c4"):
        FlowMatching()(Step(target, estimate))


def test_the_loss_by_time_is_the_mean_of_every_tenth():
    collected, rng = LossByTime(), np.random.default_rng(0)
    times, losses = rng.random(300) * 0.7, rng.random(300)
    for part in np.array_split(np.arange(300), 7):
        collected.add(torch.from_numpy(times[part]), torch.from_numpy(losses[part]))
    expected = stats.binned_statistic(times, losses, bins=10, range=(0, 1)).statistic
    found = collected.means("train/loss")
    assert list(found) == [f"train/loss_t{i}" for i in range(7)], "tenths without an image are left out"
    for i in range(7):
        assert found[f"train/loss_t{i}"] == pytest.approx(expected[i], rel=1e-5)
    assert collected.means("loss") == {}, "it starts anew"
    collected.add(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 5.0]))
    assert collected.means("loss") == {"loss_t0": 5.0, "loss_t9": 3.0}


def test_who_can_be_denoised():
    Denoising().check(latentae.create("dito-tiny"))
    for autoencoder in (latentae.create("dc-ae-tiny"), latentae.create("dito-tiny", prediction="pixels")):
        with pytest.raises(RequestError, match=r"model\.denoising is for autoencoders with a diffusion decoder"):
            Denoising().check(autoencoder)
    with pytest.raises(RequestError, match="std above 0, not 0"):
        LogitNormalTimes(std=0)
    with pytest.raises(RequestError, match="val_steps is at least 1, not 0"):
        Denoising(val_steps=0)
