"""The claim pipeline: what a swapped autoencoder changes in the pictures of a trained denoiser."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image


@pytest.fixture
def module(claims):
    import claims.pipeline

    return claims.pipeline


def good(module):
    """Figures that show all of it, of two pictures."""
    to_photo = {key: [27.0, 24.0] for key in (module.OWN, module.STOCK, module.TUNED, module.RETRAINED)}
    lost = {key: [9.0, 11.0] for key in (module.OTHER, module.RESCALED)}
    return {
        "to_a": {module.STOCK: [100.0, 100.0], module.TUNED: [33.0, 30.0], **lost},
        "to_photo": {**to_photo, **lost},
        "reconstruction": {key: [28.0, 26.0] for key in (module.OWN, module.TUNED, module.OTHER)},
        "a_to_a_of_other_photos": [12.0],
        "largest_difference_of_stock_class": 1e-6,
        "changed_tensors": {"encoder": [0, 90], "decoder": [80, 90]},
    }


def shown(module, figures):
    return [verdict["shown"] for verdict in module.thresholds(figures)]


def test_one_picture_decides(module):
    assert shown(module, good(module)) == [True] * 7
    for position, (group, name, values) in enumerate(
        [
            ("changed_tensors", "encoder", [1, 90]),
            ("to_photo", module.OWN, [27.0, 22.9]),
            (None, "largest_difference_of_stock_class", 2e-4),
            ("to_a", module.TUNED, [40.0, 24.9]),
            ("to_a", module.OTHER, [9.0, 15.1]),
            ("to_a", module.RESCALED, [9.0, 15.1]),
            ("to_photo", module.RETRAINED, [24.9, 24.0]),
        ]
    ):
        figures = good(module)
        (figures[group] if group else figures)[name] = values
        assert shown(module, figures) == [index != position for index in range(7)], name
    figures = good(module)
    figures["changed_tensors"]["decoder"] = [0, 90]
    assert not shown(module, figures)[0], "nothing was fine-tuned"


def test_the_picture_has_a_row_for_each(module):
    ramp = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 16, 16)
    sheet = module.picture_of({"up": ramp, "down": -ramp}, gap=2, margin=40)
    assert sheet.size == (40 + 5 * 16 + 4 * 2, 2 * 16 + 2)
    rows = [[sheet.getpixel((40 + 18 * column + 8, 18 * row + 8))[0] for column in range(5)] for row in range(2)]
    assert rows[0] == [0, 64, 128, 191, 255]
    assert rows[1] == rows[0][::-1]


@pytest.fixture
def trained(module, tmp_path):
    plan = module.QUICK
    return tmp_path, plan, module.train_autoencoders(tmp_path, plan)


@pytest.mark.slow
def test_swapping_from_training_to_pictures(module, trained):
    folder, plan, runs = trained
    pictures = module.draw_with_all(folder, plan, runs)
    figures = module.measure(pictures, runs, plan)
    encoder, decoder = (figures["changed_tensors"][half] for half in ("encoder", "decoder"))
    assert encoder[0] == 0 < encoder[1]
    assert 0 < decoder[0] <= decoder[1]
    assert module.changed(runs[module.OWN], runs[module.OTHER])["encoder"][0] > 0
    assert figures["largest_difference_of_stock_class"] <= module.LARGEST_ROUNDING
    assert not torch.equal(pictures[module.TUNED], pictures[module.OWN])
    assert max(figures["to_a"][module.OTHER]) < min(figures["to_a"][module.TUNED])
    assert not torch.equal(pictures[module.OTHER], pictures[module.RESCALED])
    assert not torch.equal(pictures[module.RESCALED], pictures[module.RETRAINED])
    assert all(x.shape == (5, 3, 64, 64) for x in pictures.values())


@pytest.mark.slow
def test_the_command_from_end_to_end(tool, tmp_path):
    script = tool("claims").__file__
    options = ["--quick", "--threads", "1", "--json", str(tmp_path / "p.json"), "--figure", str(tmp_path / "p.jpg")]
    done = subprocess.run([sys.executable, script, "pipeline", *options], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("pipeline: fine-tuning the decoder leaves the encoder bit for bit")
    result = json.loads((tmp_path / "p.json").read_text())["pipeline"]
    assert all(len(values) == 5 for values in result["to_photo"].values())
    with Image.open(tmp_path / "p.jpg") as sheet:
        assert sheet.size == (96 + 5 * 66 - 2, 4 * 66 - 2)
    refused = subprocess.run([sys.executable, script, "pipeline", "--tier", "gpu"], capture_output=True, text=True)
    assert refused.returncode == 2
