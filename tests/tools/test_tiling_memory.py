"""Memory of large images: tiled it is bounded, and what counts it agrees with the allocator.

Tensors are counted operation by operation on the meta device, which computes nothing: figures are the same on every
machine, and full-size models at 4096 px take seconds.
"""

import gc
import json
import math

import pytest
import torch

import latentae
from latentae.families.presets import PRESETS
from latentae.nn import exact_tiling

GIB = 2**30
KEPT = 2**20  # bytes between two steps, of models of a thousandth of the size
HALVES = ("encode", "decode")
TINY = [name for name in PRESETS if name.endswith("-tiny")]
IMAGES = [name for name in TINY if not latentae.create(name).is_video]


@pytest.fixture
def memory(tool):
    return tool("tiling_memory")


def live(memory, name, half, size, tile=None):
    model = memory.make_without_weights(name, torch.float32)
    if getattr(model, "samples", False):
        model.register_to_config(num_inference_steps=2)  # one takes as much as another
    if tile:
        memory.enable_tiling(model, tile)
    given = torch.empty(memory.input_shape(model, half, size), device="meta")
    return memory.live_peak(model, half, given)


def image(size):
    """Bytes of one image of that size."""
    return 3 * size * size * 4


def test_what_lives_at_once_is_counted(memory):
    def run(x):
        first = x + 1  # 1
        second = torch.cat([first, first])  # 1 + 2
        del first
        view = second[:10].view(-1)
        second.mul_(2)
        return torch.cat([second, second]), view  # 2 + 4

    for device in ("cpu", "meta"):
        given = torch.zeros(1000, device=device)
        with memory.LiveTensors() as counted:
            run(given)
        assert counted.peak == 6 * 4000


@pytest.mark.filterwarnings("ignore:These latents are:UserWarning")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", IMAGES)
def test_the_count_agrees_with_the_allocator(memory, name, half):
    """Which allocates what kernels need inside too, a third of all in so small a model."""
    model = memory.make(name, torch.float32)
    if model.samples:
        model.register_to_config(num_inference_steps=2)
    given = memory.clouds(memory.input_shape(model, half, "128"))
    with torch.no_grad():
        memory.run(model, half, given)
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            memory.run(model, half, given)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0.6 * peak < live(memory, name, half, "128") <= 1.01 * peak


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", IMAGES)
def test_tiles_bound_the_memory_of_large_images(memory, name, half, monkeypatch):
    """At 1024 px with tiles of 256: less than half of the whole, and from there on no faster than the pixels."""
    monkeypatch.setattr(exact_tiling, "KEPT", KEPT)
    whole, tiled = live(memory, name, half, "1024"), live(memory, name, half, "1024", tile=256)
    assert tiled < 0.5 * whole
    assert live(memory, name, half, "1536", tile=256) <= 2.3 * tiled


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", [name for name in TINY if name not in IMAGES])
def test_windows_bound_the_memory_of_long_clips(memory, name, half, monkeypatch):
    """A clip of ten windows: what one takes, and the pixels or latents that come and go."""
    model = latentae.create(name)
    window = model.config.window_frames
    frames = model.padded_frames(10 * window)
    one, many = (live(memory, name, half, f"{count}x64") for count in (window, frames))
    assert many < one + 4 * frames * image(64)
    assert many < 2 * one
    monkeypatch.setattr(exact_tiling, "KEPT", KEPT)
    tiled, whole = (live(memory, name, half, f"{window}x256", tile) for tile in (64, None))
    assert tiled < 0.4 * whole


FULL_SIZE = {  # GiB of tensors in fp32 beside the model, tiles of 1024 px
    ("litevae-b-f8c4", "encode", "4096"): 9.0,
    ("litevae-b-f8c4", "decode", "4096"): 10.0,
    ("dc-ae-f32c32-sana-1.0", "encode", "4096"): 3.5,
    ("dc-ae-f32c32-sana-1.0", "decode", "4096"): 3.5,
    ("fourplane-t4f8c8", "encode", "69x256"): 3.5,
    ("fourplane-t4f8c8", "decode", "69x256"): 4.5,
}


