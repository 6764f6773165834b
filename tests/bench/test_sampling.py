"""Decoders that sample: what they cost by step, their rows by number of steps, the noise of each image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import latentae
from latentae.bench.results import COST_HEADER, cost_rows, summarise
from latentae.bench.run import bench
from latentae.bench.speed import count_gmac, count_parameters, measure_speed
from latentae.cli.main import main
from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.store.reconstruction import reconstruct


@pytest.fixture
def squares(tmp_path):
    """Three smooth images of 32 x 32."""
    folder = tmp_path / "squares"
    folder.mkdir()
    y, x = np.mgrid[:32, :32]
    for i in range(3):
        image = np.stack([127 + 120 * np.sin(x / (3 + c) + y / (5 + i)) for c in range(3)], -1).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def products(module, run) -> float:
    """10^9 multiply-accumulates of the convolutions and linear layers of a module, by their shapes."""
    total = 0

    def add(layer, _, output):
        nonlocal total
        kernel = layer.weight[0].numel()  # inputs that each output is a sum over
        total += output.numel() * kernel

    handles = [
        layer.register_forward_hook(add)
        for layer in module.modules()
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return total / 1e9


def test_a_decode_is_the_conditioner_and_its_steps():
    for name in ("dito-tiny", "swycc-tiny"):
        model = latentae.create(name)
        z = torch.randn(1, 4, 4, 4)
        conditioner = products(model, lambda m=model, z=z: m.condition(z))
        whole = products(model, lambda m=model, z=z: m.decode(z, num_inference_steps=1))
        for steps in (1, 3):
            gmac = count_gmac(LatentCodec(model).with_inference_steps(steps), 32)
            assert gmac["decode_step"] == pytest.approx(whole - conditioner, rel=1e-6)
            assert gmac["decode"] == pytest.approx(conditioner + steps * (whole - conditioner), rel=1e-6)
    assert "decode_step" not in count_gmac(LatentCodec(latentae.create("dc-ae-tiny")), 32)


@pytest.mark.parametrize(("preset", "gmac"), [("dito-b-f8c4", 794), ("dito-l-f8c4", 1787)])
def test_steps_cost_what_the_published_networks_do(preset, gmac):
    """Of the authors' own code at 256 px; SD-VAE's decoder has 311."""
    with torch.device("meta"):
        codec = LatentCodec(latentae.create(preset))
    counts = count_gmac(codec, 256)
    assert counts["decode_step"] == pytest.approx(gmac, rel=2e-3)
    assert counts["decode"] == pytest.approx(50 * counts["decode_step"], rel=1e-3)


def test_a_first_decoder_counts_as_decoder():
    model = latentae.create("swycc-tiny")
    counts = count_parameters(model)
    assert counts["encoder"] + counts["decoder"] == counts["total"] == sum(p.numel() for p in model.parameters())


def test_timings_of_a_decode_and_of_one_of_its_steps():
    speed = measure_speed(LatentCodec(latentae.create("dito-tiny")).with_inference_steps(6), 32, repeats=3)
    assert speed["decode_step"]["seconds_per_batch"] >= 0
    assert speed["decode_step"]["seconds_per_batch"] * 5 <= speed["decode"]["seconds_per_batch"]


def test_every_number_of_steps_is_a_row_of_its_own_with_its_seed(squares, tmp_path):
    models = [("d", latentae.create("dito-tiny")), ("plain", latentae.create("dc-ae-tiny"))]
    results = bench(
        squares, models, size=32, decode_steps=[1, 3], seed=5, speed=False, out=tmp_path / "out", metrics=["psnr"]
    )
    assert [model["name"] for model in results["models"]] == ["d, 1 step", "d, 3 steps", "plain"]
    one, three, plain = results["models"]
    assert (one["decoding"], three["decoding"]) == ({"steps": 1, "seed": 5}, {"steps": 3, "seed": 5})
    assert plain["decoding"] is None
    assert one["per_image"] != three["per_image"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "3 steps, seed 5" in html
    text = summarise(results)
    assert "noise seeded by 5 and the image's name" in text
    assert "3 steps" in text
    rows = [dict(zip(COST_HEADER, row, strict=True)) for row in cost_rows(results)]
    halves = [(row["model"], row["half"]) for row in rows]
    assert ("d, 3 steps", "decoder, 3 steps") in halves
    assert ("d, 3 steps", "one of its steps") in halves
    assert halves[-1] == ("for comparison: SD-VAE", "decoder")
    assert rows[-1]["parameters, M"] == "49.5"
    assert float(rows[-1]["GMAC"]) == pytest.approx(311 / 64, rel=0.02)  # but for the attention


def test_where_nothing_samples_nothing_is_said_of_steps(squares):
    results = bench(squares, [latentae.create("dc-ae-tiny")], size=32, speed=False)
    assert results["reference_cost"] is None
    assert "step" not in summarise(results)
    assert not any("SD-VAE" in row[0] for row in cost_rows(results))


def test_the_noise_is_that_of_the_name_in_any_batch_and_that_of_reconstruct(squares, tmp_path):
    def measure(seed, batch_size):
        model = latentae.create("swycc-tiny")
        results = bench(squares, [model], size=32, seed=seed, batch_size=batch_size, speed=False, metrics=["psnr"])
        return {row["key"]: row["psnr"] for row in results["models"][0]["per_image"]}

    first = measure(1, 3)
    assert measure(1, 1) == pytest.approx(first, abs=1e-2)
    assert measure(2, 3) != pytest.approx(first, abs=1e-2)
    reconstruct(squares, tmp_path / "out", latentae.create("swycc-tiny"), seed=1)
    for key, psnr in first.items():
        a, b = (np.asarray(Image.open(folder / key)).astype(float) for folder in (squares, tmp_path / "out"))
        assert 10 * np.log10(255**2 / np.square(a - b).mean()) == pytest.approx(psnr, abs=1e-2)


def test_steps_that_no_model_takes_are_refused(squares, capsys):
    plain = latentae.create("dc-ae-tiny")
    with pytest.raises(RequestError, match="None of these models decodes by steps"):
        bench(squares, [plain], size=32, decode_steps=[4])
    with pytest.raises(RequestError, match="at least 1, not 0"):
        bench(squares, [latentae.create("dito-tiny")], size=32, decode_steps=[0])
    assert main(["bench", str(squares), "--model", "dito-tiny", "--decode-steps", "1,x"]) == 2
    assert "--decode-steps 1,x: expected whole numbers" in capsys.readouterr().err


def test_the_command_measures_each_number_of_steps_and_times_sd_vae_beside_them(squares, capsys):
    command = ["bench", str(squares), "--model", "swycc-tiny", "--decode-steps", "1,2", "--size", "32", "--json"]
    assert main([*command, "--metrics", "psnr", "--limit", "1"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [model["decoding"]["steps"] for model in results["models"]] == [1, 2]
    assert all("decode_step" in model["speed"] for model in results["models"])
    reference = results["reference_cost"]
    assert reference["speed"]["size"] == 32
    assert reference["speed"]["decode"]["seconds_per_batch"] > 0
