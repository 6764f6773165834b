import pytest
import torch
import torch.nn.functional as F

from latentae.nn.resample import (
    average_groups,
    duplicate_to_pixels,
    nearest_upsample_conv3x3,
    pixels_of,
    space_to_channel_average,
)


@pytest.mark.parametrize(("channels_in", "channels_out"), [(4, 8), (8, 8), (4, 16), (8, 4), (16, 4), (3, 12)])
def test_space_to_channel_is_unshuffle_and_group_mean(channels_in, channels_out):
    x = torch.randn(2, channels_in, 6, 10)
    expected = F.pixel_unshuffle(x, 2).unflatten(1, (channels_out, -1)).mean(2)
    torch.testing.assert_close(space_to_channel_average(x, channels_out), expected)


def test_twice_the_channels_keeps_rows_and_averages_columns():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)  # the anisotropy of the published models: rows apart, columns averaged
    assert space_to_channel_average(x, 2).flatten().tolist() == [0.5, 2.5]


@pytest.mark.parametrize(("channels_in", "channels_out"), [(8, 4), (8, 8), (8, 2), (4, 8), (4, 16)])
def test_duplicates_are_repeat_and_shuffle(channels_in, channels_out):
    x = torch.randn(2, channels_in, 3, 5)
    expected = F.pixel_shuffle(x.repeat_interleave(4 * channels_out // channels_in, dim=1), 2)
    y = torch.zeros(2, channels_out, 6, 10).contiguous(memory_format=torch.channels_last)
    pixels_of(y).add_(duplicate_to_pixels(x, channels_out))
    assert torch.equal(y, expected)


def test_average_groups_takes_consecutive_channels():
    x = torch.tensor([1.0, 3, 10, 30]).reshape(1, 4, 1, 1)
    assert average_groups(x, 2).flatten().tolist() == [2, 20]


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (8, 3)])
def test_folded_upsampling_equals_nearest_then_convolution(size):
    x, weight, bias = torch.randn(2, 6, *size).double(), torch.randn(4, 6, 3, 3).double(), torch.randn(4).double()
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    torch.testing.assert_close(nearest_upsample_conv3x3(x, weight, bias), expected)


def test_folded_upsampling_has_the_gradients_of_the_plain_one():
    x, weight = torch.randn(1, 3, 4, 5).double(), torch.randn(2, 3, 3, 3).double()
    gradients = []
    for function in (
        lambda x, w: nearest_upsample_conv3x3(x, w, None),
        lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(a, b).square().sum().backward()
        gradients.append((a.grad, b.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
