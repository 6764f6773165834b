"""Fixtures that several rooms share. No network, no GPU, no downloaded weights."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)


def _randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every one-dimensional parameter: zero norm weights would hide the residual branches from a test."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture(scope="session")
def randomise():
    return _randomise


@pytest.fixture
def tiny_dcae():
    import latentae

    return _randomise(latentae.create("dc-ae-tiny"))


@pytest.fixture
def photo_folder(tmp_path):
    """Six small smooth images of odd sizes, nested, in three formats."""
    folder = tmp_path / "photos"
    names = ["a.png", "b.jpg", "sub/c.webp", "sub/deeper/d.png", "e e.jpeg", "f.PNG"]
    sizes = [(64, 64), (97, 61), (40, 130), (33, 71), (128, 96), (65, 64)]
    for i, (name, (height, width)) in enumerate(zip(names, sizes)):
        y, x = np.mgrid[:height, :width]
        image = np.stack([127 + 120 * np.sin(x / (5 + c) + y / (9 + i) + c) for c in range(3)], -1).astype(np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


class NumberedClips:
    """Clips whose frames show their number: eight bars, black or white, on a ground that moves."""

    @staticmethod
    def frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
        clip = np.empty((count, height, width, 3), np.uint8)
        for number in range(count):
            y, x = np.mgrid[:height, :width]
            ground = 60 + 40 * np.sin((x + 3 * number) / 9)[..., None] + [0, 40, 80]
            bars = 255 * (number >> (8 * x // width) & 1)[..., None]
            clip[number] = np.where((y < height // 2)[..., None], bars, ground)
        return clip

    @staticmethod
    def read(frames) -> list[int]:
        """The numbers on frames (T, H, W, 3), of any size."""
        numbers = []
        for frame in frames:
            height, width = frame.shape[:2]
            bars = [frame[height // 4, int((i + 0.5) * width / 8)].mean() > 128 for i in range(8)]
            numbers.append(sum(int(bar) << i for i, bar in enumerate(bars)))
        return numbers

    def write(self, path, count, *, fps=25, times=None, codec="libx264", height=48, width=64, **options):
        """By PyAV; ``times`` in milliseconds make a variable rate."""
        from fractions import Fraction

        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=fps, options={"g": "12", **options})
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
            if times:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for number, pixels in enumerate(self.frames(count, height, width)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = number, 1 / Fraction(fps)
                if times:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path


@pytest.fixture(scope="session")
def clips():
    pytest.importorskip("av")
    return NumberedClips()


@pytest.fixture(autouse=True)
def _skip_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def load_tool(name: str):
    """Import a script of tools/ by its file name."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden_tool():
    return load_tool("make_golden")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The tiers and the seconds of test time that each may take, all workers added up, on two cores.
TIERS = {"unit": 740, "contract": 160, "faults": 60, "slow": 1560}
FAULT_FILES = {"test_kill", "test_faults", "test_resume", "test_checkpoints", "test_broken", "test_files"}


def _tier(nodeid: str, keywords: dict) -> str:
    name = nodeid.split("::")[0].rsplit("/", 1)[-1].removesuffix(".py")
    if "slow" in keywords:
        return "slow"
    return "contract" if name == "test_contract" else "faults" if name in FAULT_FILES else "unit"


def pytest_terminal_summary(terminalreporter):
    """Say how long each tier took beside its budget; machines are noisy, so nothing fails by it."""
    seconds = dict.fromkeys(TIERS, 0.0)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "keywords"):
                seconds[_tier(report.nodeid, report.keywords)] += report.duration
    figures = (f"{tier} {spent:.0f} of {TIERS[tier]} s" for tier, spent in seconds.items())
    terminalreporter.write_line("time by tier: " + ", ".join(figures))
