"""What sources carry along, manifests of all kinds, saved data sets, and clips inside of archives."""

import csv
import io
import json
import pickle
import tarfile
from datetime import date

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from latentae.data.clips import ClipReader, ClipSource, open_inputs
from latentae.data.decode import BadImage
from latentae.data.sources import (
    ArrowSource,
    DatasetSource,
    Item,
    ItemTable,
    ItemTableBuilder,
    ManifestSource,
    ParquetSource,
    TarSource,
    UriReader,
    manifest,
    open_source,
)
from latentae.data.sources.base import path_of
from latentae.errors import DataError, RequestError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path, images, **columns):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(images, kind), **columns}), path)
    return path


def columns(source):
    return {item.key: dict(item.columns) for item in source.items()}


def contents(source):
    """By the URI alone, as a worker elsewhere reads it."""
    reader = pickle.loads(pickle.dumps(UriReader()))
    return {item.key: reader.read(Item(item.key, item.uri, item.size)) for item in source.items()}


# tables


def test_a_table_is_a_sequence_of_its_items():
    items = [Item(f"{i:03d}.png", f"file:///{i}.png", i, i % 3 or None, {"caption": f"n{i}"}) for i in range(200)]
    table = ItemTable.of(items)
    assert list(table) == items
    assert [table[i] for i in (0, 7, -1, -200)] == [items[i] for i in (0, 7, -1, -200)]
    assert list(table[5:9]) == items[5:9]
    assert list(table[::-40]) == items[::-40]
    assert (len(table[:0]), len(table[190:500])) == (0, 10)
    assert not table[:0]
    assert table[150:] == ItemTable.of(items[150:])
    with pytest.raises(IndexError):
        table[200]
    assert pickle.loads(pickle.dumps(table)) == table
    assert pickle.loads(pickle.dumps(table[3])) == items[3]
    assert pickle.loads(pickle.dumps(table[3:5])) == table[3:5]
    assert len(pickle.dumps(table[3:5])) < len(pickle.dumps(table)) / 4


def test_blocks_and_single_items_are_the_same():
    values = ["dog", "3", None, "", " cat ", "dog"]
    texts = ["dog", None, None, None, "cat", "dog"]
    builder, other = ItemTableBuilder(), ItemTableBuilder()
    keys = [f"{i}.png" for i in range(6)]
    for key, label in zip(keys, texts):
        builder.append(key, f"file:///{key}", 0, label)
    both = ItemTableBuilder()
    both.extend(pyarrow.array(keys), pyarrow.array(keys), np.zeros(6), pyarrow.array(values))
    with pytest.raises(RequestError, match="labels of two kinds, such as 3 and 'cat'"):
        both.finish()
    values[1] = None
    uris = pyarrow.array([f"file:///{key}" for key in keys])
    other.extend(pyarrow.array(keys), uris, np.zeros(6), pyarrow.array(values))
    table = builder.finish()
    assert table == other.finish()
    assert table.labels.to_pylist() == [1, None, None, None, 0, 1]


def test_values_of_several_kinds_become_text():
    builder = ItemTableBuilder()
    for i, value in enumerate([1, 2.5, None, 3]):
        builder.append(f"{i}", "", 0, None, {"number": value, "mixed": [1, "x", True, None][i], "half": "a\ud800"})
    table = builder.finish()
    assert table.table.column("number").to_pylist() == [1.0, 2.5, None, 3.0]
    assert table.table.column("mixed").to_pylist() == ["1", "x", "True", None]
    assert table.table.column("half")[0].as_py() == "a\\ud800"


# manifests


@pytest.fixture
def rows(tmp_path):
    """Three rows, for every kind of manifest."""
    for name in ("a.png", "b#.png", "c c.png"):
        (tmp_path / name).write_bytes(name.encode())
    return [
        {"path": "c c.png", "label": "dog", "caption": "a, b", "width": 3, "score": 0.5, "tags": ["x", "y"]},
        {"path": "a.png", "label": "cat", "caption": None, "width": 4, "score": 1.5, "tags": []},
        {"path": "b#.png", "label": "dog", "caption": 'say "x"', "width": None, "score": 2.5, "tags": None},
    ]


