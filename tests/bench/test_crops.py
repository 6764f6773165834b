"""The crops of the papers against torchvision, scikit-image and Pillow."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from skimage.transform import resize
from torchvision.transforms import InterpolationMode

from latentae.bench.crops import CROPS

SIZES = [(61, 97), (130, 40), (64, 64), (33, 71), (200, 201), (48, 48)]


def picture(height, width):
    y, x = np.mgrid[:height, :width]
    image = np.stack([127 + 90 * np.sin(x / (2 + c) + y / 5 + c) for c in range(3)], -1)
    return (image + np.random.default_rng(0).normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    ("name", "filter"), [("bicubic", InterpolationMode.BICUBIC), ("lanczos", InterpolationMode.LANCZOS)]
)
def test_pillow_filters_are_torchvisions_resize_and_crop(shape, name, filter):
    image = picture(*shape)
    expected = tv.center_crop(tv.resize(Image.fromarray(image), [48], filter), [48])
    np.testing.assert_array_equal(CROPS[name][0](image, 48), np.asarray(expected))


@pytest.mark.parametrize("shape", SIZES)
def test_the_tensor_crop_is_torchvisions_resize_of_floats(shape):
    image = picture(*shape)
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
    expected = tv.center_crop(tv.resize(tensor, [48], antialias=True), [48]) * 255
    ours = CROPS["tensor"][0](image, 48)
    assert np.abs(ours - expected.permute(1, 2, 0).numpy()).max() < 0.51


@pytest.mark.parametrize("shape", SIZES)
def test_the_linear_crop_does_not_antialias(shape):
    image = picture(*shape)
    height, width = shape
    whole = (48 * height // min(shape), 48 * width // min(shape))
    expected = resize(image.astype(float), whole, order=1, mode="edge", anti_aliasing=False)
    top, left = (round((side - 48) / 2) for side in whole)
    expected = expected[top : top + 48, left : left + 48]
    ours = CROPS["linear"][0](image, 48)
    assert np.abs(ours - expected).max() < 0.51


@pytest.mark.parametrize("name", CROPS)
def test_a_square_of_the_right_size_is_left_as_it_is(name):
    image = picture(48, 48)
    np.testing.assert_array_equal(CROPS[name][0](image, 48), image)
