"""The benchmark end to end: its figures are those of scikit-image and others on the very same reconstructions."""

import io
import json
from dataclasses import replace
from functools import partial

import lpips
import numpy as np
import piq
import pytest
import torch
import torchvision
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from scipy.stats import bootstrap
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch_fidelity.metric_kid import kernel_poly, mmd2
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance as TorchmetricsFID

import latentae
from latentae.bench import quality
from latentae.bench.results import read_results, summarise
from latentae.bench.run import bench
from latentae.cli.bench import numbers
from latentae.cli.main import main
from latentae.codec import LatentCodec
from latentae.data.transforms import adm_center_crop
from latentae.errors import DataError, MissingWeights, RequestError
from latentae.files import read_json, sha256_file
from latentae.metrics.features import FeatureSample
from latentae.metrics.frechet import FrechetDistance
from latentae.nn.pixels import to_float
from latentae.weights import WEIGHT_FILES


@pytest.fixture(autouse=True)
def _no_weight_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)


def tiny_kl():
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def tiny_taesd():
    torch.manual_seed(2)
    return AutoencoderTiny(
        encoder_block_out_channels=[8, 8],
        decoder_block_out_channels=[8, 8],
        num_encoder_blocks=[1, 1],
        num_decoder_blocks=[1, 1],
    )


class Rigged(nn.Module):
    """An "autoencoder" that gives back what it gets, changed as the test wants."""

    def __init__(self, change=lambda pixels: pixels):
        super().__init__()
        self.change, self.weight = change, nn.Parameter(torch.zeros(1))
        self.config = {"spatial_compression_ratio": 1, "latent_channels": 3}

    def encode(self, pixels):
        return pixels

    def decode(self, latents):
        return self.change(latents)


def read_pair(out, sample, model=0):
    files = sample["input"], sample["models"][model]["reconstruction"]
    return [np.asarray(Image.open(out / file)) for file in files]


@pytest.fixture
def measured(photo_folder, tmp_path, tiny_dcae):
    """Three models on six photos of odd sizes; the size is no multiple of any ratio."""
    models = [("dc", LatentCodec(tiny_dcae)), ("kl", tiny_kl()), ("taesd", tiny_taesd())]
    out = tmp_path / "report"
    return bench(photo_folder, models, out=out, size=60, batch_size=4, speed=False), out, dict(models)


def test_every_figure_is_that_of_scikit_image_on_the_saved_pairs(measured):
    results, out, _ = measured
    assert read_json(out / "results.json") == results
    assert len(results["samples"]) == 6
    assert results["images"]["enlarged"] == 2  # those of 40x130 and 33x71
    for index, model in enumerate(results["models"]):
        expected = {"psnr": [], "ssim": []}
        for sample, row in zip(results["samples"], model["per_image"], strict=True):
            pair = read_pair(out, sample, index)
            assert sample["key"] == row["key"]
            expected["psnr"].append(peak_signal_noise_ratio(*pair, data_range=255))
            expected["ssim"].append(
                structural_similarity(
                    *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2
                )
            )
            assert row["psnr"] == pytest.approx(expected["psnr"][-1], abs=1e-9)
            assert row["ssim"] == pytest.approx(expected["ssim"][-1], abs=1e-9)
        for name, values in expected.items():
            assert model["metrics"][name] == pytest.approx(np.mean(values), abs=1e-9)