@pytest.mark.parametrize(("name", "half", "size"), FULL_SIZE)
def test_full_size_models_take_what_is_stated(memory, name, half, size):
    taken = live(memory, name, half, size, tile=1024) / GIB
    assert 0.5 * FULL_SIZE[name, half, size] < taken < FULL_SIZE[name, half, size]


# The command


@pytest.fixture
def one_process(memory, monkeypatch):
    """Calls in this process, whose memory has no limit."""
    monkeypatch.setattr(memory.resource, "setrlimit", lambda *_: None)

    def run(*options):
        with torch.random.fork_rng():
            monkeypatch.setattr(memory, "measure_apart", lambda task, seconds: memory.measure(task))
            memory.main(["--threads", "2", *options])

    yield run
    torch.set_grad_enabled(True)


@pytest.mark.filterwarnings("ignore:These latents are:UserWarning")
def test_tiled_and_untiled_are_compared(one_process, memory, tmp_path, capsys):
    file = tmp_path / "out.json"
    one_process("--models", "litevae-tiny", "dito-tiny", "--sizes", "96", "--tile", "32", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["half"]) for row in rows] == [
        (name, half) for name in ("litevae-tiny", "dito-tiny") for half in HALVES
    ]
    *exact, blended = rows
    assert all(row["difference"] < 1e-5 for row in exact)
    assert blended["difference"] > 1e-4
    assert 10 < blended["psnr"] < 80
    assert blended["tiled"]["live_gib"] < blended["untiled"]["live_gib"]
    assert all(way["seconds"] > 0 for row in rows for way in (row["tiled"], row["untiled"]))
    assert capsys.readouterr().out.splitlines()[-1].startswith("tiled, added to the model at the largest size that ran")


def test_rows_of_another_call_are_kept_and_of_the_same_are_replaced(one_process, tmp_path, capsys):
    file = tmp_path / "out.json"
    for size in ("64", "96", "64"):
        one_process("--models", "dc-ae-tiny", "--halves", "encode", "--sizes", size, "--live-only", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert sorted(row["size"] for row in rows) == ["64", "96"]
    assert "seconds" not in rows[0]["tiled"]
    assert "none ran" in capsys.readouterr().out


def test_what_would_take_more_than_the_limit_is_not_tried(one_process, tmp_path):
    file = tmp_path / "out.json"
    limit = ["--limit-gib", "0.004", "--json", str(file)]
    one_process("--models", "dc-ae-tiny", "--halves", "encode", "--sizes", "256", "--tile", "64", *limit)
    (row,) = json.loads(file.read_text())["rows"]
    assert "seconds" in row["tiled"]
    assert "seconds" not in row["untiled"]


@pytest.mark.slow
def test_a_process_of_its_own_stops_at_its_limit(memory, tmp_path):
    task = {"model": "litevae-tiny", "half": "decode", "size": "2048", "dtype": "float32", "device": "cpu"}
    task |= {"tile": 256, "threads": 1, "result": str(tmp_path / "out.pt"), "limit_gib": 1.75, "tiled": False}
    assert memory.measure_apart(task, None)["added"] is None
    assert not (tmp_path / "out.pt").exists()
    found = memory.measure_apart(task | {"tiled": True, "size": "512"}, None)
    assert 0 < found["added"] < GIB
    assert torch.load(tmp_path / "out.pt").shape == (1, 3, 512, 512)
    assert memory.measure_apart(task, 0.1) is None


def test_the_figures_are_those_of_their_definitions(memory, tmp_path):
    reference = torch.tensor([0.0, 1.0, 2.0, 4.0])
    torch.save(reference, tmp_path / "untiled")
    torch.save(reference + torch.tensor([0.0, 0.2, 0.0, 0.0]), tmp_path / "tiled")
    found = memory.compare(tmp_path / "tiled", tmp_path / "untiled")
    assert found["psnr"] == pytest.approx(10 * math.log10(16 / 0.01), abs=1e-4)
    assert found["difference"] == pytest.approx(0.05)
