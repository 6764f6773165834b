import pytest
import torch
from torch import nn

from latentae.nn.tiling import run_in_tiles


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