def test_the_pairs_are_the_adm_crop_and_its_rounded_reconstruction(measured, photo_folder):
    results, out, models = measured
    for sample in results["samples"]:
        crop = adm_center_crop(np.asarray(Image.open(photo_folder / sample["key"]).convert("RGB")), 60)
        for index, model in enumerate(models.values()):
            codec = model if isinstance(model, LatentCodec) else LatentCodec(model)
            pixels = codec.reconstruct(torch.from_numpy(crop).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
            expected = np.floor(np.clip((pixels.astype(np.float64) + 1) * 127.5, 0, 255) + 0.5)
            original, reconstruction = read_pair(out, sample, index)
            np.testing.assert_array_equal(original, crop)
            # batches of another size round the last bits of a float differently
            assert np.abs(reconstruction - expected).max() <= 1
            assert (reconstruction != expected).mean() < 0.001


def test_what_a_model_is_and_what_its_latents_are(measured, photo_folder):
    results, _, models = measured
    dc, kl, taesd = results["models"]
    assert [model["name"] for model in results["models"]] == ["dc", "kl", "taesd"]
    assert kl["class"] == "AutoencoderKL"
    assert (kl["spatial_ratio"], kl["latent_channels"], kl["floats_per_pixel"]) == (4, 4, 0.25)
    assert kl["parameters"]["total"] == sum(p.numel() for p in models["kl"].parameters())
    assert kl["dtype"] == "float32"
    assert dc["weights_sha256"] != kl["weights_sha256"]

    crops = [
        adm_center_crop(np.asarray(Image.open(photo_folder / row["key"]).convert("RGB")), 60) for row in kl["per_image"]
    ]
    pixels = to_float(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))
    with torch.no_grad():
        posterior = models["kl"].encode(pixels).latent_dist
        z = models["taesd"].encode(pixels).latents.double()
    latents = taesd["latents"]  # without a posterior
    assert latents["shape"] == list(z.shape[1:])
    np.testing.assert_allclose(latents["mean"], z.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(latents["std"], z.std((0, 2, 3), correction=0), rtol=1e-5)
    assert 1 / latents["suggested_scaling_factor"] == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    spread = (posterior.mode().var(correction=0) + posterior.var.mean()).sqrt()  # of samples, in expectation
    assert posterior.mode().std() < 0.9 * spread
    assert 1 / kl["latents"]["suggested_scaling_factor"] == pytest.approx(spread.item(), rel=0.05)
    assert kl["normalisation"]["scaling_factor"] == 0.5


def test_intervals_are_percentile_bootstrap_intervals(measured):
    results, _, _ = measured
    model = results["models"][1]
    values = [row["psnr"] for row in model["per_image"]]
    expected = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    spread = expected.high - expected.low
    np.testing.assert_allclose(model["intervals"]["psnr"], expected, atol=0.1 * spread)


def test_without_weight_files_everything_else_is_measured_and_says_why(measured, capsys):
    results, _, _ = measured
    for model in results["models"]:
        without_weights = {"psnr", "ssim", "ms_ssim", "gmsd", "haarpsi"}
        missing = dict.fromkeys(("rfid", "kid", "precision", "recall"), "inception-2015")
        missing |= {"lpips_alex": "alexnet-owt", "lpips_vgg": "vgg16-397923af", "dists": "vgg16-397923af"}
        assert set(model["metrics"]) == without_weights | set(missing)
        for name, file in missing.items():
            assert model["metrics"][name] is None
            assert file in model["skipped"][name]
            assert "curl" in model["skipped"][name]


def test_each_missing_file_gets_one_line_on_standard_error(photo_folder, capsys):
    bench(photo_folder, [tiny_taesd()], size=32, speed=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "not measured" in line]
    assert [line.split(" not measured")[0] for line in lines] == [
        "lpips_alex",
        "lpips_vgg, dists",
        "rfid, kid, precision, recall",
        "ms_ssim",
    ]
    assert not any("--model.objective" in line for line in lines)


def test_a_metric_that_is_asked_for_by_name_must_be_there(photo_folder):
    with pytest.raises(MissingWeights, match="alexnet-owt-7be5be79"):
        bench(photo_folder, [tiny_taesd()], size=32, metrics=["lpips"])
    results = bench(photo_folder, [tiny_taesd()], size=32, metrics=["psnr"], speed=False)
    assert set(results["models"][0]["metrics"]) == {"psnr", "ssim", "ms_ssim", "gmsd", "haarpsi"}
    assert set(results["models"][0]["skipped"]) == {"ms_ssim"}  # of 161 pixels, and nobody asked for it


def test_ms_ssim_waits_for_161_pixels(photo_folder, tmp_path):
    with pytest.raises(RequestError, match="ms_ssim cannot be measured: it needs images of at least 161 px"):
        bench(photo_folder, [tiny_taesd()], size=160, metrics=["ms_ssim"])
    results = bench(photo_folder, [tiny_taesd()], out=tmp_path, size=176, limit=2, speed=False, metrics=["psnr"])
    model = results["models"][0]
    assert not model["skipped"]
    for sample, row in zip(results["samples"], model["per_image"], strict=True):
        original, reconstruction = (
            torch.tensor(image).permute(2, 0, 1)[None].double() for image in read_pair(tmp_path, sample)
        )
        for name, theirs in (("ms_ssim", piq.multi_scale_ssim), ("gmsd", piq.gmsd), ("haarpsi", piq.haarpsi)):
            assert row[name] == pytest.approx(theirs(reconstruction, original, data_range=255).item(), abs=1e-9)
    text = summarise(results)
    assert all(label in text for label in ("MS-SSIM", "GMSD", "HaarPSI"))


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_is_measured_where_its_file_is(photo_folder, tmp_path, monkeypatch):
    checkpoints = tmp_path / "torch_home" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    file = checkpoints / WEIGHT_FILES["alexnet"].name
    torch.save(torchvision.models.alexnet().state_dict(), file)
    sha256 = sha256_file(file)
    monkeypatch.setitem(WEIGHT_FILES, "alexnet", replace(WEIGHT_FILES["alexnet"], sha256_prefix=sha256[:8]))
    results = bench(photo_folder, [tiny_kl()], out=tmp_path / "out", size=64, batch_size=4, speed=False)
    model = results["models"][0]
    theirs = lpips.LPIPS(net="alex", verbose=False)  # finds the same file through torch.hub
    for sample, row in zip(results["samples"], model["per_image"], strict=True):
        pair = [torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in read_pair(tmp_path / "out", sample)]
        assert row["lpips_alex"] == pytest.approx(theirs(*pair).item(), rel=1e-4)
    assert model["metrics"]["lpips_alex"] == pytest.approx(np.mean([row["lpips_alex"] for row in model["per_image"]]))
    of_features = {"rfid", "kid", "precision", "recall"}
    assert set(model["skipped"]) == {"lpips_vgg", "dists", *of_features, "ms_ssim"}
    assert results["metric_weights_sha256"] == {"lpips_alex": sha256}
    assert "LPIPS alex" in summarise(results)


class TinyFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 4, 5, stride=3)

    def forward(self, images):
        return self.convolution(images.float() / 128 - 1).relu().mean((2, 3))


