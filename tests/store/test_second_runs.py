"""What a second run may find, and must neither lose nor make worse: other shapes, damage, other processes."""

import json
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet
import pytest
import torch

from latentae.data.sources import manifest
from latentae.errors import DataError, RequestError, ResumableError
from latentae.store import job, planning, shard
from latentae.store.encode import encode_dataset
from latentae.store.estimate import estimate
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


def listed(folder, rows):
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dataset_of(folder, keys):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": (folder / key).read_bytes(), "path": key} for key in keys]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


@pytest.mark.parametrize("options", [{"size": 16}, {"shard_size": 7}], ids=str)
def test_a_plan_whose_run_was_killed_before_it_said_what_for(options, seven, tmp_path, dcae):
    request = Request(seven[0], tmp_path / "store", dcae, **{"size": 32, "shard_size": 3, **options})
    plan_store(open_request(request))
    (tmp_path / "store/store.json").unlink()  # as if killed between the two
    with pytest.raises(RequestError, match=r"has a plan that was made with other options.* delete .*/plan\.parquet"):
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    assert not (tmp_path / "store/store.json").exists()
    assert encode_dataset(seven[0], tmp_path / "store", dcae, **{**OPTIONS, **options}).encoded == 7


def test_an_extension_reads_inputs_where_they_lie_now(seven, tmp_path, dcae, write_images):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    for path in (tmp_path / "store/shards").glob("00001*"):
        path.unlink()
    seven[0].rename(tmp_path / "moved")
    write_images(tmp_path / "moved", {"zebras/z.png": (32, 32)})
    summary = encode_dataset(tmp_path / "moved", tmp_path / "store", dcae, **OPTIONS, extend=True)
    assert (summary.encoded, summary.encoded_now) == (8, 4)


def test_a_tar_that_was_written_again_is_read_by_its_new_lengths(seven, tmp_path, dcae, write_images):
    def write_tar(image):
        with tarfile.open(tmp_path / "one.tar", "w") as tar:
            tar.add(image, "a.png")

    write_tar(seven[0] / "cats/a.png")
    plan_store(open_request(Request(tmp_path / "one.tar", tmp_path / "store", dcae, size=32, shard_size=3)))
    write_images(tmp_path / "large", {"a.png": (96, 96)})
    write_tar(tmp_path / "large/a.png")
    assert encode_dataset(tmp_path / "one.tar", tmp_path / "store", dcae, **OPTIONS).encoded == 1


def test_lengths_that_a_list_only_guesses_accuse_no_input(seven, tmp_path, dcae, monkeypatch):
    monkeypatch.setattr(manifest, "MOST_SIZES", 5)
    rows = [{"path": key} for key in seven[1]]
    encode_dataset(listed(seven[0], rows[:4]), tmp_path / "store", dcae, **OPTIONS)
    assert encode_dataset(listed(seven[0], rows), tmp_path / "store", dcae, **OPTIONS, extend=True).encoded == 7


def test_changed_columns_are_refused_by_name(seven, tmp_path, dcae):
    rows = [{"path": key, "caption": "one", "score": float("nan")} for key in seven[1]]
    encode_dataset(listed(seven[0], rows), tmp_path / "store", dcae, **OPTIONS)
    assert encode_dataset(listed(seven[0], rows), tmp_path / "store", dcae, **OPTIONS).encoded_now == 0
    with pytest.raises(RequestError, match="column score: in the plan, but gone"):
        encode_dataset(listed(seven[0], rows), tmp_path / "store", dcae, **OPTIONS, columns=["caption"])
    rows[2] = {**rows[2], "caption": "two"}
    with pytest.raises(RequestError, match=r"1 input with another caption: cats/c\.png"):
        encode_dataset(listed(seven[0], rows), tmp_path / "store", dcae, **OPTIONS)
    with pytest.raises(RequestError, match="column more: not in the plan"):
        encode_dataset(listed(seven[0], [{**row, "more": 1} for row in rows]), tmp_path / "store", dcae, **OPTIONS)


def test_an_extension_may_bring_columns_but_no_other_types(seven, tmp_path, dcae, tree):
    rows = [{"path": key, "score": 1} for key in seven[1]]
    encode_dataset(listed(seven[0], rows[:4]), tmp_path / "store", dcae, **OPTIONS)
    before = tree(tmp_path / "store")
    other = listed(seven[0], [*rows[:4], *({**row, "score": "good"} for row in rows[4:])])
    with pytest.raises(RequestError, match="column score: int64 in the plan, large_string now"):
        encode_dataset(other, tmp_path / "store", dcae, **OPTIONS, extend=True)
    assert tree(tmp_path / "store") == before
    more = listed(seven[0], [*rows[:4], *({**row, "more": "x"} for row in rows[4:])])
    encode_dataset(more, tmp_path / "store", dcae, **OPTIONS, extend=True)
    assert [item["more"] for item in LatentStore(tmp_path / "store")] == [None] * 4 + ["x"] * 3


def test_an_extended_store_says_how_to_go_on(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, limit=3)
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, limit=5, extend=True)
    with pytest.raises(RequestError, match=r"2 inputs planned, but gone: .*\n.* give --extend or --as-planned"):
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, limit=3)
    assert encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, limit=3, as_planned=True).encoded == 5


