"""The wavelet transform equals PyWavelets', inverts exactly and has exact gradients."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latentae.nn.wavelet import MODES, dwt2, dwt3, idwt2, idwt3, wavedec2, waverec2

WAVELETS = ("haar", "db2", "db4", "sym4", "bior2.2", "bior4.4")
BANDS_3D = ("aaa", "aad", "ada", "add", "daa", "dad", "dda", "ddd")

wavelets = st.sampled_from(WAVELETS)
modes = st.sampled_from(MODES)
sides = st.integers(1, 24)
seeds = st.integers(0, 2**32 - 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def assert_equal(actual, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=tolerance)


def assert_restored(actual, x) -> None:
    """The taps of some wavelets stand in PyWavelets with eleven digits, so no inverse is better than that."""
    assert_equal(actual[tuple(map(slice, x.shape))], x, 1e-10)


@given(wavelets, modes, sides, sides, seeds)
@settings(max_examples=300, deadline=None)
def test_one_level_and_its_inverse_are_pywavelets(wavelet, mode, height, width, seed):
    assume(mode != "reflect" or min(height, width) > 1)  # refused by both
    x = noise(2, 3, height, width, seed=seed)
    bands = dwt2(x, wavelet, mode)
    low, details = pywt.dwt2(x.numpy(), wavelet, mode)
    for band, expected in zip(bands, (low, *details), strict=True):
        assert_equal(band, expected)

    other = [noise(*low.shape, seed=seed + i) for i in range(4)]  # no image has these bands
    expected = pywt.idwt2((other[0].numpy(), tuple(b.numpy() for b in other[1:])), wavelet, mode)
    assert_equal(idwt2(*other, wavelet, mode), expected)
    assert_restored(idwt2(*bands, wavelet, mode), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", [(32, 32), (31, 33), (24, 17)])
def test_levels_are_pywavelets(wavelet, mode, size):
    x = noise(2, 3, *size)
    coefficients = wavedec2(x, wavelet, mode, levels=3)
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)  # that the filter is longer than the band
        expected = pywt.wavedec2(x.numpy(), wavelet, mode, level=3)
    assert_equal(coefficients[0], expected[0])
    for bands, theirs in zip(coefficients[1:], expected[1:], strict=True):
        for band, their in zip(bands, theirs, strict=True):
            assert_equal(band, their)
    restored = waverec2(coefficients, wavelet, mode)
    assert_equal(restored, pywt.waverec2(expected, wavelet, mode))
    assert_restored(restored, x)


@pytest.mark.parametrize("wavelet", [*pywt.wavelist(kind="discrete")])
@pytest.mark.parametrize("mode", MODES)
def test_every_discrete_wavelet(wavelet, mode):
    x = noise(1, 1, 9, 12)
    low, details = pywt.dwt2(x.numpy(), wavelet, mode)
    bands = dwt2(x, wavelet, mode)
    for band, expected in zip(bands, (low, *details), strict=True):
        assert_equal(band, expected)
    assert_equal(idwt2(*bands, wavelet, mode), pywt.idwt2((low, details), wavelet, mode))


@given(modes, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), seeds)
@settings(max_examples=50, deadline=None)
def test_video_is_dwtn(mode, frames, height, width, seed):
    assume(mode != "reflect" or min(frames, height, width) > 1)
    x = noise(2, 3, frames, height, width, seed=seed)
    bands = dwt3(x, mode)
    expected = pywt.dwtn(x.numpy(), "haar", mode, axes=(-3, -2, -1))
    for band, name in zip(bands, BANDS_3D, strict=True):
        assert_equal(band, expected[name])
    restored = idwt3(bands)
    assert_equal(restored, pywt.idwtn(expected, "haar", mode, axes=(-3, -2, -1)))
    assert_restored(restored, x)
