"""Broken images of a run: counted over all workers, shown, and too many of them."""

import io
import tarfile

import numpy as np
import pytest
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
