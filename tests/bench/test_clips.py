"""A benchmark of clips: figures are those of scikit-image and numpy on frames, of models of videos and of images."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import latentae
from latentae.bench import checkpoints, measuring, speed
from latentae.bench.codecs import classical_codec
from latentae.bench.framewise import FramewiseCodec
from latentae.bench.planes import as_repeated, independent_values
from latentae.bench.results import summarise
from latentae.bench.run import bench
from latentae.cli.main import main
from latentae.codec import LatentCodec
from latentae.data.video import FrameChoice
from latentae.errors import DataError, RequestError
from latentae.files import read_json, sha256_file
from latentae.metrics.video import FrechetVideoDistance
from latentae.weights import WEIGHT_FILES

FRAMES, SIZE = 3, 32


@pytest.fixture(autouse=True)
def _no_weight_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)


class Flickering(nn.Module):
    """An "autoencoder" of videos at half the size, whose frames are too dark by turns."""

    def __init__(self, factor):
        super().__init__()
        self.encoder = nn.Conv3d(1, 1, 1)  # by which a model of videos is told
        self.factor = factor
        self.config = {"spatial_compression_ratio": 2, "latent_channels": 3}

    def encode(self, pixels):
        return nn.functional.avg_pool3d(pixels, (1, 2, 2))

    def decode(self, latents):
        wave = 1 - (1 - self.factor) * (torch.arange(latents.shape[2]) % 2).float().view(-1, 1, 1)
        return nn.functional.interpolate(latents, scale_factor=(1, 2, 2)) * wave


class Half(nn.Module):
    """An "autoencoder" of images at half the size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = {"spatial_compression_ratio": 2, "latent_channels": 3}

    def encode(self, pixels):
        return nn.functional.avg_pool2d(pixels, 2)

    def decode(self, latents):
        return nn.functional.interpolate(latents, scale_factor=2)