def test_rfid_compares_each_model_with_the_same_originals(photo_folder, tmp_path, monkeypatch, tiny_dcae):
    def with_tiny_features(keep_originals):
        metric = FrechetDistance(TinyFeatures(), 4, keep_originals=keep_originals)
        metric.weights_sha256 = "0"
        return metric

    monkeypatch.setattr(quality, "FrechetInceptionDistance", with_tiny_features)
    models = [("dc", tiny_dcae), ("kl", tiny_kl())]
    results = bench(photo_folder, models, out=tmp_path, size=48, batch_size=4, speed=False)
    for index, model in enumerate(results["models"]):
        pairs = np.stack([read_pair(tmp_path, sample, index) for sample in results["samples"]])
        theirs = TorchmetricsFID(feature=TinyFeatures().requires_grad_(False), input_img_size=(3, 48, 48))
        for side, real in ((0, True), (1, False)):
            theirs.update(torch.from_numpy(pairs[:, side]).permute(0, 3, 1, 2), real=real)
        assert model["metrics"]["rfid"] == pytest.approx(theirs.compute().item(), rel=1e-3)
        assert any("biased" in warning for warning in model["warnings"])
        with torch.no_grad():
            x, y = (TinyFeatures()(torch.from_numpy(pairs[:, side]).permute(0, 3, 1, 2)).double() for side in (0, 1))
        options = dict(kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
        kernels = [kernel_poly(a.numpy(), b.numpy(), **options) for a, b in ((x, x), (x, y), (y, y))]
        assert model["metrics"]["kid"] == pytest.approx(mmd2(*kernels, mmd_est="u-statistic"), abs=1e-7)
        theirs = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=9, save_cpu_ram=False, verbose=False)
        for name in ("precision", "recall"):
            assert model["metrics"][name] == pytest.approx(theirs[name], abs=1e-6)
    few = bench(photo_folder, [("kl", tiny_kl())], size=48, limit=3, speed=False, metrics=["kid"])["models"][0]
    assert few["metrics"]["kid"] is None
    assert few["skipped"]["kid"] == "it needs at least 4 images"
    assert "rfid" not in few["metrics"]


def test_features_beyond_the_sample_are_said_to_be_left_out(photo_folder, monkeypatch):
    def with_tiny_features(keep_originals):
        metric = FrechetDistance(TinyFeatures(), 4, keep_originals=keep_originals)
        metric.weights_sha256 = "0"
        return metric

    monkeypatch.setattr(quality, "FrechetInceptionDistance", with_tiny_features)
    sample = partial(FeatureSample, size=5)
    monkeypatch.setattr(quality, "FeatureSample", sample)
    model = bench(photo_folder, [tiny_kl()], size=48, batch_size=2, speed=False, metrics=["recall"])["models"][0]
    assert "KID, precision and recall are of 5 of the 6 images, drawn by name." in model["warnings"]
    assert 0 <= model["metrics"]["recall"] <= 1


