"""VA-VAE's losses against a loop over positions; the frozen network from a module and from a transformers folder."""

import builtins
import sys

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from latentae.errors import MissingExtra, MissingWeights, RequestError
from latentae.objectives import L1, Alignment, Objective, Step
from latentae.objectives.alignment import open_vision_model


class Features(nn.Module):
    """A small network of known output: 5 channels on a grid of a quarter of the side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, pixels):
        return self.conv(pixels)


def make(**options):
    torch.manual_seed(0)
    return Alignment(Features(), latent_channels=4, size=16, **options)


def some_step(height=4, width=4):
    torch.manual_seed(1)
    pixels = torch.rand(2, 3, 4 * height, 4 * width) * 2 - 1
    return Step(pixels, pixels, latents=torch.randn(2, 4, height, width, requires_grad=True))


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("margins", [(0.5, 0.25), (0.0, 0.0), (0.8, 0.6)])
def test_the_value_is_the_two_margin_losses_position_by_position(margins):
    term, step = make(cosine_margin=margins[0], distance_margin=margins[1]), some_step()
    f = term._network[0](step.target).flatten(2)
    z = torch.einsum("dc,bchw->bdhw", term.projection.weight[:, :, 0, 0], step.latents).flatten(2)
    f, z = f.detach(), z.detach()
    cosines, distances = [], []
    for image in range(2):
        for i in range(16):
            cosines.append(max(0, 1 - margins[0] - cosine(z[image, :, i], f[image, :, i])))
            for j in range(16):
                difference = cosine(z[image, :, i], z[image, :, j]) - cosine(f[image, :, i], f[image, :, j])
                distances.append(max(0, abs(difference) - margins[1]))
    expected = sum(cosines) / len(cosines) + sum(distances) / len(distances)
    assert term(step).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_agree_with_finite_differences():
    term, step = make(cosine_margin=0.1, distance_margin=0.05).double(), some_step(2, 3)
    latents = step.latents.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: term(Step(step.target, step.target, latents=z)), (latents,), atol=1e-5)


def test_it_trains_the_projection_and_the_latents_and_saves_no_network():
    objective = Objective({"align": make()})
    total, _ = objective(some_step())
    total.backward()
    assert [name for name, _ in objective.named_parameters()] == ["align.projection.weight"]
    assert list(objective.state_dict()) == ["align.projection.weight"]
    network = objective["align"]._network[0]
    assert not network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_any_grid_of_latents_and_zero_latents_have_finite_gradients():
    term = make()
    for shape in ((3, 7), (1, 1), (8, 8)):
        latents = torch.zeros(2, 4, *shape, requires_grad=True)
        pixels = torch.zeros(2, 3, 24, 56)
        term(Step(pixels, pixels, latents=latents)).backward()
        assert latents.grad.isfinite().all()


def test_it_is_float32_under_autocast():
    term, step = make(), some_step()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term(step), make()(step))


@pytest.mark.parametrize(
    ("config", "model", "prefix"),
    [(Dinov2Config, Dinov2Model, 1), (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, 5)],
)
def test_a_transformers_folder_gives_its_patch_tokens(tmp_path, config, model, prefix):
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28)
    theirs = model(config(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 56, 56)
    tokens = theirs(pixels).last_hidden_state[:, prefix:]  # (2, 16, 8), row by row
    ours = open_vision_model(str(tmp_path)).eval()(pixels)
    torch.testing.assert_close(ours[:, :, 1, 2], tokens[:, 1 * 4 + 2])
    assert ours.shape == (2, 8, 4, 4)
    assert Alignment(str(tmp_path), latent_channels=4, size=56).projection.weight.shape == (8, 4, 1, 1)


def test_a_model_that_is_nowhere_and_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingWeights, match=r"nobody/nothing .* leave the term out"):
        Alignment(str(tmp_path / "nobody/nothing"), latent_channels=4)

    original = builtins.__import__

    def without_timm(name, *arguments, **options):
        if name == "timm":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(MissingExtra, match=r"timm/vit.*latentae\[align\]"):
        Alignment("timm/vit_large_patch14_dinov2.lvd142m", latent_channels=4)


def test_a_network_that_gives_no_map_and_a_step_without_latents_are_refused():
    with pytest.raises(RequestError, match=r"Flatten gave \(1, 768\)"):
        Alignment(nn.Flatten(), latent_channels=4, size=16)
    step = some_step()
    with pytest.raises(RequestError, match="offers none"):
        make()(Step(step.target, step.reconstruction))
    assert L1()(step) == 0  # other terms do not mind latents
