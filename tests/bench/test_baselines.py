"""The trivial codes against scikit-learn and scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio
from skimage.transform import downscale_local_mean
from sklearn.decomposition import PCA

from latentae.bench.baselines import block_mean_baseline, pca_baseline
from latentae.errors import RequestError


def images(count, height, width, seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x * rng.uniform(0.05, 1) + y * rng.uniform(0.05, 1))[..., None] * rng.uniform(30, 120, 3)
        for _ in range(count)
    ]
    return [(127 + wave + rng.normal(0, 6, wave.shape)).clip(0, 255).astype(np.uint8) for wave in waves]


def patches_of(image, size):
    return np.stack(
        [
            image[top : top + size, left : left + size].reshape(-1)
            for top in range(0, image.shape[0], size)
            for left in range(0, image.shape[1], size)
        ]
    ).astype(np.float64)


def test_block_means_are_those_of_scikit_image():
    photos = images(3, 48, 64, seed=0)
    baseline = block_mean_baseline(photos, factor=8)
    expected = []
    for photo, reconstruction in zip(photos, baseline.reconstructions, strict=True):
        small = downscale_local_mean(photo.astype(float), (8, 8, 1))
        blocks = np.floor(small + 0.5).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        np.testing.assert_array_equal(reconstruction, blocks)
        expected.append(peak_signal_noise_ratio(photo, blocks, data_range=255))
    assert baseline.psnr == pytest.approx(np.mean(expected), abs=1e-9)


def test_pca_is_that_of_scikit_learn():
    train, test = images(6, 64, 64, seed=1), images(2, 40, 56, seed=2)
    baseline = pca_baseline(train, test, patch=8, components=16)
    theirs = PCA(16, svd_solver="full").fit(np.concatenate([patches_of(image, 8) for image in train]))
    expected = []
    for photo, reconstruction in zip(test, baseline.reconstructions, strict=True):
        code = theirs.inverse_transform(theirs.transform(patches_of(photo, 8))).clip(0, 255)
        np.testing.assert_array_equal(patches_of(reconstruction, 8), np.floor(code + 0.5))
        expected.append(peak_signal_noise_ratio(photo, reconstruction, data_range=255))
    assert baseline.psnr == pytest.approx(np.mean(expected), abs=1e-9)
    assert baseline.psnr > block_mean_baseline(test).psnr


def test_sizes_that_are_no_multiple_are_covered():
    photos = images(2, 37, 61, seed=3)
    for baseline in (block_mean_baseline(photos), pca_baseline(images(4, 64, 64, seed=1), photos)):
        assert [r.shape for r in baseline.reconstructions] == [(37, 61, 3)] * 2
        assert baseline.psnr > 10


def test_more_components_than_patches_are_refused():
    with pytest.raises(RequestError, match="4 training patches"):
        pca_baseline(images(1, 16, 16, seed=0), images(1, 16, 16, seed=1), components=16)