def test_manifests_carry_their_columns(tmp_path, rows):
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    for name in ("m.jsonl", "m.parquet"):
        source = open_source(tmp_path / name)
        assert isinstance(source, ManifestSource)
        assert contents(source) == {name: name.encode() for name in ("a.png", "b#.png", "c c.png")}
        assert [item.label for item in source.items()] == [0, 1, 1]
        assert columns(source)["c c.png"] == {"caption": "a, b", "input_width": 3, "score": 0.5, "tags": '["x", "y"]'}
        assert columns(source)["b#.png"] == {"caption": 'say "x"', "input_width": None, "score": 2.5, "tags": None}
        assert source.items().table.schema.field("score").type == pyarrow.float64()
    for name, delimiter in (("m.csv", ","), ("m.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        source = open_source(tmp_path / name)
        assert columns(source)["c c.png"] == {
            "caption": "a, b",
            "input_width": "3",
            "score": "0.5",
            "tags": "['x', 'y']",
        }


def test_columns_can_be_chosen(tmp_path, rows):
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert columns(open_source(tmp_path / "m.jsonl", columns=("width",)))["a.png"] == {"input_width": 4}
    assert columns(open_inputs(tmp_path / "m.jsonl", clips=False, columns=()))["a.png"] == {}
    with pytest.raises(RequestError, match="no column 'captoin' to carry along; it has caption, width, score, tags"):
        open_source(tmp_path / "m.jsonl", columns=("captoin",))
    with pytest.raises(RequestError, match="no 'x' to carry along"):
        open_source(tmp_path, columns=("x",))


def test_names_that_are_taken_are_told_apart(tmp_path):
    (tmp_path / "m.csv").write_text("path,uri,input_uri,status,crop_top,fine,\nx.png,1,2,3,4,5,6\n")
    assert columns(open_source(tmp_path / "m.csv"))["x.png"] == {
        "input_uri": "1",
        "input_input_uri": "2",
        "input_status": "3",
        "input_crop_top": "4",
        "fine": "5",
    }


def test_a_key_of_their_own(tmp_path):
    (tmp_path / "m.csv").write_text("key,path\nz,a.png\ny,a.png\n")
    assert [(item.key, item.uri.rpartition("/")[2]) for item in open_source(tmp_path / "m.csv").items()] == [
        ("y", "a.png"),
        ("z", "a.png"),
    ]
    (tmp_path / "m.jsonl").write_text('{"key": 7, "path": "s3://bucket/a.png"}\n{"path": "https://host/b.png"}')
    items = open_source(tmp_path / "m.jsonl").items()
    assert [(item.key, item.uri) for item in items] == [
        ("7", "s3://bucket/a.png"),
        ("host/b.png", "https://host/b.png"),
    ]
    for name, text in (
        ("m.csv", "key,path\nz,a.png\n,b.png\n"),
        ("m.jsonl", '{"path": "a"}\n{"path": "b", "key": ""}'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(RequestError, match=rf"has no key in line {3 if name == 'm.csv' else 2}"):
            open_source(tmp_path / name)
    (tmp_path / "m.csv").write_text("key,path\nz,a.png\nz,b.png\n")
    with pytest.raises(RequestError, match="lists z twice, in lines 2 and 3"):
        open_source(tmp_path / "m.csv")


PATHS = ["a.png", "./b.png", "sub//c.png", "sub/../d.png", "../e.png", "{root}/f.png", "{root}/lists/g.png", "/h.png"]
PATHS += ["/x/../i.png", "sp ace.png", "ü.png", "a%20b.png", "#1.png", "?.png", "...png", ".../j.png", "k/.l.png", "m/"]
PATHS += ["s3://bucket/n o#.png", "https://host/p%20q.png?x=1#y", "file:///r%20s.png", "t:u.png", " v.png"]


def test_arrow_and_python_read_manifests_alike(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    paths = [path.replace("{root}", str(tmp_path)) for path in PATHS]
    with (tmp_path / "lists/m.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "cls"])
        writer.writerows((path, number % 3) for number, path in enumerate(paths))
    (tmp_path / "lists/m.jsonl").write_text(
        "\n".join(json.dumps({"path": path, "cls": number % 3}) for number, path in enumerate(paths))
    )
    by_arrow = ManifestSource(tmp_path / "lists/m.csv").items()
    assert by_arrow == ManifestSource(tmp_path / "lists/m.jsonl").items()
    assert len(by_arrow) == len(paths)
    uris = {item.key: item.uri for item in by_arrow}
    assert path_of(uris["sp ace.png"]) == str(tmp_path / "lists/sp ace.png")
    assert uris["h.png"] == "file:///h.png"
    assert uris["bucket/n o#.png"] == "s3://bucket/n%20o%23.png"

    def refuse(place):
        raise pyarrow.ArrowInvalid("not today")

    monkeypatch.setattr(manifest, "_csv_tables", refuse)
    assert ManifestSource(tmp_path / "lists/m.csv").items() == by_arrow


def test_rows_that_arrow_refuses_late_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 4096)
    lines = [f"{i:06d}.png,{i}" for i in range(3000)]
    lines[2500] = "002500.png"  # a cell is missing
    (tmp_path / "m.csv").write_text("path,caption\n" + "\n".join(lines))
    items = ManifestSource(tmp_path / "m.csv").items()
    assert [item.key for item in items] == [f"{i:06d}.png" for i in range(3000)]
    assert [item.columns["caption"] for item in items[2498:2502]] == ["2498", "2499", None, "2501"]
    (tmp_path / "m.csv").write_text("path,caption\n" + "\n".join([*lines, "000007.png,x"]))
    with pytest.raises(RequestError, match=r"lists .*000007\.png twice, in lines 9 and 3002"):
        ManifestSource(tmp_path / "m.csv")


def test_numbers_in_csv_stay_as_they_are_written(tmp_path):
    (tmp_path / "m.csv").write_text("\n\nPath , Code\na.png,007\nb.png,1e3\nc.png,NA\n")
    assert [item.columns for item in open_source(tmp_path / "m.csv").items()] == [
        {"code": "007"},
        {"code": "1e3"},
        {"code": "NA"},
    ]
    (tmp_path / "m.csv").write_text('path,caption\na.png,5" disc\nb.png,a "quoted" b\n')
    assert [item.columns["caption"] for item in open_source(tmp_path / "m.csv").items()] == ['5" disc', 'a "quoted" b']


def test_sizes_of_long_manifests_are_a_guess(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i:02d}.png").write_bytes(bytes(3000 + 10 * i))
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"{i:02d}.png" for i in range(20)))
    assert [item.size for item in ManifestSource(tmp_path / "m.csv").items()] == [3000 + 10 * i for i in range(20)]
    monkeypatch.setattr(manifest, "MOST_SIZES", 10)
    monkeypatch.setattr(manifest, "SAMPLED_FILES", 5)
    assert {item.size for item in ManifestSource(tmp_path / "m.csv").items()} == {4096}


# tars and tables


def test_tars_carry_captions_and_fields(tmp_path):
    fields = {"caption": "no", "url": "u", "width": 9, "tags": {"a": [1]}, "label": 5, "cls": "kept", "ok": True}
    members = [("a.jpg", b""), ("a.txt", b"a cat\n"), ("a.json", json.dumps(fields).encode()), ("a.cls", b"2")]
    members += [("n/b.left.jpg", b""), ("n/b.json", b'{"caption": "both"}'), ("n/b.left.txt", b"left"), ("c.jpg", b"")]
    path = write_tar(tmp_path / "x.tar", members)
    source = open_source(path)
    assert columns(source) == {
        "a.jpg": {
            "caption": "a cat",
            "url": "u",
            "input_width": 9,
            "tags": '{"a": [1]}',
            "cls": "kept",
            "ok": True,
        },
        "c.jpg": dict.fromkeys(["caption", "url", "input_width", "tags", "cls", "ok"]),
        "n/b.left.jpg": {**dict.fromkeys(["url", "input_width", "tags", "cls", "ok"]), "caption": "left"},
    }
    assert [item.label for item in source.items()] == [2, None, None]
    assert columns(TarSource(path, columns=["url"]))["a.jpg"] == {"url": "u"}
    assert columns(TarSource(path, columns=[]))["a.jpg"] == {}
    assert [item.label for item in TarSource(path, columns=[]).items()] == [2, None, None]
    with pytest.raises(RequestError, match="no column 'text' to carry along; it has caption, url"):
        TarSource(path, columns=["text"])


def test_parquet_carries_its_columns(tmp_path):
    images = [{"bytes": b"a", "path": "a.png"}, {"bytes": b"b", "path": "b.png"}]
    path = write_parquet(
        tmp_path / "x.parquet",
        images,
        label=[1, 0],
        text=["x", None],
        day=[date(2020, 1, 2), None],
        kind=pyarrow.array(["p", "q"]).dictionary_encode(),
        boxes=[[{"x": 1}], None],
        mask=[b"m", b"n"],
        row=[7, 8],
    )
    assert [dict(item.columns) for item in open_source_column(path).items()] == [
        {"text": "x", "day": "2020-01-02", "kind": "p", "boxes": '[{"x": 1}]', "input_row": 7},
        {"text": None, "day": None, "kind": "q", "boxes": None, "input_row": 8},
    ]
    assert columns(ParquetSource(path, column="image", columns=["text"]))["00000000-a.png"] == {"text": "x"}
    with pytest.raises(RequestError, match="no column 'mask' to carry along; it has text, day"):
        ParquetSource(path, columns=["mask"])


def open_source_column(path):
    source = open_source(path)
    assert source.items()[0].label == 1
    return source


def test_the_column_travels_in_the_address(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"le ft": [b"l"], "right": [b"r"]}), path)
    source = ParquetSource(path, column="le ft")
    assert source.items()[0].uri.endswith("#row=0&column=le%20ft")
    assert contents(source) == {"00000000": b"l"}
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"i"], "mask": [b"m"]}), path)
    assert contents(ParquetSource(path, column="mask")) == {"00000000": b"m"}
    assert open_source(path).items()[0].uri.endswith("#row=0")


