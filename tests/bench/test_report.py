"""The page: nothing outside of it is needed, other people's names stay text, and in a browser it does what it says."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latentae.bench.diagnostics import diagnostics_section
from latentae.bench.equivariance import equivariance_section
from latentae.bench.report import Section, write_report
from latentae.bench.results import read_results
from latentae.bench.run import bench
from latentae.errors import RequestError
from latentae.files import write_json

HOSTILE_NAME = "<script>alert(1)</script>\"'&{{ 7*7 }}"
HOSTILE_FILE = "<img src=x onerror=alert(2)>.png"
# Debian's package chromium, which .ci/run installs; an own Chrome does as well
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Darken(nn.Module):
    """An "autoencoder" that multiplies pixels; the nearer to one, the better."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.zeros(1))
        self.config = {"spatial_compression_ratio": 4, "latent_channels": 3}

    def encode(self, pixels):
        return nn.functional.avg_pool2d(pixels, 4)

    def decode(self, latents):
        return nn.functional.interpolate(latents, scale_factor=4) * self.factor


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a benchmark of two models on seven images, one of which has a hostile name."""
    photos, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("measured")
    for i, name in enumerate(["a.png", "b.png", "c.jpg", "d.webp", "e e.jpeg", "sub/f.PNG", HOSTILE_FILE]):
        y, x = np.mgrid[: 48 + 5 * i, : 80 - 4 * i]
        image = np.stack([127 + 120 * np.sin(x / (5 + c) + y / (9 + i) + c) for c in range(3)], -1).astype(np.uint8)
        (photos / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(photos / name)
    models = [("good", Darken(0.95)), (HOSTILE_NAME, Darken(0.6))]
    baselines = [{"name": "block mean", "psnr": 12.345}]
    section = Section(
        "A <b>title</b>",
        text="Some text.",
        header=("one", "two"),
        rows=[("x", 1), ("<i>y</i>", 2)],
        images=[("a caption", np.zeros((8, 8, 3), np.uint8))],
    )
    bench(photos, models, out=out, size=48, baselines=baselines, extra_sections=[section])
    return out


@pytest.fixture
def report(measured, tmp_path):
    out = shutil.copytree(measured, tmp_path / "out")
    return read_results(out), out


@pytest.fixture
def full_report(report):
    """With rates, robustness, rFID, a classical codec in two qualities, and an image that the second model failed."""
    results, out = report
    for i, model in enumerate(results["models"]):
        curve = [{"step": 2.0**-n, "bits_per_pixel": 0.2 * 2**n * (i + 1), "psnr": 15.0 + n - i} for n in range(4)]
        model["rate"] = {**curve[2], "curve": curve, "within": True, "images": 6, "psnr_unaltered": 18.0}
        model["noise_robustness"] = {"curve": [{"noise": n, "psnr": 20 - 10 * n} for n in (0.1, 0.4)]}
        model["gmac"] = {"encode": 1.0 + i, "decode": 2.0}
        model["metrics"]["rfid"] = 1.5 + i
        model["skipped"].pop("rfid", None)
    bad = results["samples"][2]["key"]
    bad_rows = [row for row in results["models"][1]["per_image"] if row["key"] != bad]
    results["models"][1] |= {"per_image": bad_rows, "failed": [{"key": bad, "reason": "it holds NaN"}]}
    for quality, bits, psnr in ((90, 2.0, 34.0), (10, 0.3, 25.0)):
        place = len(results["models"])
        for sample in results["samples"]:
            with Image.open(out / sample["input"]) as image:
                file = sample["input"].replace("input", f"model-{place}").replace("png", "jpg")
                image.save(out / file, quality=quality)
            sample["models"].append({"reconstruction": file})
        results["models"].append(
            {
                "name": f"jpeg:{quality}",
                "class": "JPEG",
                "metrics": {"psnr": psnr},
                "per_image": [{"key": row["key"], "psnr": psnr} for row in results["models"][0]["per_image"]],
                "rate": {"bits_per_pixel": bits, "psnr": psnr},
                "latents": {},
                "parameters": {},
                "gmac": {},
                "speed": None,
            }
        )
    write_report(results, out / "report.html", [diagnostics_section(results["models"])])
    return results, out


class Page(HTMLParser):
    """Tags with their attributes, table rows as lists of texts, and all text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.best, self.text, self.in_cell = [], [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "td" and dict(attributes).get("class") == "best":
            self.best.append((len(self.rows) - 1, len(self.rows[-1]) - 1))

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def test_nothing_outside_of_the_page_is_referred_to(report):
    html = (report[1] / "report.html").read_text()
    page = Page(html)
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(references) > 10
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in references)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form"}
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_names_stay_text(report):
    html = (report[1] / "report.html").read_text()
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2  # the data and the viewer
    assert HOSTILE_NAME not in html
    assert HOSTILE_FILE not in html
    assert HOSTILE_NAME in page.text
    assert HOSTILE_FILE in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))
    assert data["models"] == ["good", HOSTILE_NAME]
    assert "<b>title</b>" not in html
    assert {path.name for path in (report[1] / "samples").iterdir()} == {
        f"{i:03d}-{kind}.png"
        for i in range(7)
        for kind in ("input", "model-0", "model-0-latents", "model-1", "model-1-latents")
    }


