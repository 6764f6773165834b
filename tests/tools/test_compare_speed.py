"""The comparison of speeds compares equal outputs, and says so when they are not."""

import json
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def comparison(tool, monkeypatch):
    module = tool("compare_speed")
    monkeypatch.setattr(module, "SD_VAE", module.SD_VAE | {"block_out_channels": (32,) * 4, "layers_per_block": 1})
    monkeypatch.setattr(module, "peak_memory", lambda *_: {"peak": 2**30, "added": 2**20})
    with torch.no_grad():
        yield module


def test_encoders_of_litevae_are_those_of_float64(comparison):
    rows = comparison.compare_litevae(["litevae-tiny"], [32], [1, 2], runs=1, dtype=torch.float32)
    assert [(row["size"], row["batch"]) for row in rows] == [(32, 1), (32, 2)]
    assert all(0 < row["relative_difference"] < 1e-4 and row["speedup"] > 0 for row in rows)
    summary = comparison.summarise_litevae(rows)
    assert summary.startswith("speedup of encoders, geometric mean: litevae-tiny ")
    assert summary.endswith("1.00x less memory at batch 2")


def test_dc_ae_computes_what_stock_computes(comparison):
    rows = comparison.compare_dcae(["dc-ae-tiny"], 32, runs=1, dtype=torch.float32)
    assert [row["task"] for row in rows] == ["encode", "decode"]
    assert max(row["relative_difference"] for row in rows) < 1e-5


def test_unequal_outputs_would_show(comparison, monkeypatch):
    original = comparison.build

    def other_weights(which, dtype):
        model = original(which, dtype)
        if which == "dc-ae-tiny":
            model.decoder.conv_out.register_forward_hook(lambda module, inputs, output: output * 1.01)
        return model

    monkeypatch.setattr(comparison, "build", other_weights)
    rows = comparison.compare_dcae(["dc-ae-tiny"], 32, runs=1, dtype=torch.float32)
    assert rows[0]["relative_difference"] < 1e-5 < 1e-3 < rows[1]["relative_difference"]


@pytest.mark.slow
def test_the_command_ends_with_a_summary(tool, tmp_path):
    command = [sys.executable, tool("compare_speed").__file__, "dcae", "--presets", "dc-ae-tiny", "--size", "32"]
    output = subprocess.run(
        [*command, "--runs", "1", "--json", str(tmp_path / "out.json")], check=True, capture_output=True, text=True
    )
    assert output.stdout.splitlines()[-1].startswith("speedup: dc-ae-tiny encode ")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert all(0 < row["ours_peak_gib"] < 4 for row in rows)
