"""The ADM crop against a second implementation and block means, the random crop against its own geometry."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.transforms import adm_center_crop, random_resized_crop_flip, to_tensor

RNG = np.random.default_rng(0)


def noise(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_crop(image, size):
    """From the description: halve by box, scale the short side by bicubic, cut the middle out of the array."""
    picture, width, height = Image.fromarray(image), image.shape[1], image.shape[0]
    while width >= 2 * size and height >= 2 * size:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), resample=Image.BOX)
    factor = size / (width if width < height else height)
    array = np.array(picture.resize((round(width * factor), round(height * factor)), resample=Image.BICUBIC))
    first_row, first_column = (len(array) - size) // 2, (len(array[0]) - size) // 2
    return array[first_row:, first_column:][:size, :size]


SHAPES = [(64, 64), (100, 75), (75, 100), (63, 65), (321, 481), (129, 257), (1, 1), (3, 90), (128, 64), (255, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 31, 32, 64])
def test_adm_crop(shape, size):
    image = noise(*shape)
    crop = adm_center_crop(image, size)
    np.testing.assert_array_equal(crop, reference_crop(image, size))
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    assert crop.flags.writeable


def test_adm_crop_of_a_right_sized_image_is_the_image():
    image = noise(48, 48)
    np.testing.assert_array_equal(adm_center_crop(image, 48), image)


def test_adm_crop_only_cuts_where_the_short_side_fits():
    image = noise(48, 71)
    np.testing.assert_array_equal(adm_center_crop(image, 48), image[:, 11:59])


def test_adm_crop_halves_by_block_means():
    image = np.repeat(np.repeat(noise(16, 16) // 4 * 4, 4, 0), 4, 1)
    image[::2, ::2] += 2  # each 2x2 block gains a half on average: horizontally one, then a half, rounded up
    quarter = image.reshape(32, 2, 32, 2, 3).astype(float)
    rows = np.floor(quarter.mean(3) + 0.5)
    half = np.floor(rows.mean(1) + 0.5)
    full = np.floor(half.reshape(16, 2, 16, 2, 3).mean((1, 3)) + 0.5)
    np.testing.assert_array_equal(adm_center_crop(image, 16), full)


@pytest.mark.parametrize("shape", [(2, 100_000), (100_000, 2), (1, 50_001)])
def test_very_long_images_take_bounded_memory_and_keep_their_middle(shape, monkeypatch):
    resize, areas = Image.Image.resize, []

    def recording(picture, size, *options, **named):
        areas.append(size[0] * size[1])
        return resize(picture, size, *options, **named)

    monkeypatch.setattr(Image.Image, "resize", recording)
    image = np.zeros((*shape, 3), np.uint8)
    middle = tuple(slice(max(0, side // 2 - 10), side // 2 + 11) for side in shape)
    image[middle] = 200
    np.testing.assert_array_equal(adm_center_crop(image, 64), np.full((64, 64, 3), 200))
    assert max(areas) < 64 * 64 * 34


# random crop


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 32, 64])
def test_random_crop_has_the_right_form(shape, size):
    image = noise(*shape)
    for seed in range(5):
        crop = random_resized_crop_flip(image, size, np.random.default_rng(seed))
        assert crop.shape == (size, size, 3)
        assert crop.dtype == np.uint8
        assert crop.flags.c_contiguous


def test_random_crop_is_a_pure_function_of_its_generator():
    image = noise(90, 120)
    kept = image.copy()
    first = random_resized_crop_flip(image, 32, np.random.default_rng(5))
    np.testing.assert_array_equal(random_resized_crop_flip(image, 32, np.random.default_rng(5)), first)
    assert not np.array_equal(random_resized_crop_flip(image, 32, np.random.default_rng(6)), first)
    np.testing.assert_array_equal(image, kept)


def test_random_crop_takes_four_numbers():
    for shape in SHAPES:
        used, counted = np.random.default_rng(1), np.random.default_rng(1)
        random_resized_crop_flip(noise(*shape), 32, used)
        counted.random(4)
        assert used.random() == counted.random()


def ramps(side):
    """Red grows to the right and green downwards, so that a crop tells where it was taken."""
    y, x = np.mgrid[:side, :side]
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)


def test_scale_position_and_mirror_are_spread():
    size, side, image = 32, 256, ramps(256)
    zooms, lefts, mirrored = [], [], []
    for seed in range(400):
        crop = random_resized_crop_flip(image, size, np.random.default_rng(seed)).astype(float)
        across = (crop[:, -2, 0] - crop[:, 1, 0]).mean() / (size - 3)  # source pixels per pixel
        down = (crop[-2, :, 1] - crop[1, :, 1]).mean() / (size - 3)
        assert down == pytest.approx(abs(across), abs=0.15)  # the aspect ratio is kept
        zooms.append(np.log(down) / np.log(side / size))
        mirrored.append(across < 0)
        lefts.append(crop[:, :, 0].mean() / 255)
    np.testing.assert_allclose(
        np.quantile(zooms, [0.02, 0.25, 0.5, 0.75, 0.98]), [0.02, 0.25, 0.5, 0.75, 0.98], atol=0.08
    )
    assert 0.42 < np.mean(mirrored) < 0.58
    assert np.mean(lefts) == pytest.approx(0.5, abs=0.04)
    assert np.std(lefts) > 0.12


def test_a_crop_at_scale_one_is_cut_out_of_the_image():
    image = noise(40, 64)
    crops = [random_resized_crop_flip(image, 40, np.random.default_rng(seed)) for seed in range(20)]
    windows = np.lib.stride_tricks.sliding_window_view(image, (40, 40, 3))[0, :, 0]
    assert all(
        (windows == crop).all((1, 2, 3)).any() or (windows == crop[:, ::-1]).all((1, 2, 3)).any() for crop in crops
    )


def test_downscaling_does_not_alias():
    checkers = np.indices((512, 512)).sum(0) % 2 * 255
    image = np.repeat(checkers[..., None], 3, -1).astype(np.uint8)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        zoom = np.random.default_rng(seed).random()
        crop = random_resized_crop_flip(image, 32, rng)
        if 32 * 16**zoom > 128:  # averages over at least four pixels each way
            assert np.abs(crop.astype(float) - 127.5).max() < 12


# tensors


def test_to_tensor():
    image = noise(5, 7)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), np.moveaxis(image, -1, 0))
    image[:] = 0
    assert tensor.any()
    flipped = noise(4, 4)[:, ::-1]  # negative strides, which torch.from_numpy refuses
    np.testing.assert_array_equal(to_tensor(flipped)[0].numpy(), flipped[..., 0])
