"""The adversary's regularisers and adaptive weight inside a run: exact resume, one forward, what is logged."""

import pytest
import torch

import latentae
from latentae.errors import RequestError
from latentae.objectives import L1, Adversary, UNetGAN
from latentae.training.optimization import last_layer

EVERYTHING = {"adaptive": True, "lecam": 0.05, "r1": 1.0, "r1_every": 2}


def test_a_crashed_run_repeats_the_uninterrupted_one_with_every_regulariser(runs, folder, tmp_path):
    def go(run_dir, **options):
        torch.manual_seed(3)
        adversary = Adversary(UNetGAN(channels=2), **EVERYTHING)
        return runs.fit(runs.module(adversary), runs.data(folder), run_dir, 5, **options)

    straight = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=3)
    resumed = go(tmp_path / "resumed")
    assert {step: straight[step] for step in resumed} == resumed
    first, second = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("straight", "resumed"))
    assert first["state_dict"]["adversary.running_logits"].abs().min() > 0
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_regularisers_are_logged_by_name_and_cost_no_second_forward(runs, folder, tmp_path):
    module = runs.module(runs.adversary(**EVERYTHING))
    calls = []
    module.autoencoder.decoder.register_forward_hook(lambda *_: calls.append(1))
    steps = runs.fit(module, runs.data(folder), tmp_path, 4)
    assert len(calls) == 4
    assert all({"lecam", "adaptive_factor", "adaptive_clamped"} <= values.keys() for values in steps.values())
    assert [step for step, values in steps.items() if "r1" in values] == [1, 3]  # computed at global steps 0 and 2


def test_the_adaptive_weight_makes_the_two_gradients_meet_at_the_last_layer(runs, folder, tmp_path):
    """With weight 1 the adversarial gradient is as long there as that of everything else."""
    module = runs.module(runs.adversary(weight=1.0, adaptive=True), objective={"l1": L1(7.0)}, gradient_clip=None)
    seen = {}
    balance = module.adversary.balance

    def recorded(loss, adversarial, layer):
        values = balance(loss, adversarial, layer)
        both = [loss, values["adaptive_factor"] * adversarial]
        seen["norms"] = [torch.autograd.grad(v, layer, retain_graph=True)[0].norm().item() for v in both]
        seen["layer"] = layer
        return values

    module.adversary.balance = recorded
    runs.fit(module, runs.data(folder), tmp_path, 1)
    assert seen["layer"] is module.autoencoder.decoder.conv_out.conv.weight
    assert seen["norms"][1] == pytest.approx(seen["norms"][0], rel=1e-2)


def test_an_adaptive_weight_without_a_last_layer_that_trains_is_refused(runs, folder, tmp_path):
    module = runs.module(runs.adversary(adaptive=True), trainable=["encoder"])
    with pytest.raises(RequestError, match="last layer, which is frozen"):
        runs.fit(module, runs.data(folder), tmp_path, 1)


@pytest.mark.parametrize("preset", ["dc-ae-tiny", "dc-ae-f8c16-small"])
def test_the_last_layer_is_the_one_that_makes_pixels(preset):
    decoder = latentae.create(preset).decoder
    assert last_layer(decoder) is decoder.conv_out.conv.weight
