"""Denoisers against the stock transformers that they wrap, DiT's initialisation, and flows that are known."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel

from latentae.denoisers import build_denoiser, create_denoiser, sample, velocity_errors
from latentae.errors import RequestError

TINY = ("dit-tiny", "pixart-tiny", "sana-tiny")


def shaken(denoiser, seed=0):
    """With weights that leave nothing at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return denoiser.eval()


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_kind_gives_a_velocity_that_knows_time_and_class(preset, patch_size):
    denoiser = shaken(create_denoiser({"preset": preset, "patch_size": patch_size}, (5, 4, 4), num_classes=3))
    noisy = torch.randn(2, 5, 4, 4)
    velocity = denoiser(noisy, torch.tensor([0.2, 0.9]), torch.tensor([0, 2]))
    assert velocity.shape == noisy.shape
    assert not torch.allclose(velocity, denoiser(noisy, torch.tensor([0.3, 0.9]), torch.tensor([0, 2])))
    assert not torch.allclose(velocity, denoiser(noisy, torch.tensor([0.2, 0.9]), torch.tensor([1, 2])))
    none = denoiser(noisy, torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(none, denoiser(noisy, torch.tensor([0.2, 0.9]), torch.tensor([3, 3])))


def test_dit_is_the_stock_class_with_times_in_thousandths():
    denoiser = shaken(create_denoiser({"preset": "dit-tiny"}, (4, 4, 4), num_classes=10))
    stock = DiTTransformer2DModel.from_config(denoiser.transformer.config).eval()
    stock.load_state_dict(denoiser.transformer.state_dict())
    noisy, labels = torch.randn(3, 4, 4, 4), torch.tensor([0, 9, 10])
    expected = stock(noisy, timestep=torch.tensor([0, 250, 1000]), class_labels=labels).sample
    torch.testing.assert_close(denoiser(noisy, torch.tensor([0.0, 0.25, 1.0]), labels), expected)


def test_labels_are_dropped_by_nobody_in_training():
    denoiser = shaken(create_denoiser({"preset": "dit-tiny"}, (4, 4, 4), num_classes=2)).train()
    noisy, t, labels = torch.randn(1, 4, 4, 4).expand(64, -1, -1, -1), torch.full((64,), 0.5), torch.zeros(64).long()
    velocity = denoiser(noisy, t, labels)
    torch.testing.assert_close(velocity, velocity[:1].expand_as(velocity))


@pytest.mark.parametrize("preset", TINY)
def test_it_begins_as_dit_does_with_a_velocity_of_zero(preset):
    denoiser = create_denoiser({"preset": preset}, (4, 4, 4))
    assert denoiser(torch.randn(2, 4, 4, 4), torch.rand(2)).abs().max() == 0
    if preset == "dit-tiny":
        block = denoiser.transformer.transformer_blocks[0]
        assert block.norm1.linear.weight.abs().max() == 0
        tokens = torch.randn(1, 16, 128)
        out = block(tokens, timestep=torch.tensor([500.0]), class_labels=torch.tensor([0]))
        torch.testing.assert_close(out, tokens)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("dit-s", 33), ("dit-b", 130), ("dit-l", 458), ("dit-xl", 675), ("sana-600m", 590), ("sana-1.6b", 1600)],
)
def test_sizes_are_those_of_the_papers(preset, millions):
    """Of DiT without the embedders that diffusers repeats in every block."""
    with torch.device("meta"):
        shape = (4, 32, 32) if preset.startswith("dit") else (32, 32, 32)
        denoiser = create_denoiser({"preset": preset, "patch_size": 2 if preset.startswith("dit") else 1}, shape, 1000)
    count = sum(p.numel() for p in denoiser.transformer.parameters())
    if preset.startswith("dit"):
        blocks = denoiser.transformer.transformer_blocks
        count -= (len(blocks) - 1) * sum(p.numel() for p in blocks[0].norm1.emb.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("preset", TINY)
def test_a_description_builds_the_same_net(preset):
    denoiser = create_denoiser({"preset": preset, "patch_size": 2}, (4, 8, 8), num_classes=7, seed=3)
    again = build_denoiser(denoiser.describe())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in denoiser.state_dict().items()}
    again.load_state_dict(denoiser.state_dict())
    assert again.describe() == denoiser.describe()


def test_the_seed_decides_and_the_global_generator_stays():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b = (create_denoiser({"preset": "dit-tiny"}, (4, 4, 4), seed=1).state_dict() for _ in range(2))
    assert torch.rand(1) == expected
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_wide_latents_fit_transformers_that_are_not_square():
    denoiser = shaken(create_denoiser({"preset": "pixart-tiny", "patch_size": 2}, (4, 4, 8), num_classes=2))
    assert isinstance(denoiser.transformer, PixArtTransformer2DModel)
    assert denoiser(torch.randn(1, 4, 4, 8), torch.rand(1)).shape == (1, 4, 4, 8)


