"""The radial spectrum against scipy's cosine transform and against latents whose spectrum is known."""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from latentae.errors import RequestError
from latentae.metrics.spectrum import RadialSpectrum, cosine_matrix


def spectrum(latents):
    metric = RadialSpectrum(latents.shape[1])
    metric.update(latents)
    return metric.compute()


def test_the_energy_is_that_of_scipy_s_transform_sorted_by_radius():
    torch.manual_seed(0)
    latents = torch.randn(3, 2, 10, 14, dtype=torch.float64).cumsum(-1) + 5
    squares = scipy.fft.dctn(latents.numpy(), axes=(2, 3), norm="ortho") ** 2
    expected = np.zeros((2, 23))
    for i in range(10):
        for j in range(14):
            if i or j:
                expected[:, int(math.hypot(i / 10, j / 14) * 16 + 1e-9)] += squares[:, :, i, j].sum(0)
    expected = (expected / expected.sum(1, keepdims=True)).mean(0)
    results = spectrum(latents)
    np.testing.assert_allclose(results["energy"], expected, rtol=1e-9, atol=1e-15)
    assert results["high_frequency_share"].item() == pytest.approx(expected[8:].sum(), rel=1e-9)
    assert results["frequency"][8].item() == 8.5 / 16


def test_white_noise_is_flat():
    torch.manual_seed(0)
    results = spectrum(torch.randn(64, 4, 32, 32) + 10)
    filled = ~results["density"].isnan()
    assert filled.tolist() == [True] * 22 + [False]  # 31 of 32, on both sides, is at 1.370
    assert (results["density"] - 1).abs()[:20].max() < 0.05  # few coefficients lie in the corner
    assert results["high_frequency_share"].item() == pytest.approx(1 - math.pi / 16, abs=0.02)


@pytest.mark.parametrize(("row", "column", "bin"), [(3, 0, 3), (0, 8, 8), (15, 15, 21), (6, 8, 10)])
def test_a_wave_lies_in_its_own_bin(row, column, bin):
    wave = cosine_matrix(16)[row][:, None] * cosine_matrix(16)[column]
    results = spectrum(torch.stack([wave, 1000 * wave])[None] + 3)
    assert results["energy"][bin].item() == pytest.approx(1, abs=1e-9)
    assert results["high_frequency_share"].item() == pytest.approx(float(bin >= 8), abs=1e-9)


def test_every_channel_counts_alike_and_an_empty_one_not_at_all():
    torch.manual_seed(0)
    latents = torch.randn(4, 2, 8, 8)
    latents[:, 0] = latents[:, 0].cumsum(-1).cumsum(-2)
    scaled = torch.cat([latents * torch.tensor([100.0, 0.01]).view(2, 1, 1), torch.zeros(4, 1, 8, 8)], 1)
    torch.testing.assert_close(spectrum(latents)["energy"], spectrum(scaled)["energy"])


def test_frames_of_a_video_are_images_and_processes_merge_exactly():
    torch.manual_seed(0)
    latents = torch.randn(6, 3, 8, 12)
    video = latents.view(2, 3, 3, 8, 12).transpose(1, 2)  # (B, C, t, h, w)
    first, second = RadialSpectrum(3), RadialSpectrum(3)
    first.update(latents[:2])
    second.update(latents[2:])
    first.merge_state(second)
    whole = spectrum(latents)
    for name, value in whole.items():
        torch.testing.assert_close(first.compute()[name], value, rtol=1e-12, atol=0, equal_nan=True)
        torch.testing.assert_close(spectrum(video)[name], value, rtol=1e-12, atol=0, equal_nan=True)


def test_nothing_that_varies_is_nan_and_a_wrong_shape_a_sentence():
    assert spectrum(torch.ones(2, 2, 1, 1))["high_frequency_share"].isnan()
    with pytest.raises(RequestError, match=r"of 2 channels got latents of shape \(1, 3, 4, 4\)"):
        RadialSpectrum(2).update(torch.zeros(1, 3, 4, 4))
