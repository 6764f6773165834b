"""A killed benchmark continues to the same figures, bit for bit; several processes share one and agree with one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from latentae.bench import checkpoints, measuring
from latentae.bench.run import bench
from latentae.bench.state import dump_state, load_state, merge
from latentae.data.samples import dead_leaves
from latentae.errors import RequestError
from latentae.metrics.frechet import FrechetDistance
from latentae.metrics.intrinsic_dimension import TwoNN

# What the children of these tests run: a bench with a feature network of its own in place of Inception's.
SCRIPT = """
import json, os, signal, sys
import torch
from torch import nn
from latentae.bench import checkpoints, measuring, quality
from latentae.bench.run import bench
from latentae.metrics.frechet import FrechetDistance

torch.set_num_threads(1)
checkpoints.SAVE_EVERY_SECONDS = 0.0

class Features(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 4, 5, stride=3)

    def forward(self, images):
        return self.convolution(images.float() / 128 - 1).relu().mean((2, 3))

def with_features(keep_originals, **options):
    metric = FrechetDistance(Features(), 4, keep_originals=keep_originals)
    metric.weights_sha256 = "0"
    return metric

quality.FrechetInceptionDistance = with_features
src, out, models, kill_after = sys.argv[1], sys.argv[2], sys.argv[3].split(","), int(sys.argv[4])
options = json.loads(sys.argv[5])
done = 0
add = measuring.Measurement.add

def counted(self, *arguments):
    global done
    if done == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return add(self, *arguments)

if kill_after >= 0:
    measuring.Measurement.add = counted
bench(src, [(f"m{i}", m) for i, m in enumerate(models)], out=out, speed=False, **options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i in range(15):
        Image.fromarray(dead_leaves(i, 64)).save(folder / f"{i:02d}.png")
    (folder / "07b.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 8],
            norm_num_groups=4,
        )
        path = tmp_path_factory.mktemp("model") / "kl"
        model.save_pretrained(path)
        paths.append(str(path))
    return paths


OPTIONS = {"size": 32, "batch_size": 4, "max_bad": 1, "equivariance": 5, "report_images": 3, "sample": True}


def command(folder, out, models, kill_after=-1, **options):
    return [sys.executable, "-c", SCRIPT, str(folder), str(out), ",".join(models), str(kill_after),
            json.dumps({**OPTIONS, **options})]  # fmt: skip


def run(arguments):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCH_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)


def figures(out):
    results = json.loads((out / "results.json").read_text())
    del results["machine"]
    return results


@pytest.fixture(scope="module")
def uninterrupted(folder, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(command(folder, out, models)).returncode == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [1, 4, 6])  # four batches a model
def test_killed_anywhere_it_continues_to_the_same_figures(folder, models, tmp_path, uninterrupted, kill_after):
    out = tmp_path / "out"
    killed = run(command(folder, out, models, kill_after))
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    again = run(command(folder, out, models))
    assert again.returncode == 0, again.stderr
    assert ("Continued from" in again.stderr) == (kill_after != 4)
    assert differences(figures(out), figures(uninterrupted)) == []
    assert not (out / "progress").exists()
    saved, expected = (sorted(p.relative_to(o) for p in o.rglob("*.png")) for o in (out, uninterrupted))
    assert saved == expected
    assert all((out / name).read_bytes() == (uninterrupted / name).read_bytes() for name in saved)


@pytest.mark.slow
def test_several_processes_give_the_figures_of_one(folder, models, tmp_path, uninterrupted):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = run([*launcher, str(script), *command(folder, out, models)[3:]])
    assert process.returncode == 0, process.stderr
    one, several = figures(uninterrupted), figures(out)
    assert several["protocol_sha256"] == one["protocol_sha256"]
    for model, other in zip(one["models"], several["models"], strict=True):
        assert other["per_image"] == model["per_image"]
        assert other["intervals"] == model["intervals"]
        assert other["metrics"]["psnr"] == model["metrics"]["psnr"]
        assert_close(other["metrics"], model["metrics"])
        assert_close(other["latents"], model["latents"])
    assert several["images"] == one["images"]
    assert several["samples"] == one["samples"]


def differences(value, expected, path=""):
    """Where two results differ."""
    if isinstance(expected, dict) and isinstance(value, dict):
        names = sorted({*value, *expected})
        return [d for name in names for d in differences(value.get(name), expected.get(name), f"{path}/{name}")]
    if isinstance(expected, list) and isinstance(value, list) and len(value) == len(expected):
        return [d for i, (a, b) in enumerate(zip(value, expected)) for d in differences(a, b, f"{path}/{i}")]
    return [] if value == expected else [(path, value, expected)]


def assert_close(value, expected):
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for name in expected:
            assert_close(value[name], expected[name])
    elif isinstance(expected, list):
        for a, b in zip(value, expected, strict=True):
            assert_close(a, b)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9)
    else:
        assert value == expected