def moving(frames=12, seed=0):
    """uint8 (T, 32, 32, 3), so that the crop changes nothing."""
    rng = np.random.default_rng(seed)
    t, y, x = np.mgrid[:frames, :SIZE, :SIZE]
    clip = [127 + 100 * np.sin((x + 2 * t) / (4 + c + seed) + (y - t) / (7 + seed)) for c in range(3)]
    return (np.stack(clip, -1) + rng.uniform(-20, 20, (frames, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three arrays of 24 frames a second, and a folder of frames."""
    path = tmp_path / "clips"
    (path / "frames").mkdir(parents=True)
    for i in range(3):
        np.save(path / f"{i}.npy", moving(seed=i))
    for number, frame in enumerate(moving(seed=3)):
        Image.fromarray(frame).save(path / "frames" / f"{number}.png")
    return path


def expected(original, reconstruction):
    """Of clips (T, H, W, 3) uint8."""
    a, b = original.astype(float), reconstruction.astype(float)
    difference = np.diff(b, axis=0) - np.diff(a, axis=0)
    return {
        "psnr": np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in zip(original, reconstruction)]),
        "ssim": np.mean(
            [
                structural_similarity(
                    x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
                )
                for x, y in zip(original, reconstruction)
            ]
        ),
        "difference_psnr": 10 * np.log10(255**2 / np.mean(difference**2)),
        "flicker": np.std((b - a).mean((1, 2, 3))),
    }


def through(model, clip):
    """A clip (T, H, W, 3) as a model gives it back, rounded half up."""
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    pixels = pixels if isinstance(model, Flickering) else pixels[0].transpose(0, 1)
    pixels = model.decode(model.encode(pixels))
    pixels = pixels[0].permute(1, 2, 3, 0) if isinstance(model, Flickering) else pixels.permute(0, 2, 3, 1)
    return np.floor(pixels.numpy() * 127.5 + 128).clip(0, 255).astype(np.uint8)


def test_figures_are_means_over_frames_and_then_over_clips(folder, tmp_path):
    models = [("video", Flickering(0.8)), ("images", Half())]
    choice = FrameChoice(FRAMES, Fraction(12))  # of 24: every other frame
    results = bench(folder, models, size=SIZE, frames=choice, out=tmp_path / "out", speed=False, rate_images=2)
    assert read_json(tmp_path / "out/results.json") == results
    for model, (_, autoencoder) in zip(results["models"], models):
        assert [row["key"] for row in model["per_clip"]] == ["0.npy", "1.npy", "2.npy", "frames"]
        rows = []
        for seed, row in enumerate(model["per_clip"]):
            clip = moving(seed=seed)[: 2 * FRAMES : 2]
            rows.append(expected(clip, through(autoencoder, clip)))
            for name, value in rows[-1].items():
                assert row[name] == pytest.approx(value, rel=1e-6), name
        for name in rows[0]:
            assert model["metrics"][name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-6)
        assert model["floats_per_pixel"] == pytest.approx(3 / 4)
        assert model["latents"]["shape"] == [3, FRAMES, 16, 16]
        assert model["rate"]["images"] == 2
        assert 0 < model["rate"]["bits_per_pixel"] < 8 * 3 / 4
    protocol = results["protocol"]
    assert (protocol["frames"], protocol["fps"], protocol["stride"]) == (FRAMES, "12", 1)
    assert "mean over the frames of a clip, then over clips" in protocol["ssim"]
    assert results["images"] | {"quarantined": 0} == {
        "source": str(folder), "unit": "clips", "measured": 4, "enlarged": 0, "quarantined": 0,
    }  # fmt: skip
    table = summarise(results)
    assert "4 clips of 3 frames at 32 px" in table
    assert "difference PSNR" in table
    assert "rfid" not in results["models"][0]["metrics"]
    assert "i3d_torchscript.pt" in results["models"][0]["skipped"]["rfvd"] or FRAMES < 16


@pytest.fixture
def planes(randomise):
    return randomise(
        latentae.FourPlane(
            plane_channels=2, temporal_compression=2, block_out_channels=(4, 8, 8), layers_per_block=1,
            norm_num_groups=2, mid_block_add_attention=False, window_frames=9, window_overlap=2,
        )
    )  # fmt: skip


def test_models_of_videos_and_images_go_through_it_all(folder, planes, tiny_dcae, monkeypatch):
    torch.manual_seed(0)
    wan = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    models = [("planes", planes), ("wan", wan), ("dc", tiny_dcae), ("h264", "h264:30"), ("jpeg", "jpeg:30")]
    monkeypatch.setattr(speed, "ENOUGH_SECONDS", 0.0)
    results = bench(folder, models, size=SIZE, frames=FRAMES, limit=1, rate_images=1)
    of = {model["name"]: model for model in results["models"]}
    floats = planes.layout((1, 3, FRAMES, SIZE, SIZE)).num_tokens * planes.config.plane_channels
    assert of["planes"]["floats_per_pixel"] == pytest.approx(floats / (FRAMES * SIZE**2))  # not of the volume
    assert of["wan"]["floats_per_pixel"] == pytest.approx(16 * 2 * 4 * 4 / (FRAMES * SIZE**2))
    assert of["dc"]["floats_per_pixel"] == pytest.approx(tiny_dcae.config.latent_channels / 64)
    for name in ("planes", "wan", "dc"):
        model = of[name]
        assert model["speed"]["encode"]["images_per_second"] > 0
        assert model["gmac"]["encode"] > 0
        assert model["latents"]["std"]
        assert len(model["noise_robustness"]["curve"]) == 3
        assert not model["failed"]
    assert of["wan"]["latents"]["spectrum"]
    assert of["wan"]["latents"]["kl"]["kl"] > 0
    with torch.no_grad():
        clip = torch.from_numpy(np.stack([np.load(folder / f"{i}.npy")[:FRAMES] for i in range(1)]))
        posterior = planes.encode(clip.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    assert of["planes"]["latents"]["kl"]["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert of["planes"]["latents"]["spectrum"] is of["planes"]["latents"]["effective_rank"] is None
    assert "planes" in of["planes"]["skipped"]["spectrum"]
    for name, codec in (("h264", "h264:30"), ("jpeg", "jpeg:30")):
        first = np.load(folder / "0.npy")[:FRAMES]
        frames, bits = classical_codec(codec, clips=True).reconstruct(first)
        assert of[name]["rate"]["bits_per_pixel"] == pytest.approx(bits / (FRAMES * SIZE**2))
        assert of[name]["per_clip"][0]["psnr"] == pytest.approx(expected(first, frames)["psnr"])
    assert "clips/s" in summarise(results)


@pytest.mark.parametrize("frames", [1, 9, 23])  # an image, one window, three of them
def test_the_values_of_planes_count_once(planes, frames):
    codec = LatentCodec(planes)
    z = codec.encode(torch.rand(2, 3, frames, 16, 24) * 2 - 1).posterior.mode()
    values = independent_values(planes, z)
    tokens = codec.encode(torch.rand(2, 3, frames, 16, 24)).posterior.mean
    assert sum(value.numel() for value in values) == tokens.numel()
    repeated = as_repeated(planes, torch.randn(z.shape))
    assert repeated.shape == z.shape
    kept = independent_values(planes, repeated)
    assert torch.cat(kept, 1).std() == pytest.approx(1, abs=0.15)
    window = z.shape[2] if frames < 10 else 5  # nine frames a window, two of them a latent one
    layout = planes.layout((2, 3, min(frames, 9), 16, 24))
    for part, noise in zip(z.split(window, 2), repeated.split(window, 2)):
        for volume in (part, noise):  # what a layout can hold without loss
            torch.testing.assert_close(layout.pack(layout.unpack(volume, "volume"), "volume"), volume)


def test_frame_by_frame_is_what_the_model_does_to_each_frame():
    codec = LatentCodec(latentae.create("litevae-tiny"))
    framewise = FramewiseCodec.of(codec)
    clip = torch.rand(2, 3, 2, 22, 32) * 2 - 1
    latents = framewise.encode(clip)
    back = framewise.decode(latents)
    assert back.shape == clip.shape
    for b in range(2):
        for t in range(2):
            image = codec.encode(clip[b, :, t][None])
            torch.testing.assert_close(latents.tensor[b, :, t], image.tensor[0])
            torch.testing.assert_close(latents.posterior.mean[b, :, t], image.posterior.mean[0])
            torch.testing.assert_close(back[b, :, t], codec.decode(image)[0], atol=1e-4, rtol=1e-4)
    draws = latents.posterior.sample([torch.Generator().manual_seed(i) for i in range(2)])
    again = framewise.encode(clip[1:]).posterior.sample([torch.Generator().manual_seed(1)])
    torch.testing.assert_close(draws[1], again[0])
    noise = (draws - latents.posterior.mean) / latents.posterior.std
    assert not torch.allclose(noise[0, :, 0], noise[0, :, 1], atol=0.1)  # new in every frame


def test_a_decoder_that_samples_has_one_noise_for_a_clip():
    framewise = FramewiseCodec.of(LatentCodec(latentae.create("dito-tiny")))
    frame = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    latents = framewise.encode(frame.expand(2, -1, 3, -1, -1))
    pixels = framewise.decode(latents, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    torch.testing.assert_close(pixels[:, :, 0], pixels[:, :, 2])
    assert not torch.allclose(pixels[0], pixels[1])
    one_step = framewise.decode(latents, num_inference_steps=1)
    assert one_step.shape == pixels.shape


def test_h264_costs_fewer_bits_for_less(clips):
    clip = clips.frames(12)
    found = [classical_codec(f"h264:{factor}", clips=True).reconstruct(clip) for factor in (0, 23, 40)]
    quality = [expected(clip, frames)["psnr"] for frames, _ in found]
    assert quality == sorted(quality, reverse=True)
    assert quality[0] > 38
    bits = [bits for _, bits in found]
    assert bits == sorted(bits, reverse=True)
    frames, _ = classical_codec("h264:20", clips=True).reconstruct(clip[:, :33, :35])
    assert frames.shape == (12, 33, 35, 3)


def test_bad_clips_are_named_and_the_others_measured(folder, clips, tmp_path):
    import av

    np.save(folder / "short.npy", moving(2))
    np.save(folder / "nothing.npy", moving(0))
    whole = clips.write(folder / "torn.mkv", 40)
    data = bytearray(whole.read_bytes())
    whole.write_bytes(data[: len(data) // 3])
    with av.open(folder / "audio.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    options = dict(size=SIZE, frames=FRAMES, speed=False, rate_images=0)
    results = bench(folder, [("half", Half())], max_bad=4, **options)
    bad = {row["key"]: row["reason"] for row in results["images"]["quarantined"]}
    assert bad.keys() == {"short.npy", "nothing.npy", "torn.mkv", "audio.mp4"}
    assert bad["short.npy"] == "too-short"
    assert results["images"]["measured"] == 4 == len(results["models"][0]["per_clip"])
    with pytest.raises(DataError, match=r"4 of 8 inputs are bad.*results.json"):
        bench(folder, [("half", Half())], out=tmp_path / "out", **options)
    assert len(read_json(tmp_path / "out/results.json")["models"][0]["per_clip"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": None}, "say how many frames"),
        ({"frames": FrameChoice(None, Fraction(8))}, "say how many frames"),
        ({"protocol": "dc-ae"}, "protocols are of images"),
        ({"equivariance": 2}, "equivariance is measured on images"),
        ({"interpolation": 3}, "interpolation is measured on images"),
        ({"metrics": ["rfid"]}, "rfid is a metric of images and not of clips"),
        ({"metrics": ["rfvd"]}, "rfvd cannot be measured: it needs clips of at least 16 frames, these have 3"),
        ({"frames": 0}, "expected at least 1"),
    ],
)
def test_requests_that_cannot_be_met(folder, options, message):
    (folder / "frames").rename(folder.parent / "frames")  # only clips are left
    with pytest.raises(RequestError, match=message):
        bench(folder, [("half", Half())], **{"size": SIZE, "frames": FRAMES, **options})


def test_images_have_no_metrics_of_clips_and_no_h264(photo_folder):
    with pytest.raises(RequestError, match="rfvd is a metric of clips"):
        bench(photo_folder, [("half", Half())], metrics=["rfvd"])
    with pytest.raises(RequestError, match="h264:23 is a codec of clips"):
        bench(photo_folder, ["h264:23"])
    with pytest.raises(RequestError, match="52: the quality of h264"):
        bench(photo_folder, ["h264:52"])


def test_one_frame_has_no_figures_of_time(folder):
    results = bench(folder, [("half", Half())], size=SIZE, frames=1, limit=1, speed=False)
    model = results["models"][0]
    assert model["metrics"]["flicker"] is None
    assert model["skipped"]["difference_psnr"] == "it needs clips of at least 2 frames, these have 1"


class Features(nn.Module):
    """As I3D is called."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(3, 400, (16, 8, 8), stride=(1, 8, 8))

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        return self.convolution(x / 255).relu().mean((2, 3, 4))


def test_rfvd_is_measured_where_its_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(tmp_path))
    path = tmp_path / WEIGHT_FILES["i3d"].name
    torch.manual_seed(0)
    torch.jit.script(Features()).save(path)
    monkeypatch.setitem(WEIGHT_FILES, "i3d", replace(WEIGHT_FILES["i3d"], sha256_prefix=sha256_file(path)))
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(2):
        np.save(folder / f"{i}.npy", moving(35, seed=i))
    models = [("dark", Flickering(0.8)), ("half", Half())]
    results = bench(folder, models, size=SIZE, frames=33, speed=False, rate_images=0, metrics=["rfvd"])
    for model, (_, autoencoder) in zip(results["models"], models):
        metric = FrechetVideoDistance()
        for i in range(2):
            clip = moving(35, seed=i)[:33]
            for pixels, original in ((clip, True), (through(autoencoder, clip), False)):
                metric.update(torch.from_numpy(pixels).permute(3, 0, 1, 2)[None], original=original)
        assert model["metrics"]["rfvd"] == pytest.approx(metric.compute().item(), rel=1e-4)
        assert any("rFVD of 4 windows of 16 frames" in warning for warning in model["warnings"])
    assert results["metric_weights_sha256"] == {"rfvd": sha256_file(path)}


def test_a_stopped_one_continues_to_the_same_figures(folder, planes, tmp_path, monkeypatch, capsys):
    options = dict(size=SIZE, frames=FRAMES, speed=False, rate_images=1, out=tmp_path / "out")
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_SECONDS", 0.0)
    add, done = measuring.Measurement.add, []

    def stop(self, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Measurement, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            bench(folder, [("planes", planes)], **options)
    with pytest.raises(RequestError, match="of other protocol"):
        bench(folder, [("planes", planes)], **{**options, "frames": FRAMES + 1})
    continued = bench(folder, [("planes", planes)], **options)
    whole = bench(folder, [("planes", planes)], **{**options, "out": tmp_path / "again"})
    assert "Continued from" in capsys.readouterr().err
    assert continued["models"] == whole["models"]


def test_parts_of_several_processes_are_one(folder, planes):
    """What each of two counted of its batches, brought together as under torchrun."""
    from latentae.bench.images import ImageSet
    from latentae.bench.quality import Quality
    from latentae.bench.samples import Samples
    from latentae.bench.state import dump_state, load_state, merge
    from latentae.data.clips import ClipSource

    source, codec = ClipSource(folder), LatentCodec(planes)

    class Share:
        def __init__(self, rank, count):
            self.rank, self.count, self.state = rank, count, b""

        def gather(self, state):
            self.state = state
            return []

    class Nothing:
        def load(self, fresh):
            return fresh

        def save(self, *arguments, **options):
            pass

    def fresh():
        return measuring.Pass(
            0, codec, images.facts, Quality(None, SIZE, frames=FRAMES), seed=0, rated=1, equivariance=0, interpolation=0
        )

    found = []
    for count in (1, 2):
        parts = []
        for rank in range(count):
            images = ImageSet(source, source.items(), SIZE, 1, 1, choice=FrameChoice(FRAMES))
            share = Share(rank, count)
            options = dict(sample=False, seed=0, quantisation="round")
            samples = Samples(None, images, 1, 0)
            _, whole = measuring.measure("a", codec, images, fresh(), samples, Nothing(), share, **options)
            parts.append(whole or load_state(share.state, fresh()))
        found.append((merge(parts[0], parts[1]) if count == 2 else parts[0]).results(SIZE))
    assert found[0]["per_clip"] == found[1]["per_clip"]
    assert found[0]["rate"] == found[1]["rate"]
    np.testing.assert_allclose(found[0]["latents"]["std"], found[1]["latents"]["std"], rtol=1e-9)
    assert dump_state(parts[0])


def test_the_command_and_its_report_of_frames(folder, tmp_path, capsys):
    arguments = ["bench", str(folder), "--model", "dc-ae-tiny", "--model", "jpeg:50", "--size", "32", "--frames", "5"]
    arguments += ["--stride", "2", "--no-speed", "--random-weights", "--rate-images", "1"]
    for out in ("a", "b"):
        assert main([*arguments, "--out", str(tmp_path / out)]) == 0
    assert "4 clips of 5 frames at 32 px" in capsys.readouterr().out
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["protocol"]["stride"] == 2
    assert [row["frame"] for row in results["samples"][:3]] == [0, 2, 4]
    saved = np.asarray(Image.open(tmp_path / "a" / results["samples"][1]["input"]))
    assert np.array_equal(saved, moving()[4])  # the third of every other frame
    page = (tmp_path / "a/report.html").read_text()
    assert "4 clips of 5 frames at 32 px" in page
    assert "0.npy, frame 3 of 5" in page
    assert "4 of 4 clips; of each its first, middle and last frame" in page
    assert main(["bench", "--merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    assert len(json.loads((tmp_path / "c/results.json").read_text())["samples"]) == 12
    assert main([*arguments[:-4], "--fps", "0"]) == 2
    assert main(["bench", str(folder), "--model", "dc-ae-tiny", "--fps", "8"]) == 2
    assert "--frames N" in capsys.readouterr().err
