"""The panel, cell by cell."""

import numpy as np
import torch

from latentae.data.visual import GAP, panel

HEIGHT, WIDTH = 16, 24


def cell(image, row, column):
    top, left = row * (HEIGHT + GAP), column * (WIDTH + GAP)
    return image[top : top + HEIGHT, left : left + WIDTH]


def batch(seed=0):
    return torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_input_reconstruction_and_error():
    pixels, reconstruction = batch(0), batch(1)
    image = panel(pixels, reconstruction)
    assert image.shape == (2 * HEIGHT + GAP, 3 * WIDTH + 2 * GAP, 3)
    assert image.dtype == np.uint8
    for row in range(2):
        before, after = (t[row].permute(1, 2, 0).numpy() for t in (pixels, reconstruction))
        np.testing.assert_array_equal(cell(image, row, 0), before)
        np.testing.assert_array_equal(cell(image, row, 1), after)
        error = np.minimum(8 * np.abs(before.astype(int) - after), 255)
        np.testing.assert_array_equal(cell(image, row, 2), error)
    assert (image[HEIGHT : HEIGHT + GAP] == 255).all()
    assert (image[:, WIDTH : WIDTH + GAP] == 255).all()


def test_floats_are_quantised_like_everywhere():
    pixels = batch()
    floats = pixels.float() / 127.5 - 1
    outside = (floats * 3).requires_grad_()  # clamped
    image = panel(floats, outside.bfloat16())
    np.testing.assert_array_equal(image[:, :WIDTH], panel(pixels, pixels)[:, :WIDTH])
    assert (cell(image, 0, 1)[(floats[0] > 0.34).permute(1, 2, 0).numpy()] == 255).all()


def test_equal_images_have_a_black_error():
    assert (cell(panel(batch(), batch()), 1, 2) == 0).all()


def test_latents_are_grey_squares_three_deviations_either_way():
    latents = torch.zeros(2, 6, HEIGHT // 8, WIDTH // 8)
    latents[:, 0, 0, 0] = 5.0  # constant channels stay in the middle
    image = panel(batch(), batch(), latents)
    assert image.shape == (2 * HEIGHT + GAP, 7 * WIDTH + 6 * GAP, 3)
    first = latents[:, 0]
    level = 127.5 * (5 - first.mean()) / (3 * first.std(correction=0)) + 127.5
    np.testing.assert_allclose(cell(image, 0, 3)[:8, :8], np.full((8, 8, 3), float(level)), atol=1)
    assert len(np.unique(cell(image, 0, 3))) == 2
    assert (cell(image, 1, 4) == 128).all()


def test_latents_of_an_odd_size_fill_the_cell():
    latents = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert panel(batch(), batch(), latents.to(torch.bfloat16)).shape[1] == 5 * WIDTH + 4 * GAP
