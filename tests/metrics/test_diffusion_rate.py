"""The rate of latents under a denoiser where the integral is known: Gaussians, white and not, and two points."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch

from latentae.metrics.diffusion_rate import SpectralGaussian, diffusion_nats, gaussian_nats
from latentae.metrics.spectrum import cosine_matrix
from latentae.metrics.whitening import Whitening

SNR = 80.0


def gaussian_velocity(variances):
    """The best denoiser of N(0, variances), which broadcast against latents (B, C, h, w)."""

    def velocity(noisy, t):
        t = t.view(-1, 1, 1, 1)
        clean = (1 - t) * variances / ((1 - t) ** 2 * variances + t**2) * noisy
        return (noisy - clean) / t

    return velocity


def mean_and_error(nats):
    return nats.mean().item(), (nats.std() / len(nats) ** 0.5).item()


@pytest.mark.parametrize("snr", [0.01, 1.0, 100.0, 1e4])
def test_white_gaussians_take_half_a_logarithm_for_each_number(snr):
    torch.manual_seed(0)
    latents = torch.randn(400, 4, 6, 6)
    nats = diffusion_nats(gaussian_velocity(1.0), latents, snr)
    expected = 72 * math.log1p(snr)
    mean, error = mean_and_error(nats)
    assert abs(mean - expected) < 4 * error
    assert error < 0.02 * expected


@pytest.mark.parametrize("snr", [1.0, 100.0])
def test_gaussians_of_any_variance_do_too(snr):
    torch.manual_seed(0)
    variances = torch.logspace(-3, 3, 16).view(4, 4).expand(3, 4, 4)
    latents = torch.randn(2000, 3, 4, 4) * variances.sqrt()
    mean, error = mean_and_error(diffusion_nats(gaussian_velocity(variances), latents, snr, batch_size=500))
    expected = 0.5 * torch.log1p(snr * variances).sum().item()
    assert abs(mean - expected) < 4 * error
    assert error < 0.02 * expected


def test_the_quadrature_itself_is_exact_to_1e_4():
    """Without chance: a denoiser whose error is known at every level, in one number of latents."""
    for variance in (1e-3, 1.0, 1e3):

        def velocity(noisy, t, variance=variance):
            s = ((1 - t) / t) ** 2
            error = (variance / (1 + s * variance)).sqrt()
            clean = torch.zeros_like(noisy)
            return clean + ((noisy - 0) / t.view(-1, 1, 1, 1)) + (error / t).view(-1, 1, 1, 1)

        # latents are 0, so that v = noisy / t, and the estimate of them is wrong by just that error
        nats = diffusion_nats(velocity, torch.zeros(1, 1, 1, 1), SNR)
        assert nats.item() == pytest.approx(0.5 * math.log1p(SNR * variance), rel=1e-4)


def test_the_integral_over_time_is_the_same():
    """The form of the docstring, by scipy, for a denoiser that is not the best one."""
    variance, wrong = 0.3, 2.0

    def squared_error(t):  # of the velocity, expected over clean and noise
        gain = (1 - t) * wrong / ((1 - t) ** 2 * wrong + t**2)
        return ((gain * (1 - t) - 1) ** 2 * variance + (gain * t) ** 2) / t**2

    first = 1 / (1 + math.sqrt(SNR))
    expected, _ = scipy.integrate.quad(lambda t: squared_error(t) * (1 - t) / t, first, 1)
    torch.manual_seed(0)
    latents = torch.randn(4000, 1, 2, 2) * variance**0.5
    mean, error = mean_and_error(diffusion_nats(gaussian_velocity(wrong), latents, SNR, batch_size=4000))
    assert abs(mean - 4 * expected) < 4 * error
    assert mean > 2 * math.log1p(SNR * variance)  # and never below the information
    by_formula = gaussian_nats(latents.flatten(1), torch.full((4,), wrong), SNR)
    assert by_formula.mean().item() == pytest.approx(4 * expected, rel=0.02)
    paired = diffusion_nats(gaussian_velocity(wrong), latents, SNR, batch_size=4000) - by_formula
    assert abs(paired.mean()) < 4 * paired.std() / 4000**0.5


def test_one_bit_is_one_bit():
    """Latents of ±1 with little noise: all that there is to know is a sign, log 2 nats."""

    def velocity(noisy, t):
        t = t.view(-1, 1, 1, 1)
        clean = torch.tanh((1 - t) * noisy / t**2)
        return (noisy - clean) / t

    torch.manual_seed(0)
    latents = torch.randn(4000, 1, 2, 2).sign()
    mean, error = mean_and_error(diffusion_nats(velocity, latents, 100.0, batch_size=4000))
    assert abs(mean - 4 * math.log(2)) < 4 * error + 1e-3


def correlated(count, seed=0):
    """Three channels mixed by a matrix, white over positions: the latents and their covariance."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.tensor([[2.0, 0.5, 0], [0, 1, 0.9], [0.1, 0, 0.3]])
    latents = torch.einsum("ij,bjhw->bihw", mix, torch.randn(count, 3, 4, 4, generator=rng))
    return latents, mix @ mix.T


