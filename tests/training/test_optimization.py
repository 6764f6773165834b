"""Schedules, weight decay groups and the choice of what trains."""

import math

import pytest
import torch
from torch import nn

import latentae
from latentae.errors import RequestError
from latentae.training.optimization import Schedule, parameter_groups, select_trainable, set_training_modes


def test_a_constant_schedule_warms_up():
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(step, 100) for step in (0, 1, 3, 4, 99)] == pytest.approx([0.2, 0.4, 0.8, 1, 1])


def test_a_cosine_schedule_is_torch_s():
    schedule = Schedule(kind="cosine", final=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(20):
        assert schedule.factor(step, 20) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert schedule.factor(25, 20) == pytest.approx(0.1)


def test_a_cosine_after_warm_up_ends_at_the_last_step():
    schedule = Schedule(warmup_steps=10, kind="cosine")
    assert schedule.factor(9, 30) == pytest.approx(10 / 11)
    assert schedule.factor(10, 30) == 1
    assert schedule.factor(20, 30) == pytest.approx(0.5)
    assert schedule.factor(30, 30) == pytest.approx(0, abs=1e-12)


def test_a_step_schedule_is_torch_s():
    schedule = Schedule(kind="step", milestones=(3, 7), decay=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5)
    for step in range(10):
        assert schedule.factor(step, 100) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_the_learning_rate_of_each_step(runs, folder, tmp_path):
    class LearningRates(runs.Recorder):
        def on_train_batch_end(self, trainer, *_):
            self.steps[trainer.global_step] = [o.param_groups[0]["lr"] for o in trainer.optimizers]

    rates = LearningRates()
    module = runs.module(runs.adversary(), schedule=Schedule(warmup_steps=1, kind="cosine"))
    runs.trainer(tmp_path, 4, rates).fit(module, runs.data(folder))
    expected = [5e-4, *(1e-3 * 0.5 * (1 + math.cos(math.pi * t / 3)) for t in (0, 1, 2))]
    for step, rate in enumerate(expected, start=1):
        assert rates.steps[step] == pytest.approx([rate, rate])


def test_norms_and_biases_are_undecayed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 4))
    decayed, undecayed = parameter_groups(model)
    assert [p.shape for p in decayed["params"]] == [(8, 3, 3, 3), (4, 8)]
    assert [p.shape for p in undecayed["params"]] == [(8,), (8,), (8,), (4,)]
    optimizer = torch.optim.AdamW([decayed, undecayed], lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_prefixes_end_at_dots():
    model = nn.ModuleDict({"conv": nn.Linear(2, 2), "conv_out": nn.Linear(2, 2)})
    select_trainable(model, ["conv"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["conv.weight", "conv.bias"]
    select_trainable(model, None)
    assert all(p.requires_grad for p in model.parameters())


def test_a_prefix_that_names_nothing_is_refused():
    with pytest.raises(RequestError, match=r"'decoder.convout'.*DCAE.*did you mean decoder.conv_out\?"):
        select_trainable(latentae.create("dc-ae-tiny"), ["decoder.convout"])


def test_frozen_parts_are_in_eval_mode_and_dropout_with_them():
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    trained = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model = nn.Sequential(frozen, trained)
    select_trainable(model, ["1"])
    set_training_modes(model)
    assert model.training
    assert not any(module.training for module in frozen.modules())
    assert all(module.training for module in trained.modules())