def test_the_table_stands_without_javascript_and_marks_the_best(report):
    results, out = report
    page = Page((out / "report.html").read_text())
    titles, good, bad, baseline = page.rows[:4]
    names = ("PSNR", "SSIM", "GMSD", "HaarPSI")
    psnr, ssim, gmsd, haarpsi = (next(i for i, title in enumerate(titles) if title.startswith(n)) for n in names)
    for row, model in ((good, results["models"][0]), (bad, results["models"][1])):
        assert f"{model['metrics']['psnr']:.2f}" in row[psnr]
        assert f"{model['metrics']['ssim']:.4f}" in row[ssim]
    assert "12.35" in baseline[psnr]
    lower, higher = (model["metrics"]["gmsd"] for model in results["models"])
    assert lower < higher  # and lower is better
    assert set(page.best) == {(1, psnr), (1, ssim), (1, gmsd), (1, haarpsi)}
    for value in ("rounded half up", results["protocol_sha256"], "MS-SSIM not measured", "Some text.", "a caption"):
        assert value in page.text
    assert ["<i>y</i>", "2"] in page.rows


def test_plots_show_every_model_and_name_it(full_report):
    html = (full_report[1] / "report.html").read_text()
    assert HOSTILE_NAME not in html
    plots = dict(re.findall(r'<svg class="plot"[^>]*aria-label="([^"]*)">(.*?)</svg>', html, re.DOTALL))
    assert set(plots) == {
        "Rate and distortion",
        "Noise in the latents",
        "Spectrum of the latents",
        "Correlation of neighbours",
        *(f"{quality} over {cost}" for quality in ("PSNR", "rFID") for cost in ("GMAC", "time")),
    }
    rate = Page(plots["Rate and distortion"])
    assert [tag for tag, _ in rate.tags].count("polyline") == 3
    assert [tag for tag, _ in rate.tags].count("title") == 10
    assert f"{HOSTILE_NAME}: 0.8 bits per pixel, 15.00 dB, latents rounded to 1/2 of their std" in rate.text
    assert "jpeg:10: 0.3 bits per pixel, 25.00 dB" in rate.text
    legend = re.search(r'<ul class="legend">(.*?)</ul>', html, re.DOTALL).group(1)
    assert Page(legend).text.split("\n  ")[1:] == ["good", HOSTILE_NAME, "JPEG\n"]
    assert Page(plots["rFID over time"]).text.count("rFID 1.500") == 1


def test_rates_stand_in_the_table_and_codecs_compete_with_nobody(full_report):
    results, out = full_report
    page = Page((out / "report.html").read_text())
    titles, good, _, fine, coarse = page.rows[:5]
    rate, psnr, rfid = (next(i for i, t in enumerate(titles) if t.startswith(n)) for n in ("Bits", "PSNR", "rFID"))
    assert good[rate] == "0.817.00 dB"
    assert coarse[rate] == "0.325.00 dB"
    assert fine[0] == "jpeg:90JPEG, a reference"
    assert set(fine[rfid:]) == {"–"}
    assert (1, psnr) in page.best
    assert (1, rfid) in page.best
    assert not [place for place in page.best if place[0] != 1]
    assert {len(row) for row in page.rows[:6]} == {len(titles)}
    assert f"{HOSTILE_NAME}: {results['samples'][2]['key']} left out" in page.text
    assert "it holds NaN" in page.text


def test_codecs_have_no_rows_of_dashes_and_no_say_in_the_conditions(full_report):
    page = Page((full_report[1] / "report.html").read_text())
    names = [row[0].removesuffix("JPEG, a reference") for row in page.rows if row]
    assert names.count("jpeg:90") == names.count("jpeg:10") == 1
    assert "4 models,\n    cpu, float32 ·" in page.text


