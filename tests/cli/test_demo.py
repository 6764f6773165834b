"""The demo, cut short: everything it promises to leave is there, and it repeats itself."""

import json

import numpy as np
import pytest
from diffusers import AutoencoderDC
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from latentae.cli.main import main
from latentae.data.samples import photos
from latentae.data.transforms import adm_center_crop


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("demo") / "with space" for _ in range(2)]
    for folder in folders:
        assert main(["demo", "--out", str(folder), "--steps", "3", "--threads", "2"]) == 0
    return folders


@pytest.mark.slow
def test_results_have_their_names_and_their_values(demos):
    results = json.loads((demos[0] / "results.json").read_text())
    crops = {name: adm_center_crop(image, 256) for name, image in photos("held_out").items()}
    decoded = {name: np.asarray(Image.open(demos[0] / "decoded" / f"{name}.png")) for name in crops}
    expected = np.mean([peak_signal_noise_ratio(crops[name], decoded[name], data_range=255) for name in crops])
    assert results["demo"]["psnr"] == pytest.approx(expected, abs=1e-6)  # store and bench agree with scikit-image
    assert results["models"][0]["metrics"]["psnr"] == results["demo"]["psnr"]
    means = [
        np.repeat(np.repeat(crop.reshape(32, 8, 32, 8, 3).mean((1, 3)), 8, 0), 8, 1).round() for crop in crops.values()
    ]
    block_mean = np.mean(
        [peak_signal_noise_ratio(crop, mean, data_range=255) for crop, mean in zip(crops.values(), means)]
    )
    assert results["demo"]["baseline_psnr"]["block_mean"] == pytest.approx(block_mean, abs=0.01)
    assert results["demo"]["baseline_psnr"]["pca"] > block_mean + 4


@pytest.mark.slow
def test_twice_gives_the_same_figures(demos):
    one, two = (json.loads((folder / "results.json").read_text()) for folder in demos)
    assert one["demo"]["psnr"] == two["demo"]["psnr"]
    assert one["models"][0]["metrics"] == two["models"][0]["metrics"]
    assert (demos[0] / "panel.png").read_bytes() == (demos[1] / "panel.png").read_bytes()


@pytest.mark.slow
def test_what_it_leaves(demos):
    for name in ("report.html", "panel.png", "pipeline/model_index.json", "pipeline/picture.png", "latents/store.json"):
        assert (demos[0] / name).stat().st_size > 0, name
    model = AutoencoderDC.from_pretrained(demos[0] / "model")
    assert model.config.scaling_factor != 1.0
    assert main(["demo", "--out", str(demos[0]), "--steps", "3", "--threads", "2"]) == 0  # goes on, finds all done
    assert main(["demo", "--out", str(demos[0]), "--steps", "4"]) == 2  # another run does not replace it
