"""The adversary: PatchGAN against a layout written independently, losses against their formulas, who gets gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentae.errors import RequestError
from latentae.objectives import Adversary, PatchGAN, UNetGAN


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
    adversary = Adversary(PatchGAN(channels=8, layers=2), loss=loss, lecam=0.0)
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


def tiny(**options):
    """A discriminator whose logits are large enough to sit on both sides of every threshold."""
    torch.manual_seed(0)
    adversary = Adversary(PatchGAN(channels=8, layers=2), **options)
    adversary.discriminator.main[-1].weight.data *= 100
    return adversary


def test_lecam_is_its_formula_and_its_means_run():
    adversary = tiny(lecam=0.3)
    adversary.running_logits.copy_(torch.tensor([[0.2], [-0.1]]))  # of real, of reconstructed pixels
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    r, f = adversary.discriminator(real), adversary.discriminator(fake)
    reference = (r + 0.1).clamp(min=0).pow(2).mean() + (0.2 - f).clamp(min=0).pow(2).mean()
    loss, values = adversary.discriminator_loss(real, fake)
    torch.testing.assert_close(values["lecam"], reference.detach())
    torch.testing.assert_close(loss, FORMULAS["hinge"][0](r, f) + 0.3 * reference)

    adversary.end_step(values)
    expected = [[0.2 + 1e-3 * (r.mean().item() - 0.2)], [-0.1 + 1e-3 * (f.mean().item() + 0.1)]]
    torch.testing.assert_close(adversary.running_logits, torch.tensor(expected))
    restored = tiny(lecam=0.3)
    restored.load_state_dict(adversary.state_dict())
    assert torch.equal(restored.running_logits, adversary.running_logits)


def test_r1_is_the_squared_gradient_on_real_pixels_every_few_steps():
    """Against finite differences of the summed logits along every pixel."""
    adversary = Adversary(PatchGAN(channels=2, layers=1, norm="none"), r1=10.0, r1_every=4).double()
    adversary.discriminator.main[-1].weight.data *= 100
    real, fake = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain, values = adversary.discriminator_loss(real, fake, step=3)
    assert "r1" not in values
    penalised, values = adversary.discriminator_loss(real, fake, step=8)

    slopes = torch.zeros(2)
    per_image = adversary.discriminator(real)[0].numel()
    with torch.no_grad():
        for i in range(real[0].numel()):
            nudge = torch.zeros_like(real).flatten(1)
            nudge[:, i] = 1e-6
            up, down = (adversary.discriminator(real + sign * nudge.view_as(real)).sum((1, 2, 3)) for sign in (1, -1))
            slopes += ((up - down) / 2e-6) ** 2
    reference = 0.5 * (slopes / per_image).mean()
    torch.testing.assert_close(values["r1"], reference.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(penalised, plain + 4 * 10.0 * values["r1"])

    penalised.backward()
    assert all(p.grad is not None for p in adversary.discriminator.main[0].parameters())
    assert not real.requires_grad


def test_the_gradient_of_r1_agrees_with_finite_differences():
    adversary = Adversary(PatchGAN(channels=2, layers=1), r1=10.0).double()
    real, fake = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    names = list(dict(adversary.discriminator.named_parameters()))
    parameters = [p.detach().requires_grad_() for p in adversary.discriminator.parameters()]

    def penalty(*parameters):
        replaced = {f"discriminator.{name}": p for name, p in zip(names, parameters, strict=True)}

        class Call(nn.Module):
            def __init__(self):
                super().__init__()
                self.adversary = adversary

            def forward(self):
                return self.adversary.discriminator_loss(real, fake, 0)[0]

        call = Call()
        return torch.func.functional_call(call, {f"adversary.{k}": v for k, v in replaced.items()}, ())

    assert torch.autograd.gradcheck(penalty, parameters, eps=1e-6, atol=1e-4, rtol=1e-3)


def test_the_adaptive_factor_is_ldm_s_ratio_of_norms():
    adversary = tiny(adaptive=True)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    features, target = torch.randn(2, 4, 32, 32), torch.randn(2, 3, 32, 32)
    reconstruction = layer(features)
    loss = (reconstruction - target).abs().mean()
    adversarial = adversary.generator_loss(reconstruction)
    norms = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in (loss, adversarial)]
    values = adversary.balance(loss, adversarial, layer.weight)
    torch.testing.assert_close(values["adaptive_factor"], norms[0] / (norms[1] + 1e-4))
    assert values["adaptive_clamped"] == 0
    assert not values["adaptive_factor"].requires_grad
    (loss + values["adaptive_factor"] * adversarial).backward()  # the graphs are still there

    reconstruction = layer(features)
    values = adversary.balance(1e9 * reconstruction.square().mean(), 0 * reconstruction.mean(), layer.weight)
    assert values["adaptive_factor"] == 1e4
    adversary.end_step(values)
    adversary.end_step(adversary.balance(reconstruction.mean(), reconstruction.mean(), layer.weight))
    assert adversary.clamped_steps == 1
    assert adversary.state_dict()["clamped_steps"] == 1


def test_the_adaptive_factor_needs_a_last_layer_that_trains():
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(RequestError, match="last layer, which is frozen"):
        tiny(adaptive=True).balance(torch.zeros(()), torch.zeros(()), frozen)


def test_both_outputs_of_a_u_net_count_alike():
    torch.manual_seed(0)
    adversary = Adversary(UNetGAN(channels=4), lecam=1.0, r1=1.0).eval()  # eval: no power iteration between the calls
    real, fake = torch.randn(2, 3, 40, 40), torch.randn(2, 3, 40, 40)
    reals, fakes = adversary.discriminator(real), adversary.discriminator(fake)
    games = [FORMULAS["hinge"][0](r, f) for r, f in zip(reals, fakes, strict=True)]
    _, values = adversary.discriminator_loss(real, fake, step=1)
    torch.testing.assert_close(values["discriminator"], (games[0] + games[1]).detach() / 2)
    torch.testing.assert_close(adversary.generator_loss(fake), -(fakes[0].mean() + fakes[1].mean()) / 2)
    torch.testing.assert_close(values["score_logits_real"], reals[1].mean().detach())
    adversary.end_step(values)
    means = [[x.mean().item() for x in logits] for logits in (reals, fakes)]
    torch.testing.assert_close(adversary.running_logits, 1e-3 * torch.tensor(means))
    adversary.discriminator_loss(real, fake, step=0)[0].backward()
    assert all(p.grad.isfinite().all() for p in adversary.parameters())
