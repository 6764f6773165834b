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

from latentae.bench.report import Section, write_report
from latentae.bench.results import read_results
from latentae.bench.run import bench
from latentae.errors import RequestError
from latentae.files import write_json

HOSTILE_NAME = "<script>alert(1)</script>\"'&{{ 7*7 }}"
HOSTILE_FILE = "<img src=x onerror=alert(2)>.png"
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


@pytest.fixture
def report(photo_folder, tmp_path):
    shutil.copy(photo_folder / "a.png", photo_folder / HOSTILE_FILE)
    models = [("good", Darken(0.95)), (HOSTILE_NAME, Darken(0.6))]
    out = tmp_path / "out"
    baselines = [{"name": "block mean", "psnr": 12.345}]
    section = Section(
        "A <b>title</b>",
        text="Some text.",
        header=("one", "two"),
        rows=[("x", 1), ("<i>y</i>", 2)],
        images=[("a caption", np.zeros((8, 8, 3), np.uint8))],
    )
    results = bench(photo_folder, models, out=out, size=48, baselines=baselines, extra_sections=[section])
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
    for value in ("rounded half up", results["protocol_sha256"], "rFID not measured", "Some text.", "a caption"):
        assert value in page.text
    assert ["<i>y</i>", "2"] in page.rows


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


def test_the_number_of_images_is_limited(photo_folder, tmp_path):
    results = bench(photo_folder, [Darken(0.9)], out=tmp_path, size=48, report_images=3, speed=False)
    assert [sample["key"] for sample in results["samples"]] == ["a.png", "e e.jpeg", "sub/deeper/d.png"]


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
    keys = [sample["key"] for sample in results["samples"]]
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
    assert len(transforms) == 4
    assert set(transforms) == {transforms[0]}  # both panes zoom together
    assert float(re.search(r"scale\((.*)\)", transforms[0]).group(1)) == pytest.approx(np.e, rel=0.01)
    x, y = browser.centre(".difference")
    browser.drag((x, y), (x + 20, y + 10))
    assert browser.evaluate(TRANSFORMS)[0] != transforms[0]
    browser.press("0")
    assert set(browser.evaluate(TRANSFORMS)) == {"translate(0%, 0%) scale(1)"}

    browser.evaluate(
        "(select => { select.value = 'worst'; select.onchange(); })(document.querySelectorAll('.bar select')[2])"
    )
    rows = [[row["psnr"] for row in model["per_image"]] for model in results["models"]]
    worst = int(np.argmin(np.min(rows, axis=0)))
    assert browser.evaluate(TITLE) == results["models"][0]["per_image"][worst]["key"]
    assert browser.problems() == []


@pytest.mark.slow
def test_the_error_map_shows_eight_times_the_error(report, browser):
    results, out = report
    browser.open(out / "report.html")
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
