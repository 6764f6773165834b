import pytest
import torch
from torch import nn

from latentae.nn.tiling import blend_tiles, run_in_tiles


@pytest.mark.parametrize("size", [(40, 24), (33, 50), (8, 64)])
def test_a_stack_of_convolutions_equals_its_tiles(size):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 5, padding=2)).double()
    x = torch.randn(1, 2, *size).double()
    torch.testing.assert_close(run_in_tiles(net, x, (16, 12), halo=3), net(x))


def test_down_and_up():
    x = torch.randn(2, 3, 48, 36).double()
    down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PixelUnshuffle(4)).double()
    torch.testing.assert_close(run_in_tiles(down, x, (16, 16), halo=4, down=4), down(x))
    up = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2)).double()
    torch.testing.assert_close(run_in_tiles(up, x, (10, 10), halo=1, up=2), up(x))


def test_too_small_a_halo_shows():
    net = nn.Conv2d(1, 1, 5, padding=2).double()
    x = torch.randn(1, 1, 32, 32).double()
    assert not torch.allclose(run_in_tiles(net, x, (16, 16), halo=1), net(x))


@pytest.mark.parametrize("size", [(40, 24), (33, 51), (8, 64), (16, 12)])
@pytest.mark.parametrize("stride", [(16, 12), (12, 9), (5, 1)])
def test_blending_what_depends_on_single_pixels_is_exact(size, stride):
    x = torch.randn(2, 3, *size).double()
    torch.testing.assert_close(blend_tiles(torch.sin, x, (16, 12), stride), x.sin())
    double = blend_tiles(lambda t: t.repeat_interleave(2, -1).repeat_interleave(2, -2), x, (16, 12), stride, up=2)
    torch.testing.assert_close(double, x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_one_tile_that_covers_all_runs_once():
    x = torch.randn(1, 3, 48, 36).double()
    calls = []
    assert blend_tiles(lambda t: calls.append(t) or t, x, (48, 40), (12, 12)) is x
    assert len(calls) == 1


def test_blended_tiles_meet_without_a_step():
    """Each tile adds a number of its own; from one pixel to the next the result changes by at most 1 / overlap."""
    numbers = iter([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    x = torch.zeros(1, 1, 8, 40).double()
    result = blend_tiles(lambda t: t + next(numbers), x, (8, 16), (8, 8))
    assert result.diff(dim=-1).abs().max() <= 1 / 8 + 1e-9
    assert result.max() == 1.0


def test_half_precision_comes_back_as_it_was():
    x = torch.randn(1, 3, 40, 40).bfloat16()
    result = blend_tiles(lambda t: t * 3, x, (16, 16), (8, 8))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, x * 3)