def test_an_estimate_is_of_what_is_left(seven, tmp_path, dcae, write_images, tree):
    def left(**options):
        request = Request(seven[0], tmp_path / "store", dcae, size=32, shard_size=3, **options)
        return estimate(open_request(request), 2).inputs

    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    with pytest.raises(RequestError, match="Nothing is left to encode"):
        left()
    (tmp_path / "store/shards/00001.json").unlink()
    before = tree(tmp_path / "store")
    assert left() == left(as_planned=True) == 3
    write_images(seven[0], {"zebras/z.png": (32, 32)})
    assert left(extend=True) == 4
    with pytest.raises(RequestError, match="add the new ones with --extend"):
        left()
    assert tree(tmp_path / "store") == before


def test_jobs_of_several_share_a_dataset_in_memory(seven, tmp_path, dcae):
    dataset = dataset_of(*seven)
    runs = [
        encode_dataset(dataset, tmp_path / "store", dcae, **OPTIONS, shard_index=i, shard_count=2) for i in range(2)
    ]
    assert [run.encoded_now for run in runs] == [4, 3]


def test_splits_are_asked_for(seven, tmp_path, dcae):
    splits = pytest.importorskip("datasets").DatasetDict({"train": dataset_of(*seven)})
    with pytest.raises(RequestError, match=r"The data set has splits, train: give one, such as dataset\['train'\]"):
        encode_dataset(splits, tmp_path / "store", dcae, **OPTIONS)


@pytest.mark.parametrize("file", ["plan.parquet", "plan-00001.parquet", "store.json", "shards/00001.json"])
def test_what_verify_reads_is_all_that_a_store_rests_on(file, seven, tmp_path, dcae):
    rows = [{"path": key, "label": 1, "score": 0.5, "flag": True, "text": "é", "no": None} for key in seven[1]]
    encode_dataset(listed(seven[0], rows[:4]), tmp_path / "store", dcae, **OPTIONS)
    encode_dataset(listed(seven[0], rows), tmp_path / "store", dcae, **OPTIONS, extend=True)
    assert verify_store(tmp_path / "store").problems == LatentStore(tmp_path / "store").verify() == []
    path = tmp_path / "store" / file
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        labels = pyarrow.array([7] * table.num_rows, pyarrow.int64())
        table = table.set_column(table.column_names.index("label"), "label", labels)
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        path.write_text(path.read_text().replace('_factor": ', '_factor": 2').replace('"bad": 0', '"bad": 0,,'))
    named = "plan.parquet" if path.suffix == ".parquet" else file
    assert any(named in problem for problem in verify_store(tmp_path / "store").problems)


def test_an_extension_that_is_missing_takes_no_later_one_with_it(seven, tmp_path, dcae):
    for limit in (2, 4, 7):
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, limit=limit, extend=limit > 2)
    (tmp_path / "store/plan-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"plan-00001\.parquet is missing, which plan-00002\.parquet extends: restore"):
        LatentStore(tmp_path / "store")


def test_extensions_that_are_made_at_once_part_the_new_inputs(seven, tmp_path, dcae, tree, monkeypatch):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    for number in range(3):
        shutil.copytree(seven[0], tmp_path / f"{number}")
        for new in range(number, number + 3):
            shutil.copy(seven[0] / "dogs/d.png", tmp_path / f"{number}/dogs/x{new}.png")
    barrier, own, real = threading.Barrier(3), threading.local(), planning.draft_plan

    def at_once(*args, **kwargs):
        plan = real(*args, **kwargs)
        if not hasattr(own, "drafted"):
            own.drafted = True
            barrier.wait(10)
        return plan

    def extend(number):
        try:
            return encode_dataset(tmp_path / f"{number}", tmp_path / "store", dcae, **OPTIONS, extend=True)
        except ResumableError:  # it may have met another one at a shard
            return encode_dataset(tmp_path / f"{number}", tmp_path / "store", dcae, **OPTIONS, extend=True)

    monkeypatch.setattr(planning, "draft_plan", at_once)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(extend, range(3)))
    store = LatentStore(tmp_path / "store")
    assert store.complete
    assert store.verify() == []
    assert len(store.keys) == len(set(store.keys)) == 12


def test_files_of_two_versions_never_get_a_marker(repaired, tmp_path, dcae, monkeypatch):
    """As of two machines that give other bytes, and that publish one shard at the same time."""
    planned = plan_store(open_request(Request(repaired, tmp_path / "store", dcae, size=32, shard_size=3)))
    (tmp_path / "store/shards/00000.json").unlink()
    workers = [
        job.ShardWorker(job_of(planned.opened, planned.plan, planned.fingerprint, batch_size=2)) for _ in range(2)
    ]
    real, others = shard._write, [lambda: list(workers[1].run([0], lambda *_: None))]

    def between(path, content):
        node = real(path, content)
        if path.suffix == ".safetensors" and others:
            (repaired / "cats/a.png").write_bytes(b"")  # so that the other has another version, of one length
            (repaired / "cats/aa.png").write_bytes((repaired / "cats/c.png").read_bytes())
            others.pop()()
        return node

    (repaired / "cats/aa.png").write_bytes(b"")
    monkeypatch.setattr(shard, "_write", between)
    with pytest.raises(ResumableError, match=r"Another process writes 00000 of .*: run the command again"):
        list(workers[0].run([0], lambda *_: None))
    assert LatentStore(tmp_path / "store").verify() == []
    encode_dataset(repaired, tmp_path / "store", dcae, **OPTIONS, max_bad=1)
    store = LatentStore(tmp_path / "store")
    assert (store.verify(), len(store.keys), "cats/a.png" in store.keys) == ([], 7, False)
