"""Small runs: dc-ae-tiny on a few generated images, a narrow PatchGAN, a trainer as the command line builds it."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

import latentae
from latentae.objectives import L1, Adversary, FlowMatching, HaarDetail, PatchGAN
from latentae.training.autoencoder import AutoencoderModule
from latentae.training.callbacks import AtomicCheckpointIO, Checkpoints
from latentae.training.cli import TRAINER_DEFAULTS, quiet_libraries
from latentae.training.datamodule import ImageData


class Crash(Exception):
    """A stand-in for whatever kills a run."""


class Recorder(pl.Callback):
    """Every value of every step, exactly; ends the run as a crash before batch ``crash_at`` would."""

    def __init__(self, crash_at=None):
        self.steps = {}
        self.crash_at = crash_at
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.batches == self.crash_at:
            raise Crash
        self.batches += 1

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.window.batches == 0:
            self.steps[trainer.global_step] = {name: float(value) for name, value in pl_module.last_values.items()}


def make_adversary(**options):
    torch.manual_seed(3)
    return Adversary(PatchGAN(channels=8, layers=2), **{"weight": 0.1, "lecam": 0.0, **options})


def make_module(adversary=None, **options):
    """A tiny autoencoder in training, with the same initial weights every time."""
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), **options}
    objective = options.pop("objective", None) or {"l1": L1(), "haar": HaarDetail(0.5)}
    autoencoder = options.pop("autoencoder", None) or latentae.create("dc-ae-tiny")
    return AutoencoderModule(autoencoder, objective, adversary, **options)


def make_trainer(run_dir, max_steps, *callbacks, checkpoints=None, **options):
    return pl.Trainer(
        **{**TRAINER_DEFAULTS, "max_steps": max_steps, "accelerator": "cpu", "logger": False, **options},
        default_root_dir=run_dir,
        enable_progress_bar=False,
        callbacks=[checkpoints or Checkpoints(every_steps=10**6), *callbacks],
        plugins=[AtomicCheckpointIO()],
    )


def make_data(folder, **options):
    return ImageData(str(folder), **{"size": 32, "batch_size": 2, "workers": 0, "dead_leaves": 0.3, **options})


def fit(module, data, run_dir, max_steps, crash_at=None, **options):
    """Train in ``run_dir``, from its last checkpoint if it has one; returns the values of every step."""
    recorder = Recorder(crash_at)
    trainer = make_trainer(run_dir, max_steps, recorder, **options)
    last = run_dir / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.is_file() else None)
    return recorder.steps


def read_pixels(folder, index):
    """The middle of an image as floats in [-1, 1], (3, 32, 32)."""
    image = np.asarray(Image.open(folder / f"{index}.png"))[8:40, 16:48]
    return torch.from_numpy(image.copy()).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture
def runs():
    """The functions above, on one thread, which is fastest for nets this small and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet_libraries():
        yield SimpleNamespace(
            Crash=Crash,
            Recorder=Recorder,
            adversary=make_adversary,
            module=make_module,
            trainer=make_trainer,
            data=make_data,
            fit=fit,
            quiet=quiet_libraries,
            pixels=read_pixels,
        )
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Five smooth images of which an epoch is soon over, so that short runs cross epochs."""
    folder = tmp_path_factory.mktemp("images")
    y, x = np.mgrid[:48, :64]
    for i in range(5):
        image = np.stack([127 + 120 * np.sin(x / (4 + i) + y / (7 + c) + i) for c in range(3)], -1)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def dito_run(tmp_path_factory, folder):
    """A run of DiTo that predicts the image, which learns fastest: 60 steps."""
    run_dir = tmp_path_factory.mktemp("dito")
    module = make_module(
        autoencoder={"preset": "dito-tiny", "prediction": "x0"},
        objective={"flow": FlowMatching(weighting="x0")},
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
        ema=0.95,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet_libraries():
        fit(module, make_data(folder, batch_size=8, dead_leaves=0.0), run_dir, 60)
    torch.set_num_threads(threads)
    return run_dir
