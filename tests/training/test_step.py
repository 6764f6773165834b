"""One training step: one forward pass, who gets which gradient, what is skipped, what stays frozen."""

import math

import pytest
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL

import latentae
from latentae.errors import DataError, RequestError
from latentae.objectives import KL, L1, L2, Adversary, Term, UNetGAN
from latentae.objectives.latent_transforms import Equivariance


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_one_forward_per_batch_with_a_discriminator_that_trains(runs, folder, tmp_path):
    module = runs.module(runs.adversary(), accumulate=2)
    encodes, decodes = count_calls(module.autoencoder.encoder), count_calls(module.autoencoder.decoder)
    runs.fit(module, runs.data(folder), tmp_path, 3)
    assert len(encodes) == len(decodes) == 3 * 2


def test_global_step_counts_generator_steps(runs, folder, tmp_path):
    trainer = runs.trainer(tmp_path, 5)
    trainer.fit(runs.module(runs.adversary()), runs.data(folder))
    assert trainer.global_step == 5
    trainer = runs.trainer(tmp_path / "accumulating", 5)
    module = runs.module(runs.adversary(), accumulate=3)
    trainer.fit(module, runs.data(folder))
    assert trainer.global_step == 5
    assert module.samples_seen == 5 * 3 * 2


def test_the_two_networks_learn_from_their_own_losses_only(runs, folder, tmp_path):
    """With every other loss at weight 0, an adversary of weight 0 gives the autoencoder no gradient, but learns."""

    def go(name, **options):
        module = runs.module(runs.adversary(**options), objective={"l1": L1(0.0)}, optimizer=sgd)
        before = [parameter.clone() for parameter in module.parameters()]
        runs.fit(module, runs.data(folder), tmp_path / name, 1)
        moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
        count = len(list(module.autoencoder.parameters()))
        return any(moved[:count]), any(moved[count:])

    assert go("only the discriminator trains", start_step=5, warmup_steps=5) == (False, True)
    assert go("the autoencoder is driven by the adversary", start_step=0) == (True, True)
    assert go("nobody trains", start_step=5) == (False, False)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_the_adversary_moves_the_autoencoder_as_its_loss_says(runs, folder, tmp_path):
    """One SGD step against gradients computed by hand, for both networks."""
    module = runs.module(runs.adversary(weight=0.3), optimizer=sgd, gradient_clip=None, objective={"l2": L2(2.0)})
    data = runs.data(folder)
    trainer = runs.trainer(tmp_path, 1)

    reference, opponent = latentae.create("dc-ae-tiny"), runs.adversary().discriminator
    reference.load_state_dict(module.autoencoder.state_dict())
    trainer.fit(module, data)
    batch = next(iter(runs_first_batch(trainer, data)))["pixels"]
    pixels = batch / 127.5 - 1
    reconstruction = reference.train()(pixels).sample
    loss = 2 * (reconstruction - pixels).square().mean() - 0.3 * opponent(reconstruction).mean()
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    for gradient, start, end in zip(gradients, reference.parameters(), module.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(end, start - 0.1 * gradient, rtol=1e-4, atol=1e-6)

    real, fake = opponent(pixels), opponent(reconstruction.detach())
    loss = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    gradients = torch.autograd.grad(loss, list(opponent.parameters()))
    moved = module.adversary.discriminator.parameters()
    for gradient, start, end in zip(gradients, opponent.parameters(), moved, strict=True):
        torch.testing.assert_close(end, start - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def runs_first_batch(trainer, data):
    trainer.lightning_module.samples_seen = 0
    return data.train_dataloader()


def test_accumulated_batches_are_one_large_batch(runs, folder, tmp_path):
    """dc-ae-tiny has no BatchNorm, so only rounding differs: of float64, and of the float32 inside its attention."""

    def go(name, batch_size, accumulate):
        module = runs.module(runs.adversary(start_step=1), accumulate=accumulate, optimizer=sgd)
        data = runs.data(folder, batch_size=batch_size)
        return runs.fit(module, data, tmp_path / name, 3, precision="64-true"), module

    large, module = go("large", 4, 1)
    small, other = go("small", 1, 4)
    for step in large:
        assert small[step] == pytest.approx(large[step], rel=1e-7)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Poison(Term):
    """Not finite at the steps that it is told."""

    def __init__(self, at, value=math.nan):
        super().__init__()
        self.at, self.value, self.calls = at, value, 0

    def measure(self, step):
        self.calls += 1
        return step.reconstruction.mean() * (self.value if self.calls - 1 in self.at else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(runs, folder, tmp_path, value):
    module = runs.module(runs.adversary(), objective={"l1": L1(), "poison": Poison({1, 3}, value)})
    steps = runs.fit(module, runs.data(folder), tmp_path, 3)
    assert module.skipped_steps == 2
    assert list(steps) == [1, 2, 3]
    assert module.samples_seen == 2 * (3 + 2)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert all(p.isfinite().all() for p in module.ema.average.values())


def test_a_skipped_step_moves_nothing(runs, folder, tmp_path):
    module = runs.module(runs.adversary(), objective={"poison": Poison({0, 1})}, max_skipped_steps=2)
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(DataError, match=r"2 steps in a row were not finite in loss, poison, gradient_norm"):
        runs.fit(module, runs.data(folder), tmp_path, 3)
    for a, b in zip(before, module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_not_finite_is_skipped_too(runs, folder, tmp_path):
    class Cliff(Term):
        def measure(self, step):
            return (step.reconstruction * 0).sum().sqrt()  # 0, with an infinite slope

    module = runs.module(objective={"l1": L1(), "cliff": Cliff()}, max_skipped_steps=3)
    with pytest.raises(DataError, match="not finite in gradient_norm at step 0"):
        runs.fit(module, runs.data(folder), tmp_path, 3)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_short_gan_run_stays_finite(runs, folder, tmp_path):
    module = runs.module(runs.adversary(weight=0.1))
    steps = runs.fit(module, runs.data(folder), tmp_path, 60)
    assert all(math.isfinite(value) for values in steps.values() for value in values.values())
    assert module.skipped_steps == 0
    l1 = [values["l1"] for values in steps.values()]
    assert sum(l1[-10:]) < 0.9 * sum(l1[:10])


def test_only_the_named_parts_train(runs, folder, tmp_path):
    module = runs.module(runs.adversary(), trainable=["decoder.norm_out", "decoder.conv_out"])
    before = {name: value.clone() for name, value in module.autoencoder.state_dict().items()}
    data = runs.data(folder)
    trainer = runs.trainer(tmp_path, 2)
    trainer.fit(module, data)
    after = module.autoencoder.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    head = {name for name in before if name.startswith(("decoder.norm_out.", "decoder.conv_out."))}
    assert moved == head
    assert {n for n, p in module.autoencoder.named_parameters() if p.grad is not None or p.requires_grad} == head
    assert len(trainer.optimizers[0].state) == len(head)
    assert set(module.ema.average) == head


def test_frozen_batch_norm_does_not_drift(runs, folder, tmp_path):
    def build():
        return latentae.create("dc-ae-tiny", decoder_norm_types=("batch_norm",) * 2 + ("rms_norm",) * 2)

    def statistics(module):
        return [b.clone() for name, b in module.autoencoder.named_buffers() if "running" in name]

    frozen = runs.module(autoencoder=build(), trainable=["decoder.conv_out"])
    before = statistics(frozen)
    runs.fit(frozen, runs.data(folder), tmp_path / "frozen", 2)
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(frozen), strict=True))

    trained = runs.module(autoencoder=build())
    runs.fit(trained, runs.data(folder), tmp_path / "trained", 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, statistics(trained), strict=True))


def test_the_discriminator_may_have_an_optimizer_of_its_own(runs, folder, tmp_path):
    module = runs.module(runs.adversary(optimizer=sgd))
    trainer = runs.trainer(tmp_path, 1)
    trainer.fit(module, runs.data(folder))
    assert [type(optimizer) for optimizer in trainer.optimizers] == [torch.optim.AdamW, torch.optim.SGD]


def test_a_stock_kl_autoencoder_trains_with_a_kl_term(runs, folder, tmp_path):
    torch.manual_seed(0)
    stock = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
    )
    module = runs.module(autoencoder=stock, objective={"l1": L1(), "kl": KL(1e-3)})
    steps = runs.fit(module, runs.data(folder), tmp_path, 2)
    assert steps[2]["kl"] > 0
    assert type(latentae.load(tmp_path)) is AutoencoderKL


