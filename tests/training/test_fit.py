"""The two commands in one process: a run, its continuation, changed configurations, validation, shipped recipes."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import lpips
import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

import latentae
from latentae.cli.main import main
from latentae.data.images import ImageDataset
from latentae.errors import MissingWeights, RequestError
from latentae.files import sha256_file
from latentae.nn.pixels import to_float, to_uint8
from latentae.training.cli import CommandLine, fit_command, quiet_libraries, validate_command
from latentae.training.datamodule import ImageData
from latentae.training.optimization import select_trainable
from latentae.training.recipes import FOLDERS, find_recipe, recipe_names
from latentae.training.start import build_autoencoder
from latentae.weights import WEIGHT_FILES

RECIPE = {
    "model": {
        "autoencoder": {"preset": "dc-ae-tiny"},
        "objective": {"l1": {"class_path": "L1"}, "msssim": {"class_path": "MSSSIM", "init_args": {"weight": 0.1}}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001}},
    },
    "data": {"size": 32, "batch_size": 2, "workers": 0},
    "trainer": {"max_steps": 4, "accelerator": "cpu", "val_check_interval": 2, "log_every_n_steps": 1},
}


@pytest.fixture
def arguments(tmp_path, folder):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return ["--config", str(recipe), "--data.path", str(folder), "--run_dir", str(tmp_path / "run")]


def test_a_run_leaves_a_model_pictures_logs_and_its_configuration(arguments, tmp_path, capsys):
    assert fit_command(arguments) == 0
    run = tmp_path / "run"
    printed = capsys.readouterr()
    assert {line.split()[0] for line in printed.out.splitlines()[2:]} == {"l1", "msssim", "psnr", "ssim"}
    assert "run is finished: 4 steps" in printed.err

    assert latentae.load(run).latent_channels == 8
    pictures = sorted(path.name for path in (run / "samples").iterdir())
    assert pictures == ["step-00000002.png", "step-00000004.png"]
    assert np.asarray(Image.open(run / "samples" / pictures[0])).shape == (32, 7 * 34 - 2, 3)  # one held-out image
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["objective"]["l1"]["init_args"] == {"weight": 1.0}
    assert saved["trainer"]["max_steps"] == 4
    assert "run_dir" not in saved

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = [EventAccumulator(str(path)).Reload() for path in (run / "tensorboard").glob("events*")]
    scalars = {tag: [e.step for e in a.Scalars(tag)] for a in events for tag in a.Tags()["scalars"]}
    assert scalars["train/l1"] == [1, 2, 3, 4]
    assert {"val/psnr", "val/msssim", "train/gradient_norm", "train/learning_rate"} <= scalars.keys()
    assert any("reconstructions" in a.Tags()["images"] for a in events)


def test_the_same_command_says_that_the_run_is_finished(arguments, tmp_path, capsys):
    fit_command(arguments)
    before = (tmp_path / "run/checkpoints/last.ckpt").stat().st_mtime_ns
    capsys.readouterr()
    assert fit_command(arguments) == 0
    assert "is finished: 4 of 4 steps are done" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/last.ckpt").stat().st_mtime_ns == before


def test_a_changed_configuration_is_refused_with_the_difference(arguments):
    fit_command(arguments)
    with pytest.raises(RequestError, match=r"-data.size: 32; \+data.size: 64.*--fork"):
        fit_command([*arguments, "--data.size", "64"])
    with pytest.raises(RequestError, match=r"\+model.objective.haar.class_path"):
        fit_command([*arguments, "--model.objective.haar", "HaarDetail"])
    assert fit_command([*arguments, "--data.workers", "1"]) == 0, "workers change nothing"


def test_a_fork_continues_under_the_new_configuration(arguments, tmp_path):
    """Longer training, and a learning rate that the old optimizer state must not bring back."""
    fit_command(arguments)
    longer = [*arguments, "--trainer.max_steps", "6", "--model.optimizer.lr", "0.0", "--fork"]
    before = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert fit_command(longer) == 0
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert after["global_step"] == 6
    assert all(torch.equal(before["state_dict"][key], value) for key, value in after["state_dict"].items())
    assert fit_command([word for word in longer if word != "--fork"]) == 0, "the fork's configuration is now the run's"


def test_a_fork_that_the_checkpoint_does_not_fit_is_refused(arguments):
    fit_command(arguments)
    discriminator = ["--model.adversary.discriminator", "PatchGAN", "--trainer.max_steps", "6", "--fork"]
    with pytest.raises(RequestError, match=r"does not fit the changed configuration .*init_from"):
        fit_command([*arguments, *discriminator])


def test_a_damaged_checkpoint_is_named(arguments, tmp_path):
    fit_command(arguments)
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(RequestError, match=r"last\.ckpt cannot be read"):
        fit_command(arguments)


def test_a_longer_run_is_the_same_run(arguments, tmp_path, folder):
    """A finished run that a fork extends gives the weights of one that was longer from the start."""
    fit_command(arguments)
    fit_command([*arguments, "--trainer.max_steps", "7", "--fork"])
    fit_command([*arguments[:-1], str(tmp_path / "straight"), "--trainer.max_steps", "7"])
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("run", "straight")
    )
    for key in ("state_dict", "latentae_ema"):
        assert all(torch.equal(one[key][name], value) for name, value in other[key].items())


def test_validate_prints_what_an_independent_evaluation_finds(arguments, tmp_path, photo_folder, capsys):
    fit_command(arguments)
    capsys.readouterr()
    assert validate_command(["--run_dir", str(tmp_path / "run"), "--data.val_path", str(photo_folder)]) == 0
    values = dict(line.split() for line in capsys.readouterr().out.splitlines()[2:])

    from skimage.metrics import peak_signal_noise_ratio

    from latentae.data.decode import decode_image
    from latentae.data.transforms import adm_center_crop

    autoencoder = latentae.load(tmp_path / "run")
    psnr, l1 = [], []
    for path in photo_folder.rglob("*.*"):
        image = adm_center_crop(decode_image(path.read_bytes()), 32)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            reconstruction = autoencoder(pixels).sample
        rounded = np.floor(reconstruction[0].permute(1, 2, 0).numpy() * 127.5 + 128).clip(0, 255).astype(np.uint8)
        psnr.append(peak_signal_noise_ratio(image, rounded))
        l1.append((reconstruction - pixels).abs().mean().item())
    assert float(values["psnr"]) == pytest.approx(np.mean(psnr), rel=1e-3)
    assert float(values["l1"]) == pytest.approx(np.mean(l1), rel=1e-3)


def test_a_run_from_an_earlier_stage_resumes_more_than_once(arguments, tmp_path):
    """Its configuration keeps saying where it began, also once the checkpoint has taken that over."""
    fit_command(arguments)
    start = ["--model.autoencoder.init_from", str(tmp_path / "run")]
    second = [*arguments[:-1], str(tmp_path / "second"), *start]
    for steps in ("2", "3", "4"):
        assert fit_command([*second, "--trainer.max_steps", steps, *(["--fork"] if steps != "2" else [])]) == 0
        saved = yaml.safe_load((tmp_path / "second/config.yaml").read_text())
        assert saved["model"]["autoencoder"]["init_from"] == str(tmp_path / "run")
    assert fit_command([*second, "--trainer.max_steps", "4"]) == 0


def test_validate_prints_every_size(arguments, tmp_path, capsys):
    fit_command([*arguments, "--data.val_sizes", "[32, 64]", "--checkpoint.monitor", "val/psnr@64"])
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
    assert {"psnr@32", "psnr@64", "l1@32", "l1@64"} <= names
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert {path.name.split("@")[1] for path in (tmp_path / "run/samples").iterdir()} == {"32.png", "64.png"}


def test_validate_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(RequestError, match=r"config\.yaml"):
        validate_command(["--run_dir", str(tmp_path / "none")])


def test_the_demo_trains_on_bundled_photos(tmp_path):
    arguments = ["--config", "demo", "--trainer.max_steps", "1", "--data.workers", "0", "--data.size", "32"]
    assert fit_command([*arguments, "--run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]) == 0
    assert latentae.load(tmp_path / "run").latent_channels == 16


def test_a_length_is_asked_for(arguments):
    with pytest.raises(RequestError, match=r"--trainer\.max_steps"):
        fit_command([*arguments, "--trainer.max_steps", "-1"])


def test_a_recipe_is_asked_for():
    with pytest.raises(RequestError, match=r"--config: a file, or one of .*demo"):
        fit_command(["--data.path", "photos"])


def test_a_trainer_that_cannot_be_is_one_sentence(arguments):
    with pytest.raises(RequestError, match="trainer: You selected an invalid strategy name"):
        fit_command([*arguments, "--trainer.strategy", "foo"])


def test_lightning_s_own_options_name_ours(arguments):
    with pytest.raises(RequestError, match="gradient"):
        fit_command([*arguments, "--trainer.gradient_clip_val", "1.0"])


EXIT_CODES = {
    3: ["--model.optimizer.lr", "1e30", "--model.max_skipped_steps", "2", "--trainer.max_steps", "20"],
    2: ["--model.trainable", "[decoder.konv_out]"],
}


@pytest.mark.parametrize("code", EXIT_CODES)
def test_exit_codes_and_one_line(arguments, code, capsys):
    outer = signal.getsignal(signal.SIGTERM)
    assert main(["fit", *arguments, *EXIT_CODES[code]]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert ("steps in a row" if code == 3 else "did you mean decoder.conv_out?") in errors[0]
    signal.signal(signal.SIGTERM, outer)


WEIGHTS_THAT_ARE_NOT_HERE = ("init_from", "decoder_of", "encoder_of")


def test_every_shipped_recipe_is_understood():
    assert {"demo", "dcae/f32c32-phase1", "dcae/f32c32-phase2", "dcae/f32c32-phase3"} <= set(recipe_names())
    with quiet_libraries():
        for name in recipe_names():
            config = CommandLine(["--config", name]).config
            header = find_recipe(name).read_text()
            assert all(word in header for word in ("# Command:", "# Hardware:", "# Expect:"))
            if "denoiser" in config.model:
                continue  # built in test_latent_diffusion.py
            if "pretrained" in config.model.autoencoder:  # weights that are not here
                continue
            with torch.device("meta"):
                given = {k: v for k, v in config.model.autoencoder.items() if k not in WEIGHTS_THAT_ARE_NOT_HERE}
                autoencoder = build_autoencoder(given)
            select_trainable(autoencoder, config.model.trainable)


def test_a_paper_s_recipe_without_lpips_weights_says_how_to_get_them(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    smaller = ["--model.autoencoder.preset", "dc-ae-tiny", "--trainer.devices", "1", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(MissingWeights, match=r"vgg16-397923af\.pth.*--model\.objective\.lpips null"):
        fit_command(["--config", "dcae/f32c32-phase1", "--data.path", str(folder), *smaller])
    assert not (tmp_path / "run").exists(), "nothing has begun"


def test_lpips_and_the_adversary_can_be_left_out_of_a_recipe(tmp_path, monkeypatch, folder, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    smaller = ["--trainer.devices", "1", "--data.size", "64", "--trainer.precision", "32-true", "--data.batch_size=2"]
    smaller += ["--trainer.accelerator", "cpu", "--data.workers", "0", "--model.autoencoder={preset: dc-ae-tiny}"]
    run = ["--run_dir", str(tmp_path / "run"), "--checkpoint.every_steps=1", "--data.path", str(folder), *smaller]
    without = ["--model.objective.lpips", "null", "--model.adversary", "null"]
    recipe = ["--config", "sd-vae-f8c4", "--model.objective.kl", "null", *run]
    assert fit_command([*recipe, *without, "--trainer.max_steps=1"]) == 0
    with pytest.raises(RequestError, match=r"another configuration.*LPIPS"):
        fit_command([*recipe, "--trainer.max_steps=1"])
    assert fit_command([*recipe, *without, "--trainer.max_steps=2", "--fork"]) == 0
    assert list(yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["objective"]) == ["l1"]
    capsys.readouterr()
    assert validate_command(["--run_dir", str(tmp_path / "run")]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]} == {"l1", "psnr", "ssim"}


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_validate_measures_lpips_where_its_weights_are(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    fit_command(arguments)
    printed = capsys.readouterr()
    assert printed.err.count("Validation goes without lpips_alex.") == 1, "once a run"
    assert WEIGHT_FILES["alexnet"].name in printed.err
    assert "lpips_alex" not in printed.out

    torch.manual_seed(0)
    file = tmp_path / WEIGHT_FILES["alexnet"].name
    torch.save(torchvision.models.alexnet().state_dict(), file)
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(WEIGHT_FILES, "alexnet", replace(WEIGHT_FILES["alexnet"], sha256_prefix=sha256_file(file)[:8]))
    assert validate_command(["--run_dir", str(tmp_path / "run"), "--data.size", "64"]) == 0
    values = dict(line.split() for line in capsys.readouterr().out.splitlines()[2:])

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(file, tmp_path / "home" / "hub" / "checkpoints")
    reference = lpips.LPIPS(net="alex", verbose=False)
    data = ImageData(**{**yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"], "size": 64})
    data.setup("validate")
    expected = []
    for pixels in (torch.stack([item["pixels"]]) for item in ImageDataset(data.val_source, size=64, augment=False)):
        with torch.no_grad():
            reconstruction = to_uint8(latentae.load(tmp_path / "run")(to_float(pixels)).sample)
            expected.append(reference(to_float(reconstruction), to_float(pixels)).item())
    assert float(values["lpips_alex"]) == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_recipes_are_those_of_the_checkout_or_the_wheel():
    assert any(folder.is_dir() for folder in FOLDERS)


def test_help_needs_neither_torch_nor_lightning():
    code = (
        "import sys; from latentae.cli import fit, validate; fit.print_help(); validate.print_help(); "
        "assert not {'torch', 'pytorch_lightning', 'diffusers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--run_dir" in result.stdout
    assert "--help-all" in result.stdout
