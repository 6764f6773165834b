"""Faults, injected wherever the disk is touched, and what a second run makes of them."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import latentae
from latentae import files
from latentae.errors import DataError, RequestError
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore
from latentae.store.worker import BatchEncoder

OPTIONS = {"size": 32, "shard_size": 3, "batch_size": 2, "max_bad": 1}


@pytest.fixture
def inputs(seven):
    """Seven good images and a broken one, so that every kind of row and file is written."""
    (seven[0] / "cats/broken.png").write_bytes(b"\x89PNG")
    return seven[0]


class Fault:
    """Counts calls of a function of ``os`` and raises at one of them, before or after it has done its work."""

    def __init__(self, monkeypatch, name, at=None, after=False):
        self.calls, self.at, self.after, self.real = 0, at, after, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise OSError(errno.ENOSPC, "No space left on device")
        result = self.real(*args, **kwargs)
        if self.calls == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("function", "calls"), [("link", 2), ("replace", 2 * 3 + 1), ("fsync", 2 + 2 * 3 + 1)])
def test_a_disk_that_fills_up_at_any_step_loses_nothing(
    function, calls, after, inputs, tmp_path, dcae, tree, monkeypatch
):
    options = {**OPTIONS, "shard_size": 5}
    with monkeypatch.context() as patch:
        counter = Fault(patch, function)
        encode_dataset(inputs, tmp_path / "whole", dcae, **options)
    expected = tree(tmp_path / "whole")
    assert counter.calls >= calls  # plan and store.json, three files for each of two shards, quarantine
    for step in range(1, counter.calls + 1):
        store = tmp_path / f"{function}-{step}"
        with monkeypatch.context() as patch:
            Fault(patch, function, at=step, after=after)
            with pytest.raises(OSError, match="No space left") as caught:
                encode_dataset(inputs, store, dcae, **options)
        assert caught.value.errno == errno.ENOSPC
        assert not list(tmp_path.rglob("*.tmp"))
        if (store / "store.json").exists():
            assert LatentStore(store).verify() == []  # what is there is whole, whenever one looks
        encode_dataset(inputs, store, dcae, **options)
        assert tree(store) == expected
        shutil.rmtree(store)


def test_a_second_run_encodes_nothing_again(inputs, tmp_path, dcae, monkeypatch):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)

    def never(*args):
        raise AssertionError("an image was encoded twice")

    monkeypatch.setattr(BatchEncoder, "encode", never)
    summary = encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    assert (summary.encoded, summary.bad, summary.encoded_now) == (7, 1, 0)


@pytest.mark.parametrize("name", ["00001.json", "00001.safetensors", "00001.parquet"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_shard_that_misses_a_file_is_made_again(name, damage, inputs, tmp_path, dcae, tree):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    expected = tree(tmp_path / "store")
    path = tmp_path / "store" / "shards" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    assert encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS).encoded_now == 3
    assert tree(tmp_path / "store") == expected


def test_temporaries_of_dead_processes_are_swept_and_those_of_the_living_are_not(inputs, tmp_path, dcae):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    shards = tmp_path / "store" / "shards"
    orphan, alive = (shards / f"{files._host()}.{pid}.0123abcd.tmp" for pid in (gone.pid, os.getpid()))
    for path in (orphan, alive):
        path.write_text("{")
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    assert not orphan.exists()
    assert alive.exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"size": 16}, "preprocess.size: 32 in the store, 16 now"),
        ({"size": "native"}, 'preprocess.size: 32 in the store, "native" now'),
        ({"dtype": "float16"}, 'dtype: "float32" in the store, "float16" now'),
        ({"shard_size": 4}, "plan.shard_size: 3 in the store, 4 now"),
        ({"limit": 3}, "plan.limit: null in the store, 3 now"),
    ],
)
def test_a_changed_option_is_refused_with_a_diff(options, line, inputs, tmp_path, dcae, tree):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    before = tree(tmp_path / "store")
    with pytest.raises(RequestError) as caught:
        encode_dataset(inputs, tmp_path / "store", dcae, **{**OPTIONS, **options})
    assert f"\n  {line}\n" in str(caught.value)
    assert "another folder" in str(caught.value)
    assert tree(tmp_path / "store") == before


def test_other_weights_are_refused_and_a_renamed_model_is_not(inputs, tmp_path, dcae):
    dcae.save_pretrained(tmp_path / "model")
    encode_dataset(inputs, tmp_path / "store", str(tmp_path / "model"), **OPTIONS)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert encode_dataset(inputs, tmp_path / "store", str(tmp_path / "moved"), **OPTIONS).encoded_now == 0
    with pytest.raises(RequestError, match=r"model\.weights_sha256: "):
        encode_dataset(inputs, tmp_path / "store", latentae.create("dc-ae-tiny", seed=2), **OPTIONS)


def test_another_kind_and_another_seed_are_refused(inputs, tmp_path, kl):
    encode_dataset(inputs, tmp_path / "store", kl, **OPTIONS, kind="sample")
    with pytest.raises(RequestError, match="seed: 0 in the store, 1 now"):
        encode_dataset(inputs, tmp_path / "store", kl, **OPTIONS, kind="sample", seed=1)
    with pytest.raises(RequestError, match='kind: "sample" in the store, "moments" now'):
        encode_dataset(inputs, tmp_path / "store", kl, **OPTIONS, kind="moments")


def test_inputs_that_came_or_went_are_refused_by_name(inputs, tmp_path, dcae):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    (inputs / "dogs/a.png").rename(inputs / "dogs/z.png")
    with pytest.raises(RequestError) as caught:
        encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    assert "1 input not in the plan: dogs/z.png" in str(caught.value)
    assert "1 input planned, but gone: dogs/a.png" in str(caught.value)


def test_inputs_may_move_as_long_as_their_keys_stay(inputs, tmp_path, dcae):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    (tmp_path / "store/shards/00002.json").unlink()
    inputs.rename(tmp_path / "elsewhere")
    summary = encode_dataset(tmp_path / "elsewhere", tmp_path / "store", dcae, **OPTIONS)
    assert (summary.encoded, summary.encoded_now) == (7, 2)


def test_an_input_replaced_after_it_was_encoded_is_refused(inputs, tmp_path, dcae):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    Image.new("RGB", (32, 32)).save(inputs / "dogs/a.png")
    with pytest.raises(RequestError, match=r"dogs/a\.png: \d+ bytes when it was encoded, \d+ now"):
        encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)


def test_an_input_replaced_before_its_turn_is_simply_encoded(inputs, tmp_path, dcae, read_raw):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    (tmp_path / "store/shards/00002.json").unlink()
    Image.new("RGB", (32, 32)).save(inputs / "dogs/d.png")
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    row = read_raw(tmp_path / "store").rows[-1]
    assert (row["key"], row["bytes"]) == ("dogs/d.png", (inputs / "dogs/d.png").stat().st_size)


def test_retrying_encodes_what_was_repaired_and_nothing_else(inputs, tmp_path, dcae, read_raw, monkeypatch):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    before = read_raw(tmp_path / "store")
    shutil.copy(inputs / "dogs/d.png", inputs / "cats/broken.png")

    assert encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS).bad == 1  # not without being asked
    encoded = []
    real = BatchEncoder.encode
    monkeypatch.setattr(BatchEncoder, "encode", lambda self, s: (encoded.extend(x.item.key for x in s), real(self, s)))
    summary = encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS, retry_failed=True)
    assert encoded == ["cats/broken.png"]
    assert (summary.encoded, summary.bad) == (8, 0)
    after = read_raw(tmp_path / "store")
    assert after.quarantine == []
    latents = {row["key"]: z for row, z in zip(after.rows, after.latents)}
    kept = [row["key"] for row in before.rows if row["status"] == "ok"]
    np.testing.assert_array_equal([latents[key] for key in kept], before.latents)
    np.testing.assert_allclose(latents["cats/broken.png"], latents["dogs/d.png"], rtol=0, atol=1e-5)
    assert LatentStore(tmp_path / "store").verify() == []
    assert encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS).encoded_now == 0


@pytest.mark.parametrize("step", range(1, 5))
def test_a_retry_that_is_cut_short_loses_nothing(step, inputs, tmp_path, dcae, monkeypatch):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    shutil.copy(inputs / "dogs/d.png", inputs / "cats/broken.png")
    with monkeypatch.context() as patch:
        Fault(patch, "replace", at=step)
        with pytest.raises(OSError, match="No space left"):
            encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS, retry_failed=True)
    assert LatentStore(tmp_path / "store").verify() == []
    summary = encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS, retry_failed=True)
    assert (summary.encoded, summary.bad) == (8, 0)
    store = LatentStore(tmp_path / "store")
    assert len(store.keys) == len(set(store.keys)) == 8


def test_markers_of_another_store_do_not_count(inputs, tmp_path, dcae, kl, read_raw):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    for name in ("store.json", "plan.parquet"):
        (tmp_path / "store" / name).unlink()
    summary = encode_dataset(inputs, tmp_path / "store", kl, **OPTIONS)
    assert summary.encoded_now == 8
    assert read_raw(tmp_path / "store").latents.shape == (7, 4, 8, 8)


def test_a_plan_of_another_store_is_noticed(inputs, tmp_path, dcae):
    encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)
    encode_dataset(inputs, tmp_path / "other", dcae, **{**OPTIONS, "shard_size": 2})
    shutil.copy(tmp_path / "other/plan.parquet", tmp_path / "store/plan.parquet")
    with pytest.raises(DataError, match=r"plan\.parquet is not the plan that"):
        encode_dataset(inputs, tmp_path / "store", dcae, **OPTIONS)


def test_two_runs_at_once_agree(inputs, tmp_path, dcae, tree):
    from concurrent.futures import ThreadPoolExecutor

    encode_dataset(inputs, tmp_path / "alone", dcae, **OPTIONS)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(encode_dataset, inputs, tmp_path / "both", dcae, **OPTIONS) for _ in range(2)]
    assert [run.result().encoded for run in runs] == [7, 7]
    assert tree(tmp_path / "both") == tree(tmp_path / "alone")