def test_bf16_mixed_trains_and_fp16_is_refused(runs, folder, tmp_path):
    steps = runs.fit(runs.module(runs.adversary()), runs.data(folder), tmp_path / "bf16", 2, precision="bf16-mixed")
    assert math.isfinite(steps[2]["loss"])
    with pytest.raises(RequestError, match=r"16-true.*bf16-mixed"):
        runs.fit(runs.module(), runs.data(folder), tmp_path / "fp16", 2, precision="16-true")


def test_draws_depend_on_the_seed_and_on_the_images_before(runs):
    seeds = [runs.module(seed=seed).draw_seed() for seed in (0, 1, 2**24, 2**32 - 1)]
    assert len(set(seeds)) == 4
    module = runs.module(seed=1)
    module.samples_seen += 1
    assert module.draw_seed() == (seeds[1] + 1) % 2**63
    torch.manual_seed(max(seeds))  # within torch's range


def test_the_norm_of_the_gradient_is_clipped(runs, folder, tmp_path):
    module = runs.module(optimizer=sgd, gradient_clip=1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in module.autoencoder.parameters()])
    steps = runs.fit(module, runs.data(folder), tmp_path, 1)
    after = torch.cat([p.detach().flatten() for p in module.autoencoder.parameters()])
    assert steps[1]["gradient_norm"] > 1e-3
    assert (after - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_gradient_checkpointing_saves_memory_and_changes_nothing(runs, folder, tmp_path):
    class Saved(pl.Callback):
        """Bytes that the forward passes of a run keep for their backward passes."""

        def __init__(self):
            self.bytes = 0
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self.count, lambda tensor: tensor)

        def count(self, tensor):
            self.bytes += tensor.nbytes
            return tensor

        def on_train_batch_start(self, *_):
            self.hooks.__enter__()

        def on_train_batch_end(self, *_):
            self.hooks.__exit__(None, None, None)

    def go(name, **options):
        saved, module = Saved(), runs.module(autoencoder=latentae.create("dc-ae-tiny"), **options)
        runs.trainer(tmp_path / name, 3, saved).fit(module, runs.data(folder))
        return saved.bytes, module.autoencoder.state_dict()

    plain_bytes, plain = go("plain")
    checkpointed_bytes, checkpointed = go("checkpointed", gradient_checkpointing=True)
    assert checkpointed_bytes < 0.7 * plain_bytes
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_a_model_without_gradient_checkpointing_is_refused(runs):
    with pytest.raises(RequestError, match=r"model\.gradient_checkpointing: Linear has none"):
        runs.module(autoencoder=torch.nn.Linear(1, 1), gradient_checkpointing=True)


def test_transforms_of_latents_that_nothing_decodes_are_refused(runs, folder, tmp_path):
    module = runs.module(objective={"kl": KL()}, latent_transforms=[Equivariance()])
    with pytest.raises(RequestError, match="no term of this objective looks at a reconstruction"):
        runs.fit(module, runs.data(folder), tmp_path, 1)


@pytest.mark.slow
def test_compiled_steps_train_against_spectral_normalisation(runs, folder, tmp_path):
    """Its power iteration changes buffers in place between the passes of one step, which a compiled graph forbids."""
    module = runs.module(Adversary(UNetGAN(channels=2), weight=0.1), compile=True)
    losses = runs.fit(module, runs.data(folder, size=64), tmp_path, 2)
    assert all(math.isfinite(losses[step]["discriminator"]) for step in (1, 2))
