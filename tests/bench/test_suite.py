"""The list of public autoencoders: its claims, what is run of it, and the anchor; with tiny stand-ins."""

import json

import pytest

from latentae.bench import suite as suite_module
from latentae.bench.run import bench
from latentae.bench.suite import load_suite, run_suite, summarise_suite
from latentae.cli.main import main
from latentae.errors import RequestError
from latentae.files import read_json


@pytest.fixture(autouse=True)
def _nothing_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def stand_ins(photo_folder, tmp_path):
    """A list of two tiny models by two protocols and one that is nowhere; the first claims what is true."""
    common = {"dataset": "six pictures", "images": 6, "source": "this test", "size": 40}
    truth = bench(photo_folder, ["dc-ae-tiny"], size=40, protocol="dc-ae", speed=False)["models"][0]["metrics"]
    claims = {name: round(truth[name], 3) for name in ("psnr", "ssim")}
    entries = [
        {"name": "anchor", "model": "dc-ae-tiny", "protocol": "dc-ae", **common, "claims": claims,
         "tolerances": {"psnr": 0.01, "ssim": 0.001}},
        {"name": "absent", "model": "nobody/nothing", "protocol": "dc-ae", **common, "claims": {"rfid": 0.5}},
        {"name": "other", "model": "litevae-tiny", "protocol": "eqvae", **{**common, "images": 50000},
         "claims": {"psnr": 99.0}},
    ]  # fmt: skip
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({"entries": entries}))
    return file


def change(file, place, **values):
    suite = json.loads(file.read_text())
    suite["entries"][place] |= values
    file.write_text(json.dumps(suite))


def test_the_public_list_holds_the_anchor_and_is_not_run(capsys):
    entries = load_suite("public")
    anchors = [entry for entry in entries if entry.tolerances]
    assert [(entry.model, entry.size, entry.claims) for entry in anchors] == [
        (
            "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers",
            512,
            {"rfid": 0.2168, "psnr": 26.149, "ssim": 0.7105, "lpips_alex": 0.0802},
        )
    ]
    assert len({entry.name for entry in entries}) == len(entries)
    suite = run_suite("public", None)
    assert {entry["status"] for entry in suite["entries"]} == {"not run: no images were given"}
    assert main(["bench", "--suite", "public"]) == 0
    printed = capsys.readouterr().out
    assert "26.15 | –" in printed
    assert "anchor DC-AE f64c128 (anchor): not run" in printed


def test_what_is_on_this_machine_is_run(stand_ins, photo_folder, tmp_path):
    out = tmp_path / "out"
    suite = run_suite(str(stand_ins), photo_folder, out=out, speed=False, rate_images=0)
    anchor, absent, other = suite["entries"]
    assert anchor["status"] == "run on 6 images"
    assert anchor["anchor"] == "met"
    assert absent["status"] == "not run: nobody/nothing is not on this machine"
    assert absent["figures"] is None
    assert other["status"].startswith("run on 6 images, the claim is of 50,000 of six pictures: not comparable")
    assert read_json(out / "suite.json") == json.loads(json.dumps(suite))
    assert (out / "dc-ae-40/report.html").is_file()
    assert read_json(out / "eqvae-40/results.json")["protocol"]["preset"] == "eqvae"
    text = summarise_suite(suite)
    assert f"{anchor['claims']['psnr']:.2f} | {anchor['figures']['psnr']:.2f}" in text
    assert "99.00 | " in text


def test_an_anchor_that_is_missed_says_by_how_much(stand_ins, photo_folder):
    truth = load_suite(str(stand_ins))[0].claims["psnr"]
    change(stand_ins, 0, claims={"psnr": truth + 0.2}, tolerances={"psnr": 0.05})
    change(stand_ins, 2, model="nobody/nothing")
    anchor = run_suite(str(stand_ins), photo_folder, speed=False)["entries"][0]["anchor"]
    assert anchor == f"missed: PSNR {truth:.2f} instead of {truth + 0.2:.2f}"
    change(stand_ins, 0, claims={"rfid": 0.2}, tolerances={"rfid": 0.05})
    assert run_suite(str(stand_ins), photo_folder, speed=False)["entries"][0]["anchor"] == "without rFID"
    change(stand_ins, 0, images=50000)
    assert run_suite(str(stand_ins), photo_folder, speed=False)["entries"][0]["anchor"] == "not run on 50,000 images"


def test_a_model_that_was_downloaded_is_here(tmp_path, monkeypatch):
    assert not suite_module.is_here("somebody/vae")
    folder = tmp_path / "hub/models--somebody--vae"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc/config.json").write_text("{}")
    assert suite_module.is_here("somebody/vae")


def test_lists_that_are_none(stand_ins, tmp_path):
    with pytest.raises(RequestError, match="There is no suite 'privat'"):
        load_suite("privat")
    (tmp_path / "broken.json").write_text('{"entries": [{"name": "x"}]}')
    with pytest.raises(RequestError, match="is no list of autoencoders"):
        load_suite(str(tmp_path / "broken.json"))
    change(stand_ins, 0, claims={"beauty": 1.0})
    with pytest.raises(RequestError, match="anchor claims beauty"):
        load_suite(str(stand_ins))
    change(stand_ins, 0, claims={}, tolerances={}, protocol="nobody's")
    with pytest.raises(RequestError, match="no protocol"):
        load_suite(str(stand_ins))


def test_the_command(stand_ins, photo_folder, tmp_path, capsys):
    arguments = ["bench", str(photo_folder), "--suite", str(stand_ins), "--no-speed", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "anchor anchor: met" in capsys.readouterr().out
    assert main([*arguments, "--model", "dc-ae-tiny"]) == 2
    assert "--suite names its models itself" in capsys.readouterr().err
