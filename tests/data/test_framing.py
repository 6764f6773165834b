"""Crops against torchvision and Pillow, buckets against their definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from latentae.data.framing import CROPS, Framing, buckets, nearest_bucket
from latentae.data.transforms import adm_center_crop
from latentae.errors import RequestError


def image_of(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(301, 457), (457, 301), (128, 128), (40, 33), (129, 500)])
def test_center_is_what_torchvision_does(shape):
    image = image_of(*shape)
    reference = transforms.Compose(
        [transforms.Resize(128, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(128)]
    )(Image.fromarray(image))
    pixels, crop = Framing((128,), "center", 8).apply(image, (128, 128))
    assert torch.equal(pixels, torch.from_numpy(np.array(reference)).permute(2, 0, 1))
    side = min(shape)
    assert crop == ((shape[0] - side) // 2, (shape[1] - side) // 2, side, side)


def test_adm_is_that_of_evaluation_and_squash_is_one_resize():
    image = image_of(300, 200)
    pixels, crop = Framing((64,)).apply(image, (64, 64))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), adm_center_crop(image, 64))
    assert crop == (50, 0, 200, 200)
    squashed, crop = Framing((64,), "squash").apply(image, (64, 64))
    reference = Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(squashed.permute(1, 2, 0).numpy(), np.asarray(reference))
    assert crop == (0, 0, 300, 200)


@given(size=st.sampled_from([64, 256, 512, 1024]), multiple=st.sampled_from([1, 8, 32, 64]))
def test_buckets_are_of_the_size_and_fit_the_ratio(size, multiple):
    shapes = buckets(size, multiple)
    assert (size, size) in shapes
    assert len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert height * width <= size * size
        assert size / 2 <= min(height, width) + multiple
        assert max(height, width) <= 2 * size
        assert (width, height) in shapes


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_the_bucket_is_that_of_the_nearest_aspect_ratio(height, width):
    shapes = buckets(256, 32)
    chosen = nearest_bucket(height, width, shapes)
    distances = [abs(math.log(h / w) - math.log(height / width)) for h, w in shapes]
    assert abs(math.log(chosen[0] / chosen[1]) - math.log(height / width)) <= min(distances) + 1e-9


def test_a_bucket_shows_a_centred_part_of_its_own_aspect_ratio():
    image = image_of(300, 640)
    framing = Framing((256,), "buckets", 32)
    shape = framing.shape(300, 640)
    assert shape == (160, 352)
    pixels, (top, left, height, width) = framing.apply(image, shape)
    assert pixels.shape == (3, *shape)
    assert height / width == pytest.approx(160 / 352, rel=0.01)
    assert (height, top) == (291, 4)
    assert (width, left) == (640, 0)
    part = Image.fromarray(image[top : top + height, left : left + width])
    reference = np.asarray(part.resize((352, 160), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - reference)
    assert difference[4:-4, 4:-4].max() <= 1


@pytest.mark.parametrize(
    ("crop", "sizes", "image", "expected"),
    [
        ("adm", (256, 512), (600, 800), (512, 512)),
        ("adm", (256, 512), (511, 2000), (256, 256)),
        ("adm", (256, 512), (100, 100), (256, 256)),
        ("buckets", (256, 512, 1024), (1024, 1024), (1024, 1024)),
        ("buckets", (256, 512, 1024), (1000, 1100), (960, 1088)),
        ("buckets", (256, 512, 1024), (1000, 1000), (512, 512)),
        ("buckets", (256, 512), (50, 200), (128, 512)),
    ],
)
def test_of_several_sizes_the_largest_that_needs_no_enlarging(crop, sizes, image, expected):
    assert Framing(sizes, crop, 32).shape(*image) == expected


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (7, 3)])
def test_images_of_any_size_get_the_shape_they_were_planned_for(crop, shape):
    framing = Framing((32, 64), crop, 8)
    planned = framing.shape(*shape)
    pixels, (top, left, height, width) = framing.apply(image_of(*shape), planned)
    assert pixels.shape == (3, *planned)
    assert pixels.dtype == torch.uint8
    assert 0 <= top < top + height <= shape[0]
    assert 0 <= left < left + width <= shape[1]


def test_whole_images_are_padded():
    framing = Framing((), multiple=8)
    assert framing.fixed_shape is None
    assert framing.shape(17, 32) == (24, 32)
    image = image_of(17, 32)
    pixels, crop = framing.apply(image, (24, 32))
    assert torch.equal(pixels[:, :17], torch.from_numpy(image).permute(2, 0, 1))
    assert crop == (0, 0, 17, 32)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((256,), "centre"), "crop='centre'; expected one of adm, center, squash, buckets"),
        (((0,),), "size=0; expected at least 1"),
        (((), "buckets"), "crop='buckets' needs a size"),
    ],
)
def test_what_cannot_be_framed_is_refused(arguments, sentence):
    with pytest.raises(RequestError, match=sentence):
        Framing(*arguments)
