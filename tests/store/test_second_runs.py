"""What a second run may find, and must neither lose nor make worse: other shapes, damage, other processes."""

import shutil

import pytest
import torch

from latentae.errors import DataError, ResumableError
from latentae.store import job, shard
from latentae.store.encode import encode_dataset
from latentae.store.planning import Request, job_of, open_request, plan_store
from latentae.store.reader import LatentStore
from latentae.store.verification import verify_store

OPTIONS = {"size": 32, "shard_size": 3, "batch_size": 2}


@pytest.fixture
def repaired(seven, tmp_path, dcae):
    """A store of which one input was bad, and is good now."""
    (seven[0] / "cats/aa.png").write_bytes(b"\x89PNG")
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, max_bad=1)
    shutil.copy(seven[0] / "dogs/d.png", seven[0] / "cats/aa.png")
    return seven[0]


def test_the_batch_size_of_large_images_survives_a_resume(tmp_path, write_images, dcae, tree):
    write_images(tmp_path / "in", {f"{i}.png": (1024, 1024) for i in range(4)})
    for name in ("whole", "cut"):
        encode_dataset(tmp_path / "in", tmp_path / name, dcae, size="native", shard_size=2)
    for path in (tmp_path / "cut/shards").glob("00001*"):
        path.unlink()
    encode_dataset(tmp_path / "in", tmp_path / "cut", dcae, size="native", shard_size=2)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_retrying_in_vain_changes_nothing(seven, tmp_path, dcae, tree):
    (seven[0] / "cats/aa.png").write_bytes(b"\x89PNG")
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, max_bad=1)
    before = tree(tmp_path / "store")
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, max_bad=1, retry_failed=True)
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_retry_gives_no_new_hash_to_what_is_damaged(kind, repaired, tmp_path, dcae):
    path = tmp_path / f"store/shards/00000.{kind}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"00000\.{kind} is not what was written: delete .*00000\.json and run"):
        encode_dataset(repaired, tmp_path / "store", dcae, **OPTIONS, retry_failed=True)
    assert len(verify_store(tmp_path / "store").problems) == 1
    (tmp_path / "store/shards/00000.json").unlink()
    assert encode_dataset(repaired, tmp_path / "store", dcae, **OPTIONS).encoded == 8
    assert verify_store(tmp_path / "store").problems == []


def test_a_retry_that_meets_another_one_halfway_stops(repaired, tmp_path, dcae, monkeypatch):
    """The data of the other are there already, its rows are not: they would part keys from their latents."""
    planned = plan_store(open_request(Request(repaired, tmp_path / "store", dcae, size=32, shard_size=3)))
    second = job.ShardWorker(job_of(planned.opened, planned.plan, planned.fingerprint, batch_size=2, retry_failed=True))
    work = second._work(0)
    real, samples = shard._write, list[shard.Sample]()

    def halfway(path, content):
        real(path, content)
        if path.suffix == ".safetensors":
            samples.extend(second.loader.load(item, work.shard.shape) for item in work.items)
            second._encode(work.shard, samples)
            with pytest.raises(ResumableError, match=r"Another process writes 00000 of .*: run the command again"):
                second._publish(work, samples, 2)

    monkeypatch.setattr(shard, "_write", halfway)
    encode_dataset(repaired, tmp_path / "store", dcae, **OPTIONS, retry_failed=True)
    assert len(samples) == 1
    assert verify_store(tmp_path / "store").problems == []
    assert second._publish(work, samples, 2)["encoded"] == 3  # what the other wrote


def test_the_first_of_two_that_encode_a_shard_wins(seven, tmp_path, dcae, tree, monkeypatch):
    """They may be machines that give other bytes; the files of one must not meet the marker of the other."""
    planned = plan_store(open_request(Request(seven[0], tmp_path / "store", dcae, size=32, shard_size=3)))
    slow = job.ShardWorker(job_of(planned.opened, planned.plan, planned.fingerprint, batch_size=3))
    work = slow._work(0)
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    before = tree(tmp_path / "store")
    assert slow._publish(work, [shard.Sample(item, reason="late", message="") for item in work.items], 3)["bad"] == 0
    assert tree(tmp_path / "store") == before


def test_an_open_store_notices_that_a_shard_was_written_again(repaired, tmp_path, dcae):
    stores = [LatentStore(tmp_path / "store") for _ in range(3)]
    stores[0].stored(0)  # its latents are open, its rows are not
    encode_dataset(repaired, tmp_path / "store", dcae, **OPTIONS, retry_failed=True)
    for look in (lambda: stores[0][0], lambda: stores[1][0], lambda: stores[2].keys):
        with pytest.raises(ResumableError, match="was written again while its store was open, by a retry: open"):
            look()
    whole = {item["key"]: item["latents"] for item in LatentStore(tmp_path / "store")}
    assert stores[0].stored(0).equal(whole["cats/a.png"])


def test_the_last_shards_are_encoded_with_as_many_threads_as_the_first(seven, tmp_path, dcae, monkeypatch):
    """Other numbers of threads may give other bits."""
    from latentae.store.engines import local

    monkeypatch.setattr(local, "available_cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)

    class Worker:
        def __init__(self, *arguments):
            pass

        def run(self, shards, advance):
            assert numbers == [2]
            yield from ()

    list(local.run_local(None, [5], processes=2, devices=["cpu"], advance=lambda *_: None, open_worker=Worker))
    assert numbers == [2, 4]