def test_a_folder_of_reconstructions_competes_without_latents_or_cost(full_report):
    results, out = full_report
    nothing = {"latents": {}, "parameters": {}, "gmac": {}, "speed": None, "rate": None, "weights_sha256": None}
    given = {"name": "theirs", "class": "given", "dtype": "uint8", "device": "cpu", "spatial_ratio": None}
    given |= {"files_sha256": "abc" * 20, "metrics": {"psnr": 20.0, "rfid": 0.25}, "per_image": []}
    results["models"].append(nothing | given)
    for sample in results["samples"]:
        sample["models"].append(sample["models"][0])
    write_report(results, out / "report.html")
    page = Page((out / "report.html").read_text())
    rfid = next(i for i, title in enumerate(page.rows[0]) if title.startswith("rFID"))
    assert page.rows[5][0] == "theirsimages as given"
    assert (5, rfid) in page.best
    assert (1, rfid) not in page.best
    assert sum(row[:1] == ["theirs"] for row in page.rows) == 0
    assert "files abcabcabc" in page.text
    assert sum(attributes.get("data-kind") == "latents" for _, attributes in page.tags) == 7 * 2


def test_equivariance_leaves_codecs_out(full_report):
    models = full_report[0]["models"]
    models[0]["latents"]["equivariance"] = {"images": 2, "rotation_error": 0.25}
    (row,) = equivariance_section(models).rows
    assert row[:2] == ["good", "0.25"]
    assert equivariance_section(models[2:]).rows == []


def test_the_worst_of_all_images_are_named_if_not_all_are_shown(full_report):
    results, out = full_report
    assert "The worst of all" not in Page((out / "report.html").read_text()).text
    results["samples"] = results["samples"][:3]
    write_report(results, out / "report.html")
    text = Page((out / "report.html").read_text()).text
    assert "3 of 7 images: half chosen evenly by name, half the worst of the first model." in text
    assert "The worst of all 7 images" in text
    figures = sorted((row["psnr"], row["key"]) for row in results["models"][1]["per_image"])
    assert len(figures) == 6  # one failed
    assert ", ".join(f"{key} ({psnr:.2f})" for psnr, key in figures) in text


@pytest.mark.parametrize("same", [True, False])
def test_merged_results_say_what_does_not_compare(report, same):
    results, out = report
    first = {key: results[key] for key in ("protocol", "protocol_sha256", "versions", "machine")}
    other = first if same else {"protocol": {"crop": "another"}, "protocol_sha256": "f" * 64, "versions": {}}
    other = {**other, "machine": first["machine"] if same else {"system": "Plan 9", "threads": 3, "gpu": "Voodoo"}}
    results["merged"] = [{"source": "A", **first}, {"source": "B", **other}]
    for model, part in zip(results["models"], results["merged"]):
        model["protocol_sha256"] = part["protocol_sha256"]
    write_report(results, out / "report.html")
    page = Page((out / "report.html").read_text())
    assert bool(page.best) == same
    assert ("Different protocols" in page.text) == (not same)
    assert ("; Plan 9, 3 threads, Voodoo" in page.text or "Plan 9, 3 threads, Voodoo; " in page.text) == (not same)
    assert page.text.count("f" * 64) == page.text.count("another\n") == (not same)
    assert page.text.count(results["protocol_sha256"]) == 1


def test_a_reason_is_given_once_and_names_the_models_it_holds_for(full_report):
    results, out = full_report
    good, hostile = results["models"][:2]
    good["skipped"] = {"lpips_alex": "no file A", "kid": "no file B", "recall": "no file B"}
    hostile["skipped"] = {"kid": "no file B", "recall": "no file B"}
    write_report(results, out / "report.html")
    text = Page((out / "report.html").read_text()).text
    assert text.count("no file A") == text.count("no file B") == 1
    assert "LPIPS alex not measured of good" in text
    assert re.search(r"KID, recall not measured\s*no file B", text)


def test_a_single_model_is_not_marked_best(photo_folder, tmp_path):
    bench(photo_folder, [Darken(0.9)], out=tmp_path, size=48, speed=False)
    assert not Page((tmp_path / "report.html").read_text()).best


def test_the_embedded_images_are_the_saved_ones(report):
    results, out = report
    page = Page((out / "report.html").read_text())
    embedded = [attributes["src"] for tag, attributes in page.tags if attributes.get("data-kind") == "reconstruction"]
    files = [entry["reconstruction"] for sample in results["samples"] for entry in sample["models"]]
    for source, file in zip(embedded, files, strict=True):
        decoded = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(Image.open(out / file)))


