"""Resizing against torch's and Pillow's, rotations against NumPy's, and sizes that fit every ratio."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latentae.nn.equivariance import ratio_of, resize, rotate, scaled_lengths, scaled_size, transform

MODES = ["bicubic", "bilinear"]


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [(8, 31), (31, 8), (13, 13), (1, 1), (40, 64)])
def test_resizing_is_torch_s(interpolation, size):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours = resize(x, size, interpolation)
    theirs = F.interpolate(y, size, mode=interpolation, antialias=interpolation == "bicubic", align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


def test_bicubic_is_pillow_s():
    """Away from the border, where both weigh the same taps; Pillow works in float32 on one channel."""
    x = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(x).resize((20, 37), Image.Resampling.BICUBIC))
    ours = resize(torch.from_numpy(x)[None, None], (37, 20))[0, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("interpolation", "spreads"), [("bilinear", (0.50, 0.50)), ("bicubic", (0.40, 0.20))])
def test_white_noise_keeps_as_much_spread_as_the_docs_say(interpolation, spreads):
    noise = torch.randn(1, 4, 512, 512)
    for size, spread in zip((256, 128), spreads):
        assert resize(noise, (size, size), interpolation).std().item() == pytest.approx(spread, abs=0.01)


@pytest.mark.parametrize("interpolation", MODES)
def test_constants_stay_constant(interpolation):
    """Standardising channels and transforming them commute because of this."""
    torch.testing.assert_close(
        resize(torch.full((1, 1, 9, 14), 3.0), (4, 11), interpolation), torch.full((1, 1, 4, 11), 3.0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays_and_autocast_changes_nothing(dtype):
    x = torch.randn(1, 2, 16, 12).to(dtype)
    plain = resize(x, (5, 7))
    assert plain.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize(x, (5, 7)), plain)
    torch.testing.assert_close(
        plain.double(), resize(x.double(), (5, 7)), rtol=1e-2, atol=1e-2 if x.element_size() == 2 else 1e-5
    )


def test_rotations_are_exact_and_form_a_group():
    x = torch.randn(2, 3, 5, 8)
    for turns in range(-3, 6):
        np.testing.assert_array_equal(rotate(x, turns).numpy(), np.rot90(x.numpy(), turns, axes=(-2, -1)))
        for more in range(4):
            assert torch.equal(rotate(rotate(x, turns), more), rotate(x, turns + more))
    assert rotate(x, 1).shape == (2, 3, 8, 5)
    assert torch.equal(rotate(x, 4), x)


def test_rotating_commutes_with_resizing():
    x = torch.randn(1, 2, 12, 20, dtype=torch.float64)
    torch.testing.assert_close(rotate(resize(x, (5, 9)), 1), resize(rotate(x, 1), (9, 5)), rtol=1e-12, atol=1e-12)
    assert torch.equal(transform(x, (5, 9), 3), rotate(resize(x, (5, 9)), 3))
    assert torch.equal(transform(x), x)


def test_videos_are_transformed_frame_by_frame():
    video = torch.randn(2, 3, 4, 8, 12)
    whole = transform(video, (5, 7), 1)
    assert whole.shape == (2, 3, 4, 7, 5)
    for t in range(4):
        torch.testing.assert_close(whole[:, :, t], transform(video[:, :, t], (5, 7), 1))


@pytest.mark.parametrize("ratio", [8, 16, 32, 64, 128])
def test_latents_stay_a_grid_over_the_image(ratio):
    """At odd multiples of the ratio, where a real factor rounds latents and image apart."""
    for height, width in [(3, 3), (5, 3), (7, 9)]:
        latents, pixels = torch.randn(1, 4, height, width), torch.randn(1, 3, height * ratio, width * ratio)
        assert ratio_of(latents, pixels) == ratio
        for longer in scaled_lengths(max(height, width), 0.25, 1):
            rows, columns = scaled_size((height, width), longer)
            small = transform(latents, (rows, columns), 1)
            assert ratio_of(small, transform(pixels, (rows * ratio, columns * ratio), 1)) == ratio


def test_what_is_no_grid_is_refused():
    for latents, pixels in [
        ((1, 8, 3, 5), (1, 3, 24, 32)),
        ((1, 8, 3, 5), (1, 3, 25, 40)),
        ((1, 60, 8), (1, 3, 24, 40)),
    ]:
        with pytest.raises(ValueError, match="no grid"):
            ratio_of(torch.zeros(latents), torch.zeros(pixels))


def test_lengths_are_the_whole_numbers_between():
    assert list(scaled_lengths(32, 0.25, 1)) == list(range(8, 32))
    assert list(scaled_lengths(9, 0.25, 1)) == [3, 4, 5, 6, 7, 8]
    assert list(scaled_lengths(10, 0.3, 0.7)) == [3, 4, 5, 6, 7], "neither bound is lost to rounding"
    assert list(scaled_lengths(2, 0.25, 1)) == [1]
    assert not scaled_lengths(1, 0.25, 1)
    assert not scaled_lengths(3, 0.4, 0.6)


def test_the_aspect_ratio_stays_as_near_as_whole_numbers_come():
    assert scaled_size((32, 32), 9) == (9, 9)
    assert scaled_size((16, 32), 9) == (5, 9)
    assert scaled_size((2, 64), 16) == (1, 16)
