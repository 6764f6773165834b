"""Broken images of a run: counted over all workers, shown, and too many of them."""

import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image

from latentae.errors import DataError
from latentae.training.callbacks import BrokenImages


def write_tar(path, broken, count=40):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "png")
            data = b"<html>" if i in broken else stream.getvalue()
            member = tarfile.TarInfo(f"{i:02d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def data_of(runs, path, **options):
    return runs.data(path, val_fraction=0.0, dead_leaves=0.0, workers=2, batch_size=4, **options)


def test_broken_images_are_counted_over_all_workers_and_logged(runs, tmp_path, capsys):
    counter = BrokenImages()
    data = data_of(runs, write_tar(tmp_path / "x.tar", {3, 4, 30}), max_bad=0.1)
    trainer = runs.trainer(tmp_path, 10, counter)  # one epoch
    trainer.fit(runs.module(), data)
    assert counter.met == {3, 4, 30}
    assert int(trainer.callback_metrics["data/broken_images"]) == 3
    assert "3 of 40 images are broken" in capsys.readouterr().err


def test_workers_that_each_meet_few_stop_together(runs, tmp_path):
    path = write_tar(tmp_path / "x.tar", set(range(0, 40, 5)))
    runs.trainer(tmp_path / "alone", 10).fit(runs.module(), data_of(runs, path, max_bad=0.17))
    with pytest.raises(DataError, match=r"[78] of 40 images cannot be decoded"):
        runs.trainer(tmp_path / "together", 10, BrokenImages()).fit(runs.module(), data_of(runs, path, max_bad=0.17))


def command_of(tmp_path, path):
    recipe = {
        "model": {"autoencoder": {"preset": "dc-ae-tiny"}, "objective": {"l1": {"class_path": "L1"}}},
        "data": {"path": str(path), "size": 32, "batch_size": 2, "workers": 1, "val_fraction": 0.0},
        "trainer": {"max_steps": 50, "accelerator": "cpu", "logger": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    config = ["--config", str(tmp_path / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    return [sys.executable, "-m", "latentae", "fit", *config]


def test_a_command_whose_workers_fail_ends_with_one_sentence(tmp_path):
    """Python waits for workers at its end, and ours ignore the signal that should end them."""
    command = command_of(tmp_path, write_tar(tmp_path / "x.tar", range(39)))
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