@pytest.mark.parametrize(
    ("description", "shape", "sentence"),
    [
        ({"preset": "dit-tyny"}, (4, 8, 8), "did you mean dit-tiny"),
        ({"class_name": "UNet"}, (4, 8, 8), "known are DiTTransformer2DModel"),
        ({}, (4, 8, 8), "known are DiTTransformer2DModel"),
        ({"preset": "dit-tiny", "num_layer": 3}, (4, 8, 8), "did you mean num_layers"),
        ({"preset": "dit-tiny", "in_channels": 3}, (4, 8, 8), "has no argument 'in_channels' of its own"),
        ({"preset": "dit-tiny", "patch_size": 2}, (4, 7, 7), "patches of 2 do not divide latents of 7 x 7"),
        ({"preset": "dit-tiny"}, (4, 8, 4), "can only hold square latents"),
    ],
)
def test_what_cannot_be_is_refused(description, shape, sentence):
    with pytest.raises(RequestError, match=sentence):
        create_denoiser(description, shape)


@pytest.mark.parametrize(
    ("shape", "sentence"), [((3, 4, 4), "latents of 4 channels, these have 3"), ((4, 8, 8), "made for latents of 4")]
)
def test_other_latents_are_refused(shape, sentence):
    with pytest.raises(RequestError, match=sentence):
        create_denoiser({"preset": "dit-tiny"}, (4, 4, 4)).check_grid(shape)


class Gaussian(torch.nn.Module):
    """The exact velocity field of latents N(mean of the class, std² 1), in place of a network."""

    def __init__(self, means=(2.0, -2.0, 0.0), std=0.5):
        super().__init__()
        self.means, self.std = torch.nn.Parameter(torch.tensor(means)), std

    def null_labels(self, count):
        return torch.full((count,), 2)

    def forward(self, noisy, t, labels=None):
        labels = self.null_labels(len(noisy)) if labels is None else labels
        t, mean = t.view(-1, 1, 1, 1), self.means[labels].view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        residual = (noisy - (1 - t) * mean) / variance
        return (t * residual) - (mean + (1 - t) * self.std**2 * residual)  # E[noise] - E[clean]


def test_samples_of_a_known_flow_have_its_distribution():
    noise = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]).repeat(200)
    latents = sample(Gaussian(), noise, labels, steps=200)
    assert latents[::2].mean() == pytest.approx(2.0, abs=0.03)
    assert latents[1::2].mean() == pytest.approx(-2.0, abs=0.03)
    assert latents[::2].std() == pytest.approx(0.5, abs=0.02)


def test_guidance_moves_samples_away_from_the_other_class():
    noise = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(200).long()
    plain, guided = (sample(Gaussian(), noise, labels, steps=50, guidance_scale=g).mean() for g in (1.0, 3.0))
    assert guided == pytest.approx(3 * plain.item(), rel=0.02)  # linear in the velocity here, the null mean being 0


def test_euler_is_that_of_diffusers():
    denoiser = shaken(create_denoiser({"preset": "dit-tiny"}, (4, 4, 4), num_classes=2))
    noise, labels = torch.randn(2, 4, 4, 4), torch.tensor([0, 1])
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    latents = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = scheduler.step(denoiser(latents, t.expand(2) / 1000, labels), t, latents).prev_sample
    torch.testing.assert_close(sample(denoiser, noise, labels, steps=4), latents, rtol=1e-4, atol=1e-5)


def test_the_error_of_the_best_velocity_is_that_of_a_gaussian():
    torch.manual_seed(0)
    std, t = 0.5, 0.3
    clean, noise = 2 + std * torch.randn(500, 1, 8, 8), torch.randn(500, 1, 8, 8)
    errors = velocity_errors(Gaussian(std=std), clean, torch.full((500,), t), noise, torch.zeros(500).long())
    # Var(noise - clean | noisy) of jointly Gaussian variables
    expected = (1 + std**2) - (t - (1 - t) * std**2) ** 2 / ((1 - t) ** 2 * std**2 + t**2)
    assert errors.mean().item() == pytest.approx(expected, rel=0.02)


def test_errors_are_measured_in_single_precision_at_least():
    denoiser = shaken(create_denoiser({"preset": "dit-tiny"}, (4, 4, 4))).to(torch.bfloat16)
    clean = torch.randn(2, 4, 4, 4, dtype=torch.bfloat16)
    errors = velocity_errors(denoiser, clean, torch.rand(2, dtype=torch.bfloat16), torch.randn_like(clean))
    assert errors.dtype == torch.float32
    assert errors.isfinite().all()
