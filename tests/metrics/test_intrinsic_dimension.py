"""TwoNN against scikit-dimension, a plain evaluation of the paper's fit, and manifolds of known dimension."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from sklearn.linear_model import LinearRegression

from latentae.metrics.intrinsic_dimension import TwoNN, two_nn


def flat(count, dimension, ambient):
    rng = np.random.default_rng(0)
    return rng.random((count, dimension)) @ rng.standard_normal((dimension, ambient)) + 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((500, 5, 40), 4.418370671713234), ((1000, 2, 10), 1.8934290096874606), ((300, 20, 64), 14.144698428833662)],
)
def test_it_is_the_figure_of_scikit_dimension(shape, expected):
    """What ``skdim.id.TwoNN().fit(flat(*shape)).dimension_`` of version 0.5.0 gives."""
    assert two_nn(torch.from_numpy(flat(*shape))) == pytest.approx(expected, rel=1e-9)


def plain(points):
    distances = cKDTree(points).query(points, 3)[0]
    ratios = distances[:, 2][distances[:, 1] > 0] / distances[:, 1][distances[:, 1] > 0]
    kept = int(0.9 * len(ratios))
    x, y = np.log(np.sort(ratios)[:kept]), -np.log(1 - np.arange(1, kept + 1) / len(ratios))
    return LinearRegression(fit_intercept=False).fit(x[:, None], y).coef_[0]


@pytest.mark.parametrize("far", [0, 1e4])
def test_near_points_and_duplicates_lose_nothing_to_rounding(far):
    rng = np.random.default_rng(0)
    angle = rng.random((1000, 1)) * 2 * np.pi
    circle = np.concatenate([np.cos(angle), np.sin(angle)], 1) @ rng.standard_normal((2, 30)) + far
    points = np.concatenate([circle, circle[:50]])
    assert two_nn(torch.from_numpy(points)) == pytest.approx(plain(points), rel=1e-6)


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_a_sphere_in_many_dimensions_has_its_own_dimension(dimension):
    rng = np.random.default_rng(1)
    points = rng.standard_normal((2000, dimension + 1))
    points = points / np.linalg.norm(points, axis=1, keepdims=True) @ rng.standard_normal((dimension + 1, 5000))
    assert two_nn(torch.from_numpy(points).float()) == pytest.approx(dimension, rel=0.06)


def test_the_sample_is_the_same_for_every_batch_size_and_bounded():
    points = torch.from_numpy(flat(400, 3, 12)).float().view(400, 3, 2, 2)
    results = []
    for batch in (1, 7, 400):
        metric = TwoNN(most_points=100)
        for some in points.split(batch):
            metric.update(some)
            assert len(metric.sample) <= 100
        assert metric.compute()["points"] == 100
        results.append(metric.compute()["dimension"].item())
    assert results[0] == results[1] == results[2]
    rows = torch.cat(metric.sample)[:, 1:]
    places = [(points.flatten(1) == row).all(1).nonzero().item() for row in rows]
    assert len(set(places)) == 100
    assert 150 < np.mean(places) < 250  # neither the first nor the last ones

    other = TwoNN(most_points=100, seed=1)
    other.update(points)
    assert other.compute()["dimension"].item() != results[0]


def test_few_points_are_all_used_and_processes_merge():
    points = torch.from_numpy(flat(90, 3, 12)).float()
    whole, first, second = (TwoNN() for _ in range(3))
    whole.update(points)
    first.update(points[:40])
    second.update(points[40:])
    first.merge_state(second)
    assert first.compute()["dimension"].item() == pytest.approx(whole.compute()["dimension"].item(), rel=1e-9)
    assert first.compute()["points"] == 90

    bounded = TwoNN(most_points=50)
    bounded.update(points)
    bounded.merge_state(whole)
    assert bounded.compute()["points"] == 50


def test_too_few_points_have_no_dimension():
    metric = TwoNN()
    metric.update(torch.randn(19, 4))
    assert metric.compute()["dimension"].isnan()
    assert np.isnan(two_nn(torch.ones(100, 4)))