@pytest.mark.slow
def test_the_command_under_torchrun(folder, models, tmp_path):
    """More processes than batches, and one table."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "latentae",
    ]
    arguments = ["bench", str(folder), "--model", models[0], "--size", "32", "--limit", "4", "--batch-size", "4"]
    process = run([*launcher, *arguments, "--no-speed", "--out", str(tmp_path / "out")])
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("images of 32 px") == 1
    alone = run([sys.executable, "-m", "latentae", *arguments, "--no-speed"])
    assert process.stdout.split("versions")[0] == alone.stdout.split("versions")[0]


class Stops(Exception):
    pass


@pytest.fixture
def interrupted(folder, models, tmp_path, monkeypatch):
    """A bench that stopped in its first model after two batches."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_SECONDS", 0.0)
    add, done = measuring.Measurement.add, []

    def stop(self, *arguments):
        if len(done) == 2:
            raise Stops
        done.append(1)
        return add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Measurement, "add", stop)
        with pytest.raises(Stops):
            bench(folder, [("a", models[0])], out=tmp_path / "out", speed=False, **OPTIONS)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 48}, "protocol"),
        ({"protocol": "dc-ae"}, "protocol"),
        ({"sample": False}, "protocol"),
        ({"seed": 1}, "protocol"),
        ({"limit": 5}, "images"),
        ({"batch_size": 3}, "options"),
        ({"metrics": ["psnr"], "size": 48}, "protocol"),
    ],
)
def test_another_request_does_not_continue_it(folder, models, interrupted, change, words):
    with pytest.raises(RequestError, match=rf"not finished, of other .*{words}.*remove the folder"):
        bench(folder, [("a", models[0])], out=interrupted, speed=False, **{**OPTIONS, **change})


def test_neither_does_another_model_nor_another_image(folder, models, interrupted, tmp_path):
    with pytest.raises(RequestError, match="not finished, of other models"):
        bench(folder, [("a", models[1])], out=interrupted, speed=False, **OPTIONS)
    import shutil

    shutil.copytree(folder, tmp_path / "photos")
    (tmp_path / "photos/03.png").write_bytes((folder / "04.png").read_bytes())
    with pytest.raises(RequestError, match="not finished, of other images"):
        bench(tmp_path / "photos", [("a", models[0])], out=interrupted, speed=False, **OPTIONS)


def test_a_damaged_state_is_measured_anew(folder, models, interrupted, tmp_path, capsys):
    state = interrupted / "progress/process-0.state"
    state.write_bytes(state.read_bytes()[:1000])
    results = bench(folder, [("a", models[0])], out=interrupted, speed=False, **OPTIONS)
    assert "measured from its first image on" in capsys.readouterr().err
    whole = bench(folder, [("a", models[0])], speed=False, **OPTIONS)
    assert results["models"] == whole["models"]


def test_an_interrupted_one_continues_within_python_too(folder, models, interrupted, capsys):
    results = bench(folder, [("a", models[0])], out=interrupted, speed=False, **OPTIONS)
    assert "Continued from" in capsys.readouterr().err
    whole = bench(folder, [("a", models[0])], speed=False, **OPTIONS)
    assert results["models"] == whole["models"]


class Holder:
    """Stands for what a benchmark counts: of this package by its module's name."""

    def __init__(self):
        self.network = nn.Linear(3, 3)
        self.metric = FrechetDistance(self.network, 3)
        self.late = None
        self.rows = {"a": [1.0, 2.5], "b": []}
        self.function = lambda: self.network
        self.array = np.arange(3.0)


Holder.__module__ = "latentae.bench.measuring"


@pytest.fixture
def _findable(monkeypatch):
    monkeypatch.setattr(measuring, "Holder", Holder, raising=False)


@pytest.mark.usefixtures("_findable")
def test_state_keeps_what_was_counted_and_not_what_works():
    holder, fresh = Holder(), Holder()
    holder.metric.sum_original += torch.arange(3)
    holder.late = TwoNN(5)
    holder.late.update(torch.randn(7, 2))
    loaded = load_state(dump_state(holder), fresh)
    assert loaded.network is fresh.network
    assert loaded.metric._network[0] is fresh.network
    assert loaded.function is fresh.function
    assert loaded.rows == holder.rows
    np.testing.assert_array_equal(loaded.array, holder.array)
    torch.testing.assert_close(loaded.metric.sum_original, holder.metric.sum_original)
    torch.testing.assert_close(torch.cat(loaded.late.sample), torch.cat(holder.late.sample))
    loaded.late.update(torch.randn(7, 2))
    assert int(loaded.late.count) == 14
    assert int(holder.late.count) == 7


@pytest.mark.usefixtures("_findable")
def test_states_merge():
    ours, theirs = Holder(), Holder()
    theirs.metric.sum_original += 1
    theirs.late = TwoNN(5)
    merge(ours, theirs)
    assert ours.metric.sum_original.tolist() == [1, 1, 1]
    assert ours.late is theirs.late


def test_a_state_cannot_call_anything():
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    with pytest.raises(RequestError, match="has no place in it"):
        load_state(dump_state({"b": [_Smuggled(Evil())]}), {})


class _Smuggled:
    """Walks as of this package, and pickles as what it was made of."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return self.inner.__reduce__()


_Smuggled.__module__ = "latentae.bench.measuring"
