"""Discrete DC-AEs in training: codebooks learn, are used, resumed, skipped with their step, exported and loaded."""

import json

import diffusers
import pytest
import torch

import latentae
from latentae.loading import export
from latentae.objectives import L1, Equivariance, HaarDetail, Term

QUANTIZERS = {
    "ema": {"kind": "vq", "codes": 32, "decay": 0.9},
    "loss": {"kind": "vq", "codes": 32, "codebook": "loss", "decay": 0.9},
    "fsq": {"kind": "fsq", "levels": [4, 4, 3, 3, 3, 3, 3, 3]},
}


def discrete(kind, **options):
    return latentae.create("dc-ae-tiny", quantizer=QUANTIZERS[kind], **options)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_hundred_steps_lower_the_error_and_use_the_codes(runs, folder, tmp_path, kind):
    module = runs.module(autoencoder=discrete(kind), ema=None)
    steps = runs.fit(module, runs.data(folder, dead_leaves=0.0), tmp_path, 100)
    assert ("commitment" in steps[1]) == (kind != "fsq")
    first, last = (sum(steps[i]["l1"] for i in part) / 5 for part in (range(1, 6), range(96, 101)))
    assert last < 0.7 * first
    if kind == "fsq":  # 11,664 codes for 32 latents a step: 300 would be all of the last ten steps
        assert steps[100]["perplexity"] > 100
    else:
        assert steps[100]["codes_used"] > 0.75
        assert steps[100]["perplexity"] > 16


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_trains_in_every_precision_under_transforms(runs, folder, tmp_path, kind, precision):
    module = runs.module(autoencoder=discrete(kind), latent_transforms=[Equivariance(0.6)], objective={"l1": L1()})
    before = module.autoencoder.encoder.conv_out.weight.clone()
    steps = runs.fit(module, runs.data(folder), tmp_path, 4, precision=precision)
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in steps.values())
    assert not torch.equal(module.autoencoder.encoder.conv_out.weight, before), "gradients pass straight through"


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_resumed_run_repeats_and_its_checkpoint_opens(runs, folder, tmp_path, kind):
    def go(name, **options):
        module = runs.module(autoencoder=discrete(kind), accumulate=2)
        steps = runs.fit(module, runs.data(folder), tmp_path / name, 4, **options)
        return module, steps

    module, straight = go("straight")
    with pytest.raises(runs.Crash):
        go("resumed", crash_at=5)
    again, resumed = go("resumed")
    assert {step: straight[step] for step in resumed} == resumed
    for name, value in module.autoencoder.state_dict().items():
        assert torch.equal(again.autoencoder.state_dict()[name], value), name

    opened = latentae.load(tmp_path / "straight")
    assert opened.config.quantizer == QUANTIZERS[kind]
    pixels = runs.pixels(folder, 0)[None]
    module.ema.use_average()
    with torch.no_grad():
        expected = module.autoencoder.eval()(pixels).sample
        assert torch.equal(opened(pixels).sample, expected)
    assert export(opened, tmp_path / "exported") == "DCAE", "AutoencoderDC would not quantise"
    assert json.loads((tmp_path / "exported/config.json").read_text())["quantizer"] == QUANTIZERS[kind]
    assert "latentae.load" in (tmp_path / "exported/README.md").read_text()
    with torch.no_grad():
        assert torch.equal(latentae.load(tmp_path / "exported")(pixels).sample, expected)


class NotFinite(Term):
    """Infinite in the third step."""

    calls = 0

    def measure(self, step):
        self.calls += 1
        return step.reconstruction.mean() * (float("inf") if self.calls == 3 else 0.0)


def test_a_skipped_step_leaves_the_codebook_as_it_was(runs, folder, tmp_path):
    states = []
    module = runs.module(autoencoder=discrete("ema"), objective={"l1": L1(), "broken": NotFinite()}, ema=None)
    ended = module.end_step

    def end_step(values):
        ended(values)
        states.append({name: value.clone() for name, value in module.autoencoder.quantize.state_dict().items()})

    module.end_step = end_step
    runs.fit(module, runs.data(folder), tmp_path, 4)
    assert module.skipped_steps == 1
    for name in ("codebook", "cluster_size", "embedding_sum", "share"):
        assert torch.equal(states[2][name], states[1][name])
        assert not torch.equal(states[3][name], states[2][name])


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_the_codebook_stays_where_the_decoder_alone_trains(runs, folder, tmp_path, kind):
    module = runs.module(autoencoder=discrete(kind), trainable=["decoder"])
    before = {name: value.clone() for name, value in module.autoencoder.quantize.state_dict().items()}
    runs.fit(module, runs.data(folder), tmp_path, 3)
    for name, value in module.autoencoder.quantize.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_stage_with_codes_starts_from_continuous_weights(runs, folder, tmp_path, capsys):
    runs.fit(runs.module(), runs.data(folder), tmp_path / "continuous", 2)
    description = {"preset": "dc-ae-tiny", "quantizer": QUANTIZERS["ema"], "init_from": str(tmp_path / "continuous")}
    module = runs.module(autoencoder=description, objective={"l1": L1(), "haar": HaarDetail(0.5)})
    assert "quantize 0 of 4" in capsys.readouterr().err
    earlier = latentae.load(tmp_path / "continuous").state_dict()
    for name, value in module.autoencoder.state_dict().items():
        assert name.startswith("quantize.") or torch.equal(value, earlier[name])
    assert module.inherited_ema_updates == 2


def test_stock_diffusers_says_that_it_does_not_know_codes(tmp_path, caplog):
    discrete("ema").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DCAE"
    assert not hasattr(diffusers, "DCAE")
