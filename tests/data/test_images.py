"""The training data set: samples as a pure function of their position, broken images, memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from latentae.data import images
from latentae.data.decode import decode_image
from latentae.data.images import ImageDataset, epoch_order
from latentae.data.samples import dead_leaves
from latentae.data.sources import FolderSource
from latentae.data.transforms import adm_center_crop, random_resized_crop_flip
from latentae.errors import DataError, RequestError

SIZE = 24


def make(folder, count, broken=()):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + i % 5, 30 + i % 7)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
    return FolderSource(folder)


def assert_same(one, other):
    assert torch.equal(one["pixels"], other["pixels"])
    assert (one["index"], one["key"], one["label"]) == (other["index"], other["key"], other["label"])


def test_a_sample_is_what_its_definition_says(tmp_path):
    source = make(tmp_path, 7)
    dataset = ImageDataset(source, size=SIZE, seed=5)
    for position in (0, 3, 6, 7, 40, 7 * 1000 + 2):
        epoch, place = position // 7, position % 7
        index = np.random.default_rng((5, epoch)).permutation(7)[place]
        item = source.items()[index]
        rng = np.random.default_rng((5, epoch, index))
        rng.random()  # decides between this image and dead leaves
        expected = random_resized_crop_flip(decode_image(source.read(item)), SIZE, rng)
        sample = dataset[position]
        np.testing.assert_array_equal(sample["pixels"].permute(1, 2, 0).numpy(), expected)
        assert (sample["index"], sample["key"], sample["label"]) == (index, item.key, item.label)
        assert sample["pixels"].dtype == torch.uint8


def test_a_sample_depends_on_nothing_else(tmp_path):
    source = make(tmp_path, 6)
    expected = [ImageDataset(source, size=SIZE, seed=1, dead_leaves=0.3)[p] for p in range(20)]
    backwards = ImageDataset(source, size=SIZE, seed=1, dead_leaves=0.3, cache_bytes=0)
    for position in reversed(range(20)):
        np.random.seed(position)  # noqa: NPY002
        torch.manual_seed(position)
        assert_same(backwards[position], expected[position])


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_batches(tmp_path, workers):
    dataset = ImageDataset(make(tmp_path, 6), size=SIZE, seed=1)
    loader = DataLoader(dataset, batch_size=4, sampler=range(3, 15), num_workers=workers)
    position = 3
    for batch in loader:
        assert batch["pixels"].shape == (4, 3, SIZE, SIZE)
        for i in range(4):
            sample = dataset[position]
            assert torch.equal(batch["pixels"][i], sample["pixels"])
            assert (int(batch["index"][i]), batch["key"][i]) == (sample["index"], sample["key"])
            position += 1
    assert position == 15


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(tmp_path):
    dataset = ImageDataset(make(tmp_path, 9), size=SIZE, seed=0)
    epochs = [[dataset[9 * epoch + place]["index"] for place in range(9)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == epoch_order(9, 0, 1).tolist()
    assert not np.array_equal(epoch_order(1000, 0, 1), epoch_order(1000, 1, 0))


def test_evaluation_is_the_centre_crop_in_key_order(tmp_path):
    source = make(tmp_path, 5)
    dataset = ImageDataset(source, size=SIZE, seed=9, augment=False, dead_leaves=0.9)
    samples = list(dataset)
    assert [sample["key"] for sample in samples] == [item.key for item in source.items()]
    for sample, item in zip(samples, source.items()):
        expected = adm_center_crop(decode_image(source.read(item)), SIZE)
        np.testing.assert_array_equal(sample["pixels"].permute(1, 2, 0).numpy(), expected)
    assert_same(dataset[7], samples[2])


def test_images_without_a_class_have_label_minus_one_and_collate(tmp_path, photo_folder):
    dataset = ImageDataset(FolderSource(photo_folder), size=SIZE)
    labels = {sample["key"]: sample["label"] for sample in dataset}
    assert labels["a.png"] == -1
    assert labels["sub/c.webp"] == 0
    assert next(iter(DataLoader(dataset, batch_size=6)))["label"].tolist().count(-1) == 4


# generated pictures


def test_share_of_dead_leaves(tmp_path):
    dataset = ImageDataset(make(tmp_path, 4), size=16, seed=2, dead_leaves=0.25)
    samples = [dataset[position] for position in range(400)]
    generated = [p for p, sample in enumerate(samples) if sample["key"].startswith("dead-leaves/")]
    assert 70 < len(generated) < 130
    for position in generated[:5]:
        expected = dead_leaves(position, 16, seed=2)
        np.testing.assert_array_equal(samples[position]["pixels"].permute(1, 2, 0).numpy(), expected)
        assert samples[position]["label"] == -1


def test_only_dead_leaves_reads_nothing(tmp_path, monkeypatch):
    dataset = ImageDataset(make(tmp_path, 3), size=16, dead_leaves=1.0)
    monkeypatch.setattr(images, "decode_image", None)
    assert len({dataset[position]["pixels"].numpy().tobytes() for position in range(9)}) == 9


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_dead_leaves_is_a_share(tmp_path, share):
    with pytest.raises(RequestError, match="from 0 to 1"):
        ImageDataset(make(tmp_path, 1), size=16, dead_leaves=share)


# broken images


def test_a_broken_image_is_replaced_by_the_next_good_one_and_named_once(tmp_path, capsys):
    source = make(tmp_path, 6, broken=[4])
    dataset = ImageDataset(source, size=SIZE, seed=3)
    bad = next(i for i, item in enumerate(source.items()) if item.key == "class0/004.png")
    order = epoch_order(6, 3, 0).tolist()
    samples = [dataset[position] for position in range(6)]
    assert [sample["index"] for sample in samples] == [(bad + 1) % 6 if i == bad else i for i in order]
    assert dataset.bad == {bad: "truncated"}
    for position in range(6, 18):
        dataset[position]
    message = capsys.readouterr().err
    assert message.count("class0/004.png: truncated: the PNG file ends before its picture does.") == 1

    alone = ImageDataset(source, size=SIZE, seed=3)  # a worker that meets the broken image first
    assert_same(alone[order.index(bad)], samples[order.index(bad)])


def test_the_last_image_is_replaced_by_the_first(tmp_path):
    dataset = ImageDataset(make(tmp_path, 2, broken=[1]), size=SIZE, augment=False)
    assert dataset[1]["index"] == 0


def test_too_many_broken_images(tmp_path):
    dataset = ImageDataset(make(tmp_path, 20, broken=[3, 8]), size=SIZE)
    with pytest.raises(DataError, match=r"2 of 20 images cannot be decoded, .* share of 0\.01") as caught:
        list(dataset)
    assert caught.value.exit_code == 3


def test_max_bad_is_the_share_that_is_let_pass(tmp_path):
    dataset = ImageDataset(make(tmp_path, 20, broken=[3, 8]), size=SIZE, max_bad=0.1)
    assert len(list(dataset)) == 20
    assert len(dataset.bad) == 2


def test_a_single_broken_image_is_an_error_and_no_endless_search(tmp_path):
    with pytest.raises(DataError, match="1 of 1 images"):
        ImageDataset(make(tmp_path, 1, broken=[0]), size=SIZE)[0]


def test_a_data_error_reaches_the_user_from_a_worker(tmp_path):
    dataset = ImageDataset(make(tmp_path, 6, broken=range(6)), size=SIZE)
    with pytest.raises(DataError, match="cannot be decoded"):
        list(DataLoader(dataset, sampler=[0], num_workers=1))


def test_an_empty_source_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no images"):
        ImageDataset(FolderSource(tmp_path), size=SIZE)


# memory


def count_decodes(dataset, monkeypatch, positions):
    seen = []
    decode = images.decode_image

    def counting(data, policy):
        seen.append(1)
        return decode(data, policy)

    monkeypatch.setattr(images, "decode_image", counting)
    for position in positions:
        dataset[position]
    return len(seen)


def test_small_data_sets_are_decoded_once(tmp_path, monkeypatch):
    dataset = ImageDataset(make(tmp_path, 5), size=SIZE)
    assert count_decodes(dataset, monkeypatch, range(20)) == 5


def test_the_cache_stops_at_its_limit(tmp_path, monkeypatch):
    largest = 44 * 36 * 3
    dataset = ImageDataset(make(tmp_path, 8), size=SIZE, cache_bytes=3 * largest)
    decodes = count_decodes(dataset, monkeypatch, range(16))
    held = sum(image.nbytes for image in dataset._cache.values())
    assert 2 * largest < held <= 3 * largest
    assert decodes == 16 - len(dataset._cache)


def test_workers_share_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "get_worker_info", lambda: SimpleNamespace(num_workers=4))
    dataset = ImageDataset(make(tmp_path, 8), size=SIZE, cache_bytes=4 * 44 * 36 * 3)
    list(dataset)
    assert len(dataset._cache) == 1


def test_cached_images_are_not_changed_by_crops(tmp_path):
    source = make(tmp_path, 3)
    dataset = ImageDataset(source, size=SIZE)
    for position in range(12):
        dataset[position]["pixels"].zero_()
    for index, image in dataset._cache.items():
        np.testing.assert_array_equal(image, decode_image(source.read(source.items()[index])))