def test_a_report_can_be_written_again_from_the_results(report):
    _, out = report
    before = (out / "report.html").read_text()
    write_report(read_results(out), out / "report.html", [Section("Another", "More.")])
    after = (out / "report.html").read_text()
    assert "Another" in after
    assert "Another" not in before
    assert after.count("data:image") == before.count("data:image") - 1  # the picture of the section is gone


def test_the_images_shown_are_evenly_chosen_and_the_worst(photo_folder, tmp_path):
    models = [("half", Darken(0.5)), ("most", Darken(0.9))]
    results = bench(photo_folder, models, out=tmp_path, size=48, report_images=3, speed=False)
    even, worst = [sample["key"] for sample in results["samples"][:2]], results["samples"][2]
    assert even == ["a.png", "sub/deeper/d.png"]
    others = [row for row in results["models"][0]["per_image"] if row["key"] not in even]
    assert worst["key"] == min(others, key=lambda row: row["psnr"])["key"]
    original = np.asarray(Image.open(tmp_path / worst["input"]), float)
    for model, files in zip(results["models"], worst["models"]):
        shown = np.asarray(Image.open(tmp_path / files["reconstruction"]), float)
        (row,) = [row for row in model["per_image"] if row["key"] == worst["key"]]
        assert 10 * np.log10(255**2 / np.square(shown - original).mean()) == pytest.approx(row["psnr"], abs=1e-6)


def test_results_of_something_else_are_refused(tmp_path):
    write_json(tmp_path / "results.json", {"schema": 999})
    with pytest.raises(RequestError, match="schema"):
        read_results(tmp_path)


class Browser:
    """Headless Chromium, spoken to by its debugging pipe: NUL-terminated JSON on file descriptors 3 and 4."""

    def __init__(self, folder, width=1200, height=1600):
        to_read, self.to_write = os.pipe()
        self.from_read, from_write = os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size={width},{height}"
        options += f' --remote-debugging-pipe --user-data-dir="{folder}"'
        command = f'exec "{CHROMIUM}" {options} about:blank 3<&{to_read} 4>&{from_write}'
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_read, from_write), stdout=quiet, stderr=quiet
        )
        os.close(to_read)
        os.close(from_write)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self):
        while b"\0" not in self.buffer:
            block = os.read(self.from_read, 1 << 16)
            assert block, "Chromium ended"
            self.buffer += block
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 30
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.05)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" and len(key) == 1 else ""
            )

    def drag(self, start, end):
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def wheel(self, at, amount):
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=at[0], y=at[1], deltaX=0, deltaY=amount)

    def centre(self, selector):
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        return self.evaluate(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")

    def problems(self):
        """Console errors, exceptions, and requests for anything that is not the page itself or part of it."""
        found = []
        for event in self.events:
            kind, details = event.get("method"), event.get("params", {})
            if kind in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(details)
            if kind == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
                found.append(details)
            if kind == "Network.requestWillBeSent" and not details["request"]["url"].startswith(
                ("file:", "data:", "about:")
            ):
                found.append(details)
        return found

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to_write)
        os.close(self.from_read)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


SPLIT = "Number(document.querySelector('.handle').getAttribute('aria-valuenow'))"
TITLE = "document.querySelector('.title').firstChild.textContent"
TRANSFORMS = "[...document.querySelectorAll('.stage img')].map(image => image.style.transform)"


