"""Folders of pipelines: what stock diffusers opens alone draws what we draw, and what cannot be is said."""

import errno
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors import SafetensorError

import latentae
from latentae.cli.main import main
from latentae.denoisers import sample
from latentae.errors import RequestError
from latentae.loading import weights_hash
from latentae.loading.diffusion import describe_diffusion
from latentae.pipelines import dit_pipeline, export_pipeline, flow_pipeline

WITHOUT_LATENTAE = """
import sys
sys.modules["latentae"] = None  # importing it fails
import numpy, torch
from diffusers import DiffusionPipeline
folder, guidance_scale = sys.argv[1], float(sys.argv[2])
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
names = list(pipe.labels)
labels = pipe.get_label_ids(["dog", "felis catus"]) if names else [1, 0]
generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
images = pipe(labels, guidance_scale=guidance_scale, generator=generator, num_inference_steps=100, output_type="np")
numpy.save(folder + "/images.npy", images.images)
print(type(pipe).__name__, type(pipe.vae).__name__)
"""


@pytest.fixture
def stock_dit(diffusion):
    return lambda **changes: diffusion(one_scale=True, **changes)


def run_of(diffusion, folder):
    """A run as training leaves it."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    weights = {key: value.clone() for key, value in diffusion.denoiser.state_dict().items()}
    torch.save({"latentae_diffusion": describe_diffusion(diffusion), "latentae_ema": weights}, checkpoint)
    return folder


@pytest.mark.parametrize(
    ("name", "opens_as", "guidance_scale"),
    [
        ("AutoencoderKL", "AutoencoderKL", 4.0),
        pytest.param("dc-ae-tiny", "AutoencoderDC", 1.0, marks=pytest.mark.slow),
    ],
)
def test_stock_diffusers_alone_draws_what_we_draw(name, opens_as, guidance_scale, stock_dit, autoencoder, tmp_path):
    vae = autoencoder(name)
    model = stock_dit(channels=latentae.LatentCodec(vae).latent_channels, labels={0: "cat, felis catus", 1: "dog"})
    assert export_pipeline(model, vae, tmp_path, "dit") == ("DiTPipeline", False)
    arguments = [sys.executable, "-c", WITHOUT_LATENTAE, str(tmp_path), str(guidance_scale)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DiTPipeline", opens_as]
    ours = flow_pipeline(model, autoencoder(name))(
        [1, 0],
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=100,
        output_type="np",
    ).images
    difference = np.abs(np.load(tmp_path / "images.npy") - ours)
    assert difference.mean() < 0.05 * ours.std()
    assert np.abs(np.load(tmp_path / "images.npy")[::-1] - ours).mean() > 3 * difference.mean()  # as of other images


def test_the_solver_of_first_order_is_euler_to_a_thousandth_of_time(stock_dit, autoencoder, monkeypatch):
    """Its times are rounded down to thousandths and start at 0.999; nothing else differs."""
    model, vae = stock_dit(), autoencoder("AutoencoderKL")
    pipe = dit_pipeline(model, vae)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    drawn = {}

    def decode(z):
        drawn["z"] = z
        return DecoderOutput(sample=z[:, :3])

    monkeypatch.setattr(vae, "decode", decode)
    generator = torch.Generator().manual_seed(0)
    pipe([2, 1], guidance_scale=3.0, generator=generator, num_inference_steps=25, output_type="pt")
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = sample(model.denoiser, noise, torch.tensor([2, 1]), steps=25, guidance_scale=3.0)
    normalised = drawn["z"] * 0.41407
    assert (normalised - expected).std() < 0.003 * (expected - noise).std()


def test_the_scheduler_of_the_folder_solves_a_known_flow(stock_dit, autoencoder):
    """From noise to two narrow peaks, whose velocity is known: far closer than Euler in as many steps."""

    def velocity(x, t):
        peaks, width = torch.tensor([-1.0, 1.0]), 0.2
        variance = (1 - t) ** 2 * width**2 + t**2
        residual = (x[..., None] - (1 - t) * peaks) / variance
        clean = peaks + (1 - t) * width**2 * residual
        shares = torch.softmax(-(residual**2) * variance / 2, -1)
        return (shares * (t * residual - clean)).sum(-1)

    def euler(noisy, steps):
        for i in range(steps):
            noisy = noisy - velocity(noisy, 1 - i / steps) / steps
        return noisy

    noise = torch.randn(1024, 1, 1, 1)
    scheduler = dit_pipeline(stock_dit(), autoencoder("AutoencoderKL")).scheduler
    scheduler.set_timesteps(20)
    noisy = noise
    for t in scheduler.timesteps:
        noisy = scheduler.step(velocity(noisy, t / 1000), t, noisy).prev_sample
    limit = euler(noise, 2000)
    error, of_euler = ((found - limit).square().mean().sqrt() for found in (noisy, euler(noise, 20)))
    assert error < of_euler / 3
    assert error < 0.01


def test_tables_are_filled_up_with_no_class(stock_dit, autoencoder):
    model = stock_dit()
    pipe = dit_pipeline(model, autoencoder("AutoencoderKL"))
    noisy, t = torch.randn(4, 4, 4, 4), torch.full((4,), 0.3)
    with torch.no_grad():
        stock = pipe.transformer(noisy, timestep=1000 * t, class_labels=torch.tensor([2, 0, 1000, 500])).sample
        torch.testing.assert_close(stock, model.denoiser(noisy, t, torch.tensor([2, 0, 3, 3])))
    assert pipe.vae.config.scaling_factor == pytest.approx(0.41407)
    unconditional = stock_dit(num_classes=1)
    pipe = dit_pipeline(unconditional, autoencoder("AutoencoderKL"))
    with torch.no_grad():
        stock = pipe.transformer(noisy, timestep=1000 * t, class_labels=torch.tensor([0, 0, 1, 1000])).sample
        torch.testing.assert_close(stock, unconditional.denoiser(noisy, t))
    full = stock_dit(num_classes=1000)
    assert dit_pipeline(full, autoencoder("AutoencoderKL")).transformer is full.denoiser.transformer


def test_ours_inside_the_stock_pipeline_needs_our_package(stock_dit, autoencoder, tmp_path):
    vae = autoencoder("litevae-tiny")
    model = stock_dit(channels=vae.latent_channels)
    assert export_pipeline(model, vae, tmp_path, "dit") == ("DiTPipeline", True)
    assert "import latentae" in (tmp_path / "README.md").read_text()
    pipe = DiTPipeline.from_pretrained(tmp_path)
    images = pipe([0], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert type(pipe.vae).__name__ == "LiteVAE"


@pytest.mark.parametrize(
    ("kind", "changes", "name", "message"),
    [
        ("dit-tiny", {"one_scale": False}, "AutoencoderKL", "scales all latents by one number and shifts none"),
        ("sana-tiny", {}, "AutoencoderKL", "the denoiser is a SanaTransformer2DModel"),
        ("dit-tiny", {"num_classes": 1001}, "AutoencoderKL", "at most 1000 classes, these are 1001"),
        ("dit-tiny", {}, "AutoencoderKLWan", "one scaling_factor, which AutoencoderKLWan does not have"),
        ("dit-tiny", {"channels": 5}, "AutoencoderKL", "latents of 5 channels, AutoencoderKL decodes 4"),
    ],
)
def test_what_the_stock_pipeline_cannot_hold(kind, changes, name, message, diffusion, autoencoder, tmp_path):
    model = diffusion(kind, **{"one_scale": True, **changes})
    with pytest.raises(RequestError, match=message):
        export_pipeline(model, autoencoder(name), tmp_path / "out", "dit")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_pipeline_of_a_run(diffusion, autoencoder, tmp_path, capsys):
    vae = autoencoder("dc-ae-tiny")
    vae.save_pretrained(tmp_path / "vae")
    model = diffusion(channels=8, labels={0: "cat", 1: "dog", 2: "crane"})
    model.autoencoder, model.autoencoder_sha256 = str(tmp_path / "vae"), weights_hash(vae)
    run, out = run_of(model, tmp_path / "run"), tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert "latentae.ClassConditionalFlowPipeline.from_pretrained" in capsys.readouterr().out
    pipe = latentae.ClassConditionalFlowPipeline.from_pretrained(out)
    noise = torch.randn(1, 8, 4, 4)
    latents = pipe("dog", latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    expected = sample(model.denoiser, noise, torch.tensor([1]), steps=3, guidance_scale=2.0)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(pipe.config["latents_std"]), model.std)
    card = (out / "README.md").read_text()
    assert weights_hash(vae) in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1).replace("FOLDER", str(out))
    namespace: dict = {}
    exec(code, namespace)
    assert namespace["image"].size == (32, 32)
    assert main(["export", str(run), str(out)]) == 2
    assert main(["export", str(run), str(out), "--overwrite", "--vae", str(tmp_path / "vae")]) == 0


def test_the_command_writes_the_stock_pipeline(stock_dit, autoencoder, tmp_path, capsys):
    vae = autoencoder("AutoencoderKL")
    vae.save_pretrained(tmp_path / "vae")
    model = stock_dit(num_classes=1)
    run, out = run_of(model, tmp_path / "run"), tmp_path / "out"
    assert main(["export", str(run), str(out), "--pipeline", "dit", "--vae", str(tmp_path / "vae")]) == 0
    captured = capsys.readouterr()
    assert "does not know the weights of its autoencoder" in captured.err
    assert "diffusers.DiTPipeline.from_pretrained" in captured.out
    assert json.loads((out / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL).group(1)
    namespace: dict = {}
    exec(code.replace("FOLDER", str(out)), namespace)
    assert namespace["image"].size == (16, 16)


@pytest.mark.parametrize("kind", ["flow", "dit"])
def test_a_full_disk_is_said(kind, stock_dit, autoencoder, tmp_path, monkeypatch):
    def save(*arguments, **keywords):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    vae, model = autoencoder("AutoencoderKL"), stock_dit()
    monkeypatch.setattr(type(model.denoiser.transformer), "save_pretrained", save)
    with pytest.raises(OSError, match="No space left on device") as caught:
        export_pipeline(model, vae, tmp_path, kind)
    assert caught.value.errno == errno.ENOSPC


def test_the_command_refuses_in_one_sentence(diffusion, autoencoder, tmp_path, capsys):
    vae, other = autoencoder("AutoencoderKL"), autoencoder("AutoencoderKL", seed=1)
    vae.save_pretrained(tmp_path / "vae")
    other.save_pretrained(tmp_path / "other")
    model = diffusion()
    nameless = str(run_of(model, tmp_path / "nameless"))
    model.autoencoder, model.autoencoder_sha256 = str(tmp_path / "gone"), weights_hash(vae)
    run, out = str(run_of(model, tmp_path / "run")), str(tmp_path / "out")
    for arguments, message in [
        ([nameless], "trained without an autoencoder: name that of its latents by --vae"),
        ([run], "say by --vae where it is now"),
        ([run, "--vae", str(tmp_path / "other")], "is not the autoencoder whose latents the denoiser learnt"),
        ([run, "--vae", str(tmp_path / "vae"), "--pipeline", "dit"], "DiTPipeline scales all latents by one number"),
        ([run, "--vae", str(tmp_path / "vae"), "--with-code"], "--data and --with-code are for an autoencoder"),
        ([str(tmp_path / "vae"), "--pipeline", "dit"], "are for a run that trained a denoiser"),
    ]:
        assert main(["export", arguments[0], out, *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
