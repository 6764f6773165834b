"""Plans that are agreed on, extended and shared; crops, mirrored images and carried columns in stores."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from latentae.errors import RequestError, ResumableError
from latentae.store import planning
from latentae.store.batch_size import largest_worthwhile, last_batch_size
from latentae.store.encode import encode_dataset
from latentae.store.estimate import estimate
from latentae.store.planning import Request, open_request, plan_store
from latentae.store.reader import LatentStore
from latentae.store.verification import verify_store

OPTIONS = {"size": 32, "shard_size": 3, "batch_size": 2}


def markers(store):
    return {path.stem for path in (store / "shards").glob("*.json")}


def test_a_plan_by_itself_is_what_encode_would_make(seven, tmp_path, dcae, tree):
    planned = plan_store(open_request(Request(seven[0], tmp_path / "store", dcae, size=32, shard_size=3)))
    assert (planned.plan.inputs, len(planned.plan.shards)) == (7, 3)
    assert markers(tmp_path / "store") == set()
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    encode_dataset(seven[0], tmp_path / "whole", dcae, **OPTIONS)
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_several_that_begin_at_once_agree_on_one_plan(seven, tmp_path, dcae, monkeypatch):
    others = tmp_path / "others"
    shutil.copytree(seven[0], others)
    (others / "dogs/d.png").unlink()  # one of them sees another set of inputs
    barrier, real = threading.Barrier(4), planning.draft_plan

    def at_once(*args, **kwargs):
        plan = real(*args, **kwargs)
        barrier.wait(10)
        return plan

    monkeypatch.setattr(planning, "draft_plan", at_once)

    def start(source):
        try:
            return plan_store(open_request(Request(source, tmp_path / "store", dcae, size=32, shard_size=3)))
        except RequestError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(start, [seven[0], others, seven[0], others]))
    agreed = [result for result in results if not isinstance(result, RequestError)]
    refused = [str(result) for result in results if isinstance(result, RequestError)]
    assert len(agreed) == len(refused) == 2
    assert len({result.plan.fingerprint for result in agreed}) == 1
    assert all("was planned for other inputs" in sentence for sentence in refused)
    assert json.loads((tmp_path / "store/store.json").read_text())["plan"]["fingerprint"] == agreed[0].plan.fingerprint


def test_jobs_of_a_scheduler_share_the_shards_and_list_the_inputs_once(seven, tmp_path, dcae, tree, monkeypatch):
    encode_dataset(seven[0], tmp_path / "whole", dcae, **OPTIONS)
    (seven[0] / "cats/later.png").write_bytes((seven[0] / "cats/a.png").read_bytes())
    (seven[0] / "cats/later.png").unlink()
    first = encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, shard_index=1, shard_count=2)
    assert markers(tmp_path / "store") == {"00001"}
    assert (first.encoded, first.shards_left, first.encoded_now) == (3, 2, 3)
    assert not (tmp_path / "store/quarantine.parquet").exists()

    def never(*args, **kwargs):
        raise AssertionError("the inputs were listed again")

    monkeypatch.setattr(planning, "open_inputs", never)
    second = encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, shard_index=0, shard_count=2)
    assert (second.encoded, second.shards_left, second.encoded_now) == (7, 0, 4)
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    again = encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, as_planned=True)
    assert again.encoded_now == 0


def test_new_inputs_become_new_shards(seven, tmp_path, dcae, tree, write_images):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    before = tree(tmp_path / "store" / "shards")
    write_images(seven[0], {"ants/a.png": (32, 32), "cats/b2.png": (32, 32)})  # keys between the others
    shutil.copy(seven[0] / "cats/a.png", seven[0] / "zebras.png")
    with pytest.raises(RequestError, match=r"(?s)3 inputs not in the plan: ants/a.png.*with another label.*Restore"):
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    with pytest.raises(RequestError, match="7 inputs with another label"):  # classes are numbered by their folders
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, extend=True)
    shutil.rmtree(seven[0] / "ants")
    with pytest.raises(RequestError, match=r"add the new ones with --extend"):
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    summary = encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, extend=True)
    assert (summary.inputs, summary.encoded, summary.encoded_now, summary.shards) == (9, 9, 2, 4)
    after = tree(tmp_path / "store" / "shards")
    assert before.items() <= after.items()  # no byte of what was there has changed
    assert LatentStore(tmp_path / "store").keys[-2:] == ["cats/b2.png", "zebras.png"]
    for extend in (True, False):
        assert encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, extend=extend).encoded_now == 0


def test_a_store_grows_by_inputs_from_elsewhere(seven, tmp_path, dcae, write_images):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, limit=5)
    (tmp_path / "store/shards/00001.json").unlink()  # to be done from where they were planned
    write_images(tmp_path / "more", {"x.png": (32, 32)})
    summary = encode_dataset(tmp_path / "more", tmp_path / "store", dcae, **OPTIONS, extend=True)
    assert (summary.encoded, summary.encoded_now, summary.bad) == (6, 3, 0)
    assert encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, extend=True).encoded == 8  # limit or no limit


def test_an_extension_that_is_cut_short_is_finished(seven, tmp_path, dcae, write_images, tree):
    for store in ("one", "two"):
        encode_dataset(seven[0], tmp_path / store, dcae, **OPTIONS)
    write_images(seven[0], {"dogs/e.png": (32, 32)})
    encode_dataset(seven[0], tmp_path / "one", dcae, **OPTIONS, extend=True)
    plan_store(open_request(Request(seven[0], tmp_path / "two", dcae, size=32, shard_size=3, extend=True)))
    assert len(markers(tmp_path / "two")) == 3
    encode_dataset(seven[0], tmp_path / "two", dcae, **OPTIONS)  # without --extend: it is planned now
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_mirrored_images_have_latents_of_their_own(seven, tmp_path, dcae, kl, reference_latents, read_raw):
    for kind, model in (("mode", dcae), ("moments", kl)):
        store = tmp_path / kind
        encode_dataset(seven[0], store, model, **OPTIONS, kind=kind, flip=True)
        raw = read_raw(store)
        tensor = "moments" if kind == "moments" else "latents"
        flipped = np.concatenate([tensors[f"{tensor}_flip"] for tensors in raw.tensors])
        mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in seven[1].values()]
        expected = reference_latents(model, mirrored)
        np.testing.assert_allclose(flipped[:, : expected.shape[1]], expected, atol=1e-5)
        reader = LatentStore(store)
        assert reader.holds_flips
        np.testing.assert_array_equal(reader[3][f"{tensor}_flip"], flipped[3])
        np.testing.assert_array_equal(reader.stored(3, flip=True), flipped[3])
    with pytest.raises(RequestError, match="flip: true in the store, false now"):
        encode_dataset(seven[0], tmp_path / "mode", dcae, **OPTIONS)
    encode_dataset(seven[0], tmp_path / "plain", dcae, **OPTIONS)
    with pytest.raises(RequestError, match="holds no latents of mirrored images: encode with --flip"):
        LatentStore(tmp_path / "plain").stored(0, flip=True)


def test_retrying_keeps_the_mirrored_latents_of_the_others(seven, tmp_path, dcae, read_raw):
    (seven[0] / "cats/b2.png").write_bytes(b"broken")
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, flip=True, max_bad=1)
    shutil.copy(seven[0] / "cats/a.png", seven[0] / "cats/b2.png")
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS, flip=True, retry_failed=True)
    encode_dataset(seven[0], tmp_path / "whole", dcae, **OPTIONS, flip=True)
    one, other = read_raw(tmp_path / "store"), read_raw(tmp_path / "whole")
    for a, b in zip(one.tensors, other.tensors, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_buckets_and_sizes_part_the_shards_by_shape(tmp_path, write_images, dcae, read_raw):
    sizes = {"wide.png": (40, 90), "tall.png": (200, 80), "square.png": (70, 70), "small.png": (20, 20)}
    write_images(tmp_path / "photos", sizes)
    encode_dataset(tmp_path / "photos", tmp_path / "store", dcae, size=[32, 64], crop="buckets", shard_size=3)
    store = LatentStore(tmp_path / "store")
    shapes = {store[i]["key"]: tuple(8 * side for side in store[i]["latents"].shape[1:]) for i in range(4)}
    assert shapes == {"wide.png": (40, 88), "tall.png": (96, 40), "square.png": (64, 64), "small.png": (32, 32)}
    assert read_raw(tmp_path / "store").json["preprocess"]["size"] == [32, 64]
    rows = {row["key"]: row for row in read_raw(tmp_path / "store").rows}
    assert rows["square.png"]["crop_height"] == 70
    assert rows["tall.png"]["crop_width"] == 80


def test_an_input_of_another_shape_than_planned_is_bad(tmp_path, write_images, dcae):
    write_images(tmp_path / "photos", {"a.png": (40, 80), "b.png": (40, 80)})
    plan_store(open_request(Request(tmp_path / "photos", tmp_path / "store", dcae, size=32, crop="buckets")))
    Image.new("RGB", (40, 80)).save(tmp_path / "photos/a.png")
    options = {"size": 32, "crop": "buckets", "max_bad": 1}
    summary = encode_dataset(tmp_path / "photos", tmp_path / "store", dcae, **options)
    assert summary.reasons == {"other-shape": 1}


def test_columns_of_a_manifest_stand_in_the_rows(seven, tmp_path, dcae, read_raw):
    lines = [
        {"path": key, "caption": f"a {key}", "score": i / 2, "tags": ["x", i], "height": 7}
        for i, key in enumerate(seven[1])
    ]
    manifest = seven[0] / "all.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode_dataset(manifest, tmp_path / "store", dcae, **OPTIONS)
    rows = read_raw(tmp_path / "store").rows
    assert [row["caption"] for row in rows] == [f"a {key}" for key in seven[1]]
    assert rows[3]["score"] == 1.5
    assert json.loads(rows[3]["tags"]) == ["x", 3]
    assert (rows[3]["height"], rows[3]["input_height"]) == (32, 7)
    entry = LatentStore(tmp_path / "store")[4]
    assert (entry["caption"], entry["score"]) == ("a dogs/b.png", 2.0)
    encode_dataset(manifest, tmp_path / "some", dcae, **OPTIONS, columns=["caption"])
    table = pyarrow.parquet.read_table(tmp_path / "some/plan.parquet")
    assert "caption" in table.column_names
    assert "score" not in table.column_names


def test_an_estimate_writes_nothing_and_counts_right(seven, tmp_path, kl):
    request = Request(seven[0], tmp_path / "store", kl, size=32, shard_size=3, kind="moments", flip=True)
    found = estimate(open_request(request), 2)
    assert not (tmp_path / "store").exists()
    assert (found.inputs, found.shards, found.batch_size) == (7, 3, 2)
    encode_dataset(seven[0], tmp_path / "store", kl, **OPTIONS, kind="moments", flip=True)
    written = sum(path.stat().st_size for path in (tmp_path / "store/shards").glob("*.safetensors"))
    assert found.bytes == pytest.approx(written, rel=0.5)
    assert found.seconds > 0
    assert estimate(open_request(Request(tmp_path / "seven", tmp_path / "new", kl, size=32, limit=2))).inputs == 2


def test_inputs_that_were_replaced_are_found_by_their_hash(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    assert verify_store(tmp_path / "store", inputs=True).problems == []
    image = seven[0] / "dogs/b.png"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1  # of the same length
    image.write_bytes(content)
    (seven[0] / "dogs/c.png").unlink()
    found = verify_store(tmp_path / "store", inputs=True)
    assert (found.shards, found.inputs, len(found.problems)) == (3, 7, 2)
    assert "dogs/b.png has changed since it was encoded" in found.problems[0]
    assert "dogs/c.png cannot be read any more" in found.problems[1]
    assert verify_store(tmp_path / "store").problems == []


@pytest.mark.parametrize(
    ("seconds_of", "share", "expected"),
    [
        (lambda size: 1.0 + 0 * size, lambda: 0.1, 512),  # as long for any number
        (lambda size: size / 100, lambda: 0.1, 4),  # no faster in company
        (lambda size: max(1.0, size / 32), lambda: 0.1, 32),
        (lambda size: 1.0, lambda: 0.6, 4),  # twice as much does not fit
    ],
)
def test_a_batch_grows_as_long_as_it_pays(seconds_of, share, expected):
    now = 0.0

    def encode(size):
        nonlocal now
        now += seconds_of(size)

    assert largest_worthwhile(encode, share, lambda: now) == expected


def test_a_batch_that_does_not_fit_is_not_chosen():
    def encode(size):
        if size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    ticks = iter(range(100))
    assert largest_worthwhile(encode, lambda: 0.1, lambda: float(next(ticks))) == 16
    with pytest.raises(RuntimeError, match="broken"):
        largest_worthwhile(lambda size: (_ for _ in ()).throw(RuntimeError("broken")), lambda: 0.1)


def test_a_resumed_run_takes_the_batch_size_that_it_found(seven, tmp_path, dcae, tree):
    encode_dataset(seven[0], tmp_path / "whole", dcae, **OPTIONS)
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    (tmp_path / "store/shards/00001.json").unlink()
    encode_dataset(seven[0], tmp_path / "store", dcae, **{**OPTIONS, "batch_size": None})
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    assert last_batch_size([{"batch_size": 4}, {"batch_size": None}, {"batch_size": 4}, {"batch_size": 2}]) == 4
    assert last_batch_size([]) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shard_index": 2, "shard_count": 2}, "shard_index=2; expected 0 to 1"),
        ({"engine": "slurm"}, "engine='slurm'; expected one of local, ray"),
        ({"ray_address": "auto"}, "ray_address='auto' is of no use with engine='local'"),
        ({"engine": "ray", "device": "cpu"}, "Ray chooses the devices"),
        ({"device": ["cpu", "abacus"]}, "'abacus' is not a device"),
        ({"crop": "zoom"}, "crop='zoom'; expected one of adm"),
        ({"size": [32, 36]}, "size=36 is not a multiple of 8"),
        ({"processes": 0}, "processes=0; expected at least 1"),
    ],
)
def test_what_cannot_be_planned_is_said_and_nothing_is_written(options, sentence, seven, tmp_path, dcae):
    with pytest.raises(RequestError, match=sentence):
        encode_dataset(seven[0], tmp_path / "store", dcae, **{"size": 32, **options})
    assert not (tmp_path / "store").exists()


def test_a_shard_that_another_process_undid_is_noticed(seven, tmp_path, dcae, monkeypatch):
    from latentae.store import encode as module

    real = module._finish

    def undone(planned, *args):
        (planned.opened.store / "shards/00001.json").unlink()
        return real(planned, *args)

    monkeypatch.setattr(module, "_finish", undone)
    with pytest.raises(ResumableError, match=r"Shard 00001 of .* was changed by another process"):
        encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)


def test_a_label_stands_for_one_class_in_all_of_a_store(seven, tmp_path, dcae, write_images):
    encode_dataset(seven[0], tmp_path / "store", dcae, **OPTIONS)
    assert LatentStore(tmp_path / "store").classes == {"cats": 0, "dogs": 1}
    write_images(tmp_path / "more", {"horses/a.png": (32, 32)})
    with pytest.raises(RequestError, match=r"class 'horses' has label 0, which is that of 'cats' in the plan"):
        encode_dataset(tmp_path / "more", tmp_path / "store", dcae, **OPTIONS, extend=True)
    (tmp_path / "more/cats").mkdir()
    with pytest.raises(RequestError, match=r"class 'horses' has label 1, which is that of 'dogs' in the plan"):
        encode_dataset(tmp_path / "more", tmp_path / "store", dcae, **OPTIONS, extend=True)
    (tmp_path / "more/dogs").mkdir()
    encode_dataset(tmp_path / "more", tmp_path / "store", dcae, **OPTIONS, extend=True)
    store = LatentStore(tmp_path / "store")
    assert store.classes == {"cats": 0, "dogs": 1, "horses": 2}
    assert store.labels == [0, 0, 0, 1, 1, 1, 1, 2]


def test_texts_as_labels_are_held_to_their_numbers_too(seven, tmp_path, dcae):
    for name, keys in (("first", ["dogs/a.png", "dogs/b.png"]), ("then", ["cats/a.png"])):
        lines = [json.dumps({"path": key, "label": key[:4]}) + "\n" for key in keys]
        (seven[0] / f"{name}.jsonl").write_text("".join(lines))
    encode_dataset(seven[0] / "first.jsonl", tmp_path / "store", dcae, **OPTIONS)
    with pytest.raises(RequestError, match="class 'cats' has label 0, which is that of 'dogs' in the plan"):
        encode_dataset(seven[0] / "then.jsonl", tmp_path / "store", dcae, **OPTIONS, extend=True)
