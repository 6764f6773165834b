"""The comparison of training steps compares the same work, and counts it right."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def test_both_steps_move_the_autoencoder_alike_and_count_one_pass_apart(tool, monkeypatch):
    comparison = tool("compare_training")
    monkeypatch.setattr(comparison, "peak_memory", lambda *_: 0.0)
    module = comparison.our_module("tiny")
    usual = comparison.two_pass_step(module, CPU)
    batch = comparison.make_batch(32, 1)

    passes = []
    usual.autoencoder.decoder.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(module.draw_seed())  # what our step draws its posterior's sample from
    with comparison.quiet_libraries():
        comparison.fit(module, batch, 1, CPU)
    torch.manual_seed(0)
    usual(batch)
    assert len(passes) == 2
    for a, b in zip(module.autoencoder.parameters(), usual.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)

    with comparison.quiet_libraries():
        result = comparison.compare("tiny", 32, 1, 1, CPU)
    with FlopCounterMode(display=False) as counter:
        comparison.build_autoencoder("tiny")(torch.zeros(1, 3, 32, 32))
    extra = result["usual"]["giga_macs"] - result["ours"]["giga_macs"]
    assert extra == pytest.approx(counter.get_total_flops() / 2e9)
    assert result["predicted"] == result["usual"]["giga_macs"] / result["ours"]["giga_macs"]
    assert len(result["pairs"]) == 1


@pytest.mark.slow
def test_the_command_writes_both_ratios(tool, tmp_path):
    comparison = tool("compare_training")
    arguments = ["--tiny", "--size", "32", "--batch", "1", "--runs", "1", "--threads", "1"]
    command = [sys.executable, comparison.__file__, *arguments, "--json", str(tmp_path / "out.json")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[-1].startswith("speedup ")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["speedup"] > 0
    assert result["predicted"] > 1
    assert result["ours"]["peak_mib"] > 100