def test_dists_is_measured_where_its_file_is(photo_folder, tmp_path, monkeypatch):
    checkpoints = tmp_path / "torch_home" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    file = checkpoints / WEIGHT_FILES["vgg16"].name
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    sha256 = sha256_file(file)
    monkeypatch.setitem(WEIGHT_FILES, "vgg16", replace(WEIGHT_FILES["vgg16"], sha256_prefix=sha256[:8]))
    results = bench(photo_folder, [tiny_kl()], size=48, limit=2, speed=False, metrics=["dists"])
    model = results["models"][0]
    assert model["metrics"]["dists"] == pytest.approx(np.mean([row["dists"] for row in model["per_image"]]))
    assert 0 < model["metrics"]["dists"] < 1
    assert results["metric_weights_sha256"] == {"dists": sha256}


def test_the_batch_size_changes_no_figure(photo_folder):
    one, four = (bench(photo_folder, [tiny_kl()], size=40, batch_size=b, speed=False) for b in (1, 4))
    assert one["protocol_sha256"] == four["protocol_sha256"]
    assert one["models"][0]["metrics"]["psnr"] == pytest.approx(four["models"][0]["metrics"]["psnr"], abs=1e-3)


def test_samples_of_the_posterior_are_seeded_by_image_not_by_batch(photo_folder):
    def rows(**options):
        results = bench(photo_folder, [tiny_kl()], size=40, speed=False, **options)
        return np.array([row["psnr"] for row in results["models"][0]["per_image"]]), results["protocol_sha256"]

    mode, mode_hash = rows()
    sampled, sampled_hash = rows(sample=True, batch_size=1)
    again, _ = rows(sample=True, batch_size=5)
    other, _ = rows(sample=True, seed=1)
    np.testing.assert_allclose(sampled, again, atol=1e-3)
    assert np.abs(sampled - mode).max() > 1e-3
    assert np.abs(sampled - other).max() > 1e-3
    assert sampled_hash != mode_hash


def test_the_protocol_hash_tells_comparable_results_from_others(photo_folder):
    def protocol(model, **options):
        return bench(photo_folder, [model], speed=False, **{"size": 40, **options})["protocol_sha256"]

    same = protocol(tiny_kl())
    assert protocol(tiny_taesd()) == same
    assert protocol(tiny_kl(), size=44) != same
    assert protocol(tiny_kl(), limit=4) != same
    assert protocol(tiny_kl(), dtype="bfloat16") != same


def test_a_broken_image_is_named_and_the_others_are_measured(photo_folder, tmp_path):
    whole = bench(photo_folder, [tiny_kl()], size=40, speed=False)
    (photo_folder / "broken.jpg").write_bytes((photo_folder / "b.jpg").read_bytes()[:200])
    out = tmp_path / "report"
    with pytest.raises(DataError, match=r"1 of 7 inputs are bad.*results\.json"):
        bench(photo_folder, [("first", tiny_kl()), ("second", tiny_kl())], out=out, size=40, speed=False)
    results = read_results(out)
    assert [bad["key"] for bad in results["images"]["quarantined"]] == ["broken.jpg"]
    for model in results["models"]:
        assert model["metrics"] == whole["models"][0]["metrics"]
    assert "broken.jpg" in (out / "report.html").read_text()
    assert bench(photo_folder, [tiny_kl()], size=40, max_bad=1, speed=False)["images"]["measured"] == 6


def test_a_model_that_returns_nan_for_one_image_is_measured_on_the_others(photo_folder):
    def poison_dark_images(pixels):
        return torch.where(pixels.mean((1, 2, 3), keepdim=True) < threshold, torch.nan, pixels * 0.5)

    def crops():
        for key in ("a.png", "b.jpg", "e e.jpeg", "f.PNG", "sub/c.webp", "sub/deeper/d.png"):
            crop = adm_center_crop(np.asarray(Image.open(photo_folder / key).convert("RGB")), 40)
            yield key, to_float(torch.from_numpy(crop)).mean().item()

    (darkest, low), (_, next_low), *_ = sorted(crops(), key=lambda pair: pair[1])
    threshold = (low + next_low) / 2
    results = bench(photo_folder, [Rigged(poison_dark_images)], size=40, speed=False)
    model = results["models"][0]
    assert [failure["key"] for failure in model["failed"]] == [darkest]
    assert model["images"] == 5
    assert darkest not in [row["key"] for row in model["per_image"]]
    assert np.isfinite(model["metrics"]["psnr"])
    assert any("NaN" in warning for warning in model["warnings"])