def test_correlated_gaussians_are_white_after_whitening_whatever_their_scale_and_rotation():
    latents, _ = correlated(1000)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    rates = []
    for changed in (latents, 0.05 * latents + 3, torch.einsum("ij,bjhw->bihw", turn, latents)):
        white = Whitening(changed)(changed)
        mean, error = mean_and_error(diffusion_nats(gaussian_velocity(1.0), white, SNR, batch_size=1000))
        assert abs(mean - 24 * math.log1p(SNR)) < 4 * error
        rates.append(mean)
    np.testing.assert_allclose(rates, rates[0], rtol=1e-4)


def test_a_gaussian_that_knows_the_spectrum_gets_the_closed_form():
    """Latents whose cosine coefficients have known variances, from other latents of the same kind."""
    rng = torch.Generator().manual_seed(0)
    variances = torch.logspace(2, -2, 64, dtype=torch.float64).view(8, 8)
    basis = cosine_matrix(8)
    coefficients = torch.randn(4000, 2, 8, 8, generator=rng, dtype=torch.float64) * variances.sqrt()
    latents = basis.T @ coefficients @ basis + 2
    train, held_out = latents[:3000], latents[3000:]
    expected = torch.log1p(SNR * variances).sum().item()  # two channels of half of it
    assert SpectralGaussian(train).nats(held_out, SNR).mean().item() == pytest.approx(expected, rel=5e-3)
    # and it is what the denoiser that it stands for needs
    model = SpectralGaussian(train)

    def velocity(noisy, t):
        level = (1 - t).view(-1, 1, 1, 1)
        rest = noisy.double() - level * model.mean
        found = (basis @ rest @ basis.T).flatten(2).permute(2, 0, 1) @ model.directions  # (h * w, B, C)
        s = ((1 - t[0]) / t[0]).square().double()
        found = found * (s * model.variances / (1 + s * model.variances))[:, None] / (1 - t[0])
        found = (found @ model.directions.transpose(1, 2)).permute(1, 2, 0).reshape(noisy.shape)
        clean = basis.T @ found @ basis + model.mean
        return (noisy - clean) / t.view(-1, 1, 1, 1)

    paired = diffusion_nats(velocity, held_out.float(), SNR, batch_size=500) - model.nats(held_out, SNR)
    assert abs(paired.mean()) < 4 * paired.std() / len(paired) ** 0.5
    assert paired.mean().abs() < 0.01 * expected


def test_noise_does_not_depend_on_the_batch():
    latents = torch.randn(10, 2, 3, 3)
    first = diffusion_nats(gaussian_velocity(1.0), latents, SNR, batch_size=10)
    torch.testing.assert_close(first, diffusion_nats(gaussian_velocity(1.0), latents, SNR, batch_size=3))
    assert not torch.equal(first, diffusion_nats(gaussian_velocity(1.0), latents, SNR, seed=1))
