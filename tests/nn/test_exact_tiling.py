"""Networks with group norms in tiles against the same networks at once, and against diffusers' own."""

import math
import threading
from fractions import Fraction

import pytest
import torch
from diffusers.models.autoencoders import vae
from torch import nn
from torch._dynamo import eval_frame

from latentae.nn import sd_vae
from latentae.nn.exact_tiling import Step, run_steps, steps_of, steps_of_block

KEPT = [0, 20_000, 2**30]  # bytes: one group of all steps, a few of them, each step by itself


def with_random_norms(net):
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return net.double().eval().requires_grad_(False)


def block(channels_in, channels_out):
    norm = nn.GroupNorm(math.gcd(2, channels_in), channels_in)
    return nn.Sequential(norm, nn.SiLU(), nn.Conv2d(channels_in, channels_out, 3, padding=1))


@pytest.fixture
def x():
    """What every tile of it has another mean and variance than the whole."""
    y, x = (torch.arange(side, dtype=torch.float64) for side in (48, 56))
    ramp = torch.stack([(y[:, None] / 9).sin() * x / 10, (x / 7).cos() + y[:, None] / 20, (y[:, None] * x / 99).sin()])
    return torch.stack([ramp, ramp.flip(1) * 3 + 1])


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("tile", [(16, 24), (9, 56), (48, 5), (64, 64)])
def test_group_norms_see_the_whole_image(x, kept, tile):
    net = with_random_norms(nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), block(4, 6), block(6, 4), block(4, 3)))
    torch.testing.assert_close(run_steps(steps_of(net), x, tile, kept), net(x))
    alone = torch.cat([net(x[..., :16, :24]), net(x[..., :16, 24:48])], dim=-1)
    assert (alone - net(x)[..., :16, :48]).abs().max() > 0.1, "so the norms matter"


@pytest.mark.parametrize("kept", KEPT)
def test_down_and_up_again(x, kept):
    net = with_random_norms(
        nn.Sequential(
            block(3, 4), nn.Conv2d(4, 4, 3, stride=2, padding=1), block(4, 4), nn.Conv2d(4, 8, 3, stride=2, padding=1),
            block(8, 8), nn.PixelShuffle(2), block(2, 4), nn.Upsample(scale_factor=2), block(4, 2),
        )
    )  # fmt: skip
    torch.testing.assert_close(run_steps(steps_of(net), x, (16, 8), kept), net(x))
    torch.testing.assert_close(run_steps(steps_of(net), x, (3, 3), kept), net(x))  # cut to what begins on a pixel


@pytest.mark.parametrize("kept", KEPT)
def test_states_of_several_tensors_and_such_as_pass(x, kept):
    first, second = with_random_norms(block(3, 4)), with_random_norms(block(7, 3))
    steps = [
        Step(lambda x: (x, first(x)), 1),
        Step(lambda x, y: (x, y.sin()), 0),
        Step(lambda x, y: (second(torch.cat([x, y], dim=1)),), 1),
    ]
    expected = second(torch.cat([x, first(x).sin()], dim=1))
    torch.testing.assert_close(run_steps(steps, x, (16, 16), kept), expected)


def test_norms_that_depend_on_the_values_are_refused(x):
    """Where some tiles are done and others are not, there is no result."""
    norm = nn.GroupNorm(1, 3).double()
    with pytest.raises(AssertionError, match="number of group norms"):
        run_steps([Step(lambda x: (norm(x) if x.mean() > x.new_tensor(0.5) else x,), 0)], x, (16, 24))


def test_too_small_a_radius_shows(x):
    net = with_random_norms(nn.Sequential(nn.Conv2d(3, 3, 5, padding=2)))
    assert not torch.allclose(run_steps([Step(lambda x: (net(x),), 1)], x, (16, 16)), net(x))


