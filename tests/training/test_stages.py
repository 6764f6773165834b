"""`latentae stages`: order, weights handed on, a kill in the second stage, mistakes before anything runs."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
import yaml

from latentae.cli.main import main
from latentae.training.recipes import find_stages, stages_names
from latentae.training.stages import read_stages, stages_command

RECIPE = {
    "model": {
        "autoencoder": {"preset": "dc-ae-tiny"},
        "objective": {"l1": {"class_path": "L1"}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001}},
        "ema": 0.9,
    },
    "data": {"size": 32, "batch_size": 2, "workers": 0, "val_fraction": 0.0},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    "checkpoint": {"every_steps": 2},
}


@pytest.fixture
def stages(tmp_path, folder):
    """Two stages, of which the second trains the decoder's head only, very slowly towards 5000 steps."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    second = {"model": {"trainable": ["decoder.conv_out"]}, "trainer.max_steps": 5000, "data.path": str(folder)}
    listed = [{"config": "tiny.yaml", "run_dir": "a"}, {"config": "tiny.yaml", "run_dir": "b", "overrides": second}]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(listed))
    return ["stages", str(tmp_path / "two.yaml"), "--runs", str(tmp_path), "--data.path", str(folder)]


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
def test_killed_in_the_second_stage_it_goes_on_there(stages, tmp_path):
    command = [sys.executable, "-m", "latentae", *stages]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    last = tmp_path / "b/checkpoints/last.ckpt"
    deadline = time.monotonic() + 300
    while not last.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed_at = checkpoint(tmp_path / "b")["global_step"]
    first = (tmp_path / "a/checkpoints/last.ckpt").stat().st_mtime_ns

    text = (tmp_path / "two.yaml").read_text().replace("5000", str(killed_at + 3))
    (tmp_path / "two.yaml").write_text(text)
    saved = tmp_path / "b/config.yaml"
    saved.write_text(saved.read_text().replace("max_steps: 5000", f"max_steps: {killed_at + 3}"))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "stage 1 of 2" in result.stderr
    assert f"{tmp_path / 'a'}: finished." in result.stderr
    assert f"Continuing {tmp_path / 'b'} from step {killed_at}" in result.stderr
    assert (tmp_path / "a/checkpoints/last.ckpt").stat().st_mtime_ns == first, "the first stage was left alone"

    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert b["global_step"] == killed_at + 3
    assert b["latentae_progress"]["ema_updates"] == a["global_step"] + b["global_step"], "the average goes on"
    for name, average in a["latentae_ema"].items():  # the frozen rest is the first stage's average, bit for bit
        assert torch.equal(average, b["latentae_ema"][name]) == ("decoder.conv_out" not in name), name


@pytest.mark.slow
def test_an_interrupt_of_the_command_alone_ends_the_stage(stages, tmp_path):
    endless = (tmp_path / "two.yaml").read_text().replace("5000", "500000")  # the command waits before it passes it on
    (tmp_path / "two.yaml").write_text(endless)
    process = subprocess.Popen(
        [sys.executable, "-m", "latentae", *stages],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "b/checkpoints/last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "ended with exit code 130; the same command continues here." in errors


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_command_with_its_exit_code(stages, tmp_path, capfd):
    assert main([*stages, "--model.optimizer.lr", "1e30", "--model.max_skipped_steps", "2"]) == 3
    errors = capfd.readouterr().err
    assert "steps in a row were not finite" in errors
    assert not (tmp_path / "b").exists()


def test_every_configuration_is_checked_before_the_first_stage(stages, tmp_path, capsys):
    text = (tmp_path / "two.yaml").read_text()
    for wrong, message in [
        (text.replace("trainable", "trainabel"), "stage 2 of 2: model.trainabel is unknown; did you mean trainable?"),
        (text.replace("run_dir: b", "run_dir: a"), "of an earlier stage"),
        (text.replace("run_dir: b", "rundir: b"), "stage 2 has no key 'rundir'; did you mean run_dir?"),
        (text.replace("config: tiny.yaml", "config: tyni.yaml"), "no recipe 'tyni.yaml'"),
        ("a: b", "is no list of stages"),
        ("- [", "is not YAML"),
    ]:
        (tmp_path / "two.yaml").write_text(wrong)
        assert main(stages) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert message in errors
    assert main(["stages"]) == 2
    assert main(["stages", "nothing"]) == 2
    assert main(["stages", "dcae/f32c32", "--run_dir", "x"]) == 2
    assert not (tmp_path / "a").exists()


def test_a_dry_run_says_what_is_left(stages, tmp_path, capsys):
    assert main([*stages, "--dry-run"]) == 0
    assert "stage 2 of 2" in (said := capsys.readouterr().err)
    assert "5000 steps to do" in said
    assert not (tmp_path / "a").exists()


def test_later_stages_start_from_the_run_before(tmp_path):
    numbers = {"dcae/f128c512": 3, "dcae/f32c32": 3, "dcae/f64c128": 3, "dito/onto-sd-vae": 2, "litevae/b-f8c12": 2}
    assert stages_names() == list(numbers)
    for name, number in numbers.items():
        first, *later = read_stages(find_stages(name), tmp_path, ["--data.path=x"])
        assert len(later) == number - 1
        assert not any("init_from" in word for word in first.arguments)
        for before, after in pairwise([first, *later]):
            assert f"--model.autoencoder.init_from={before.run_dir}" in after.arguments
        assert stages_command([name, "--runs", str(tmp_path), "--data.path", "x", "--dry-run"]) == 0


def test_before_in_overrides_is_the_folder_of_the_run_before(stages, tmp_path):
    file = tmp_path / "two.yaml"
    overrides = "{data: {val_path: '{before}/x'}}"
    file.write_text(f"{file.read_text()}- {{config: tiny.yaml, run_dir: c, overrides: {overrides}}}\n")
    *_, last = read_stages(file, tmp_path / "runs", [])
    assert f"--data.val_path={tmp_path / 'runs/b'}/x" in last.arguments
    second = read_stages(find_stages("dito/onto-sd-vae"), tmp_path, [])[1]
    assert f"--model.denoising.teacher={tmp_path / 'onto-sd-vae-phase1'}" in second.arguments