@pytest.mark.slow
def test_the_viewer_works_in_a_browser(report, browser):
    results, out = report
    psnr = {row["key"]: row["psnr"] for row in results["models"][0]["per_image"]}
    keys = sorted([sample["key"] for sample in results["samples"]], key=psnr.get)  # the worst first
    browser.open(out / "report.html")
    assert browser.evaluate("document.getElementById('gallery').hidden")
    assert browser.evaluate(TITLE) == keys[0]
    assert browser.evaluate("document.querySelectorAll('.strip button').length") == 7
    browser.evaluate("document.getElementById('viewer').scrollIntoView()")

    browser.press("ArrowRight")
    assert browser.evaluate(TITLE) == keys[1]
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.evaluate(TITLE) == keys[-1]
    browser.press("ArrowDown")
    assert browser.evaluate("document.querySelector('.tag.right').textContent") == HOSTILE_NAME

    assert browser.evaluate(SPLIT) == 50
    x, y = browser.centre(".handle")
    width = browser.evaluate("document.querySelector('.stage').getBoundingClientRect().width")
    browser.drag((x, y), (x + width / 4, y))
    assert browser.evaluate(SPLIT) == pytest.approx(75, abs=1)
    assert browser.evaluate("document.querySelector('.layer[style]').style.clipPath").startswith("inset(0px 25")
    browser.press("d")
    assert browser.evaluate(SPLIT) == pytest.approx(80, abs=1)
    browser.press(" ")
    assert browser.evaluate(SPLIT) == 0

    browser.wheel(browser.centre(".difference"), -300)
    transforms = browser.evaluate(TRANSFORMS)
    assert len(transforms) == 7  # twice two, the input and both models
    assert set(transforms) == {transforms[0]}  # all panes zoom together
    assert float(re.search(r"scale\((.*)\)", transforms[0]).group(1)) == pytest.approx(np.e, rel=0.01)
    x, y = browser.centre(".difference")
    browser.drag((x, y), (x + 20, y + 10))
    assert browser.evaluate(TRANSFORMS)[0] != transforms[0]
    browser.press("0")
    assert set(browser.evaluate(TRANSFORMS)) == {"translate(0%, 0%) scale(1)"}

    assert browser.problems() == []


ORDER = "[...document.querySelectorAll('.strip button')].map(button => button.title)"


@pytest.mark.slow
def test_the_order_follows_the_metric_and_the_model(full_report, browser):
    results, out = full_report
    names = [sample["key"] for sample in results["samples"]]
    failed = names[2]
    browser.open(out / "report.html")
    for metric, sign in (("psnr", 1), ("ssim", 1), ("gmsd", -1)):
        select(browser, ".order", metric)
        for place in (1, 0):
            select(browser, ".right-choice", str(place + 1))
            value = {row["key"]: sign * row[metric] for row in results["models"][place]["per_image"]}
            expected = sorted(names, key=lambda key: value.get(key, -np.inf))  # what failed is the worst
            assert browser.evaluate(ORDER) == expected
            assert place == 0 or expected[0] == failed
        assert browser.evaluate(TITLE) == browser.evaluate(ORDER)[browser.evaluate(CURRENT)]
    select(browser, ".order", "")
    assert browser.evaluate(ORDER) == names
    select(browser, ".right-choice", "3")  # a codec has no latents to show
    assert browser.evaluate("document.querySelector('.tiles img').getClientRects().length") == 0
    assert browser.evaluate("document.querySelector('.difference img + img').getClientRects().length") == 1
    assert browser.problems() == []


@pytest.mark.slow
def test_one_model_is_not_shown_twice_and_without_images_there_is_no_viewer(report, browser):
    results, out = report
    results["models"] = results["models"][:1]
    for sample in results["samples"]:
        sample["models"] = sample["models"][:1]
    write_report(results, out / "report.html")
    browser.open(out / "report.html")
    assert browser.evaluate("document.querySelector('.models').getClientRects().length") == 0
    browser.press("ArrowDown")
    assert browser.evaluate("document.querySelector('.tag.right').textContent") == "good"
    results["samples"] = []
    write_report(results, out / "report.html")
    browser.open(out / "report.html")
    assert browser.evaluate("document.getElementById('viewer')") is None
    assert browser.problems() == []


CURRENT = "[...document.querySelectorAll('.strip button')].findIndex(b => b.getAttribute('aria-current') === 'true')"


def select(browser, selector, value):
    node = f"document.querySelector({selector!r})"
    browser.evaluate(f"(select => {{ select.value = {value!r}; select.onchange(); }})({node})")


