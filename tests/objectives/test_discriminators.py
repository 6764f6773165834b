"""Discriminators against layouts written independently, published numbers of parameters, and any size of input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from latentae.errors import RequestError
from latentae.objectives import BlurPatchGAN, PatchGAN, PatchGAN3D, UNetGAN
from latentae.objectives.discriminators import BlurDownsample


def count(module):
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize(
    ("discriminator", "millions"),
    [
        (lambda: UNetGAN(16), 2.76),
        (lambda: UNetGAN(32), 11.02),
        (lambda: UNetGAN(64), 44.07),
        (lambda: BlurPatchGAN(), 1.91),
        (lambda: PatchGAN3D(norm="batch"), 4.67),
    ],
)
def test_numbers_of_parameters_are_the_originals(discriminator, millions):
    assert count(discriminator()) == millions


def plain(discriminator):
    """The same network without its spectral normalisation, frozen at the weights that this gives now."""
    discriminator = discriminator.eval()
    for module in discriminator.modules():
        if hasattr(module, "parametrizations"):
            remove_parametrizations(module, "weight")
    return discriminator


def unet_reference(net, pixels):
    """The paper's 256-pixel forward pass in its order of operations, from the weights of ours."""

    def halve(x):
        return F.avg_pool2d(x, 2)

    def double(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def down(block, x, first):
        y = block.conv1(x if first else x.relu())
        y = halve(block.conv2(y.relu()))
        return y + (block.shortcut(halve(x)) if first else halve(block.shortcut(x)))

    def up(block, x):
        y = block.conv2(block.conv1(double(x.relu())).relu())
        return y + block.shortcut(double(x))

    d1 = down(net.down[0], pixels, True)
    d2 = down(net.down[1], d1, False)
    d3 = down(net.down[2], d2, False)
    d4 = down(net.down[3], d3, False)
    d5 = down(net.down[4], d4, False)
    d6 = down(net.down[5], d5, False)
    score = net.score(d6.relu().sum((2, 3)) / (d6.shape[2] * d6.shape[3]))
    h = up(net.up[0], d6)
    h = up(net.up[1], torch.cat([h, d5], 1))
    h = up(net.up[2], torch.cat([h, d4], 1))
    h = up(net.up[3], torch.cat([h, d3], 1))
    h = up(net.up[4], torch.cat([h, d2], 1))
    h = up(net.up[5], torch.cat([h, d1], 1))
    return net.map(h), score


def test_the_u_net_is_the_paper_s():
    torch.manual_seed(0)
    net = plain(UNetGAN(4)).double()
    pixels = torch.randn(2, 3, 128, 64, dtype=torch.float64)
    for ours, reference in zip(net(pixels), unet_reference(net, pixels), strict=True):
        torch.testing.assert_close(ours, reference)


def test_the_u_net_is_spectrally_normalised():
    torch.manual_seed(0)
    net = UNetGAN(8).train()
    for _ in range(30):
        net(torch.randn(1, 3, 16, 16))
    net.eval()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_blur_discriminator_is_titok_s_layout():
    torch.manual_seed(0)
    net = BlurPatchGAN(channels=32, stages=2).double()
    pixels = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    first, conv1, norm1, conv2, norm2, middle, last = [m for m in net.main if list(m.parameters())]
    assert [m.out_channels for m in (first, conv1, conv2, middle, last)] == [32, 32, 64, 64, 1]

    def act(x):
        return F.leaky_relu(x, 0.1)

    def blur(x):
        kernel = torch.tensor([[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]], dtype=x.dtype) / 64
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return torch.stack([F.conv2d(c[:, None], kernel[None, None], stride=2)[:, 0] for c in x.unbind(1)], 1)

    x = act(F.conv2d(pixels, first.weight, first.bias, padding=2))
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        x = act(F.group_norm(blur(conv(x)), 32, norm.weight, norm.bias))
    x = F.adaptive_max_pool2d(x, (8, 6))
    torch.testing.assert_close(net(pixels), last(act(middle(x))))


def test_the_blur_keeps_constants_and_removes_the_finest_pattern():
    blur = BlurDownsample()
    torch.testing.assert_close(blur(torch.full((1, 2, 7, 10), 3.0)), torch.full((1, 2, 4, 5), 3.0))
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    assert blur(checkerboard[None, None])[..., 1:-1, 1:-1].abs().max() < 1e-6


NORMS_3D = {"batch": nn.BatchNorm3d, "group": lambda c: nn.GroupNorm(max(c // 32, 1), c), "none": None}


@pytest.mark.parametrize("norm", NORMS_3D)
def test_patchgan_3d_is_wf_vae_s_layout(norm):
    ours, make = PatchGAN3D(channels=8, norm=norm), NORMS_3D[norm]
    stack = [nn.Conv3d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2)]
    for channels_in, channels_out, stride in [(8, 16, (2, 2, 2)), (16, 32, (1, 2, 2)), (32, 64, 1)]:
        stack.append(nn.Conv3d(channels_in, channels_out, 3, stride, 1, bias=make is None))
        stack += [make(channels_out)] if make else []
        stack.append(nn.LeakyReLU(0.2))
    reference = nn.Sequential(*stack, nn.Conv3d(64, 1, 3, 1, 1))
    reference.load_state_dict(ours.main.state_dict())
    pixels = torch.randn(2, 3, 9, 32, 48)
    torch.testing.assert_close(ours(pixels), reference(pixels), rtol=0, atol=0)
    assert ours(pixels).shape == (2, 1, 3, 4, 6)


def test_a_logit_of_patchgan_3d_sees_as_much_as_its_documentation_says():
    net = PatchGAN3D(channels=2, norm="none")
    video = torch.randn(1, 3, 64, 96, 96, requires_grad=True)
    net(video)[0, 0, 8, 6, 6].backward()
    seen = video.grad[0].abs().sum(0) > 0
    assert [int(seen.flatten(1).any(1).sum()), int(seen.any(0).any(1).sum())] == [31, 47]


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (5, 9), (1, 1)])
def test_any_size_goes_in_and_gradients_are_finite(size):
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, *size, requires_grad=True)
    scores, logits = UNetGAN(4)(pixels)[::-1]
    assert logits.shape == (2, 1, *size)
    assert scores.shape == (2, 1)
    blurred = BlurPatchGAN(channels=32, stages=2)(pixels)
    assert blurred.shape == (2, 1, *(-(-side // 8) for side in size))
    (scores.sum() + logits.sum() + blurred.sum()).backward()
    assert pixels.grad.isfinite().all()


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_any_number_of_frames_goes_in(frames):
    assert PatchGAN3D(channels=4)(torch.randn(1, 3, frames, 16, 24)).shape == (1, 1, -(-frames // 4), 2, 3)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: plain(UNetGAN(1)), (1, 3, 4, 5)),
        (lambda: BlurPatchGAN(channels=32, stages=1), (1, 3, 4, 5)),
        (lambda: PatchGAN3D(channels=2, layers=2), (1, 3, 2, 5, 4)),
    ],
    ids=["unet", "blur", "3d"],
)
def test_gradients_agree_with_finite_differences(make, shape):
    torch.manual_seed(0)
    net = make().double()
    pixels = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (pixels,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_pixels_too_few_for_one_logit_are_one_sentence(layers):
    smallest = 3 * 2**layers
    network = PatchGAN(channels=32, layers=layers)
    assert network(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(RequestError, match=rf"at least {smallest} pixels, got {smallest - 1}x64: give it fewer layers"):
        network(torch.zeros(1, 3, smallest - 1, 64))