def test_no_step_runs_more_often_than_its_norms_ask_for(x):
    """Kept tensors: one round for each norm of a step and one for the result; nothing kept: as many for all."""
    runs = []
    net = with_random_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block(4, 4), block(4, 4)))
    steps = [Step(lambda x, i=i, step=step: runs.append(i) or step.run(x), 1) for i, step in enumerate(steps_of(net))]
    for kept, rounds in ((2**30, [1, 2, 2]), (0, [3, 3, 2])):
        runs.clear()
        run_steps(steps, x, (48, 28), kept)
        assert [runs.count(i) - 1 for i in range(3)] == [2 * count for count in rounds], "two tiles, and the first look"


def test_what_is_compiled_runs_eagerly_inside_and_as_before_when_the_last_thread_is_out(x):
    """Also if the thread that came first leaves first, where each would put back the stance that it found."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    stances = []

    def run(mine, awaited):
        def step(x):
            stances.append(eval_frame._stance.stance)
            mine.set()
            assert awaited.wait(10)
            return (x,)

        run_steps([Step(step, 0)], x, (48, 28))

    first = threading.Thread(target=run, args=(first_is_in, second_is_in))
    second = threading.Thread(target=run, args=(second_is_in, first_is_out))
    first.start()
    assert first_is_in.wait(10)
    second.start()
    first.join()
    first_is_out.set()
    second.join()
    assert stances == ["force_eager"] * 6, "two tiles each, and the first look"
    assert eval_frame._stance.stance == "default"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(x, dtype):
    """As near to double precision as the whole in half is: statistics are in single."""
    net = with_random_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block(4, 6), block(6, 3)))
    exact = net(x)
    half, given = net.to(dtype), x.to(dtype)
    tiled = run_steps(steps_of(half), given, (16, 24))
    assert tiled.dtype == dtype
    error, allowed = ((each.double() - exact).square().mean() for each in (tiled, half(given)))
    assert error < 1.2 * allowed


WIDTHS = (8, 8, 16)
ARGUMENTS = {"layers_per_block": 1, "norm_num_groups": 4}
HALVES = {
    "Encoder": (3, 4, ("DownEncoderBlock2D",) * 3, WIDTHS),
    "Decoder": (4, 3, ("UpDecoderBlock2D",) * 3, WIDTHS),
    "DecoderTiny": (4, 3, (1, 2, 1), (8, 8, 8), 2, "relu", "nearest"),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", HALVES)
def test_halves_are_those_of_diffusers(x, name, hooked):
    """Blocks on which hooks of offloading sit run as a whole."""
    arguments = {} if name == "DecoderTiny" else ARGUMENTS
    stock = with_random_norms(getattr(vae, name)(*HALVES[name], **arguments))
    ours = getattr(sd_vae, name)(*HALVES[name], **arguments).double()
    ours.load_state_dict(stock.state_dict())
    runs = []
    for blocks in (getattr(ours, "down_blocks", ()), getattr(ours, "up_blocks", ())):
        for each in blocks if hooked else ():
            each._diffusers_hook = None
            each.register_forward_hook(lambda *_: runs.append(1))
    given = x if name == "Encoder" else torch.cat([x[..., ::4, ::4], x[:, :1, ::4, ::4]], dim=1)
    expected = stock(given)
    with torch.no_grad():
        torch.testing.assert_close(ours(given), expected)
        assert len(runs) == (3 if hooked and name != "DecoderTiny" else 0)
        tiled = ours(given, (16, 16) if name == "Encoder" else (4, 8))
    torch.testing.assert_close(tiled, expected)
    assert len(runs) > 3 or not hooked or name == "DecoderTiny"


def test_a_block_as_a_whole_reaches_as_far_as_its_parts():
    parts = [nn.Conv2d(2, 2, 5, padding=2), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, padding=1)]
    whole = nn.Sequential(*parts)
    whole._diffusers_hook = None
    (step,) = steps_of_block(whole, parts)
    assert (step.radius, step.scale) == (3, Fraction(2))  # two and a half
    assert len(steps_of_block(nn.Sequential(*parts), parts)) == 3