def test_a_model_that_only_returns_nan_gets_nulls_with_a_reason(photo_folder, tmp_path):
    results = bench(photo_folder, [Rigged(lambda pixels: pixels * torch.nan)], out=tmp_path, size=40)
    model = results["models"][0]
    assert model["metrics"]["psnr"] is None
    assert model["skipped"]["psnr"] == "no image could be measured"
    assert (tmp_path / "report.html").exists()
    summarise(results)


def test_perfect_reconstructions_are_null_not_infinite(photo_folder, tmp_path):
    results = bench(photo_folder, [Rigged()], out=tmp_path, size=40)
    model = results["models"][0]
    assert model["metrics"]["psnr"] is None
    assert "equals its original" in model["skipped"]["psnr"]
    assert model["identical"] == 6
    assert model["metrics"]["ssim"] == pytest.approx(1)
    assert model["gmac"]["encode"] == 0


def test_one_image_is_enough(photo_folder):
    results = bench(photo_folder / "b.jpg", [tiny_kl()], size=40, speed=False)
    assert results["protocol"]["images"] == 1
    assert results["models"][0]["intervals"]["psnr"] is None


def test_bfloat16_runs_in_bfloat16(photo_folder):
    full, half = (
        bench(photo_folder, [tiny_kl()], size=40, dtype=d, speed=False)["models"][0] for d in ("float32", "bfloat16")
    )
    assert half["dtype"] == "bfloat16"
    assert half["metrics"]["psnr"] != full["metrics"]["psnr"]
    assert half["metrics"]["psnr"] == pytest.approx(full["metrics"]["psnr"], abs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16}, "at least 32"),
        ({"limit": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"metrics": ["psrn"]}, "no metric 'psrn'"),
        ({"max_bad": -1}, "max_bad"),
        ({"dtype": "int8"}, "expected float32"),
        ({"device": "gpu0"}, "device='gpu0'"),
    ],
)
def test_requests_that_cannot_be_met(photo_folder, options, message):
    with pytest.raises(RequestError, match=message):
        bench(photo_folder, [tiny_taesd()], **options)


def test_the_function_and_the_package_of_one_name_do_not_hide_each_other(photo_folder):
    for _ in range(2):  # the first access imports the package
        results = latentae.bench(photo_folder, ["dc-ae-tiny"], size=32, speed=False)
        assert results["models"][0]["name"] == "dc-ae-tiny"
    assert latentae.bench.run.bench is bench


def test_two_models_of_one_name_are_refused(photo_folder):
    with pytest.raises(RequestError, match=r"NAME=MODEL"):
        bench(photo_folder, ["dc-ae-tiny", "dc-ae-tiny"])


def test_images_that_change_between_models_are_noticed(photo_folder):
    def overwrite(pixels):
        Image.new("RGB", (64, 64), (1, 2, 3)).save(photo_folder / "a.png")
        return pixels

    with pytest.raises(DataError, match="changed"):
        bench(photo_folder, [("first", Rigged(overwrite)), ("second", Rigged())], size=40, speed=False)


