"""Checkpoints: whole or absent, plain data, opened by `latentae.load`, kept when the disk is full."""

import errno
import resource

import pytest
import torch

import latentae
from latentae.errors import DataError, RequestError, explain_os_error
from latentae.objectives import L1
from latentae.training.callbacks import AtomicCheckpointIO, Checkpoints

LAST = "checkpoints/last.ckpt"


def test_it_opens_as_plain_data_and_builds_the_autoencoder(runs, folder, tmp_path):
    module = runs.module(runs.adversary(), ema=None)
    runs.fit(module, runs.data(folder), tmp_path, 2)
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["latentae"]["class_name"] == "DCAE"
    assert checkpoint["latentae"]["format"] == 1
    assert checkpoint["global_step"] == 2
    assert checkpoint["latentae_progress"]["samples_seen"] == 4
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    for source in (tmp_path, tmp_path / LAST):
        loaded = latentae.load(source)
        torch.testing.assert_close(loaded(pixels).sample, module.autoencoder.eval()(pixels).sample, rtol=0, atol=0)


def test_the_last_is_written_regularly_and_some_are_kept(runs, folder, tmp_path):
    seen = {}

    class Watch(runs.Recorder):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.global_step] = self.step_of_last()

        def step_of_last(self):
            path = tmp_path / LAST
            return torch.load(path, weights_only=True)["global_step"] if path.is_file() else None

    trainer = runs.trainer(tmp_path, 7, Watch(), checkpoints=Checkpoints(every_steps=2, keep_every=4))
    trainer.fit(runs.module(), runs.data(folder))
    assert seen == {1: None, 2: None, 3: 2, 4: 2, 5: 4, 6: 4, 7: 6}  # a callback before the one that saves
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 7
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "step-00000004.ckpt"}
    assert torch.load(tmp_path / "checkpoints/step-00000004.ckpt", weights_only=True)["global_step"] == 4


def test_the_best_by_a_metric_is_kept_across_a_resume(runs, folder, tmp_path):
    def go(max_steps):
        checkpoints = Checkpoints(every_steps=1, monitor="val/l1", mode="min")
        trainer = runs.trainer(tmp_path, max_steps, checkpoints=checkpoints, val_check_interval=1)
        last = tmp_path / LAST
        trainer.fit(runs.module(ema=None), runs.data(folder), ckpt_path=last if last.is_file() else None)
        return checkpoints.best, trainer.callback_metrics["val/l1"].item()

    best, value = go(3)
    assert best <= value
    step = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    later, value = go(4)
    assert later == min(best, value)
    assert torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["global_step"] == (
        step if later == best else 4
    )


class LimitedDisk:
    """Lets no file grow beyond a size, as a full disk would."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, size):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.ones(100_000)}, path)
    with LimitedDisk(size), pytest.raises(OSError, match="last") as caught:
        io.save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert caught.value.errno == errno.EFBIG
    assert explain_os_error(caught.value).exit_code == 4
    assert str(path) in str(explain_os_error(caught.value))
    assert torch.equal(io.load_checkpoint(path)["weights"], torch.ones(100_000))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_stopped_by_a_full_disk_continues(runs, folder, tmp_path):
    class FillTheDisk(runs.Recorder):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    trainer = runs.trainer(tmp_path / "full", 6, FillTheDisk(), checkpoints=Checkpoints(every_steps=2))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt"):
            trainer.fit(runs.module(), runs.data(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.load(tmp_path / "full" / LAST, weights_only=True)["global_step"] == 2
    resumed = runs.fit(runs.module(), runs.data(folder), tmp_path / "full", 6)
    straight = runs.fit(runs.module(), runs.data(folder), tmp_path / "straight", 6)
    assert resumed[6] == straight[6]


def test_a_crash_in_mid_update_saves_nothing(runs, folder, tmp_path):
    """The autoencoder has moved and the discriminator has not: the last whole state is the checkpoint before."""
    module = runs.module(runs.adversary())
    trainer = runs.trainer(tmp_path, 5, checkpoints=Checkpoints(every_steps=2))

    def crash(*_):
        if trainer.global_step == 4:
            raise runs.Crash

    module.adversary.optimizer = lambda parameters: _CrashingSGD(parameters, crash)
    with pytest.raises(runs.Crash):
        trainer.fit(module, runs.data(folder))
    assert module.mid_update
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2


class _CrashingSGD(torch.optim.SGD):
    def __init__(self, parameters, crash):
        super().__init__(parameters, lr=0.1)
        self.crash = crash

    def step(self, closure=None):
        self.crash()
        return super().step(closure)


def test_an_exception_before_the_first_step_saves_nothing(runs, folder, tmp_path):
    with pytest.raises(runs.Crash):
        runs.fit(runs.module(), runs.data(folder), tmp_path, 3, crash_at=0)
    assert not (tmp_path / LAST).exists()


def test_weights_that_are_not_finite_reach_no_checkpoint(runs, folder, tmp_path):
    class Break(runs.Recorder):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                pl_module.autoencoder.decoder.conv_in.weight.data[0] = float("nan")

    trainer = runs.trainer(tmp_path, 5, Break(), checkpoints=Checkpoints(every_steps=1))
    with pytest.raises(DataError, match=r"decoder.conv_in.weight .* not finite"):
        trainer.fit(runs.module(), runs.data(folder))
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2


def test_a_later_stage_starts_from_an_earlier_one(runs, folder, tmp_path, capsys):
    from latentae.training.autoencoder import AutoencoderModule

    earlier = runs.module(ema=0.5)
    runs.fit(earlier, runs.data(folder), tmp_path, 2)
    stage = AutoencoderModule({"preset": "dc-ae-tiny", "init_from": str(tmp_path)}, {"l1": L1()})
    wanted = latentae.load(tmp_path).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in stage.autoencoder.state_dict().items())
    count = len(wanted)
    assert f"took {count} of {count} tensors" in capsys.readouterr().err


def test_what_an_earlier_stage_lacks_is_named(tmp_path, capsys):
    from latentae.training.start import build_autoencoder

    latentae.create("dc-ae-tiny").save_pretrained(tmp_path)
    build_autoencoder({"preset": "dc-ae-tiny", "latent_channels": 4, "init_from": str(tmp_path)})
    said = capsys.readouterr().err
    assert "left as they were: " in said
    assert "encoder.conv_out.weight" in said
    assert "decoder.conv_in.weight" in said


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "needs one of preset, pretrained, diffusers; it has nothing"),
        ({"presett": "dc-ae-tiny"}, "'presett', which is neither"),
        ({"preset": "dc-ae-tiny", "pretrained": "x"}, "it has preset, pretrained"),
        ({"preset": "dc-ae-tinny"}, "dc-ae-tiny"),
        ({"preset": "dc-ae-tiny", "latent_chanels": 4}, "'latent_chanels' .* did you mean latent_channels"),
        ({"pretrained": "x", "latent_channels": 4}, "no key 'latent_channels' for pretrained x"),
        ({"pretrained": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_descriptions_that_describe_nothing(description, message):
    from latentae.training.start import build_autoencoder

    with pytest.raises(RequestError, match=message):
        build_autoencoder(description)
