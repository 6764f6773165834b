"""The cost table: encoder and decoder apart, in units that its conditions state, with a dash for what is not known."""

import pytest
from torch import nn

import latentae
from latentae.bench.results import COST_HEADER, cost_conditions, cost_rows, summarise
from latentae.bench.run import bench


class Halves(nn.Module):
    """A pair of convolutions of known cost that runs at no more than that."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 1000, 4, stride=4), nn.ConvTranspose2d(1000, 3, 4, stride=4)
        self.config = {"spatial_compression_ratio": 4, "latent_channels": 1000}

    def encode(self, pixels):
        return self.encoder(pixels)

    def decode(self, latents):
        return self.decoder(latents)


def test_both_halves_of_every_model_stand_apart(photo_folder, tmp_path):
    models = [("halves", Halves()), ("tiny", latentae.create("dc-ae-tiny"))]
    results = bench(photo_folder, models, size=64, limit=1, out=tmp_path)
    rows = [dict(zip(COST_HEADER, row, strict=True)) for row in cost_rows(results)]
    assert [(row["model"], row["half"]) for row in rows] == [
        ("halves", "encoder"),
        ("halves", "decoder"),
        ("tiny", "encoder"),
        ("tiny", "decoder"),
    ]
    # 48 products for each of 1000 x 16 x 16 latents; as many parameters as weights and biases
    assert [row["GMAC"] for row in rows[:2]] == ["0.0123", "0.0123"]
    assert [row["parameters, M"] for row in rows[:2]] == ["0.049", "0.048"]
    assert "0.0123 + 0.0123" in (tmp_path / "report.html").read_text()
    speed = results["models"][1]["speed"]
    assert float(rows[2]["ms / batch"]) == pytest.approx(1e3 * speed["encode"]["seconds_per_batch"], rel=6e-3)
    assert float(rows[3]["ms / batch"]) == pytest.approx(1e3 * speed["decode"]["seconds_per_batch"], rel=6e-3)
    text = summarise(results)
    assert "one image of 64 px" in cost_conditions(results)
    assert cost_conditions(results) in text
    assert all(cell in text for row in cost_rows(results) for cell in row)


def test_what_is_not_known_is_a_dash():
    model = {"name": "x", "parameters": {"total": 1}, "gmac": {"reason": "none"}, "speed": None}
    results = {"models": [model], "protocol": {"size": 64}}
    assert cost_rows(results) == [["x", "encoder", *"––––"], ["x", "decoder", *"––––"]]
    assert cost_conditions(results).endswith("speed was not measured.")
