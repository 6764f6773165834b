"""A run that dies anywhere and is started again repeats the uninterrupted run bit for bit."""

import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import latentae
from latentae.errors import DataError
from latentae.objectives import Adversary, PatchGAN, Term
from latentae.training.cli import fit_command

LAST = "checkpoints/last.ckpt"


def assert_same(a, b, where=""):
    """Two nested structures of tensors and plain values, equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_state(one, other):
    """Weights, averaged weights, both optimizers and the position of two checkpoints."""
    first, second = (torch.load(run / LAST, weights_only=True) for run in (one, other))
    for key in ("state_dict", "latentae_ema", "optimizer_states", "latentae_progress", "global_step"):
        assert_same(first[key], second[key], key)


@pytest.mark.parametrize(
    ("accumulate", "crashes", "workers"),
    [(1, [1], 0), (1, [3, 1], 2), (2, [5], 0), (2, [3, 4], 2), (3, [6], 0)],
    ids=["first step", "two crashes and workers", "in mid-window", "in mid-window with workers", "end of a window"],
)
def test_a_crashed_run_repeats_the_uninterrupted_one(runs, folder, tmp_path, accumulate, crashes, workers):
    """With a GAN that starts late, averaging and accumulation; an epoch has four images, so all runs cross epochs."""
    steps = 5

    def go(run_dir, **options):
        module = runs.module(runs.adversary(start_step=2, warmup_steps=1), accumulate=accumulate)
        return runs.fit(module, runs.data(folder, workers=options.pop("workers", 0)), run_dir, steps, **options)

    straight = go(tmp_path / "straight")
    resumed = {}
    for crash_at in crashes:
        with pytest.raises(runs.Crash):
            go(tmp_path / "resumed", crash_at=crash_at, workers=workers)
    resumed = go(tmp_path / "resumed", workers=workers)

    done_before = sum(crash // accumulate for crash in crashes)
    assert list(resumed) == list(range(done_before + 1, steps + 1))
    assert {step: straight[step] for step in resumed} == resumed
    assert_same_state(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("crash_at", [3, 5])
def test_running_statistics_of_half_a_step_are_not_kept(runs, folder, tmp_path, crash_at):
    """BatchNorm moves in the forward pass, before it is known whether the step counts."""

    def go(run_dir, **options):
        autoencoder = latentae.create("dc-ae-tiny", decoder_norm_types="batch_norm")
        torch.manual_seed(3)
        adversary = Adversary(PatchGAN(channels=8, layers=2, norm="batch"), weight=0.1)
        module = runs.module(adversary, accumulate=2, autoencoder=autoencoder)
        return runs.fit(module, runs.data(folder), run_dir, 4, **options)

    go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=crash_at)
    go(tmp_path / "resumed")
    assert_same_state(tmp_path / "straight", tmp_path / "resumed")


def test_a_skipped_step_leaves_running_statistics_as_they_were(runs, folder, tmp_path):
    class Poisoned(Term):
        def measure(self, step):
            return step.reconstruction.mean() * float("nan")

    autoencoder = latentae.create("dc-ae-tiny", decoder_norm_types="batch_norm")
    before = {name: buffer.clone() for name, buffer in autoencoder.named_buffers()}
    assert before
    module = runs.module(objective={"poison": Poisoned()}, autoencoder=autoencoder, max_skipped_steps=2)
    with pytest.raises(DataError, match="poison"):
        runs.fit(module, runs.data(folder), tmp_path / "run", 4)
    for name, buffer in autoencoder.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_skipped_steps_are_counted_across_a_crash(runs, folder, tmp_path):
    """A skipped step takes its samples but no global step; the position does not lose them."""

    class Poisoned(Term):
        def measure(self, step):
            return step.reconstruction.mean() * (float("nan") if torch.rand(()) < 0.5 else 1.0)

    def go(run_dir, **options):
        module = runs.module(objective={"poison": Poisoned()}, max_skipped_steps=100)
        return runs.fit(module, runs.data(folder), run_dir, 4, **options)

    straight = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=4)
    resumed = go(tmp_path / "resumed")
    progress = torch.load(tmp_path / "straight" / LAST)["latentae_progress"]
    assert progress["skipped_steps"] > 0
    assert progress["samples_seen"] == 2 * (4 + progress["skipped_steps"])
    assert str(resumed[4]) == str(straight[4])
    assert_same_state(tmp_path / "straight", tmp_path / "resumed")


RECIPE = {
    "model": {
        "autoencoder": {"preset": "dc-ae-tiny"},
        "objective": {"l1": {"class_path": "L1"}},
        "adversary": {"discriminator": {"class_path": "PatchGAN", "init_args": {"channels": 8, "layers": 2}}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001}},
    },
    "data": {"size": 32, "batch_size": 2, "workers": 1, "val_fraction": 0},
    "trainer": {"max_steps": 60, "accelerator": "cpu"},
    "checkpoint": {"every_steps": 5},
}


def test_the_command_survives_kill_and_terminate(runs, folder, tmp_path):
    """SIGKILL, then SIGTERM, then the same command to the end, against one undisturbed run."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    run_dir = tmp_path / "killed"
    arguments = ["--config", str(recipe), "--data.path", str(folder), "--run_dir"]
    main = (
        "import sys, torch; torch.set_num_threads(1); from latentae.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", main, "fit", *arguments, str(run_dir)]

    def start_and_send(number, after_step):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while step_of(run_dir / LAST) <= after_step:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    code, _ = start_and_send(signal.SIGKILL, after_step=0)
    killed_at = step_of(run_dir / LAST)
    assert code == -signal.SIGKILL
    assert killed_at % 5 == 0
    assert killed_at < 60

    code, errors = start_and_send(signal.SIGTERM, after_step=killed_at)
    terminated_at = step_of(run_dir / LAST)
    assert code == 128 + signal.SIGTERM, errors
    assert killed_at < terminated_at < 60
    assert "the same command continues" in errors

    assert fit_command([*arguments, str(run_dir)]) == 0
    assert fit_command([*arguments, str(tmp_path / "straight")]) == 0
    assert_same_state(tmp_path / "straight", run_dir)


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.is_file() else -1