@pytest.mark.slow
def test_on_a_phone_nothing_is_wider_than_the_page(full_report, browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    browser.open(full_report[1] / "report.html")
    assert browser.evaluate("innerWidth") == 390
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    outside = """[...document.querySelectorAll('body *')].filter(node => {
        const box = node.getBoundingClientRect();
        return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !node.closest('.scroll, .strip');
    }).map(node => node.outerHTML.slice(0, 80))"""
    assert browser.evaluate(outside) == []
    letters = """[...document.querySelectorAll('svg text')].map(text => parseFloat(getComputedStyle(text).fontSize)
        * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width)"""
    sizes = browser.evaluate(letters)
    assert len(sizes) > 20
    assert min(sizes) > 9
    assert browser.problems() == []


@pytest.mark.slow
def test_two_fingers_zoom_all_pictures(full_report, browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
    browser.open(full_report[1] / "report.html")
    browser.evaluate("document.querySelector('.stage').scrollIntoView({block: 'center'})")
    x, y = browser.centre(".stage")

    def touch(kind, *distances):
        points = [{"x": x + sign * d, "y": y - 60, "id": i} for d in distances for i, sign in enumerate((-1, 1))]
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", 40)
    touch("touchMove", 60)
    touch("touchMove", 80)
    touch("touchEnd")
    transforms = browser.evaluate(TRANSFORMS)
    assert set(transforms) == {transforms[0]}
    assert float(re.search(r"scale\((.*)\)", transforms[0]).group(1)) == pytest.approx(2, rel=0.02)
    assert browser.evaluate(SPLIT) == 50
    assert browser.problems() == []


CONTRASTS = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (colour) => colour.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const colour = rgba(getComputedStyle(node).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const shown = [...document.querySelectorAll('body *')].filter(node => node.getClientRects().length);
    const light = (node, colour) => luminance(rgba(getComputedStyle(node)[colour]));
    const against = (node, colour) => contrast(light(node, colour), luminance(ground(node)));
    const found = (nodes, colour) => nodes.map(node => [against(node, colour), node.outerHTML.slice(0, 80)]);
    const says = (node) => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    const words = shown.filter(node => says(node) && !node.closest('svg, script, .tag, .handle'));
    return {
        ground: luminance(rgba(getComputedStyle(document.documentElement).backgroundColor)),
        text: [...found(words, 'color'), ...found(shown.filter(node => node.matches('svg text')), 'fill')],
        marks: found(shown.filter(node => node.matches('.series path')), 'fill'),
    };
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_the_light_and_in_the_dark(full_report, browser, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(full_report[1] / "report.html")
    contrasts = browser.evaluate(CONTRASTS)
    assert (contrasts["ground"] < 0.05) == (scheme == "dark")
    assert len(contrasts["text"]) > 150
    assert min(contrasts["text"])[0] >= 4.5, min(contrasts["text"])  # WCAG 2.2, 1.4.3
    assert len(contrasts["marks"]) > 15
    assert min(contrasts["marks"])[0] >= 3, min(contrasts["marks"])  # 1.4.11


@pytest.mark.slow
def test_the_error_map_shows_eight_times_the_error(report, browser):
    results, out = report
    browser.open(out / "report.html")
    select(browser, ".order", "")
    browser.press("Home")
    browser.press("ArrowDown")
    clip = browser.evaluate(
        "(box => ({x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}))"
        "(document.querySelector('.difference').getBoundingClientRect())"
    )
    shot = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")).astype(float)
    pair = []
    for file in (results["samples"][0]["input"], results["samples"][0]["models"][1]["reconstruction"]):
        enlarged = Image.open(out / file).resize(shown.shape[1::-1], Image.Resampling.BILINEAR)
        pair.append(np.asarray(enlarged).astype(float))
    expected = (8 * np.abs(pair[0] - pair[1])).clip(0, 255)
    middle = slice(20, -20)
    assert np.abs(shown - expected)[middle, middle].mean() < 6
    assert expected[middle, middle].std() > 20


@pytest.mark.slow
def test_the_viewer_shows_frames_of_clips(tmp_path, browser):
    (tmp_path / "clips").mkdir()
    for i in range(2):
        clip = np.random.default_rng(i).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        np.save(tmp_path / "clips" / f"{i}.npy", clip)
    models = [("good", Darken(0.95)), ("bad", Darken(0.6))]
    results = bench(tmp_path / "clips", models, out=tmp_path / "out", size=32, frames=5, speed=False)
    assert len(results["samples"]) == 6
    browser.open(tmp_path / "out" / "report.html")
    assert browser.evaluate("document.querySelectorAll('.strip button').length") == 6
    browser.evaluate("document.getElementById('viewer').scrollIntoView()")
    titles = []
    for _ in range(3):
        titles.append(browser.evaluate(TITLE))
        browser.press("ArrowRight")
    key = titles[0].split(",")[0]
    assert titles == [f"{key}, frame {number} of 5" for number in (1, 3, 5)]
    x, y = browser.centre(".handle")
    width = browser.evaluate("document.querySelector('.stage').getBoundingClientRect().width")
    browser.drag((x, y), (x + width / 4, y))
    assert browser.evaluate(SPLIT) == pytest.approx(75, abs=1)
    assert "difference PSNR" in browser.evaluate("document.querySelector('.pane figcaption').textContent")
    assert browser.problems() == []
