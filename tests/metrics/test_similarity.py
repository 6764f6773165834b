"""MS-SSIM, GMSD and HaarPSI against pytorch-msssim, piq and torchmetrics, and at known values."""

import piq
import pytest
import pytorch_msssim
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from latentae.errors import RequestError
from latentae.metrics.similarity import GMSD, MSSSIM, HaarPSI, gmsd, haarpsi, ms_ssim


def textured(count, height, width, seed=0):
    """uint8 images with edges, gradients, grain and saturated areas, (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 9, generator=generator) * 360 - 50
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    grain = 15 * torch.randn(count, 3, height, width, generator=generator)
    return (fine + grain).clamp(0, 255).to(torch.uint8)


def degraded(images, strength, seed=9):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * strength
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1, count_include_pad=False)
    return (blurred + noise).clamp(0, 255).round().to(torch.uint8)


STRENGTHS = pytest.mark.parametrize("strength", [1, 15, 90])


@STRENGTHS
@pytest.mark.parametrize("size", [(176, 256), (192, 192)])
def test_ms_ssim_is_that_of_pytorch_msssim_and_piq(size, strength):
    reference = textured(3, *size)
    pair = degraded(reference, strength), reference
    ours, doubles = ms_ssim(*pair), [images.double() for images in pair]
    theirs = pytorch_msssim.ms_ssim(*doubles, data_range=255, size_average=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)  # its window has float32 taps
    theirs = piq.multi_scale_ssim(*doubles, data_range=255, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert 0 < ours.min() < ours.max() < 1


def test_ms_ssim_is_near_that_of_torchmetrics():
    reference = textured(2, 256, 256, seed=1)
    pair = degraded(reference, 15), reference
    theirs = multiscale_structural_similarity_index_measure(
        *(images.float() for images in pair), data_range=255.0, reduction="none"
    )
    assert not torch.equal(ms_ssim(*pair), theirs.double())  # it pads the borders and mixes the channels first
    torch.testing.assert_close(ms_ssim(*pair), theirs.double(), rtol=0, atol=1e-3)


def test_odd_sides_repeat_their_last_row():
    """As in Wang's code; piq repeats the first row instead, so it is shown the images upside down."""
    reference = textured(2, 177, 177, seed=2)
    pair = degraded(reference, 20), reference
    flipped = [images.flip(-1, -2).double() for images in pair]
    theirs = piq.multi_scale_ssim(*flipped, data_range=255, reduction="none")
    torch.testing.assert_close(ms_ssim(*pair), theirs, rtol=0, atol=1e-12)


def test_anticorrelated_structure_is_zero_and_not_nan():
    reference = textured(1, 161, 161, seed=3)
    assert ms_ssim(255 - reference, reference).item() == 0


def test_ms_ssim_needs_161_pixels():
    assert ms_ssim(*2 * [textured(1, 161, 170)]).item() == pytest.approx(1, abs=1e-12)
    with pytest.raises(RequestError, match="MS-SSIM got images of 160x200; it needs at least 161x161"):
        ms_ssim(*2 * [textured(1, 160, 200)])


@STRENGTHS
@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_gmsd_and_haarpsi_are_those_of_piq(size, strength):
    reference = textured(3, *size, seed=4)
    pair = degraded(reference, strength), reference
    doubles = [images.double() for images in pair]
    for ours, theirs in ((gmsd, piq.gmsd), (haarpsi, piq.haarpsi)):
        values = ours(*pair)
        torch.testing.assert_close(values, theirs(*doubles, data_range=255, reduction="none"), rtol=0, atol=1e-12)
        assert 0 < values.min() < values.max() < 1


def test_known_values():
    images = textured(2, 32, 32, seed=5)
    assert gmsd(images, images).tolist() == [0, 0]
    torch.testing.assert_close(haarpsi(images, images), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert haarpsi(black, black).item() == 1
    assert gmsd(black, black).item() == 0


def test_floats_with_their_range_give_what_bytes_give():
    reference = textured(2, 161, 170, seed=6)
    pair = degraded(reference, 10), reference
    as_units = [images.double() / 255 for images in pair]
    for metric in (ms_ssim, gmsd, haarpsi):
        torch.testing.assert_close(metric(*as_units, data_range=1), metric(*pair))
        with pytest.raises(RequestError, match="need data_range"):
            metric(*as_units)


def test_haarpsi_needs_16_pixels():
    with pytest.raises(RequestError, match="at least 16x16"):
        haarpsi(*2 * [textured(1, 15, 40)])


@pytest.mark.parametrize(("metric_class", "function"), [(MSSSIM, ms_ssim), (GMSD, gmsd), (HaarPSI, haarpsi)])
def test_parts_merge_into_the_mean_over_images(metric_class, function):
    reference = textured(5, 164, 161, seed=7)
    reconstruction = degraded(reference, 20)
    part, other = metric_class(), metric_class()
    part.update(reconstruction[:2], reference[:2])
    other.update(reconstruction[2:], reference[2:])
    part.merge_state(other)
    assert part.compute().item() == pytest.approx(function(reconstruction, reference).mean().item(), rel=1e-12)
    assert metric_class.smallest <= 161
