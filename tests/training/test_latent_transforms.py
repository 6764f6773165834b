"""Latent transforms inside of a training step: who sees what, for every kind of autoencoder, and resumed."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

import latentae
from latentae.errors import RequestError
from latentae.objectives import KL, L1, Equivariance, HaarDetail, LatentNoise, ScaleOnly, Term

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
}
AUTOENCODERS = {
    "dc-ae": lambda: latentae.create("dc-ae-tiny"),
    "kl": lambda: AutoencoderKL(**BLOCKS, latent_channels=2),
    "vq": lambda: VQModel(**BLOCKS, latent_channels=3, num_vq_embeddings=16),
}


class Spy(Term):
    """Records the steps that it sees and weighs nothing."""

    def __init__(self):
        super().__init__(0.0)
        self.steps = []

    def measure(self, step):
        self.steps.append(step)
        return step.reconstruction.mean()


def record(module):
    """What encoder, decoder and discriminator are given, batch by batch."""
    seen = {"encoder": [], "decoder": [], "discriminator": []}
    networks = {"encoder": module.autoencoder.encoder, "decoder": module.autoencoder.decoder}
    if module.adversary:
        networks["discriminator"] = module.adversary.discriminator
    for name, network in networks.items():
        network.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].detach()))
    return seen


@pytest.mark.parametrize("kind", AUTOENCODERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_every_autoencoder_trains(runs, folder, tmp_path, kind, precision):
    torch.manual_seed(0)
    transforms = [Equivariance(eq_prob=0.6, lowres_prob=0.3, anisotropic=True), LatentNoise(0.1, "interpolated")]
    module = runs.module(autoencoder=AUTOENCODERS[kind](), latent_transforms=transforms, objective={"l1": L1()})
    before = {name: value.clone() for name, value in module.autoencoder.named_parameters()}
    seen = record(module)
    steps = runs.fit(module, runs.data(folder), tmp_path, 6, precision=precision)
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in steps.values())
    assert len({x.shape for x in seen["encoder"]}) > 1, "low-resolution steps"
    assert len({x.shape for x in seen["decoder"]}) > 1
    moved = {name for name, value in module.autoencoder.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} >= {"encoder", "decoder"}
    assert ("quantize.embedding.weight" in moved) == (kind == "vq"), "the transform comes before the codebook"


def test_objective_and_adversary_see_the_same_pair(runs, folder, tmp_path):
    spy = Spy()
    module = runs.module(
        runs.adversary(start_step=0, lecam=0.0),
        objective={"l1": L1(), "spy": spy},
        latent_transforms=[Equivariance(eq_prob=1, scales=(0.5, 1.0))],
    )
    seen = record(module)
    runs.fit(module, runs.data(folder), tmp_path, 4)
    assert len(spy.steps) == len(seen["encoder"]) == len(seen["decoder"]) == 4
    assert len(seen["discriminator"]) == 3 * 4  # the generator's side, then real and fake
    for i, step in enumerate(spy.steps):
        own, real, fake = seen["discriminator"][3 * i : 3 * i + 3]
        assert torch.equal(own, step.reconstruction)
        assert torch.equal(real, step.target)
        assert torch.equal(fake, step.reconstruction)
        assert step.target.shape[2] == 8 * step.latents.shape[2] < 32
        assert seen["encoder"][i].shape == (2, 3, 32, 32)
        assert torch.equal(seen["decoder"][i], step.latents)


def test_the_posterior_of_the_kl_is_not_transformed(runs, folder, tmp_path):
    spy = Spy()
    objective = {"l1": L1(), "kl": KL(1e-6, reduction="ldm"), "spy": spy}
    module = runs.module(autoencoder=AUTOENCODERS["kl"](), objective=objective, latent_transforms=[ScaleOnly(prob=1)])
    runs.fit(module, runs.data(folder), tmp_path, 2)
    for step in spy.steps:
        assert step.posterior.mean.shape == (2, 2, 8, 8)
        assert step.latents.shape[2] <= 4


def test_shares_of_nothing_change_nothing(runs, folder, tmp_path):
    """With both shares 0 the weights are those of a run without the transform, noise of the posterior included."""

    def go(name, transforms):
        torch.manual_seed(0)
        module = runs.module(autoencoder=latentae.create("dc-ae-tiny"), latent_transforms=transforms)
        runs.fit(module, runs.data(folder), tmp_path / name, 3)
        return list(module.parameters())

    for a, b in zip(go("plain", None), go("never", [Equivariance(eq_prob=0)]), strict=True):
        assert torch.equal(a, b)


def test_fine_tuning_towards_rotations_makes_latents_rotate(runs, folder, tmp_path):
    def error(name, transforms):
        module = runs.module(objective={"l1": L1(), "haar": HaarDetail(0.5)}, ema=None, latent_transforms=transforms)
        runs.fit(module, runs.data(folder, dead_leaves=0.0), tmp_path / name, 80)
        pixels = torch.stack([runs.pixels(folder, i) for i in range(4)])
        with torch.no_grad():
            latents = module.autoencoder.encode(pixels).latent_dist.mode().rot90(1, (2, 3))
            return (module.autoencoder.decode(latents).sample - pixels.rot90(1, (2, 3))).square().mean().item()

    assert error("eq", [Equivariance(eq_prob=0.5, scales=None)]) < 0.9 * error("plain", None)


@pytest.mark.parametrize("crash_at", [1, 5])
def test_a_resumed_run_draws_the_same(runs, folder, tmp_path, crash_at):
    def go(run_dir, **options):
        transforms = [Equivariance(0.6, 0.2, scales=(0.5, 1.0)), LatentNoise(0.2, "uniform", prob=0.5)]
        module = runs.module(runs.adversary(), accumulate=2, latent_transforms=transforms)
        return runs.fit(module, runs.data(folder), run_dir, 4, **options)

    straight = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=crash_at)
    resumed = go(tmp_path / "resumed")
    assert {step: straight[step] for step in resumed} == resumed
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("straight", "resumed")
    )
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name])


def test_latents_too_small_to_scale_are_one_sentence(runs, folder, tmp_path):
    module = runs.module(latent_transforms=[Equivariance()])
    with pytest.raises(RequestError, match=r"latents of 1x1: take a larger data\.size"):
        runs.fit(module, runs.data(folder, size=8), tmp_path, 1)
