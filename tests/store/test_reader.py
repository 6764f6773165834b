import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import latentae
from latentae.codec import LatentCodec
from latentae.errors import DataError, RequestError
from latentae.store import reader
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore


@pytest.fixture
def store(seven, tmp_path, dcae):
    (seven[0] / "cats/broken.png").write_bytes(b"")
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32, shard_size=3, max_bad=1)
    return tmp_path / "store"


def test_every_encoded_input_once_in_order(store, seven, dcae, reference_latents):
    latents = latentae.LatentStore(store)
    assert len(latents) == 7
    assert latents.complete
    assert latents.keys == [latents[i]["key"] for i in range(7)] == sorted(seven[1])
    assert [latents[i]["label"] for i in range(7)] == latents.labels == [0, 0, 0, 1, 1, 1, 1]
    assert (latents[2]["height"], latents[2]["width"]) == (32, 32)
    expected = reference_latents(dcae, seven[1].values())
    np.testing.assert_allclose(torch.stack([latents[i]["latents"] for i in range(7)]), expected, rtol=0, atol=1e-5)
    assert latents[-1]["key"] == latents[6]["key"]
    for index in (7, -8):
        with pytest.raises(IndexError):
            latents[index]
    assert [item["key"] for item in latents] == latents.keys  # the end is found by IndexError


def test_whole_shards_hold_the_same_as_single_reads(store):
    latents = LatentStore(store)
    rows, tensors = zip(*latents.shards())
    assert [row["key"] for shard in rows for row in shard] == latents.keys
    assert torch.equal(torch.cat(tensors), torch.stack([latents[i]["latents"] for i in range(7)]))
    assert torch.equal(torch.cat(tensors), torch.stack([latents.stored(i) for i in range(7)]))


def test_it_feeds_a_data_loader_with_workers(store):
    latents = LatentStore(store)
    latents[0]  # an open file must not hinder the trip to a worker
    loader = DataLoader(latents, batch_size=4, num_workers=2)
    batches = list(loader)
    assert [key for batch in batches for key in batch["key"]] == latents.keys
    assert batches[0]["latents"].shape == (4, 8, 4, 4)
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert pickle.loads(pickle.dumps(latents))[3]["key"] == latents.keys[3]


