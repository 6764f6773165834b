"""The comparison of wavelet transforms compares equal results."""

import json
import subprocess
import sys

import pytest


def test_every_way_gives_the_same_bands_and_gradients(tool, monkeypatch):
    comparison = tool("compare_wavelet")
    monkeypatch.setattr(comparison.torch, "compile", lambda function, **_: function)  # needs a C++ compiler
    rows = comparison.compare(size=16, batch=1, levels=2, runs=1)
    tasks = {(row["task"], row["way"]) for row in rows}
    for task in ("forward", "forward and backward"):
        assert {(task, comparison.OURS), (task, comparison.GROUPED)} <= tasks
    assert ("forward", comparison.PYWT) in tasks
    assert max(row["difference"] for row in rows) < 1e-5
    assert comparison.summary(rows).startswith("speedup, eager / compiled: forward against pywt ")


def test_a_wrong_way_would_show(tool, monkeypatch):
    comparison = tool("compare_wavelet")
    monkeypatch.setattr(comparison.torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(comparison, "BLOCKS", -comparison.BLOCKS)
    rows = comparison.compare(size=16, batch=1, levels=1, runs=1)
    assert {row["way"] for row in rows if row["difference"] > 0.1} == {
        comparison.GROUPED,  # forward against PyWavelets
        *(row["way"] for row in rows if row["task"] == "forward and backward" and row["way"] != comparison.GROUPED),
    }


@pytest.mark.slow
def test_the_command_ends_with_a_summary(tool, tmp_path):
    command = [sys.executable, tool("compare_wavelet").__file__, "--size", "16", "--batch", "1", "--runs", "1"]
    output = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], check=True, capture_output=True, text=True
    )
    assert output.stdout.splitlines()[-1].startswith("speedup, eager / compiled: ")
    assert json.loads((tmp_path / "out.json").read_text())["levels"] == 3
