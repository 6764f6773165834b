"""The path between images and noise: conversions, diffusers' Euler scheduler, a distribution in closed form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from latentae.nn.flow import add_noise, clean_estimate, network_input, solve, times_of

TIMES = torch.tensor([1e-3, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.fixture
def clean():
    return normal(5, 3, 4, 6)


@pytest.fixture
def noise():
    return normal(5, 3, 4, 6, seed=1)


def test_the_path_goes_from_the_image_to_noise_at_each_image_s_own_time(clean, noise):
    noisy = add_noise(clean, noise, TIMES)
    for i, t in enumerate(TIMES.tolist()):
        torch.testing.assert_close(noisy[i], (1 - t) * clean[i] + t * noise[i], rtol=0, atol=1e-15)
    assert torch.equal(add_noise(clean, noise, torch.zeros(5)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(5)), noise)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_right_prediction_is_the_image(clean, noise, path):
    """The velocity is the derivative of what the network sees, by the time or by the angle, written out."""
    noisy = add_noise(clean, noise, TIMES)
    t = TIMES.view(-1, 1, 1, 1)
    angle = torch.atan2(t, 1 - t)
    velocity = noise - clean if path == "linear" else angle.cos() * noise - angle.sin() * clean
    torch.testing.assert_close(clean_estimate(velocity, noisy, TIMES, "v", path), clean, rtol=0, atol=1e-12)
    assert torch.equal(clean_estimate(clean, noisy, TIMES, "x0", path), clean)


def test_the_network_of_a_cosine_path_sees_unit_variance(clean, noise):
    noisy = add_noise(clean, noise, TIMES)
    assert torch.equal(network_input(noisy, TIMES, "linear"), noisy)
    seen = network_input(noisy, TIMES, "cosine")
    t = TIMES.view(-1, 1, 1, 1)
    angle = torch.atan2(t, 1 - t)
    torch.testing.assert_close(seen, angle.cos() * clean + angle.sin() * noise, rtol=0, atol=1e-12)
    many = torch.full((1000,), 0.3, dtype=torch.float64)
    spread = network_input(add_noise(normal(1000, 1, 9), normal(1000, 1, 9, seed=1), many), many, "cosine").std()
    assert spread.item() == pytest.approx(1, abs=0.03)


def test_times_fall_from_one_to_zero():
    assert times_of(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    np.testing.assert_allclose(times_of(4, 2.0), np.linspace(1, 0, 5) ** 2, rtol=0, atol=1e-15)
    assert times_of(1, 3.0) == [1.0, 0.0]


@pytest.mark.parametrize(("steps", "rho"), [(1, 1.0), (4, 1.0), (7, 2.0)])
def test_steps_are_those_of_diffusers_euler(noise, steps, rho):
    """The scheduler gets the same times as explicit sigmas and the velocity of the same nonlinear denoiser."""

    def denoise(noisy, t):
        return torch.tanh(noisy * (1 + t.view(-1, 1, 1, 1)))

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1] ** rho)
    expected = noise.float()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        velocity = (expected - denoise(expected, sigma.expand(5))) / sigma
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
    torch.testing.assert_close(solve(denoise, noise.float(), times_of(steps, rho)), expected, rtol=0, atol=2e-6)


def test_one_step_is_the_estimate_from_pure_noise(noise):
    seen = []

    def denoise(noisy, t):
        seen.append((noisy, t))
        return noisy.cos()

    assert torch.equal(solve(denoise, noise, times_of(1)), noise.cos())
    assert torch.equal(seen[0][0], noise)
    assert torch.equal(seen[0][1], torch.ones(5, dtype=torch.float64))


def test_samples_of_a_normal_distribution_have_its_mean_and_spread(noise):
    """For data N(m, s²) the best estimate is known, and so is the image of every noise: m + s * noise."""
    mean, spread = 0.5, 0.3

    def denoise(noisy, t):
        t = t.view(-1, 1, 1, 1)
        gain = (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)
        return mean + gain * (noisy - (1 - t) * mean)

    errors = [
        (solve(denoise, noise, times_of(steps)) - (mean + spread * noise)).abs().max().item() for steps in (40, 80, 160)
    ]
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.25), "Euler's method is of the first order"
