"""Correlations of neighbouring latents against numpy's, and of processes whose correlation is known."""

import numpy as np
import pytest
import torch

from latentae.errors import RequestError
from latentae.metrics.spatial import LAGS, SpatialCorrelation


def correlations(*batches, channels):
    metric = SpatialCorrelation(channels)
    for batch in batches:
        metric.update(batch)
    return {lag: float(value) for lag, value in metric.compute().items()}


def test_white_noise_has_none_and_flat_maps_have_all():
    noise = torch.randn(50, 3, 32, 32)
    assert all(abs(value) < 0.02 for value in correlations(noise, channels=3).values())
    flat = torch.randn(50, 3, 1, 1).expand(-1, -1, 32, 32)
    assert all(value == pytest.approx(1) for value in correlations(flat, channels=3).values())


def test_an_autoregressive_process_in_closed_form():
    """z(p + 1) = a z(p) + noise along rows has correlation a ** lag there, and none between rows."""
    rng, a = np.random.default_rng(0), 0.8
    rows = np.zeros((4000, 64))
    rows[:, 0] = rng.normal(size=4000)
    for i in range(1, 64):
        rows[:, i] = a * rows[:, i - 1] + np.sqrt(1 - a**2) * rng.normal(size=4000)
    maps = torch.from_numpy(rows).view(50, 1, 80, 64)
    for lag, value in correlations(maps, channels=1).items():
        pairs = [80 * (64 - lag), (80 - lag) * 64]
        assert value == pytest.approx(a**lag * pairs[0] / sum(pairs), abs=0.02)


def test_against_numpy_whatever_the_scale_and_in_parts():
    rng = torch.Generator().manual_seed(0)
    maps = torch.nn.functional.avg_pool2d(torch.randn(20, 2, 24, 20, generator=rng), 3, 1)
    whole = correlations(maps, channels=2)
    expected = []
    for channel in maps.numpy().astype(np.float64).transpose(1, 0, 2, 3):
        down, right = channel[:, 1:] - channel[:, :-1], channel[:, :, 1:] - channel[:, :, :-1]
        difference = (np.square(down).sum() + np.square(right).sum()) / (down.size + right.size)
        expected.append(1 - difference / (2 * channel.var()))
    assert whole[1] == pytest.approx(np.mean(expected), rel=1e-9)
    moved = maps * torch.tensor([3.0, -0.01]).view(2, 1, 1) + torch.tensor([5.0, 100.0]).view(2, 1, 1)
    one, other = SpatialCorrelation(2), SpatialCorrelation(2)
    one.update(moved[:7])
    other.update(moved[7:])
    for state in one._defaults:
        setattr(one, state, getattr(one, state) + getattr(other, state))
    for lag, value in one.compute().items():
        assert float(value) == pytest.approx(whole[lag], abs=1e-4)


def test_videos_small_maps_and_nothing_that_varies():
    video = torch.randn(2, 3, 4, 6, 6)
    frames = video.transpose(1, 2).flatten(0, 1)
    assert correlations(video, channels=3) == pytest.approx(correlations(frames, channels=3))
    assert list(correlations(video, channels=3)) == [lag for lag in LAGS if lag < 6]
    assert not correlations(torch.randn(5, 2, 1, 1), channels=2)
    assert all(np.isnan(value) for value in correlations(torch.full((2, 2, 4, 4), 3.0), channels=2).values())
    with pytest.raises(RequestError, match="expected"):
        SpatialCorrelation(3).update(torch.zeros(2, 4, 8, 8))
