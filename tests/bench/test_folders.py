"""A folder of reconstructions beside its originals, and other input that is not what a benchmark wishes for."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from latentae.bench import quality
from latentae.bench.results import summarise
from latentae.bench.run import bench
from latentae.bench.tables import results_table
from latentae.cli.main import main
from latentae.data.transforms import adm_center_crop
from latentae.errors import DataError, MissingWeights
from latentae.files import read_json
from latentae.metrics.frechet import FrechetDistance


@pytest.fixture(autouse=True)
def _no_weight_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)


def darker(path, target, size=None):
    """A reconstruction of a photo as a PNG file: whole, or its crop."""
    image = np.asarray(Image.open(path).convert("RGB"))
    image = image if size is None else adm_center_crop(image, size)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 0.9).astype(np.uint8)).save(target)


def keys(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def reconstructed(photo_folder, tmp_path):
    """Crops of all photos but two: of one the whole picture, of the other nothing."""
    folder = tmp_path / "reconstructed"
    for key in keys(photo_folder):
        if key != "f.PNG":
            target = (folder / key).with_suffix(".png")
            darker(photo_folder / key, target, None if key == "b.jpg" else 40)
    return folder


def test_reconstructions_are_found_by_name_and_measured(photo_folder, reconstructed, tmp_path):
    models = [("theirs", reconstructed), "dc-ae-tiny"]
    results = bench(photo_folder, models, out=tmp_path / "out", size=40, max_bad=1)
    row = results["models"][0]
    assert row["images"] == 5
    assert [failure["key"] for failure in row["failed"]] == ["f.PNG"]
    assert f"there is no image of that name in {reconstructed}" in row["failed"][0]["reason"]
    assert any(w.startswith("1 reconstructions cannot be measured") and "f.PNG" in w for w in row["warnings"])
    for figures in row["per_image"]:
        original = adm_center_crop(np.asarray(Image.open(photo_folder / figures["key"]).convert("RGB")), 40)
        theirs = np.asarray(Image.open((reconstructed / figures["key"]).with_suffix(".png")))
        theirs = theirs if theirs.shape == original.shape else adm_center_crop(theirs, 40)
        assert figures["psnr"] == pytest.approx(peak_signal_noise_ratio(original, theirs, data_range=255), abs=1e-9)
    assert results["models"][1]["images"] == 6
    assert "theirs, 5 of 6 images" in summarise(results)
    assert "\ndc-ae-tiny  " in summarise(results)
    assert "theirs, 5 of 6 images" in (tmp_path / "out/report.html").read_text()
    (resized,) = [warning for warning in row["warnings"] if "resized" in warning]
    assert resized.startswith("1 reconstructions of 61x97 px were cropped and resized to 40 px with their originals")
    assert read_json(tmp_path / "out/results.json") == results


def test_other_sizes_are_named_and_the_rest_is_measured(photo_folder, reconstructed):
    darker(photo_folder / "a.png", reconstructed / "a.png", 33)
    darker(photo_folder / "f.PNG", reconstructed / "f.png", 40)
    (reconstructed / "e e.png").write_bytes(b"no picture")
    shutil.copyfile(reconstructed / "sub/c.png", reconstructed / "sub/c.jpg")
    row = bench(photo_folder, [reconstructed], size=40, max_bad=3)["models"][0]
    reasons = {failure["key"]: failure["reason"] for failure in row["failed"]}
    assert set(reasons) == {"a.png", "e e.jpeg", "sub/c.webp"}
    assert reasons["a.png"] == "its reconstruction is 33x33 px; expected 40x40, or the original's 64x64"
    assert "cannot be decoded" in reasons["e e.jpeg"]
    assert "several images" in reasons["sub/c.webp"]
    assert row["images"] == 3
    assert row["metrics"]["psnr"] is not None


def test_missing_reconstructions_count_as_bad_when_all_is_written(photo_folder, reconstructed, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"1 of 6 inputs are bad \(1 without a reconstruction in theirs.*results\.json"):
        bench(photo_folder, [("theirs", reconstructed), "jpeg:50"], out=out, size=40)
    assert [model["images"] for model in read_json(out / "results.json")["models"]] == [5, 6]
    assert not (out / "progress").exists()
    command = ["bench", str(photo_folder), "--size", "40", "--model", str(reconstructed)]
    assert main(command) == 3
    assert main([*command, "--max-bad", "1"]) == 0


def test_who_lacks_images_is_not_the_best(photo_folder, reconstructed):
    contestants = [("part", reconstructed), ("whole", photo_folder), "dc-ae-tiny"]
    results = bench(photo_folder, contestants, size=40, max_bad=1, speed=False, rate_images=0)
    rows = results_table(results)["rows"]
    assert [any(cell["best"] for cell in row["cells"]) for row in rows] == [False, True, True]


def test_a_folder_of_nothing_is_no_model(photo_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match="holds no autoencoder"):
        bench(photo_folder, [tmp_path / "empty"], size=40)


def test_identical_reconstructions_are_null_with_a_reason(photo_folder):
    results = bench(photo_folder, [("same", photo_folder)], size=40)
    row = results["models"][0]
    assert row["metrics"]["psnr"] is None
    assert "equals its original" in row["skipped"]["psnr"]
    assert "PSNR" in summarise(results).splitlines()[0], "with a dash"
    assert row["identical"] == row["images"] == 6
    assert row["metrics"]["ssim"] == pytest.approx(1)
    assert all(figures["psnr"] is None for figures in row["per_image"])


def test_greyscale_photos_are_measured_as_grey_colours(tmp_path):
    y, x = np.mgrid[:60, :70]
    grey = (127 + 100 * np.sin(x / 5 + y / 9)).astype(np.uint8)
    for folder, image in (("grey", grey), ("colour", np.stack([grey] * 3, -1))):
        (tmp_path / folder).mkdir()
        Image.fromarray(image).save(tmp_path / folder / "a.png")
    one, other = (bench(tmp_path / f, ["dc-ae-tiny"], size=48, speed=False)["models"][0] for f in ("grey", "colour"))
    assert one["images"] == 1
    assert one["metrics"]["psnr"] == other["metrics"]["psnr"]


class Features(nn.Module):
    def forward(self, images):
        return images.float().flatten(1)[:, :64] / 255


def test_fewer_images_than_features_warn_and_one_image_has_no_distance(photo_folder, monkeypatch):
    def with_features(keep_originals, **options):
        metric = FrechetDistance(Features(), 64, keep_originals=keep_originals)
        metric.weights_sha256 = "0"
        return metric

    monkeypatch.setattr(quality, "FrechetInceptionDistance", with_features)
    row = bench(photo_folder, ["jpeg:50"], size=40)["models"][0]
    assert row["metrics"]["rfid"] is not None
    assert any("6 images, fewer than the 64 features, is biased upwards" in warning for warning in row["warnings"])
    alone = bench(photo_folder, ["jpeg:50"], size=40, limit=1)["models"][0]
    assert alone["metrics"]["rfid"] is None
    assert "at least two images" in alone["skipped"]["rfid"]
    assert all(value is None or np.isfinite(value) for value in alone["metrics"].values())


def test_a_model_that_fails_on_some_batches_only_is_named_once(photo_folder):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(1)), 0
            self.config = {"spatial_compression_ratio": 1, "latent_channels": 3}

        def encode(self, pixels):
            return pixels

        def decode(self, latents):
            self.calls += 1
            return latents * (torch.inf if self.calls == 1 else 0.5)

    row = bench(photo_folder, [Sometimes()], size=40, batch_size=2, speed=False, rate_images=0)["models"][0]
    assert [failure["reason"] for failure in row["failed"]] == ["the reconstruction holds NaN or infinity"] * 2
    assert row["images"] == 4
    assert any("2 reconstructions hold NaN or infinity" in warning for warning in row["warnings"])
