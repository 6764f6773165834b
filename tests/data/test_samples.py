"""The sample photos against the packages' own loaders; the statistics of dead leaves against those of photos."""

import importlib.util

import numpy as np
import pytest

from latentae.data import samples
from latentae.data.samples import PHOTO_CREDITS, PHOTO_FILES, dead_leaves, photos
from latentae.errors import MissingExtra

needs_wheels = pytest.mark.skipif(
    not (importlib.util.find_spec("skimage") and importlib.util.find_spec("sklearn")),
    reason="needs scikit-image and scikit-learn",
)


@needs_wheels
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_photos_are_there(split):
    pictures = photos(split)
    assert len(pictures) >= 4
    for name, picture in pictures.items():
        assert picture.dtype == np.uint8, name
        assert picture.ndim == 3, name
        assert min(picture.shape[:2]) >= 256, name
        assert np.ptp(picture.reshape(-1, 3).astype(int), axis=1).mean() > 5, f"{name} has no colour"


@needs_wheels
def test_photos_are_those_of_the_packages():
    import skimage.data
    from sklearn.datasets import load_sample_image

    pictures = photos("held_out")
    np.testing.assert_array_equal(pictures["chelsea"], skimage.data.chelsea())
    np.testing.assert_array_equal(pictures["coffee"], skimage.data.coffee())
    np.testing.assert_array_equal(pictures["china"], load_sample_image("china.jpg"))
    np.testing.assert_array_equal(pictures["flower"], load_sample_image("flower.jpg"))


def test_splits_share_nothing_and_every_photo_has_a_credit():
    train, held_out = PHOTO_FILES["train"], PHOTO_FILES["held_out"]
    assert not set(train) & set(held_out)
    assert not set(train.values()) & set(held_out.values())
    assert set(PHOTO_CREDITS) == set(train) | set(held_out)
    assert all(source and licence for source, licence in PHOTO_CREDITS.values())


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"latentae\[demo\]"):
        photos("train")


# dead leaves


def test_dead_leaves_are_a_pure_function():
    first = dead_leaves(7, 48, seed=3)
    dead_leaves(8, 48, seed=3)
    np.random.seed(0)  # noqa: NPY002
    samples._noise_sheet.cache_clear()
    np.testing.assert_array_equal(dead_leaves(7, 48, seed=3), first)
    for other in (dead_leaves(8, 48, seed=3), dead_leaves(7, 48, seed=4)):
        assert np.abs(other.astype(int) - first).mean() > 10


@pytest.mark.parametrize("size", [1, 16, 33, 100])
def test_dead_leaves_of_any_size(size):
    image = dead_leaves(0, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable


def power_slope(images):
    """The exponent of the power spectrum of the grey images, averaged over directions and images."""
    total = 0
    for image in images:
        grey = image.astype(float).mean(-1)
        window = np.hanning(len(grey))
        power = np.abs(np.fft.fft2((grey - grey.mean()) * window * window[:, None])) ** 2
        frequency = np.fft.fftfreq(len(grey), 1 / len(grey))
        ring = np.hypot(frequency, frequency[:, None]).round().astype(int).ravel()
        total = total + np.bincount(ring, power.ravel()) / np.bincount(ring)
    used = np.arange(3, len(grey) * 2 // 5)
    return np.polyfit(np.log(used), np.log(total[used]), 1)[0]


def gradient_kurtosis(image):
    gradient = np.diff(image.astype(float).mean(-1), axis=1)
    return ((gradient - gradient.mean()) ** 4).mean() / gradient.var() ** 2


def test_statistics_are_those_of_photos():
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3))
    assert power_slope(noise) == pytest.approx(0, abs=0.1)  # the ruler itself
    assert gradient_kurtosis(noise[0]) == pytest.approx(3, abs=0.3)

    images = [dead_leaves(index, 128) for index in range(16)]
    assert -2.6 < power_slope(images) < -1.9
    assert np.median([gradient_kurtosis(image) for image in images]) > 6
    greys = np.array([image.mean() for image in images])
    spreads = np.array([image.mean(-1).std() for image in images])
    assert 80 < greys.mean() < 150
    assert 30 < spreads.mean() < 70
    clipped = np.mean([((image == 0) | (image == 255)).mean() for image in images])
    assert clipped < 0.06


@needs_wheels
def test_the_ruler_finds_photos_in_the_same_range():
    crops = [picture[:256, :256] for picture in photos("held_out").values()]
    assert -3 < power_slope(crops) < -1.9


def test_pictures_have_different_colours():
    means = np.array([dead_leaves(index, 32).reshape(-1, 3).mean(0) for index in range(32)])
    assert (means.std(0) > 10).all()
    assert np.abs(means[:, 0] - means[:, 2]).max() > 40  # some warm or cold ones
