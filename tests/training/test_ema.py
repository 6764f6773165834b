"""The averaged weights: their closed form, when they are in the model, and what a checkpoint holds."""

import numpy as np
import pytest
import torch
from torch import nn

import latentae
from latentae.training.ema import ModelEMA


def test_the_average_is_its_closed_form():
    """A product of decays for the start, and for each later weight its own (1 - decay) times the decays after it."""
    weights = np.random.default_rng(0).normal(size=(30, 5))
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(weights[0]))})
    ema = ModelEMA(model, decay=0.7)
    for value in weights[1:]:
        model["w"].data.copy_(torch.tensor(value))
        ema.update()
    decays = np.minimum(0.7, (1 + np.arange(29)) / (10 + np.arange(29)))
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)  # product of the decays that follow
    expected = weights[0] * decays.prod() + ((1 - decays) * later) @ weights[1:]
    np.testing.assert_allclose(ema.average["w"].numpy(), expected, rtol=1e-12)
    assert decays.max() == 0.7, "the constant part must have been reached"


def test_exchanging_twice_changes_nothing():
    model = nn.Linear(3, 2)
    ema = ModelEMA(model, 0.9)
    model.weight.data += 1
    ema.update()
    weight, average = model.weight.detach().clone(), ema.average["weight"].clone()
    ema.use_average()
    ema.use_average()
    assert torch.equal(model.weight, average)
    ema.use_weights()
    ema.use_weights()
    assert torch.equal(model.weight, weight)
    assert torch.equal(ema.average["weight"], average)


def test_validation_sees_the_average_and_training_the_weights(runs, folder, tmp_path):
    class Watch(runs.Recorder):
        def on_validation_batch_end(self, trainer, pl_module, *_, **__):
            self.in_validation = pl_module.autoencoder.encoder.conv_out.weight.detach().clone()

        def on_validation_end(self, trainer, pl_module):
            self.after_validation = pl_module.autoencoder.encoder.conv_out.weight.detach().clone()
            self.average = pl_module.ema.average["encoder.conv_out.weight"].clone()

    watch = Watch()
    runs.trainer(tmp_path, 3, watch, val_check_interval=3).fit(runs.module(), runs.data(folder))
    assert torch.equal(watch.in_validation, watch.average)
    assert not torch.equal(watch.after_validation, watch.average)


def test_a_checkpoint_holds_both_and_load_takes_the_average(runs, folder, tmp_path):
    module = runs.module(ema=0.5)
    runs.fit(module, runs.data(folder), tmp_path, 3)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, raw = checkpoint["latentae_ema"], checkpoint["state_dict"]
    name = "decoder.conv_in.weight"
    assert torch.equal(averaged[name], module.ema.average[name])
    assert torch.equal(raw[f"autoencoder.{name}"], module.autoencoder.state_dict()[name])
    assert not torch.equal(averaged[name], raw[f"autoencoder.{name}"])
    loaded = latentae.load(tmp_path).state_dict()
    assert loaded.keys() == averaged.keys()
    assert all(torch.equal(loaded[key], averaged[key]) for key in loaded)


def test_a_crash_in_validation_saves_the_weights_and_not_the_average(runs, folder, tmp_path):
    class CrashInValidation(runs.Recorder):
        def on_validation_batch_end(self, *_, **__):
            raise runs.Crash

    module = runs.module(ema=0.5)
    trainer = runs.trainer(tmp_path, 9, CrashInValidation(), val_check_interval=2)
    with pytest.raises(runs.Crash):
        trainer.fit(module, runs.data(folder))
    interrupted = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    other = runs.module(ema=0.5)
    runs.fit(other, runs.data(folder), tmp_path / "straight", 2)
    straight = torch.load(tmp_path / "straight" / "checkpoints" / "last.ckpt", weights_only=True)
    for key, value in straight["state_dict"].items():
        assert torch.equal(interrupted["state_dict"][key], value)
    for key, value in straight["latentae_ema"].items():
        assert torch.equal(interrupted["latentae_ema"][key], value)


def test_without_averaging_there_is_none(runs, folder, tmp_path):
    runs.fit(runs.module(ema=None), runs.data(folder), tmp_path, 1)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert "latentae_ema" not in checkpoint
    weight = latentae.load(tmp_path).state_dict()["decoder.conv_in.weight"]
    assert torch.equal(weight, checkpoint["state_dict"]["autoencoder.decoder.conv_in.weight"])
