"""Training on clips: resume, figures of validation by hand, what is refused, and where weights of images go."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

import latentae
from latentae.cli.main import main
from latentae.data.clips import ClipSource
from latentae.errors import DataError, RequestError
from latentae.nn.pixels import frames_of, to_float, to_uint8
from latentae.objectives import KL, L1, MSSSIM, Adversary, Alignment, PatchGAN, PatchGAN3D
from latentae.training.callbacks import BrokenImages, ReconstructionImages
from latentae.training.cli import fit_command, validate_command
from latentae.training.datamodule import ImageData
from latentae.training.start import build_autoencoder

TINY = {"size": 16, "frames": 5, "batch_size": 2, "workers": 0}


def write_clips(folder, lengths, height=20, width=24):
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    for number, frames in enumerate(lengths):
        waves = [np.sin((x + 2 * t) / (3 + number) + y / 5) for t in range(frames)]
        clip = np.stack([127 + 120 * np.stack([wave, -wave, wave**2], -1) for wave in waves]).astype(np.uint8)
        np.save(folder / f"{number}.npy", clip)
    return folder


@pytest.fixture
def clip_folder(tmp_path):
    return write_clips(tmp_path / "clips", [9, 7, 12, 5, 8])


def make_module(runs, adversary=None, **options):
    options = {"objective": {"l1": L1(), "kl": KL(1e-3), "msssim": MSSSIM(0.1, frames=2)}, **options}
    return runs.module(adversary, **{"autoencoder": latentae.create("fourplane-tiny"), **options})


@pytest.mark.parametrize("discriminator", [PatchGAN3D, PatchGAN])
def test_a_crashed_run_on_clips_repeats_the_uninterrupted_one(runs, clip_folder, tmp_path, discriminator):
    def go(run_dir, workers=0, **options):
        torch.manual_seed(3)
        adversary = Adversary(discriminator(channels=8, layers=2), weight=0.1, r1=0.1, r1_every=2)
        data = ImageData(str(clip_folder), **{**TINY, "workers": workers, "dead_leaves": 0.3})
        return runs.fit(make_module(runs, adversary), data, run_dir, 4, **options)

    straight = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=2)
    resumed = go(tmp_path / "resumed", workers=1)
    assert resumed == {step: straight[step] for step in (3, 4)}
    assert {"kl", "msssim", "adversarial", "discriminator", "r1"} <= set(straight[3]) | set(straight[2])
    assert list((tmp_path / "resumed/clip-times").rglob("*.json")), "times of frames are remembered in the run folder"


RECIPE = {
    "model": {
        "autoencoder": {"preset": "fourplane-tiny"},
        "objective": {"l1": {"class_path": "L1"}, "kl": {"class_path": "KL", "init_args": {"weight": 1e-6}}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 3e-3}},
        "ema": 0.5,
    },
    "data": {**TINY, "val_fraction": 0.4},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture
def arguments(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return ["--config", str(recipe), "--run_dir", str(tmp_path / "run"), "--data.path", str(clip_folder)]


def test_a_run_on_clips_from_the_command_line(arguments, clip_folder, tmp_path, capsys):
    assert fit_command(arguments) == 0
    capsys.readouterr()
    assert validate_command(["--run_dir", str(tmp_path / "run")]) == 0
    values = {name: float(value) for name, value in (line.split() for line in capsys.readouterr().out.splitlines()[2:])}

    data = ImageData(**{**yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]})
    data.setup("validate")
    held_out = data.val_source.items()
    autoencoder = latentae.load(tmp_path / "run")
    psnrs, differences, flickers = [], [], []
    for item in held_out:
        clip = ClipSource(clip_folder).open(item).clip()[:5]
        side = Image.fromarray(clip[0]).size
        crop = [
            np.array(Image.fromarray(f).resize((round(side[0] * 16 / 20), 16), Image.Resampling.BICUBIC)) for f in clip
        ]
        left = (crop[0].shape[1] - 16) // 2
        pixels = np.stack(crop)[:, :, left : left + 16]  # (T, 16, 16, 3), by hand what adm_center_crop does here
        with torch.no_grad():
            moved = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None]
            made = to_uint8(autoencoder(to_float(moved)).sample)[0].permute(1, 2, 3, 0).numpy()
        error = made.astype(float) - pixels
        psnrs.append(np.mean(20 * np.log10(255) - 10 * np.log10(np.mean(error**2, axis=(1, 2, 3)))))
        differences.append(20 * np.log10(255) - 10 * np.log10(np.mean(np.diff(error, axis=0) ** 2)))
        flickers.append(np.std(error.mean((1, 2, 3))))
    assert values["psnr"] == pytest.approx(np.mean(psnrs), rel=1e-3)
    assert values["difference_psnr"] == pytest.approx(np.mean(differences), rel=1e-3)
    assert values["flicker"] == pytest.approx(np.mean(flickers), rel=1e-2, abs=1e-3)
    assert {"l1", "kl", "ssim"} < set(values)

    with Image.open(next((tmp_path / "run/samples").glob("*.png"))) as picture:
        assert picture.size == (5 * 18 - 2, 3 * len(held_out) * 18 - 2)
    assert fit_command([*arguments, "--trainer.max_steps=4", "--fork"]) == 0

    assert (
        main(
            [
                "export",
                str(tmp_path / "run"),
                str(tmp_path / "out"),
                "--data",
                str(clip_folder),
                "--size=16",
                "--frames=5",
            ]
        )
        == 0
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16
    assert config["scaling_factor"] == 1.0


def test_generated_clips_need_no_files(arguments, capsys):
    assert fit_command([*arguments, "--data.path=samples", "--trainer.max_steps=1", "--data.val_images=2"]) == 0
    assert "flicker" in capsys.readouterr().out


def test_the_same_clips_are_held_out_whatever_is_added(clip_folder):
    def split():
        data = ImageData(str(clip_folder), **TINY, val_fraction=0.3)
        data.setup("fit")
        return [{item.key for item in source.items()} for source in (data.train_source, data.val_source)]

    trained, held_out = split()
    assert not trained & held_out
    assert trained | held_out == {f"{i}.npy" for i in range(5)}
    np.save(clip_folder / "another.npy", np.load(clip_folder / "0.npy"))
    assert held_out <= split()[1]


def test_short_clips_are_named_replaced_and_counted(runs, tmp_path, capsys):
    folder = write_clips(tmp_path / "clips", [9, 3, 9, 9])
    data = ImageData(str(folder), **TINY, val_fraction=0.0, max_bad=0.3)
    trainer = runs.trainer(tmp_path / "run", 4, BrokenImages())
    trainer.fit(make_module(runs), data)
    told = capsys.readouterr().err
    assert "1.npy: too-short: it has 3 frames and 5 are asked for. The next clip stands in for it." in told
    assert "1 of 4 clips are broken or too short and were replaced" in told
    short = ImageData(str(write_clips(tmp_path / "short", [9, 3, 3, 3])), **TINY, val_fraction=0.0)
    with pytest.raises(DataError, match=r"\d of 4 clips are broken or too short"):
        runs.fit(make_module(runs), short, tmp_path / "other", 4)


def test_photos_are_no_clips_and_clips_no_photos(runs, photo_folder, clip_folder, tmp_path, capsys):
    with pytest.raises(RequestError, match=r"holds no videos but images of several sizes.*leave data\.frames out"):
        runs.fit(make_module(runs), ImageData(str(photo_folder), **TINY), tmp_path / "run", 1)
    with pytest.raises(RequestError, match=r"holds clips: .*--data\.frames"):
        runs.fit(runs.module(), ImageData(str(clip_folder), size=16), tmp_path / "run", 1)
    frames = tmp_path / "frames/a"
    frames.mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (24, 20), (40 * number,) * 3).save(frames / f"{number}.png")
    runs.fit(make_module(runs), ImageData(str(frames.parent), **TINY), tmp_path / "run", 1)
    assert "each of its 1 folders of images is taken as a clip" in capsys.readouterr().err


def test_a_file_without_video_is_no_clip(runs, tmp_path, capsys):
    av = pytest.importorskip("av")
    path = tmp_path / "song.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
        frame.rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="1 of 1 clips are broken"):
        runs.fit(make_module(runs), ImageData(str(path), **TINY), tmp_path / "run", 1)
    assert "no video" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 6}, r"data\.frames 6 does not fit .* compression is 2: use 5 or 7\."),
        ({"frames": 12}, r"use 9 or 16\."),  # windows of 9 that share 2
        ({"frames": 0}, r"data\.frames is 0; expected at least 1"),
        ({"fps": 8, "path": "samples"}, "generated clips have no rate"),
        ({"frames": None, "stride": 2}, r"without data\.frames these are images"),
        ({"size": 18}, r"data\.size 18 is not a multiple of the autoencoder's 4"),
    ],
)
def test_numbers_that_cannot_be(runs, clip_folder, tmp_path, options, message):
    given = {"path": str(clip_folder), **TINY, **options}
    with pytest.raises(RequestError, match=message):
        runs.fit(make_module(runs), ImageData(**given), tmp_path / "run", 1)


def test_an_autoencoder_of_images_takes_no_clips(runs, clip_folder, tmp_path):
    with pytest.raises(RequestError, match=r"data\.frames 5 asks for clips, and DCAE is for images"):
        runs.fit(runs.module(), ImageData(str(clip_folder), **TINY), tmp_path / "run", 1)


def test_four_planes_also_train_on_images(runs, folder, tmp_path):
    steps = runs.fit(make_module(runs), runs.data(folder, dead_leaves=0.0), tmp_path / "run", 2)
    assert all(np.isfinite(value) for step in steps.values() for value in step.values())


def test_terms_of_images_refuse_clips(runs, clip_folder, tmp_path):
    vision = torch.nn.Conv2d(3, 8, 4, stride=4)
    module = make_module(runs, objective={"l1": L1(), "align": Alignment(vision, latent_channels=16, size=16)})
    with pytest.raises(RequestError, match=r"Alignment is for images, and these are clips: leave the term out"):
        runs.fit(module, ImageData(str(clip_folder), **TINY), tmp_path / "run", 1)


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing(runs, clip_folder, tmp_path, options):
    precision = {"precision": options.pop("precision")} if "precision" in options else {}
    plain = runs.fit(make_module(runs), ImageData(str(clip_folder), **TINY), tmp_path / "plain", 2)
    other = runs.fit(make_module(runs, **options), ImageData(str(clip_folder), **TINY), tmp_path / "o", 2, **precision)
    tolerance = 0.05 if precision else 1e-5
    for step in plain:
        assert other[step]["loss"] == pytest.approx(plain[step]["loss"], rel=tolerance)


def test_a_video_autoencoder_begins_as_an_image_autoencoder(tmp_path, capsys):
    torch.manual_seed(0)
    image = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=4,
    ).eval()
    image.save_pretrained(tmp_path / "image")
    video = build_autoencoder({"preset": "fourplane-tiny", "inflate": str(tmp_path / "image")})
    assert video.config["plane_channels"] == 3
    assert video.config["temporal_compression"] == 2, "of the preset"
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(video(pixels).sample, image(pixels).sample, atol=1e-5, rtol=1e-4)
        still = video(pixels.unsqueeze(2).expand(-1, -1, 5, -1, -1)).sample
        torch.testing.assert_close(frames_of(still)[2], image(pixels).sample[0], atol=1e-4, rtol=1e-3)
    assert "inflate" in capsys.readouterr().err
    with pytest.raises(RequestError, match="needs a preset of FourPlane"):
        build_autoencoder({"preset": "dc-ae-tiny", "inflate": str(tmp_path / "image")})
    with pytest.raises(RequestError, match="inflate takes an AutoencoderKL"):
        build_autoencoder({"preset": "fourplane-tiny", "inflate": "dc-ae-tiny"})


def test_pictures_of_clips_are_frames_in_three_rows(runs, clip_folder, tmp_path):
    data = ImageData(str(clip_folder), **TINY, val_sizes=[16, 24])
    runs.trainer(tmp_path, 1, ReconstructionImages(1), val_check_interval=1).fit(make_module(runs), data)
    for size in (16, 24):
        with Image.open(tmp_path / f"samples/step-00000001@{size}.png") as picture:
            assert picture.size == (5 * (size + 2) - 2, 3 * (size + 2) - 2)