class TestCommand:
    def test_a_table_with_the_protocol(self, photo_folder, capsys, tmp_path):
        kl = tmp_path / "a=b"
        tiny_kl().save_pretrained(kl)
        command = ["bench", str(photo_folder), "--model", "dc-ae-tiny", "--model", f"mine={kl}", "--model", str(kl)]
        assert main([*command, "--size", "40", "--limit", "3", "--out", str(tmp_path / "out")]) == 0
        output = capsys.readouterr()
        results = read_results(tmp_path / "out")
        assert [model["name"] for model in results["models"]] == ["dc-ae-tiny", "mine", str(kl)]
        assert results["models"][1]["metrics"] == results["models"][2]["metrics"]
        for text in (
            "PSNR",
            "f4c4",
            "3 images of 40 px",
            "rounded half up",
            "torch",
            f"{results['models'][1]['metrics']['ssim']:.4f}",
        ):
            assert text in output.out
        assert "report.html" in output.err

    def test_json_on_standard_output(self, photo_folder, capsys):
        assert main(["bench", str(photo_folder), "--model", "dc-ae-tiny", "--size", "40", "--no-speed", "--json"]) == 0
        results = json.loads(capsys.readouterr().out)
        assert results["models"][0]["speed"] is None
        assert results["models"][0]["class"] == type(latentae.create("dc-ae-tiny")).__name__

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (["SRC", "--model", "dc-ae-tinny"], 2, "dc-ae-tinny"),
            (["SRC", "--model", "dc-ae-f32c32-in-1.0"], 2, "random"),
            (["nowhere", "--model", "dc-ae-tiny"], 2, "nowhere"),
            (["SRC", "--model", "dc-ae-tiny", "--metrics", "rfid"], 2, "weights-inception-2015-12-05-6726825d.pth"),
            (["SRC", "--model", "dc-ae-tiny", "--metrix", "rfid"], 2, "--metrics"),
        ],
    )
    def test_one_sentence_and_the_exit_code(self, photo_folder, capsys, arguments, code, words):
        try:
            returned = main(["bench", *[str(photo_folder) if word == "SRC" else word for word in arguments]])
        except SystemExit as stop:
            returned = stop.code
        assert returned == code
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert words in error[0]

    def test_a_broken_image_among_few_is_exit_code_3(self, photo_folder, capsys):
        (photo_folder / "zero.png").touch()
        assert main(["bench", str(photo_folder), "--model", "dc-ae-tiny", "--size", "40", "--no-speed"]) == 3
        assert "1 of 7" in capsys.readouterr().err


COARSE = {
    "encoder_block_out_channels": [8] * 6,
    "decoder_block_out_channels": [8] * 6,
    "encoder_layers_per_block": [1] * 6,
    "decoder_layers_per_block": [1] * 6,
    "attention_head_dim": 4,
    "latent_channels": 8,
}