def test_a_row_that_is_not_there(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{"bytes": b"a", "path": None}])
    for row in (1, 99):
        with pytest.raises(BadImage, match="unreadable"):
            UriReader().read(Item("a", f"{path.as_uri()}#row={row}", 1))
    with pytest.raises(BadImage, match="unreadable"):
        UriReader().read(Item("a", f"{path.as_uri()}#row=0&column=other", 1))


# data sets of Hugging Face


@pytest.fixture
def dataset(tmp_path):
    """Twelve images with bytes and two that are files, labels with names, and a caption."""
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": bytes([i]) * (i + 1), "path": f"{i}.jpg"} for i in range(12)]
    for name in ("far.png", "gone.png"):
        images.append({"bytes": None, "path": str(tmp_path / name)})
        (tmp_path / name).write_bytes(name.partition(".")[0].encode())
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "eel"]), caption=datasets.Value("string")
    )
    rows = {"image": images, "label": [i % 3 for i in range(14)], "caption": [f"n{i}" for i in range(14)]}
    return datasets.Dataset.from_dict(rows, features=features)


def expected(numbers):
    names = {i: f"{i}.jpg" for i in range(12)} | {12: "far.png"}
    data = {i: bytes([i]) * (i + 1) for i in range(12)} | {12: b"far"}
    return {f"{row:08d}-{names[i]}": data[i] for row, i in enumerate(numbers)}


