"""Whitening of latents: moments by numpy, and what must not change the outcome."""

import numpy as np
import pytest
import torch

from latentae.errors import RequestError
from latentae.metrics.whitening import Whitening


@pytest.fixture
def latents():
    """Correlated, skewed, off centre: (30, 4, 5, 6)."""
    rng = torch.Generator().manual_seed(0)
    independent = torch.rand(30, 4, 5, 6, generator=rng).pow(torch.tensor([2.0, 3, 4, 5]).view(4, 1, 1))
    mix = torch.randn(4, 4, generator=rng)
    return torch.einsum("ij,bjhw->bihw", mix, independent) + torch.tensor([3.0, -1, 0, 8]).view(4, 1, 1)


def test_it_has_the_moments_and_comes_back(latents):
    whitening = Whitening(latents)
    white = whitening(latents)
    vectors = white.permute(0, 2, 3, 1).reshape(-1, 4).numpy().astype(np.float64)
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(vectors.T, bias=True), np.eye(4), atol=1e-5)
    torch.testing.assert_close(whitening.undo(white), latents, rtol=1e-5, atol=1e-5)
    assert whitening.dead == 0


def test_shift_scale_and_rotation_change_nothing(latents):
    white = Whitening(latents)(latents)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    changed = 0.01 * torch.einsum("ij,bjhw->bihw", turn, latents) + 7
    torch.testing.assert_close(Whitening(changed)(changed), white, rtol=0, atol=2e-3)
    changed = 100 * torch.einsum("ij,bjhw->bihw", turn.double(), latents.double()) - 7
    torch.testing.assert_close(Whitening(changed)(changed), white, rtol=0, atol=1e-4)


def test_a_dead_channel_stays_small(latents):
    latents[:, 1] = 5 + 1e-7 * torch.randn(30, 5, 6)
    whitening = Whitening(latents)
    white = whitening(latents)
    assert whitening.dead == 1
    assert white[:, -1].std() < 1e-2
    torch.testing.assert_close(whitening.undo(white), latents, rtol=1e-5, atol=1e-5)


def test_nothing_that_varies_is_refused():
    with pytest.raises(RequestError, match="the same everywhere"):
        Whitening(torch.full((3, 2, 4, 4), 0.1))
    with pytest.raises(RequestError, match="no latents"):
        Whitening(torch.zeros(0, 2, 4, 4))
