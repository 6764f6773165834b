import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentae.errors import RequestError
from latentae.store.draws import draw
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore
from latentae.store.streaming import ShardShuffle, StreamedLatents
from latentae.store.worker import key_generator

COUNT = 53


@pytest.fixture(scope="module")
def path(tmp_path_factory, kl):
    """53 entries in 11 shards of moments, in two classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        image = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        where = folder / ("cats" if i < 20 else "dogs") / f"{i:02d}.png"
        where.parent.mkdir(exist_ok=True)
        Image.fromarray(image).resize((16, 16)).save(where)
    store = tmp_path_factory.mktemp("stores") / "store"
    encode_dataset(folder, store, kl, size=16, shard_size=5, kind="moments", flip=True)
    return store


@pytest.fixture(scope="module")
def kl():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.25,
        shift_factor=0.125,
    ).eval()


@pytest.fixture
def store(path):
    return LatentStore(path)


def keys_of(loader):
    return [key for batch in loader for key in batch["key"]]


def test_every_entry_once_and_a_new_order_in_every_epoch(store):
    sampler = ShardShuffle(store, seed=3, shards_at_once=4)
    assert len(sampler) == COUNT
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(COUNT))
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]
    assert list(ShardShuffle(store, seed=4, shards_at_once=4)) != orders[0]


def test_a_window_reads_so_many_shards_and_no_more(store):
    order = list(ShardShuffle(store, seed=1, shards_at_once=3))
    shards = [index // 5 for index in order]
    met = list(dict.fromkeys(shards))
    assert met != sorted(met)  # shards come in random order
    begin = 0
    for first in range(0, 11, 3):
        window = met[first : first + 3]
        end = begin + sum(3 if shard == 10 else 5 for shard in window)  # the last shard is a short one
        assert set(shards[begin:end]) == set(window)
        begin = end
    assert shards[:15] != sorted(shards[:15], key=met.index)  # and are shuffled together
    whole = list(ShardShuffle(store, seed=1, shards_at_once=100))
    assert len({index // 5 for index in whole[:15]}) > 3


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_an_epoch_and_leave_out_the_remainder(store, world_size):
    parts = [list(ShardShuffle(store, seed=5, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {COUNT // world_size}
    taken = [index for part in parts for index in part]
    assert len(set(taken)) == len(taken) == COUNT - COUNT % world_size
    assert taken == list(ShardShuffle(store, seed=5))[: len(taken)]


def test_a_sampler_goes_on_where_it_stopped(store):
    sampler = ShardShuffle(store, seed=2, shards_at_once=2)
    sampler.set_epoch(7)
    whole = list(sampler)
    for stop in (0, 1, 17, COUNT):
        iterator = iter(sampler)
        before = [next(iterator) for _ in range(stop)]
        state = sampler.state_dict() if stop else {**sampler.state_dict(), "position": 0}
        other = ShardShuffle(store, seed=2, shards_at_once=2)
        other.load_state_dict(pickle.loads(pickle.dumps(state)))
        other.set_epoch(7)  # as a trainer does after it has loaded
        assert before + list(other) == whole
        assert list(other) == whole  # the next time from the beginning
    other.set_epoch(8)
    assert list(other) != whole


def test_a_state_of_something_else_is_refused(store):
    state = ShardShuffle(store, seed=2).state_dict()
    with pytest.raises(RequestError, match="The state was saved with seed=2 and this has seed=3"):
        ShardShuffle(store, seed=3).load_state_dict(state)
    with pytest.raises(RequestError, match="saved with world_size=1 and this has world_size=2"):
        ShardShuffle(store, seed=2, world_size=2).load_state_dict(state)
    with pytest.raises(RequestError, match="saved with shuffle=True and this has shuffle=False"):
        StreamedLatents(store, shuffle=False).load_state_dict(StreamedLatents(store).state_dict())
    with pytest.raises(RequestError, match="rank=2 of world_size=2; expected 0 to 1"):
        ShardShuffle(store, rank=2, world_size=2)
    with pytest.raises(RequestError, match="too few for 60 ranks"):
        ShardShuffle(store, world_size=60)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", ["sampler", "stream"])
def test_a_stateful_loader_goes_on_in_the_middle_of_an_epoch(store, workers, make):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        options = {"batch_size": 4, "num_workers": workers}
        if make == "stream":
            data = StreamedLatents(store, seed=1, shards_at_once=3, moments="sample", normalise="model")
            return data, stateful.StatefulDataLoader(data, **options)
        sampler = ShardShuffle(store, seed=1, shards_at_once=3)
        return sampler, stateful.StatefulDataLoader(store, sampler=sampler, **options)

    ordered, whole = loader()
    ordered.set_epoch(2)
    expected = list(whole)
    assert sorted(key for batch in expected for key in batch["key"]) == store.keys
    for stop in (1, 6, len(expected) - 1, len(expected)):
        ordered, first = loader()
        ordered.set_epoch(2)
        iterator = iter(first)
        read = [next(iterator) for _ in range(stop)]
        state = pickle.dumps(first.state_dict())
        del iterator, first  # killed
        ordered, second = loader()
        second.load_state_dict(pickle.loads(state))
        read += list(second)
        ordered.set_epoch(3)
        following = [key for batch in second for key in batch["key"]]
        assert sorted(following) == store.keys
        assert following != [key for batch in expected for key in batch["key"]]
        assert [batch["key"] for batch in read] == [batch["key"] for batch in expected]
        assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(read, expected))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_gives_each_entry_once_over_workers_and_ranks(store, workers, world_size):
    keys = []
    for rank in range(world_size):
        data = StreamedLatents(store, rank=rank, world_size=world_size)
        assert len(data) == COUNT // world_size
        keys += keys_of(DataLoader(data, batch_size=4, num_workers=workers))
    assert len(keys) == len(set(keys)) == COUNT - COUNT % world_size
    indices = list(ShardShuffle(store))[: len(keys)]
    assert sorted(keys) == sorted(store.keys[i] for i in indices)


def test_a_stream_without_workers_has_the_order_of_the_sampler(store):
    data = StreamedLatents(store, seed=9, shards_at_once=2)
    sampler = ShardShuffle(store, seed=9, shards_at_once=2)
    for epoch in (0, 4):
        data.set_epoch(epoch)
        sampler.set_epoch(epoch)
        assert [sample["key"] for sample in data] == [store.keys[index] for index in sampler]
    assert [sample["key"] for sample in StreamedLatents(store, shuffle=False)] == store.keys
    second = StreamedLatents(store, shuffle=False, rank=1, world_size=2)
    assert [sample["key"] for sample in second] == store.keys[26:52]


@pytest.mark.parametrize("persistent", [False, True])
def test_set_epoch_reaches_workers(store, persistent):
    data = StreamedLatents(store)
    loader = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=persistent)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append(keys_of(loader))
    assert orders[0] == orders[2] != orders[1]


def test_latents_are_the_stores(store):
    raw = {item["key"]: item for item in store}
    samples = list(StreamedLatents(store, columns=["height"], moments="mode"))
    assert {name for sample in samples for name in sample} == {"key", "label", "latents", "height"}
    for sample in samples:
        item = raw[sample["key"]]
        assert torch.equal(sample["latents"], item["moments"][:4])
        assert (sample["label"], sample["height"]) == (item["label"], 16)
    modes = StreamedLatents(store, normalise="data", moments="mode")
    by_data = torch.stack([sample["latents"] for sample in modes])
    torch.testing.assert_close(by_data.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_data.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    draws = torch.stack([sample["latents"] for sample in StreamedLatents(store, normalise="data")])
    torch.testing.assert_close(draws.std((0, 2, 3), correction=0), torch.ones(4), atol=0.05, rtol=0)
    for sample in StreamedLatents(store, normalise="model", moments="mode"):
        expected = (raw[sample["key"]]["moments"][:4] - 0.125) * 0.25
        torch.testing.assert_close(sample["latents"], expected)


def test_draws_are_functions_of_seed_epoch_and_key(store):
    def draws(seed, epoch, workers=0):
        data = StreamedLatents(store, seed=seed)  # draws are the default
        data.set_epoch(epoch)
        batches = DataLoader(data, batch_size=4, num_workers=workers)
        return {key: z for batch in batches for key, z in zip(batch["key"], batch["latents"])}

    first = draws(1, 3)
    for key, latents in draws(1, 3, workers=2).items():
        assert torch.equal(latents, first[key])
    assert not any(torch.equal(latents, first[key]) for key, latents in draws(1, 4).items())
    assert not any(torch.equal(latents, first[key]) for key, latents in draws(2, 3).items())
    moments = {item["key"]: item["moments"] for item in store}
    noise = torch.stack([(z - moments[key][:4]) / (moments[key][4:] / 2).exp() for key, z in first.items()])
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_half_of_the_samples_are_of_mirrored_images(store):
    raw = {item["key"]: item for item in store}

    def flipped(epoch):
        data = StreamedLatents(store, flip=True, moments="mode")
        data.set_epoch(epoch)
        chosen = set()
        for sample in data:
            straight, mirrored = (raw[sample["key"]][name][:4] for name in ("moments", "moments_flip"))
            assert not torch.equal(straight, mirrored)
            assert torch.equal(sample["latents"], straight) or torch.equal(sample["latents"], mirrored)
            if torch.equal(sample["latents"], mirrored):
                chosen.add(sample["key"])
        return chosen

    epochs = [flipped(epoch) for epoch in range(4)]
    assert 0.35 < sum(map(len, epochs)) / (4 * COUNT) < 0.65
    assert epochs[0] != epochs[1]
    assert epochs[0] == flipped(0)
    sample = next(iter(StreamedLatents(store, flip=True, moments="sample", shuffle=False)))
    generator = key_generator(0, sample["key"], "epoch 0")
    name = "moments_flip" if torch.rand((), generator=generator) < 0.5 else "moments"
    assert torch.equal(sample["latents"], draw(store[0][name], generator))


def test_what_a_store_cannot_serve_is_said(store, tmp_path, seven, dcae):
    with pytest.raises(RequestError, match="has no column 'caption'; it has key, label"):
        StreamedLatents(store, columns=["caption"])
    with pytest.raises(RequestError, match="normalise='luck'; expected"):
        StreamedLatents(store, normalise="luck")
    with pytest.raises(RequestError, match="moments='mean'; expected"):
        StreamedLatents(store, moments="mean")
    encode_dataset(seven[0], tmp_path / "mode", dcae, size=32)
    with pytest.raises(RequestError, match="holds no moments to draw from: encode again with --kind moments"):
        StreamedLatents(LatentStore(tmp_path / "mode"), moments="sample")
    with pytest.raises(RequestError, match="holds no latents of mirrored images: encode again with --flip"):
        StreamedLatents(LatentStore(tmp_path / "mode"), flip=True)
