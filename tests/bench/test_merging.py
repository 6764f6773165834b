"""Results of several benchmarks in one table: those of one protocol, or marked and by force."""

import json

import pytest

from latentae.bench.merging import merge_results
from latentae.bench.results import read_results, summarise
from latentae.bench.run import bench
from latentae.cli.main import main
from latentae.errors import RequestError


@pytest.fixture(autouse=True)
def _no_weight_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)


@pytest.fixture
def reports(photo_folder, tmp_path):
    """Two benchmarks by one protocol, the second of which shows fewer images, and one by another."""
    options = {"size": 40, "speed": False, "rate_images": 2}
    folders = [tmp_path / name for name in ("one", "two", "other")]
    bench(photo_folder, [("a", "dc-ae-tiny"), "jpeg:50"], out=folders[0], baselines=[{"name": "mean", "psnr": 9.0}],
          **options)  # fmt: skip
    bench(photo_folder, [("a", "litevae-tiny")], out=folders[1], report_images=3, equivariance=2, **options)
    bench(photo_folder, ["jpeg:50"], out=folders[2], protocol="dc-ae", **options)
    return folders


def test_one_protocol_is_one_table(reports, tmp_path):
    out = tmp_path / "merged"
    merged = merge_results(reports[:2], out=out)
    one, two, _ = (read_results(folder) for folder in reports)
    assert [model["name"] for model in merged["models"]] == ["a", "jpeg:50", "a (two)"]
    for model, expected in zip(merged["models"], [*one["models"], *two["models"]], strict=True):
        assert model["metrics"] == expected["metrics"]
        assert model["per_image"] == expected["per_image"]
    assert merged["protocol_sha256"] == one["protocol_sha256"] == two["protocol_sha256"]
    assert merged["baselines"] == [{"name": "mean", "psnr": 9.0}]
    assert [part["source"] for part in merged["merged"]] == [str(folder / "results.json") for folder in reports[:2]]
    assert read_results(out) == merged
    shown = {sample["key"] for sample in two["samples"]}
    assert {sample["key"] for sample in merged["samples"]} == shown
    for sample in merged["samples"]:
        assert len(sample["models"]) == 3
        theirs = next(s for s in two["samples"] if s["key"] == sample["key"])
        for kind in ("reconstruction", "latents"):
            copied, source = out / sample["models"][2][kind], reports[1] / theirs["models"][0][kind]
            assert copied.read_bytes() == source.read_bytes()
    page = (out / "report.html").read_text()
    assert "a (two)" in page
    assert "Equivariance of the latents" in page


def test_different_protocols_need_force(reports, tmp_path):
    with pytest.raises(
        RequestError, match=r"not comparable, they differ in the protocol \(latentae and dc-ae\).*--force"
    ):
        merge_results([reports[0], reports[2]])
    merged = merge_results([reports[0], reports[2] / "results.json"], out=tmp_path / "merged", force=True)
    names = [model["name"] for model in merged["models"]]
    assert [name.split(",")[0] for name in names] == ["a [latentae", "jpeg:50 [latentae", "jpeg:50 [dc-ae"]
    assert len({model["protocol_sha256"] for model in merged["models"]}) == 2
    text = summarise(merged)
    assert "\nprotocol latentae (" in text
    assert "\nprotocol dc-ae (" in text
    assert "figures of one do not compare with figures of another" in text


def test_other_images_and_other_weights_are_not_comparable(reports, photo_folder, tmp_path):
    bench(photo_folder, ["jpeg:50"], out=tmp_path / "fewer", size=40, limit=3, speed=False)
    with pytest.raises(RequestError, match="they differ in their images, dtype:"):
        merge_results([reports[0], tmp_path / "fewer"])
    for folder, weights in zip(reports[:2], ("ab", "cd")):
        file = folder / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "metric_weights_sha256": {"lpips_vgg": weights}}))
    with pytest.raises(RequestError, match="they differ in the weights of lpips_vgg"):
        merge_results(reports[:2])


def test_metrics_that_one_of_them_lacks(reports):
    file = reports[1] / "results.json"
    results = json.loads(file.read_text())
    del results["models"][0]["metrics"]["gmsd"]
    file.write_text(json.dumps(results))
    row = merge_results(reports[:2])["models"][2]
    assert row["metrics"]["gmsd"] is None
    assert row["skipped"]["gmsd"] == "not measured in the benchmark of this model"


def test_the_command(reports, tmp_path, capsys):
    out = str(tmp_path / "merged")
    assert main(["bench", "--merge", str(reports[0]), str(reports[1] / "results.json"), "--out", out]) == 0
    printed = capsys.readouterr()
    assert "a (two)" in printed.out
    assert "images of 40 px" in printed.out
    assert "report.html" in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--merge", "A"], "two or more"),
        (["--merge", "A", "nowhere"], "there is no file nowhere"),
        (["--merge", "A", "B", "--out", "A"], "choose another --out"),
        (["--merge", "A", "C"], "--force"),
        (["--merge", "A", "B", "A"], "twice: name each results.json once"),
        ([], "at least one --model"),
    ],
)
def test_one_sentence(reports, capsys, arguments, words):
    folders = dict(zip("ABC", map(str, reports)))
    assert main(["bench", *[folders.get(word, word) for word in arguments]]) == 2
    assert words in capsys.readouterr().err
