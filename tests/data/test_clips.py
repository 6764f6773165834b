"""Lists of clips, and the data set that training reads: samples as a pure function of their position."""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from latentae.data import clip_dataset
from latentae.data.clip_dataset import ClipDataset
from latentae.data.clips import ClipSource, open_inputs
from latentae.data.images import epoch_order
from latentae.data.sources import FolderSource
from latentae.data.transforms import adm_center_crop, random_resized_crop_flip
from latentae.errors import DataError, RequestError

SIZE = 32


@pytest.fixture
def folder(tmp_path, clips):
    """Five clips of five kinds in two classes, and other files."""
    root = tmp_path / "clips"
    clips.write(root / "run/a.mp4", 30)
    clips.write(root / "run/b.WEBM", 24, codec="libvpx-vp9", height=40, width=56)
    (root / "walk/c").mkdir(parents=True)
    for number, frame in enumerate(clips.frames(20)):
        Image.fromarray(frame).save(root / f"walk/c/{number}.png")
    np.save(root / "walk/d.npy", clips.frames(18))
    frames = [Image.fromarray(frame) for frame in clips.frames(16)]
    frames[0].save(root / "e.gif", save_all=True, append_images=frames[1:], duration=50)
    (root / "run/thumbnail.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("no clip")
    return root


def test_what_counts_as_a_clip(folder):
    items = ClipSource(folder).items()
    labels = {"e.gif": None, "run/a.mp4": 0, "run/b.WEBM": 0, "walk/c": 1, "walk/d.npy": 1}
    assert {item.key: item.label for item in items} == labels  # an image beside videos is no clip
    assert [item.key for item in items] == sorted(labels)
    assert [item.key for item in ClipSource(folder / "walk/c").items()] == ["c"]
    assert [item.key for item in ClipSource(folder / "e.gif").items()] == ["e.gif"]


def test_some_clips_as_a_source(folder):
    source = ClipSource(folder)
    held_out = source.only(source.items()[3:])
    assert [item.key for item in held_out.items()] == ["walk/c", "walk/d.npy"]
    assert len(source.items()) == 5
    assert ClipDataset(held_out, frames=3, size=SIZE, augment=False)[1]["key"] == "walk/d.npy"


def test_hashes_name_the_content(folder):
    source = ClipSource(folder)
    before = {item.key: source.sha256(item) for item in source.items()}
    Image.new("RGB", (64, 48)).save(folder / "walk/c/3.png")
    after = {item.key: source.sha256(item) for item in source.items()}
    assert [key for key in before if before[key] != after[key]] == ["walk/c"]


def test_images_stay_images(folder, photo_folder, capsys):
    assert isinstance(open_inputs(photo_folder, clips=False), FolderSource)
    assert isinstance(open_inputs(photo_folder, clips=True), ClipSource)
    assert isinstance(open_inputs(folder / "run/a.mp4", clips=False), ClipSource)
    assert isinstance(open_inputs(folder, clips=False), FolderSource)
    assert "3 videos beside the images are left out" in capsys.readouterr().err
    (folder / "run/thumbnail.jpg").unlink()
    assert isinstance(open_inputs(folder / "run", clips=False), ClipSource)


@pytest.mark.parametrize("clips_asked", [True, False])
def test_nothing_there(tmp_path, clips_asked):
    with pytest.raises(RequestError, match="does not exist"):
        open_inputs(tmp_path / "nowhere", clips=clips_asked)
    (tmp_path / "notes.txt").write_text("no clip")
    with pytest.raises(RequestError, match="holds no"):
        open_inputs(tmp_path, clips=clips_asked)


def test_a_sample_is_what_its_definition_says(folder, clips):
    source = ClipSource(folder)
    dataset = ClipDataset(source, frames=4, size=SIZE, stride=2, seed=3)
    for position in (0, 1, 2, 3, 4, 5 * 100 + 2):
        epoch, place = divmod(position, 5)
        index = int(epoch_order(5, 3, epoch)[place])
        item = source.items()[index]
        sample = dataset[position]
        clip = source.open(item).clip()
        start = int(np.random.default_rng((3, epoch, index)).integers(len(clip) - 6))
        assert sample["start"] == start
        expected = [
            random_resized_crop_flip(frame, SIZE, np.random.default_rng((3, epoch, index, 1)))
            for frame in clip[start : start + 7 : 2]
        ]
        np.testing.assert_array_equal(sample["pixels"].permute(1, 2, 3, 0), expected)
        assert (sample["index"], sample["key"], sample["stands_in_for"]) == (index, item.key, "")
        assert sample["label"] == (-1 if item.label is None else item.label)


def test_evaluation_takes_the_centre_of_the_beginning(folder):
    source = ClipSource(folder)
    dataset = ClipDataset(source, frames=5, size=SIZE, fps=10, augment=False)
    for index, item in enumerate(source.items()):
        numbers = [int(k * source.open(item).info.fps / 10 + Fraction(1, 2)) for k in range(5)]
        expected = [adm_center_crop(frame, SIZE) for frame in source.open(item).frames(numbers)]
        np.testing.assert_array_equal(dataset[index]["pixels"].permute(1, 2, 3, 0), expected)
        assert (dataset[index]["start"], dataset[index]["fps"]) == (0, 10)


def test_a_sample_depends_on_nothing_else(folder, tmp_path):
    source = ClipSource(folder)
    (folder / "run/a.mp4").write_bytes(b"broken")
    options = {"frames": 3, "size": SIZE, "seed": 1}
    expected = [ClipDataset(source, **options)[position] for position in range(12)]
    backwards = ClipDataset(source, **options, cache=tmp_path / "cache")
    for position in reversed(range(12)):
        assert torch.equal(backwards[position]["pixels"], expected[position]["pixels"])
    loader = DataLoader(ClipDataset(source, **options, cache=tmp_path / "cache"), 4, sampler=range(12), num_workers=2)
    batches = list(loader)
    assert torch.equal(torch.cat([b["pixels"] for b in batches]), torch.stack([e["pixels"] for e in expected]))
    assert [text for b in batches for text in b["stands_in_for"]] == [e["stands_in_for"] for e in expected]


def test_bad_and_short_clips_are_named_and_replaced(folder, capsys):
    (folder / "run/a.mp4").write_bytes((folder / "run/a.mp4").read_bytes()[:-500])
    source = ClipSource(folder)
    dataset = ClipDataset(source, frames=17, size=SIZE, augment=False, max_bad=0.5)
    keys = [sample["key"] for sample in dataset]
    assert keys == ["run/b.WEBM", "run/b.WEBM", "run/b.WEBM", "walk/c", "walk/d.npy"]
    assert [sample["stands_in_for"] for sample in dataset] == ["0 1", "1", "", "", ""]
    assert dataset.bad == {0: "too-short", 1: "truncated"}
    told = capsys.readouterr().err
    assert told.count("stands in for it") == 2
    assert "e.gif: too-short: it has 16 frames and 17 are asked for." in told


def test_too_many_bad_clips_stop_the_work(folder):
    with pytest.raises(DataError, match="3 of 5 clips are broken or too short"):
        list(ClipDataset(ClipSource(folder), frames=21, size=SIZE, augment=False, max_bad=0.4))
    with pytest.raises(DataError, match="5 of 5 clips"):
        list(ClipDataset(ClipSource(folder), frames=99, size=SIZE, max_bad=1.0))


def test_a_damaged_frame_is_missed_only_where_it_is_wanted(tmp_path, clips):
    for name in ("a.mp4", "b.mp4"):
        clips.write(tmp_path / name, 48, crf="1", bf="0", sc_threshold="0")  # key frames at 0, 12, 24, 36
    import av

    with av.open(tmp_path / "a.mp4") as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == 40)
        place, size = packet.pos, packet.size
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[place : place + size] = bytes(255 - byte for byte in data[place : place + size])
    (tmp_path / "a.mp4").write_bytes(data)
    dataset = ClipDataset(ClipSource(tmp_path), frames=3, size=SIZE, max_bad=0.5)
    samples = [dataset[position] for position in range(60)]
    assert {sample["stands_in_for"] for sample in samples} == {"", "0"}
    for sample in samples:
        if sample["key"] == "a.mp4":
            assert sample["start"] + 2 < 40


def test_the_cache_knows_a_changed_file(tmp_path, clips, monkeypatch):
    path = clips.write(tmp_path / "clips/a.mp4", 20)
    options = {"frames": 2, "size": SIZE, "cache": tmp_path / "cache"}
    first = ClipDataset(ClipSource(path), **options)[0]
    probed = []
    real = clip_dataset.ClipSource.open

    def count(source, item, policy, info=None):
        probed.append(info is None)
        return real(source, item, policy, info)

    monkeypatch.setattr(clip_dataset.ClipSource, "open", count)
    again = ClipDataset(ClipSource(path), **options)[0]
    assert torch.equal(first["pixels"], again["pixels"])
    assert probed == [False]
    clips.write(path, 30, fps=10)
    os.utime(path, ns=(1, 1))
    assert ClipDataset(ClipSource(path), **options)[0]["fps"] == 10
    assert probed == [False, True, False]
    for entry in (tmp_path / "cache").rglob("*.json"):
        entry.write_text("{broken")
    assert ClipDataset(ClipSource(path), **options)[0]["fps"] == 10
