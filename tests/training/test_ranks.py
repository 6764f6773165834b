"""The command on two ranks: one sentence for an error of both, and a signal to one of them ends both."""

import signal
import subprocess
import sys
import time

import pytest
import yaml

RECIPE = {
    "model": {"autoencoder": {"preset": "dc-ae-tiny"}, "objective": {"l1": {"class_path": "L1"}}},
    "data": {"size": 32, "batch_size": 2, "workers": 1, "val_fraction": 0.0},
    "trainer": {"max_steps": 100000, "accelerator": "cpu", "devices": 2, "logger": False},
    "checkpoint": {"every_steps": 5},
}


@pytest.fixture
def command(folder, tmp_path):
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(RECIPE))
    arguments = ["--config", str(tmp_path / "two.yaml"), "--data.path", str(folder), "--run_dir", str(tmp_path / "run")]
    return [sys.executable, "-m", "latentae", "fit", *arguments]


@pytest.mark.slow
def test_ranks_that_fail_together_say_so_once(command):
    diverge = ["--model.optimizer=AdamW", "--model.optimizer.lr=1e30", "--model.max_skipped_steps=2"]
    result = subprocess.run([*command, *diverge], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 3
    assert result.stderr.count("steps in a row were not finite") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_signal_to_the_first_rank_ends_both(command, tmp_path):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/checkpoints/last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.count("Terminated; the same command continues.") == 1
    assert "Traceback" not in errors