def test_a_data_set_saved_to_disk(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "gone.png").unlink()
    source = open_source(tmp_path / "saved")
    assert isinstance(source, ArrowSource)
    items = list(source.items())
    assert contents(source) == {**expected(range(13)), "00000013-gone.png": b"gone"}
    assert [item.label for item in items] == [i % 3 for i in range(14)]
    assert [item.columns for item in items] == [{"caption": f"n{i}"} for i in range(14)]
    assert [item.size for item in items[:12]] == list(range(1, 13))
    assert "data-00001-of-00003.arrow#row=0" in items[5].uri


def test_arrow_files_beside_their_description(tmp_path):
    rows = [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "b c.png")}, None]
    table = pyarrow.table({"image": pyarrow.array(rows), "other": [b"1", b"2", b"3"], "cls": ["y", "x", None]})
    (tmp_path / "b c.png").write_bytes(b"b")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_info.json").write_text("{}")
    for name, open_writer in (
        ("d-test", pyarrow.ipc.new_stream),
        ("d-train", pyarrow.ipc.new_file),
        ("cache-1", pyarrow.ipc.new_file),
    ):
        with open_writer(tmp_path / f"saved/{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    source = open_source(tmp_path / "saved")
    items = list(source.items())
    assert [item.key for item in items] == [
        f"{name}.arrow/{key}"
        for name in ("d-test", "d-train")
        for key in ("00000000-a.png", "00000001-b c.png", "00000002")
    ]
    assert [item.label for item in items] == [1, 0, None] * 2
    assert [source.read(item) for item in items[:2]] == [b"a", b"b"]
    assert items[4].uri == (tmp_path / "b c.png").as_uri()
    with pytest.raises(BadImage, match="its row holds no bytes"):
        source.read(items[2])
    other = ArrowSource(tmp_path / "saved/d-train.arrow", column="other")
    assert list(contents(other).values()) == [b"1", b"2", b"3"]


def test_splits_saved_to_disk(dataset, tmp_path):
    import datasets

    parts = {"train": dataset.select(range(5)), "test": dataset.select([7, 6])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", columns=[])
    assert contents(source) == {
        **{f"train/{key}": data for key, data in expected(range(5)).items()},
        **{f"test/{key}": data for key, data in expected([7, 6]).items()},
    }
    assert columns(source)["test/00000000-7.jpg"] == {}
    one = open_source(next((tmp_path / "saved/test").glob("*.arrow")))
    assert contents(one) == expected([7, 6])


def test_damaged_arrow_files(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cut short"):
        open_source(tmp_path / "saved")
    file.unlink()
    (tmp_path / "saved/other.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="is missing"):
        open_source(tmp_path / "saved")


def test_a_data_set_in_memory(dataset):
    source = open_source(dataset.select(range(13)))
    assert isinstance(source, DatasetSource)
    assert {item.key: source.read(item) for item in source.items()} == expected(range(13))
    assert [item.label for item in source.items()] == [i % 3 for i in range(13)]
    with pytest.raises(RequestError, match="can only be read by its source"):
        UriReader().read(source.items()[0])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.items() == source.items()
    assert {item.key: copy.read(item) for item in copy.items()} == expected(range(13))
    assert isinstance(open_inputs(dataset, clips=False, columns=[]), DatasetSource)


def test_filtered_and_shuffled_data_sets_keep_their_order(dataset):
    shuffled = dataset.select(range(12)).shuffle(seed=3).filter(lambda label: label != 1, input_columns=["label"])
    order = [int(caption[1:]) for caption in shuffled["caption"]]
    assert order != sorted(order)
    source = DatasetSource(shuffled)
    assert {item.key: source.read(item) for item in source.items()} == expected(order)
    assert [item.columns["caption"] for item in source.items()] == [f"n{i}" for i in order]
    assert [item.size for item in source.items()] == [i + 1 for i in order]


def test_what_is_no_data_set(dataset):
    import datasets

    with pytest.raises(RequestError, match=r"has splits, a: give one, such as dataset\['train'\]"):
        open_source(datasets.DatasetDict(a=dataset))
    with pytest.raises(RequestError, match="stream without a length"):
        open_source(dataset.to_iterable_dataset())
    with pytest.raises(RequestError, match="no column 'x' of images"):
        DatasetSource(dataset, column="x")


# clips


def test_clips_in_archives(tmp_path, clips):
    data = {"a.mp4": clips.write(tmp_path / "clips/a.mp4", 9).read_bytes()}
    data["b.webm"] = clips.write(tmp_path / "clips/b.webm", 14, codec="libvpx-vp9").read_bytes()
    np.save(tmp_path / "c.npy", clips.frames(6))
    data["c.npy"] = (tmp_path / "c.npy").read_bytes()
    members = [*data.items(), ("a.txt", b"a clip"), ("a.cls", b"1")]
    frames = {"a.mp4": 9, "b.webm": 14, "c.npy": 6}
    rows = [{"bytes": content, "path": name} for name, content in data.items()]
    table = pyarrow.table({"video": pyarrow.array(rows), "caption": ["x", "y", "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    pyarrow.parquet.write_table(table.append_column("image", [[b"i"] * 3]), tmp_path / "both.parquet")
    paths = "\n".join(f"clips/{name}" for name in ("a.mp4", "b.webm"))
    (tmp_path / "m.csv").write_text(f"path\n{paths}\n")
    opened = {
        "tar": open_inputs(write_tar(tmp_path / "x.tar", members), clips=False),
        "parquet": open_inputs(tmp_path / "x.parquet", clips=False),
        "both": open_inputs(tmp_path / "both.parquet", clips=True),
        "manifest": open_inputs(tmp_path / "m.csv", clips=False),
    }
    for kind, source in opened.items():
        assert isinstance(source, ClipSource), kind
        for item in source.items():
            name = item.key.rpartition("/")[2].rpartition("-")[2]
            reader = pickle.loads(pickle.dumps(ClipReader()))
            assert clips.read(reader.open(Item(item.key, item.uri, item.size)).clip()) == list(range(frames[name]))
            assert reader.sha256(item) == ClipReader().sha256(item)
            assert reader.read(item) == data.get(name)
        assert len(source.items()) == (2 if kind == "manifest" else 3)
    assert (opened["tar"].items()[0].label, opened["tar"].items()[0].columns) == (1, {"caption": "a clip"})
    assert opened["parquet"].items()[1].columns == {"caption": "y"}
    assert not isinstance(open_inputs(tmp_path / "both.parquet", clips=False), ClipSource)


@pytest.mark.parametrize("name", ["a.mp4", "b.webm", "c.npy", "d.gif", "e.avi"])
def test_clips_in_memory_are_as_those_in_files(tmp_path, clips, name):
    from PIL import Image

    from latentae.data.video import BadVideo, ClipBytes, open_video

    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, clips.frames(10))
    elif name.endswith(".gif"):
        first, *rest = [Image.fromarray(frame) for frame in clips.frames(10)]
        first.save(path, save_all=True, append_images=rest, duration=40)
    else:
        clips.write(path, 10, codec={".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(path.suffix, "libx264"))
    data = path.read_bytes()
    assert open_video(ClipBytes(data, name)).info == open_video(path).info
    assert (open_video(ClipBytes(data, name)).clip() == open_video(path).clip()).all()
    for cut in (0, 20, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:cut])
        said = []
        for clip in (path, ClipBytes(data[:cut], name)):
            with pytest.raises(BadVideo) as caught:
                open_video(clip).clip()
            said.append(caught.value.reason)
        assert said[0] == said[1]
