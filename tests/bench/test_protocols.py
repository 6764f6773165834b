"""The papers' protocols: each choice against the library that its authors use, and how far it moves the figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from latentae.bench import quality, reference
from latentae.bench.crops import CROPS
from latentae.bench.pairs import Pair, truncate
from latentae.bench.presets import PRESETS, find_preset
from latentae.bench.results import summarise
from latentae.bench.run import bench
from latentae.cli.main import main
from latentae.data.samples import photos
from latentae.errors import RequestError
from latentae.metrics.frechet import FrechetDistance

SIZE = 96


class Blur(nn.Module):
    """An "autoencoder" that loses fine detail and adds some: its floats leave [-1, 1] and lie between the levels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = {"spatial_compression_ratio": 1, "latent_channels": 3}

    def encode(self, pixels):
        return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)

    def decode(self, latents):
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
        return 1.03 * latents + 0.03 * noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, image in photos("held_out").items():
        Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def _no_weight_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def results(folder):
    """One bench by each protocol."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", "/nonexistent")
        return {
            name: bench(folder, [("blur", Blur())], size=SIZE, protocol=name, metrics=["psnr"], speed=False)
            for name in PRESETS
        }


def crops(folder, name):
    paths = sorted(folder.iterdir(), key=lambda path: path.name)
    return [CROPS[name][0](np.asarray(Image.open(path).convert("RGB")), SIZE) for path in paths]


def reconstructions(images):
    """Floats of each image, as the model gives them."""
    model = Blur()
    signed = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1 for image in images]
    with torch.no_grad():
        return [(model.decode(model.encode(x))[0], x[0]) for x in signed]


def signed_ssim(x, y, data_range):
    return structural_similarity_index_measure(x[None], y[None], data_range=data_range).item()


def as_levels(x, how):
    x = ((x.double() + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    return (np.floor(x + 0.5) if how == "round" else np.floor(x + 1e-4)).astype(np.uint8)


def test_each_protocols_psnr_and_ssim_are_its_libraries(folder, results):
    def uint8_round(x, y):
        return as_levels(x, "round"), as_levels(y, "round")

    def uint8_padded(x, y):
        x, y = (torch.tensor(image).permute(2, 0, 1).float() for image in uint8_round(x, y))
        return signed_ssim(x, y, (0.0, 255.0))

    def gaussian(x, y):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return structural_similarity(*uint8_round(x, y), channel_axis=2, data_range=255, **options)

    expected = {
        "latentae": ("adm", gaussian),
        "dc-ae": ("adm", uint8_padded),
        "vavae": ("tensor", lambda x, y: signed_ssim(x, y, (-1.0, 1.0))),
        "eqvae": ("tensor", lambda x, y: signed_ssim(x, y, None)),
        "ldm": ("linear", gaussian),
        "litevae": ("bicubic", gaussian),
    }
    for name, (crop, ssim) in expected.items():
        rows = results[name]["models"][0]["per_image"]
        for row, (x, y) in zip(rows, reconstructions(crops(folder, crop)), strict=True):
            assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(*uint8_round(x, y), data_range=255), abs=2e-3)
            assert row["ssim"] == pytest.approx(ssim(x, y), abs=1e-4), (name, row["key"])


def test_truncation_and_floats(folder, results):
    rows = results["seed-voken"]["models"][0]["per_image"]
    for row, (x, y) in zip(rows, reconstructions(crops(folder, "linear")), strict=True):
        # their own two lines, on float32 arrays
        pair = [((z.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 0).numpy().astype(np.uint8) for z in (x, y)]
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=1e-3)
        assert row["ssim"] == pytest.approx(structural_similarity(*pair, channel_axis=2), abs=1e-5)
    rows = results["dito"]["models"][0]["per_image"]
    for row, (x, y) in zip(rows, reconstructions(crops(folder, "lanczos")), strict=True):
        error = (x.clamp(-1, 1) / 2 - y / 2).square().mean()
        assert row["psnr"] == pytest.approx((-10 * torch.log10(error)).item(), abs=1e-4)
    rows = results["titok"]["models"][0]["per_image"]
    for row, (x, y) in zip(rows, reconstructions(crops(folder, "bicubic")), strict=True):
        pair = [((x.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8), ((y + 1) / 2 * 255).round().to(torch.uint8)]
        pair = [z.permute(1, 2, 0).numpy() for z in pair]
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=2e-3)


def test_how_far_each_choice_moves_the_figures(folder, results):
    """On photos; the signs and the sizes are those that were measured on other images before."""

    def figure(name, metric):
        return results[name]["models"][0]["metrics"][metric]

    def own(crop, **choices):
        """PSNR and SSIM of one crop under another choice."""
        pairs = [
            Pair(x[None], torch.from_numpy(image).permute(2, 0, 1)[None], choices.get("quantisation", "round"))
            for image, (x, _) in zip(crops(folder, crop), reconstructions(crops(folder, crop)))
        ]
        measure = choices["measure"]()
        value = np.mean([measure.values(*pair.read(choices.get("reads", "uint8"))).item() for pair in pairs])
        print(crop, choices, value)  # what a reader of a failure wants to know
        return value

    psnr = own("adm", measure=quality.PSNR)
    assert psnr == pytest.approx(figure("latentae", "psnr"), abs=1e-6)
    assert 20 < psnr < 32
    # quantisation of both: some hundredths of a dB; the model's own errors are far larger
    clamped = own("adm", measure=quality.FloatPSNR, reads="clamped")
    assert 0 < clamped - psnr < 0.03
    assert 0.005 < abs(own("adm", measure=quality.PSNR, quantisation="truncate") - psnr) < 0.3
    assert abs(own("adm", measure=quality.PSNR, quantisation="truncate-both") - psnr) < 0.1
    # without the clamp what leaves the range counts
    assert own("adm", measure=quality.FloatPSNR, reads="raw") < clamped
    # SSIM: the range of [-1, 1] lowers it, a flat window raises it, the border hardly matters
    ssim = own("adm", measure=quality.SSIM)
    assert 0.0003 < ssim - own("adm", measure=quality.SignedSSIM, reads="clamped") < 0.06
    assert 0.001 < abs(own("adm", measure=quality.UniformSSIM) - ssim) < 0.03
    assert 1e-5 < abs(own("adm", measure=quality.PaddedSSIM) - ssim) < 0.01
    # crops: filters that pass more detail make the same blur look worse
    by_crop = {crop: own(crop, measure=quality.PSNR) for crop in CROPS}
    assert by_crop["linear"] < by_crop["tensor"]
    assert max(by_crop.values()) - min(by_crop.values()) > 0.3
    assert figure("ldm", "psnr") == pytest.approx(by_crop["linear"], abs=1e-6)


def test_truncation_takes_one_from_63_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert int((truncate(levels.float() / 127.5 - 1) != levels).sum()) == 63


def test_every_protocol_but_the_default_is_another(results):
    hashes = {name: result["protocol_sha256"] for name, result in results.items()}
    assert len(set(hashes.values())) == len(PRESETS)
    for name, result in results.items():
        assert result["protocol"]["preset"] == name
        text = summarise(result)
        for choice in ("crop", "quantisation", "psnr", "ssim"):
            assert result["protocol"][choice] in text
    assert "approximate" in summarise(results["litevae"])
    assert "not comparable with rFID" in summarise(results["adm"])
    assert {name for name, result in results.items() if result["protocol"]["encode"].startswith("sample")} == {
        "vavae",
        "eqvae",
    }
    assert all(
        r["protocol"]["psnr"].startswith("not of this protocol") == (n in ("adm", "titok")) for n, r in results.items()
    )


def test_an_unknown_protocol_is_refused(folder, capsys):
    with pytest.raises(RequestError, match=r"no protocol 'sdvae': choose from latentae, adm, ldm"):
        find_preset("sdvae")
    assert main(["bench", str(folder), "--model", "dc-ae-tiny", "--protocol", "sdvae"]) == 2


class TinyFeatures(nn.Module):
    takes_floats = True

    def forward(self, images):
        pixels = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
        return F.avg_pool2d(pixels.mean(1), SIZE // 2).flatten(1).exp()


@pytest.fixture
def tiny_frechet(monkeypatch):
    asked = []

    def with_tiny_features(keep_originals, **options):
        asked.append(options)
        metric = FrechetDistance(TinyFeatures(), 4, keep_originals=keep_originals)
        metric.weights_sha256 = "0"
        return metric

    monkeypatch.setattr(quality, "FrechetInceptionDistance", with_tiny_features)
    monkeypatch.setattr(reference, "FEATURES", 4)
    return asked


def test_fid_against_a_reference_set(folder, tmp_path, tiny_frechet):
    features = TinyFeatures()(torch.from_numpy(np.stack(crops(folder, "adm"))).permute(0, 3, 1, 2)).double().numpy()
    file = tmp_path / "reference.npz"
    np.savez(file, mu=features.mean(0), sigma=np.cov(features.T), other=np.zeros(3))
    options = {"size": SIZE, "protocol": "adm", "speed": False}
    with_reference = bench(folder, [("blur", Blur())], fid_reference=file, **options)
    metrics = with_reference["models"][0]["metrics"]
    own = bench(folder, [("blur", Blur())], size=SIZE, speed=False)["models"][0]["metrics"]
    assert metrics["fid"] == pytest.approx(own["rfid"], rel=1e-6)
    assert metrics["rfid"] is None  # ADM's evaluator has no such thing
    assert "reference.npz, sha256" in with_reference["protocol"]["fid"]
    assert "FID" in summarise(with_reference)
    assert any("FID of" in warning for warning in with_reference["models"][0]["warnings"])
    without = bench(folder, [("blur", Blur())], **options)["models"][0]
    assert without["metrics"]["fid"] is None
    assert "--fid-reference" in without["skipped"]["fid"]


def test_what_rfid_reads(folder, tiny_frechet):
    values = {
        name: bench(folder, [("blur", Blur())], size=SIZE, protocol=name, speed=False)["models"][0]["metrics"]["rfid"]
        for name in ("ldm", "seed-voken", "titok", "litevae", "dc-ae")
    }
    assert tiny_frechet == [
        {},
        {"resize": "half-pixel"},
        {"precision": torch.float64},
        {},
        {"resize": "half-pixel"},
    ]
    assert values["titok"] != values["litevae"]  # of one crop, truncated or rounded
    assert values["seed-voken"] != values["ldm"]  # of one crop, floats or bytes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [({"mu": np.zeros(2048)}, "no npz file with mu and sigma"), ({"mu": np.zeros(3), "sigma": np.eye(3)}, "expected")],
)
def test_a_reference_that_is_none(folder, tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(RequestError, match=message):
        bench(folder, [Blur()], size=SIZE, fid_reference=tmp_path / "r.npz")
    Path(tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(RequestError, match="no npz file"):
        bench(folder, [Blur()], size=SIZE, fid_reference=tmp_path / "text.npz")
    with pytest.raises(RequestError, match="there is no file"):
        bench(folder, [Blur()], size=SIZE, fid_reference=tmp_path / "absent.npz")
