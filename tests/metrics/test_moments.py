"""Effective rank and KL against numpy, torch.distributions, diffusers and closed forms."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from latentae.errors import RequestError
from latentae.metrics.moments import EffectiveRank, PosteriorKL


def effective_rank(latents):
    metric = EffectiveRank(latents.shape[1])
    metric.update(latents)
    return metric.compute().item()


def test_effective_rank_is_the_entropy_of_numpy_s_eigenvalues():
    torch.manual_seed(0)
    latents = torch.einsum("dc,bchw->bdhw", torch.randn(6, 6), torch.randn(5, 6, 4, 3)) + 7
    values = np.linalg.eigvalsh(np.cov(latents.double().transpose(0, 1).flatten(1).numpy(), bias=True))
    shares = values / values.sum()
    assert effective_rank(latents) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    white = torch.randn(64, 8, 16, 16)
    assert effective_rank(white) == pytest.approx(8, abs=0.01)
    assert effective_rank(white[:, :1].repeat(1, 8, 1, 1)) == pytest.approx(1, abs=1e-6)
    signs = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64).view(1, 2, 1, 4)  # uncorrelated
    three_to_one = torch.tensor([3, 1], dtype=torch.float64).sqrt().view(2, 1, 1)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert effective_rank(signs * three_to_one + 100) == pytest.approx(math.exp(entropy), rel=1e-9)
    assert math.isnan(effective_rank(torch.full((2, 4, 3, 3), 0.1)))


def test_kl_is_that_of_diffusers_and_of_torch_distributions():
    torch.manual_seed(0)
    moments = torch.randn(5, 6, 4, 7) * 2
    posterior = DiagonalGaussianDistribution(moments)
    metric = PosteriorKL(3)
    metric.update(posterior.mean[:2], posterior.logvar[:2])
    metric.update(posterior.mean[2:], posterior.logvar[2:])
    results = metric.compute()
    assert results["kl"].item() == pytest.approx(posterior.kl().sum().item() / (5 * 3 * 4 * 7), rel=1e-5)
    theirs = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0, 1)).double()
    torch.testing.assert_close(results["per_channel"], theirs.mean((0, 2, 3)), rtol=1e-5, atol=0)

    mean = posterior.mean.double().mean((0, 2, 3))
    variance = posterior.mean.double().var((0, 2, 3), correction=0) + posterior.logvar.double().exp().mean((0, 2, 3))
    aggregate = kl_divergence(Normal(mean, variance.sqrt()), Normal(torch.zeros(3).double(), 1))
    torch.testing.assert_close(results["aggregate_per_channel"], aggregate, rtol=1e-9, atol=0)


def test_the_prior_itself_is_at_zero():
    metric = PosteriorKL(2)
    metric.update(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    assert metric.compute()["kl"] == 0
    assert metric.compute()["aggregate_per_channel"].tolist() == [0, 0]


@pytest.mark.parametrize("metric", [EffectiveRank, PosteriorKL])
def test_processes_merge_exactly_and_sums_stay_in_float64(metric):
    torch.manual_seed(0)
    batches = [torch.randn(2, 4, 6, 6, dtype=torch.bfloat16) for _ in range(4)]
    whole, first, second = (metric(4).to(torch.bfloat16) for _ in range(3))
    for i, batch in enumerate(batches):
        arguments = (batch,) if metric is EffectiveRank else (batch, batch - 1)
        whole.update(*arguments)
        (first if i < 2 else second).update(*arguments)
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), whole.compute(), rtol=1e-12, atol=0)


def test_wrong_shapes_are_a_sentence():
    with pytest.raises(RequestError, match="of 4 channels got latents of shape"):
        EffectiveRank(4).update(torch.zeros(1, 3, 4, 4))
    with pytest.raises(RequestError, match="log variances"):
        PosteriorKL(4).update(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 1, 1))
