"""Sliced Wasserstein distance against scipy's, projection by projection, and against closed forms."""

import math

import numpy as np
import pytest
import pywt
import scipy.stats
import torch
from scipy.ndimage import gaussian_filter

from latentae.data.samples import dead_leaves
from latentae.errors import RequestError
from latentae.metrics.sliced_wasserstein import SlicedWasserstein, wasserstein_1d


@pytest.fixture(scope="module")
def leaves():
    """Two sets of 24 pictures, uint8 (24, 3, 64, 64)."""
    pictures = np.stack([dead_leaves(i, 64) for i in range(48)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return images[:24], images[24:]


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 49), (7, 50), (12, 18), (1, 5)])
def test_columns_agree_with_scipy(n, m):
    a, b = torch.randn(n, 3), 2 * torch.randn(m, 3) + 1
    expected = [scipy.stats.wasserstein_distance(x, y) for x, y in zip(a.T.numpy(), b.T.numpy())]
    np.testing.assert_allclose(wasserstein_1d(a, b), expected, rtol=1e-6)
    torch.testing.assert_close(wasserstein_1d(a, b), wasserstein_1d(b, a), rtol=1e-12, atol=0)


def test_gaussians_have_a_closed_form():
    quantiles = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1] + 1 / 40_000
    normal = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)[:, None]
    assert wasserstein_1d(normal, normal + 0.7).item() == pytest.approx(0.7, rel=1e-9)
    assert wasserstein_1d(normal, 3 * normal).item() == pytest.approx(2 * math.sqrt(2 / math.pi), rel=1e-3)
    assert wasserstein_1d(normal[::2], 3 * normal[::3]).item() == pytest.approx(2 * math.sqrt(2 / math.pi), rel=2e-3)


def test_the_whole_is_scipy_on_projected_patches_of_pywavelets_bands(leaves):
    """One patch size of bands that PyWavelets makes, cut in plain loops at the same places."""
    a, b = (x[:3] for x in leaves)
    metric = SlicedWasserstein(b, patches=2, projections=4, seed=3)

    def bands(images):
        rest, found = images.numpy().astype(np.float64), []
        for _ in range(2):
            rest, details = pywt.dwt2(rest, "haar", "periodization")
            found += details
        return [*found, rest]

    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    distances = []
    for mine, theirs in zip(bands(a), bands(b)):
        scale = theirs.std((0, 2, 3), keepdims=True)
        projected = []
        for band, generator in zip((mine / scale, theirs / scale), generators):
            places = [torch.randint(s - 6, (3, 2), generator=generator).numpy() for s in band.shape[-2:]]
            cut = [
                band[i, :, y : y + 7, x : x + 7].transpose(1, 2, 0).ravel()
                for i in range(3)
                for y, x in zip(places[0][i], places[1][i])
            ]
            projected.append(np.stack(cut) @ metric.directions.numpy())
        distances.append(np.mean([scipy.stats.wasserstein_distance(p, q) for p, q in zip(*(x.T for x in projected))]))
    expected = {"2 px": np.mean(distances[:3]), "4 px": np.mean(distances[3:6]), "coarse": distances[6]}
    expected["mean"] = np.mean(list(expected.values()))
    found = metric(a)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9)


def test_equal_sets_are_at_zero_and_directions_have_unit_length(leaves):
    a, _ = leaves
    metric = SlicedWasserstein(a)
    assert set(metric(a).values()) == {0.0}
    torch.testing.assert_close(metric.directions.norm(dim=0), torch.ones(64, dtype=torch.float64))
    assert SlicedWasserstein(a, seed=1)(leaves[1]) != metric(leaves[1]) == metric(leaves[1])


def test_a_shift_of_brightness_is_coarse_alone(leaves):
    a = leaves[0] // 2
    found = SlicedWasserstein(a)(a + 40)
    assert found["2 px"] == found["4 px"] == 0
    # c of each pixel is 4 c of a coefficient of level 2; a direction d moves by c times the sum of what it weighs
    metric = SlicedWasserstein(a)
    moved = (160 / metric.scales[-1]).expand(1, 3, 1, 1).reshape(3).repeat(49) @ metric.directions
    assert found["coarse"] == pytest.approx(moved.abs().mean().item(), rel=1e-9)


def test_blur_and_noise_are_seen_the_more_there_is(leaves):
    a, b = leaves
    metric = SlicedWasserstein(b)
    floor = metric(a)

    def blurred(sigma):
        return torch.from_numpy(gaussian_filter(a.numpy().astype(float), (0, 0, sigma, sigma)).round().astype(np.uint8))

    def noisy(sigma):
        noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
        return (a + sigma * noise).round().clamp(0, 255).to(torch.uint8)

    for change, amounts in ((blurred, (0.5, 1, 2)), (noisy, (5, 10, 20))):
        finest = [floor["2 px"], *(metric(change(amount))["2 px"] for amount in amounts)]
        means = [floor["mean"], *(metric(change(amount))["mean"] for amount in amounts)]
        assert finest == sorted(finest)
        assert means == sorted(means)
        assert finest[-1] > 2 * finest[0]


def test_distances_to_one_reference_swap_up_to_its_scale(leaves):
    """Coefficients are in units of the reference, so that two sets of equal deviations give the same both ways."""
    a = leaves[0]
    mirrored = a.flip(-1)
    mine, theirs = SlicedWasserstein(a)(mirrored), SlicedWasserstein(mirrored)(a)
    for name, value in mine.items():
        assert value == pytest.approx(theirs[name], rel=1e-9)


def test_sets_of_other_numbers_and_odd_sizes_and_flat_bands(leaves):
    a, b = leaves
    assert SlicedWasserstein(b)(a[:7])["mean"] > 0
    assert SlicedWasserstein(b[..., :45, :51])(a[..., :45, :51]).keys() == {"2 px", "coarse", "mean"}
    flat = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    found = SlicedWasserstein(flat)(flat + 1)
    assert found["2 px"] == 0
    assert math.isfinite(found["coarse"])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 64, 64), "expected uint8"),
        (torch.zeros(2, 1, 64, 64, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(0, 3, 64, 64, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(2, 3, 31, 64, dtype=torch.uint8), "at least 32 px"),
        (torch.zeros(2, 3, 64, 32, dtype=torch.uint8), "64 x 64"),
    ],
)
def test_what_are_no_such_images_is_refused(leaves, images, words):
    with pytest.raises(RequestError, match=words):
        SlicedWasserstein(leaves[1])(images)