def test_only_so_many_files_stay_open(store, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    latents = LatentStore(store)
    keys = [latents[i]["key"] for i in (0, 6, 3, 1, 5, 2, 4)]
    assert sorted(keys) == latents.keys
    assert len(latents._open) == 2


def test_a_file_is_opened_once_however_often_it_is_read(store, monkeypatch):
    opened = []
    real = reader.safetensors.safe_open
    monkeypatch.setattr(reader.safetensors, "safe_open", lambda path, **kw: (opened.append(path), real(path, **kw))[1])
    latents = LatentStore(store)
    for _ in range(3):
        for i in range(7):
            latents[i]
    assert len(opened) == 3


def test_it_reads_what_is_there_while_the_store_grows(store, seven, dcae):
    (store / "shards/00001.json").unlink()
    (store / "quarantine.parquet").unlink()
    growing = LatentStore(store)
    assert not growing.complete
    assert growing.keys == ["cats/a.png", "cats/b.png", "dogs/c.png", "dogs/d.png"]
    assert growing[2]["key"] == "dogs/c.png"
    encode_dataset(seven[0], store, dcae, size=32, shard_size=3, max_bad=1)
    assert len(LatentStore(store)) == 7


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_statistics_are_numpys_over_all_latents(dtype, seven, tmp_path, kl):
    encode_dataset(seven[0], tmp_path / "store", kl, size=32, shard_size=2, dtype=dtype)
    store = LatentStore(tmp_path / "store")
    values = torch.stack([item["latents"] for item in store]).double().numpy()
    statistics = store.statistics()
    assert statistics.images == 7
    np.testing.assert_allclose(statistics.mean, values.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(statistics.std, values.std((0, 2, 3)), rtol=1e-8)
    assert statistics.sample_std is None


def test_statistics_of_moments_cover_draws_too(seven, tmp_path, kl):
    encode_dataset(seven[0], tmp_path / "store", kl, size=32, shard_size=2, kind="moments")
    store = LatentStore(tmp_path / "store")
    moments = torch.stack([item["moments"] for item in store]).double().numpy()
    mean, variance = moments[:, :4], np.exp(moments[:, 4:])
    statistics = store.statistics()
    np.testing.assert_allclose(statistics.mean, mean.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(statistics.std, mean.std((0, 2, 3)), rtol=1e-8)
    draws = mean + np.sqrt(variance) * np.random.default_rng(0).standard_normal((400, *mean.shape))
    np.testing.assert_allclose(statistics.sample_std, draws.std((0, 1, 3, 4)), rtol=0.01)
    np.testing.assert_array_equal(store[3]["latents"], mean[3].astype(np.float32))


def test_statistics_of_native_sizes_weigh_every_position_alike(tmp_path, write_images, dcae):
    write_images(tmp_path / "mixed", {"a.png": (32, 64), "b.png": (8, 8), "c.png": (40, 24)})
    encode_dataset(tmp_path / "mixed", tmp_path / "store", dcae, size="native")
    store = LatentStore(tmp_path / "store")
    values = torch.cat([item["latents"].flatten(1) for item in store], dim=1).double().numpy()
    np.testing.assert_allclose(store.statistics().mean, values.mean(1), rtol=1e-10)
    np.testing.assert_allclose(store.statistics().std, values.std(1), rtol=1e-8)


def test_the_shape_is_that_of_every_entry(seven, store, tmp_path, write_images, kl, dcae):
    assert LatentStore(store).latent_shape == LatentStore(store)[0]["latents"].shape
    encode_dataset(seven[0], tmp_path / "moments", kl, size=32, kind="moments", max_bad=1)
    moments = LatentStore(tmp_path / "moments")
    assert moments.latent_shape == moments[0]["latents"].shape
    assert torch.equal(moments.stored(3), moments[3]["moments"])
    write_images(tmp_path / "two", {"a.png": (32, 32), "b.png": (64, 32)})
    encode_dataset(tmp_path / "two", tmp_path / "native", dcae, size="native")
    with pytest.raises(RequestError, match=r"holds latents of 2 shapes \(8 x 4 x 4, 8 x 8 x 4\): encode with --size"):
        LatentStore(tmp_path / "native").latent_shape  # noqa: B018


def test_normalising_is_the_codecs_or_the_datas(seven, tmp_path, kl):
    encode_dataset(seven[0], tmp_path / "store", kl, size=32)
    store = LatentStore(tmp_path / "store")
    raw = torch.stack([item["latents"] for item in store])
    assert torch.equal(store.normalise(raw), LatentCodec(kl).normalise(raw))
    assert torch.equal(store.normalise(raw[0]), store.normalise(raw)[0])
    standard = store.normalise(raw, by="data")
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-5, rtol=0)
    with pytest.raises(RequestError, match="by='luck'; expected 'model' or 'data'"):
        store.normalise(raw, by="luck")


def test_normalising_by_channel_statistics_of_the_model(seven, tmp_path, kl):
    kl.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 4.0])
    try:
        encode_dataset(seven[0], tmp_path / "store", kl, size=32)
        store = LatentStore(tmp_path / "store")
        raw = torch.stack([item["latents"] for item in store])
        assert torch.equal(store.normalise(raw), LatentCodec(kl).normalise(raw))
        assert torch.equal(store.normalise(raw[2]), LatentCodec(kl).normalise(raw)[2])
    finally:
        kl.register_to_config(latents_mean=None, latents_std=None)


def test_one_flipped_bit_is_found(store):
    assert LatentStore(store).verify() == []
    for name in ("00001.safetensors", "00002.parquet"):
        path = store / "shards" / name
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
    problems = LatentStore(store).verify()
    assert len(problems) == 2
    assert "00001.safetensors is not what was written: delete" in problems[0]
    assert "shards/00001.json" in problems[0]
    assert "00002.parquet" in problems[1]


def test_a_cut_and_a_missing_file_are_found(store):
    path = store / "shards/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (store / "shards/00001.parquet").unlink()
    assert len(LatentStore(store)) == 2  # damaged shards are not read
    problems = LatentStore(store).verify()
    assert ["is not what was written" in problems[0], "is missing" in problems[1]] == [True, True]


def test_a_shard_cut_behind_the_readers_back_names_its_file(store):
    latents = LatentStore(store)
    path = store / "shards/00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00001\.safetensors cannot be read"):
        latents[4]


def test_what_is_no_store_is_said_so(tmp_path):
    with pytest.raises(RequestError, match=r"is not a store of latents: it has no store\.json"):
        LatentStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(RequestError, match="is not the description of a store"):
        LatentStore(tmp_path)


def test_an_empty_store_has_no_statistics(tmp_path, dcae):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"")
    encode_dataset(tmp_path / "bad", tmp_path / "store", dcae, size=32, max_bad=1)
    store = LatentStore(tmp_path / "store")
    assert len(store) == 0
    with pytest.raises(RequestError, match="no encoded inputs yet"):
        store.statistics()


def test_a_description_tells_how_far_the_store_has_got(store):
    (store / "shards/00002.json").unlink()
    facts = LatentStore(store).describe()
    assert (facts["complete"], facts["shards"], facts["shards_done"]) == (False, 3, 2)
    assert (facts["inputs"], facts["encoded"], facts["bad"]) == (8, 5, 1)
    assert facts["latent_shapes"] == [(8, 4, 4)]
    assert facts["bytes"] == sum((store / f"shards/0000{i}.safetensors").stat().st_size for i in (0, 1))
    assert len(json.dumps(facts)) > 100
