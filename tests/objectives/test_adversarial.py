"""The adversary: PatchGAN against a layout written independently, losses against their formulas, who gets gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentae.objectives import Adversary, PatchGAN


def layout(norm):
    """taming's discriminator for ndf 64 and three layers, spelled out layer by layer."""
    bias = norm is None
    stack = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    for channels_in, channels_out, stride in [(64, 128, 2), (128, 256, 2), (256, 512, 1)]:
        stack.append(nn.Conv2d(channels_in, channels_out, 4, stride, 1, bias=bias))
        stack += [norm(channels_out)] if norm else []
        stack.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*stack, nn.Conv2d(512, 1, 4, 1, 1))


NORMS = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(c // 32, c), "none": None}


@pytest.mark.parametrize("norm", NORMS)
def test_patchgan_has_taming_s_layout(norm):
    ours, reference = PatchGAN(norm=norm), layout(NORMS[norm])
    reference.load_state_dict(ours.main.state_dict())  # strict: the same names and shapes
    pixels = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(pixels), reference(pixels), rtol=0, atol=0)
    assert ours(pixels).shape == (2, 1, 6, 10)


def test_patchgan_has_the_published_number_of_parameters():
    convolutions = (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) * 4 * 4 + 64 + 1  # biases: first and last only
    norms = 2 * (128 + 256 + 512)
    count = sum(p.numel() for p in PatchGAN(norm="batch").parameters())
    assert count == convolutions + norms
    assert round(count / 1e6, 2) == 2.77


def test_patchgan_starts_as_taming_does():
    torch.manual_seed(0)
    weights = [m.weight for m in PatchGAN(norm="batch").modules() if isinstance(m, nn.Conv2d)]
    assert all(abs(w.mean()) < 2e-3 and abs(w.std() - 0.02) < 2e-3 for w in weights)


FORMULAS = {
    "hinge": (lambda r, f: (F.relu(1 - r).mean() + F.relu(1 + f).mean()) / 2, lambda f: -f.mean()),
    "vanilla": (lambda r, f: (-F.logsigmoid(r).mean() - F.logsigmoid(-f).mean()) / 2, lambda f: -f.mean()),
    "non_saturating": (
        lambda r, f: (-F.logsigmoid(r).mean() - F.logsigmoid(-f).mean()) / 2,
        lambda f: F.binary_cross_entropy_with_logits(f, torch.ones_like(f)),
    ),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_losses_are_their_formulas(loss):
    adversary = Adversary(PatchGAN(channels=8, layers=2), loss=loss)
    adversary.discriminator.main[-1].weight.data *= 100  # logits on both sides of the hinge
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    r, f = adversary.discriminator(real), adversary.discriminator(fake)
    of_discriminator, of_generator = FORMULAS[loss]
    value, logits = adversary.discriminator_loss(real, fake)
    torch.testing.assert_close(value, of_discriminator(r, f))
    torch.testing.assert_close(adversary.generator_loss(fake), of_generator(f))
    torch.testing.assert_close(logits["logits_real"], r.mean().detach())
    torch.testing.assert_close(logits["logits_fake"], f.mean().detach())


def test_neither_side_gives_the_other_a_gradient():
    adversary = Adversary(PatchGAN(channels=8, layers=2))
    reconstruction = torch.randn(2, 3, 32, 32, requires_grad=True)

    adversary.generator_loss(reconstruction).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversary.parameters())

    reconstruction.grad = None
    adversary.discriminator_loss(torch.randn(2, 3, 32, 32), reconstruction)[0].backward()
    assert reconstruction.grad is None
    assert all(p.grad is not None for p in adversary.parameters())


def test_the_schedule():
    adversary = Adversary(PatchGAN(channels=8), weight=0.5, start_step=10, ramp_steps=4, warmup_steps=3)
    weights = [adversary.weight_at(step) for step in (0, 9, 10, 11, 13, 14, 100)]
    assert weights == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.5, 0.5])
    assert [adversary.trains_at(step) for step in (6, 7, 10)] == [False, True, True]


def test_logits_are_float32_under_autocast():
    adversary = Adversary(PatchGAN(channels=8, layers=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert adversary.generator_loss(torch.randn(1, 3, 32, 32)).dtype == torch.float32