def test_equivariance_is_that_of_the_model_and_stands_in_the_report(photo_folder, tmp_path):
    """Rotation errors computed by hand on the crops of the first three images."""
    autoencoder = tiny_kl().eval()
    models = [("kl", autoencoder), ("too coarse", latentae.create("dc-ae-f32c32-in-1.0", **COARSE))]
    results = bench(photo_folder, models, out=tmp_path / "out", size=64, equivariance=3, speed=False, batch_size=2)
    figures, skipped = (model["latents"]["equivariance"] for model in results["models"])

    errors = []
    for row in results["models"][0]["per_image"][:3]:
        image = adm_center_crop(np.asarray(Image.open(photo_folder / row["key"]).convert("RGB")), 64)
        pixels = to_float(torch.from_numpy(image).permute(2, 0, 1)[None])
        for turns in (1, 2, 3):
            with torch.no_grad():
                moved = autoencoder.encode(pixels).latent_dist.mode().rot90(turns, (2, 3))
                wanted = autoencoder.encode(pixels.rot90(turns, (2, 3))).latent_dist.mode()
            errors.append((moved - wanted).square().sum().item() / wanted.square().sum().item())
    assert figures["rotation_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert figures.keys() >= {"scale_error", "scale_error_standardised", "rotation_psnr"}
    assert figures["images"] == 3
    assert figures["rotation_rfid"] is None
    assert "inception-2015" in figures["rfid_skipped"]
    assert "at least 4x4, got 2x2: take images of at least 128 pixels" in skipped["skipped"]
    page = (tmp_path / "out/report.html").read_text()
    assert "Equivariance of the latents" in page
    assert f"{figures['scale_error']:.3g}" in page
    assert (
        "equivariance" not in bench(photo_folder, ["dc-ae-tiny"], size=64, limit=1, speed=False)["models"][0]["latents"]
    )


def test_r_rfid_is_measured_where_rfid_is(photo_folder, tmp_path, monkeypatch):
    def with_tiny_features(keep_originals):
        metric = FrechetDistance(TinyFeatures(), 4, keep_originals=keep_originals)
        metric.weights_sha256 = "0"
        return metric

    monkeypatch.setattr(quality, "FrechetInceptionDistance", with_tiny_features)
    autoencoder = tiny_kl().eval()
    results = bench(photo_folder, [autoencoder], out=tmp_path / "out", size=64, equivariance=4, speed=False)
    figures = results["models"][0]["latents"]["equivariance"]
    theirs = TorchmetricsFID(feature=TinyFeatures().requires_grad_(False), input_img_size=(3, 64, 64))
    for row in results["models"][0]["per_image"][:4]:
        image = adm_center_crop(np.asarray(Image.open(photo_folder / row["key"]).convert("RGB")), 64)
        image = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        theirs.update(image.rot90(1, (2, 3)), real=True)
        with torch.no_grad():
            z = autoencoder.encode(to_float(image)).latent_dist.mode().rot90(1, (2, 3))
            pixels = autoencoder.decode(z).sample
        theirs.update((pixels * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8), real=False)
    assert list(figures["rotation_rfid"]) == ["90", "180", "270"]
    assert figures["rotation_rfid"]["90"] == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert f"{figures['rotation_rfid']['90']:.3g} / " in (tmp_path / "out/report.html").read_text()

    alone = bench(photo_folder, [autoencoder], size=64, equivariance=1, speed=False)
    assert "at least two images" in alone["models"][0]["latents"]["equivariance"]["rfid_skipped"]
    unasked = bench(photo_folder, [autoencoder], size=64, equivariance=2, speed=False, metrics=["psnr"])
    assert "not asked for" in unasked["models"][0]["latents"]["equivariance"]["rfid_skipped"]


def test_bits_of_models_and_files_stand_side_by_side(photo_folder, tmp_path):
    results = bench(photo_folder, ["dc-ae-tiny", "jpeg:75", ("small", "webp:30")], out=tmp_path, size=64, speed=False)
    ours, jpeg, webp = results["models"]
    assert [model["name"] for model in results["models"]] == ["dc-ae-tiny", "jpeg:75", "small"]
    assert 0 < ours["rate"]["bits_per_pixel"] < 32 * ours["floats_per_pixel"]
    assert ours["rate"]["images"] == 6
    assert [point["noise"] for point in ours["noise_robustness"]["curve"]] == [0.1, 0.2, 0.4]
    assert jpeg["class"] == "JPEG"
    assert jpeg["rate"]["psnr"] == jpeg["metrics"]["psnr"]
    files = []
    for row in results["samples"]:
        stream = io.BytesIO()
        original = Image.open(tmp_path / row["input"])
        original.save(stream, "jpeg", quality=75, optimize=True)
        files.append(len(stream.getvalue()))
        saved = Image.open(tmp_path / row["models"][1]["reconstruction"])
        assert np.array_equal(np.array(saved), np.array(Image.open(stream)))
    assert jpeg["rate"]["bits_per_pixel"] == pytest.approx(8 * sum(files) / (6 * 64**2))
    assert webp["rate"]["bits_per_pixel"] < jpeg["rate"]["bits_per_pixel"]
    assert "1/" in summarise(results)


def test_rates_are_of_the_same_first_images(photo_folder):
    models = ["dc-ae-tiny", "jpeg:75"]
    results = bench(photo_folder, models, size=64, speed=False, rate_images=2, batch_size=3)
    ours, jpeg = results["models"]
    assert ours["rate"]["images"] == jpeg["rate"]["images"] == 2
    assert jpeg["rate"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in jpeg["per_image"][:2]]))
    assert jpeg["rate"]["psnr"] != jpeg["metrics"]["psnr"]
    assert "all bytes of files; bits and PSNR of the first 2 images." in summarise(results)
    alone = bench(photo_folder, ["jpeg:75"], size=64, rate_images=2)
    assert "\nbits: all bytes of files; bits and PSNR of the first 2 images." in summarise(alone)


@pytest.mark.parametrize("option", [{"limit": 0}, {"rate_images": -1}, {"size": 31}, {"batch_size": 0}])
def test_what_is_out_of_range_is_named_alone(photo_folder, option):
    ((name, value),) = option.items()
    with pytest.raises(RequestError, match=rf"^{name}={value}: it must be at least \d+\.$"):
        bench(photo_folder, ["jpeg:75"], **option)


def test_a_codec_without_its_quality_and_a_number_of_steps_given_twice(photo_folder):
    with pytest.raises(RequestError, match="say jpeg:75"):
        bench(photo_folder, ["jpeg"])
    assert numbers("--decode-steps", "1,1,4") == [1, 4]


def test_rates_can_be_left_out(photo_folder):
    (model,) = bench(photo_folder, ["dc-ae-tiny"], size=64, speed=False, rate_images=0)["models"]
    assert model["rate"] is None
    assert model["noise_robustness"] is None
