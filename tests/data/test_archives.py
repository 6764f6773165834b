"""Tars, parquet files and manifests: what becomes an item, what is read, and what is refused in one sentence."""

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from latentae.data.decode import BadImage
from latentae.data.images import ImageDataset
from latentae.data.sources import FolderSource, ItemTableBuilder, ManifestSource, ParquetSource, TarSource, open_source
from latentae.data.sources.base import label_of
from latentae.data.sources.opening import expand_braces
from latentae.errors import DataError, RequestError


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, content) pairs, by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path, images, row_group_size=3, **columns):
    """As the datasets library writes a column of images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(images, kind), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def keys(source):
    return [item.key for item in source.items()]


def labels(source):
    return {item.key: item.label for item in source.items()}


def contents(source):
    return {item.key: source.read(item) for item in source.items()}


def png(seed, size=(40, 30)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


# tar: names and bytes


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_back_from_every_kind_of_tar(tmp_path, format):
    rng = np.random.default_rng(0)
    names = ["b.png", "./a/z.JPG", "a/日本.webp", "white space.jpg", f"{'long/' * 18}{'name' * 15}.png", "e.jpg"]
    images = {name: rng.bytes(int(rng.integers(0, 3000))) for name in names}
    path = write_tar(tmp_path / "x.tar", [*images.items(), ("notes.txt", b"no image")], format)
    source = open_source(path)
    assert contents(source) == {name.removeprefix("./"): data for name, data in images.items()}
    assert keys(source) == sorted(keys(source))
    assert all(item.size == len(images.get(item.key, images.get(f"./{item.key}"))) for item in source.items())
    for item in source.items():  # the address is what it says
        uri, offset = item.uri.split("#offset=")
        assert uri == path.as_uri()
        with path.open("rb") as stream:
            stream.seek(int(offset))
            assert stream.read(item.size) == source.read(item)


def test_a_tar_of_the_tar_program(tmp_path, photo_folder):
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", photo_folder, "."], check=True)
    assert contents(open_source(tmp_path / "x.tar")) == contents(FolderSource(photo_folder))


def test_hidden_members_and_leftovers_are_skipped(tmp_path):
    names = ["a.png", ".b.png", "._a.png", ".git/c.png", "__MACOSX/._d.png", "e/.g/h.png", "./f.png"]
    assert keys(TarSource(write_tar(tmp_path / "x.tar", [(name, b"x") for name in names]))) == ["a.png", "f.png"]


def test_names_that_are_not_utf8(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("caf\udce9.jpg", b"x")], tarfile.GNU_FORMAT)
    assert contents(TarSource(path)) == {"caf\\xe9.jpg": b"x"}


def test_tars_of_one_folder_never_collide_and_one_more_changes_no_key(tmp_path):
    for name in ("train-0.tar", "more/train-0.tar"):
        write_tar(tmp_path / name, [("0.jpg", name.encode()), ("1.jpg", b"")])
    before = keys(open_source(tmp_path))
    assert before == [f"{tar}/{i}.jpg" for tar in ("more/train-0.tar", "train-0.tar") for i in range(2)]
    assert contents(open_source(tmp_path))["more/train-0.tar/0.jpg"] == b"more/train-0.tar"
    write_tar(tmp_path / "train-1.tar", [("0.jpg", b"")])
    assert set(before) < set(keys(open_source(tmp_path)))


def test_links_within_a_tar_are_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind, target in [
            ("a/one.png", tarfile.REGTYPE, ""),
            ("hard.png", tarfile.LNKTYPE, "a/one.png"),
            ("b/soft.png", tarfile.SYMTYPE, "../a/one.png"),
            ("gone.png", tarfile.SYMTYPE, "nowhere.png"),
            ("round.png", tarfile.SYMTYPE, "round.png"),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 0 if target else 5
            tar.addfile(member, io.BytesIO(b"12345"))
    source = TarSource(tmp_path / "x.tar")
    items = {item.key: item for item in source.items()}
    assert sorted(items) == ["a/one.png", "b/soft.png", "gone.png", "hard.png", "round.png"]
    assert source.read(items["hard.png"]) == source.read(items["b/soft.png"]) == b"12345"
    for key in ("gone.png", "round.png"):
        with pytest.raises(BadImage, match="link to nothing") as caught:
            source.read(items[key])
        assert caught.value.reason == "unreadable"


# tar: labels


def test_labels_stand_beside_their_images(tmp_path):
    members = [
        ("a.jpg", b""),
        ("a.cls", b"7\n"),
        ("b.json", b'{"label": 3, "caption": "x"}'),
        ("b.jpg", b""),
        ("n/c.left.jpg", b""),
        ("n/c.right.jpg", b""),
        ("n/c.cls", b"2"),
        ("photo.1.jpg", b""),
        ("photo.1.cls", b"1"),
        ("photo.2.jpg", b""),
        ("photo.2.cls", b"0"),
        ("none.jpg", b""),
        ("none.json", b"{broken"),
        ("both.json", b'{"cls": 1}'),
        ("both.cls", b"4"),
        ("both.jpg", b""),
    ]
    assert labels(TarSource(write_tar(tmp_path / "x.tar", members))) == {
        "a.jpg": 7,
        "b.jpg": 3,
        "both.jpg": 4,
        "n/c.left.jpg": 2,
        "n/c.right.jpg": 2,
        "none.jpg": None,
        "photo.1.jpg": 1,
        "photo.2.jpg": 0,
    }


def test_labels_that_are_texts_are_numbered_over_all_tars(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b""), ("a.cls", b"dog")])
    write_tar(tmp_path / "1.tar", [("a.jpg", b""), ("a.cls", b"cat")])
    assert labels(open_source(tmp_path)) == {"0.tar/a.jpg": 1, "1.tar/a.jpg": 0}
    write_tar(tmp_path / "2.tar", [("a.jpg", b""), ("a.cls", b"3")])
    with pytest.raises(RequestError, match="labels of two kinds, such as 3 and 'cat'"):
        open_source(tmp_path)


def test_what_is_a_label():
    values = [3, "3", " 12\n", 3.0, "3.0", True, "dog", "", None, float("nan"), "nan", -1, [1], 2**70, 0.5]
    expected = [3, 3, 12, 3, 3, 1, "dog", None, None, None, None, None, None, None, None]
    assert [label_of(value) for value in values] == expected
    for given, numbered in ((["b", None, "a", "b"], [1, None, 0, 1]), ([5, None, 2], [5, None, 2])):
        builder = ItemTableBuilder()
        for number, label in enumerate(given):
            builder.append(f"{number}.png", "", 0, label)
        assert builder.finish().labels.to_pylist() == numbered


# tar: damage and malice


def test_a_tar_that_is_cut_short_anywhere_is_refused(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(4)]).read_bytes()
    path = tmp_path / "cut.tar"
    for length in [100, 512, 600, 1024, 1535, 1536, 1700, 2048, 3071, 3072, 4 * 1536 - 1, 4 * 1536, 4 * 1536 + 100]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar is cut short"):
            open_source(path)
    path.write_bytes(whole[: 4 * 1536 + 512])
    assert len(keys(open_source(path))) == 4


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1536 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar is damaged at byte 3072"):
        open_source(path)


def test_a_member_of_negative_size_ends_in_an_error(tmp_path):
    data = bytearray(write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("b.jpg", b"y")], tarfile.GNU_FORMAT).read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\xff" * 4 + struct.pack(">q", -1536)
    data[1024 + 148 : 1024 + 156] = b"        "
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar is"):
        open_source(tmp_path / "x.tar")


def test_joined_tars_are_refused(tmp_path):
    one = write_tar(tmp_path / "1.tar", [("a.jpg", b"1")]).read_bytes()
    two = write_tar(tmp_path / "2.tar", [("b.jpg", b"2")]).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + two)
    with pytest.raises(RequestError, match=r"joined\.tar goes on behind its end"):
        open_source(tmp_path / "joined.tar")


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"x\.tar is cut short or no tar"):
        open_source(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.tar is cut short or no tar"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["../../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "//x.jpg"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b""), (name, b"")])
    with pytest.raises(RequestError, match="lies outside of any folder"):
        open_source(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds 'a\.jpg' twice"):
        open_source(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("./a.jpg", b"2")]))


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_refused(tmp_path, mode, kind):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(RequestError, match=f"is compressed with {kind}, .* uncompress it first"):
        open_source(tmp_path / "x.tar")
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.gz")
    with pytest.raises(RequestError, match=r"x\.tar\.gz is compressed"):
        open_source(tmp_path / "x.tar.gz")


def test_a_tar_without_images_says_what_it_holds(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.npy", b""), ("b.npy", b""), ("c", b"")])
    with pytest.raises(RequestError, match=r"x\.tar holds no images but other files \(2 \.npy, 1 no extension\)"):
        open_source(path)


def test_a_tar_that_shrinks_after_it_was_listed_is_a_bad_image(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 5000)])
    source = open_source(path)
    os.truncate(path, 2000)
    with pytest.raises(BadImage, match=r"unreadable: .*shorter than when it was listed"):
        source.read(source.items()[0])
    path.unlink()
    with pytest.raises(BadImage, match="unreadable"):
        pickle.loads(pickle.dumps(source)).read(source.items()[0])


# parquet


def test_rows_of_a_parquet_file(tmp_path):
    images = [{"bytes": bytes([i]) * (i + 1), "path": f"dir/{i}.jpg"} for i in range(8)]
    source = open_source(write_parquet(tmp_path / "x.parquet", images, label=list(range(8))))
    assert contents(source) == {f"{i:08d}-{i}.jpg": image["bytes"] for i, image in enumerate(images)}
    assert labels(source) == {f"{i:08d}-{i}.jpg": i for i in range(8)}
    assert [item.uri.partition("#")[2] for item in source.items()] == [f"row={i}" for i in range(8)]


def test_a_folder_of_parquet_files(tmp_path):
    for i in range(3):
        write_parquet(tmp_path / f"data/train-{i}.parquet", [{"bytes": b"%d" % i, "path": None}])
    assert contents(open_source(tmp_path)) == {f"data/train-{i}.parquet/00000000": b"%d" % i for i in range(3)}
    assert contents(open_source(f"{tmp_path}/data/train-{{1..2}}.parquet")) == {
        f"train-{i}.parquet/00000000": b"%d" % i for i in (1, 2)
    }


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_a_plain_column_of_bytes(tmp_path, kind):
    table = pyarrow.table({"jpg": pyarrow.array([b"a", b"bc"], kind), "cls": ["dog", "cat"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert contents(source) == {"00000000": b"a", "00000001": b"bc"}
    assert labels(source) == {"00000000": 1, "00000001": 0}


def test_rows_without_bytes_are_bad_images(tmp_path):
    images = [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    source = open_source(write_parquet(tmp_path / "x.parquet", images))
    items = source.items()
    assert source.read(items[0]) == b"a"
    for item in items[1:]:
        with pytest.raises(BadImage, match="its row holds no bytes"):
            source.read(item)


def test_paths_may_say_anything(tmp_path):
    paths = ["../../etc/x.png", "/abs.png", "..", "", "C:\\x\\y.png", "a\0b.png", "same.png", "same.png"]
    source = open_source(write_parquet(tmp_path / "x.parquet", [{"bytes": b"", "path": path} for path in paths]))
    names = ["-x.png", "-abs.png", "", "", "-y.png", "-ab.png", "-same.png", "-same.png"]
    assert keys(source) == [f"{i:08d}{name}" for i, name in enumerate(names)]


def test_which_column(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"left": [b"l"], "right": [b"r"], "n": [1]}), path)
    with pytest.raises(RequestError, match=r"several columns of images, left, right: .*column='left'"):
        open_source(path)
    assert contents(ParquetSource(path, column="right")) == {"00000000": b"r"}
    with pytest.raises(RequestError, match="no column 'n' of images: it has left"):
        ParquetSource(path, column="n")
    pyarrow.parquet.write_table(pyarrow.table({"mask": [b"m"], "image": [b"i"]}), path)
    assert contents(open_source(path)) == {"00000000": b"i"}
    pyarrow.parquet.write_table(pyarrow.table({"link": ["x"], "width": [1]}), path)
    with pytest.raises(RequestError, match=r"no column of images .*: it has link \(string\), width \(int64\)"):
        open_source(path)


def test_damaged_parquet_files(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(1000), "path": None} for _ in range(6)]
    path = write_parquet(tmp_path / "x.parquet", images)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"x\.parquet is cut short or no parquet file"):
        open_source(path)
    start = bytes(data).index(images[1]["bytes"][:50])
    data[4 : start - 500] = bytes(start - 504)  # the first row group's page header
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(BadImage, match=r"unreadable: .*its row group is damaged"):
        source.read(source.items()[0])
    assert source.read(source.items()[4]) == images[4]["bytes"]


def test_groups_are_read_once_in_order_and_the_cache_is_bounded(tmp_path, monkeypatch):
    from latentae.data.sources import reading

    images = [{"bytes": bytes(1000), "path": None} for _ in range(40)]
    source = open_source(write_parquet(tmp_path / "x.parquet", images, row_group_size=5))
    read = pyarrow.parquet.ParquetFile.read_row_group
    groups = []
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, number, **options: groups.append(number) or read(self, number, **options),
    )
    monkeypatch.setattr(reading, "CACHE_BYTES", 12_000)
    contents(source)
    assert groups == list(range(8))
    assert len(source.reader._rows.values) == 2
    source.read(source.items()[-6])
    assert len(groups) == 8


# both, in threads and processes


@pytest.fixture(params=["tar", "parquet", "manifest"])
def any_source(request, tmp_path):
    images = {f"{i:03d}.png": png(i) for i in range(30)}
    if request.param == "tar":
        return open_source(write_tar(tmp_path / "x.tar", images.items())), list(images.values())
    if request.param == "parquet":
        rows = [{"bytes": data, "path": name} for name, data in images.items()]
        return open_source(write_parquet(tmp_path / "x.parquet", rows)), list(images.values())
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "x.csv").write_text("path\n" + "\n".join(images))
    return open_source(tmp_path / "x.csv"), list(images.values())


def test_threads_read_the_same(any_source):
    source, images = any_source
    order = np.random.default_rng(0).integers(0, 30, 600)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: source.read(source.items()[i]), order))
    assert read == [images[i] for i in order]


def test_processes_read_the_same(any_source):
    source, images = any_source
    assert source.read(source.items()[0]) == images[0]  # opens the files here before the workers start
    copy = pickle.loads(pickle.dumps(source))
    assert copy.items() == source.items()
    assert [copy.read(item) for item in copy.items()] == images
    alone = ImageDataset(source, size=16, seed=1)
    loader = DataLoader(ImageDataset(source, size=16, seed=1), batch_size=5, sampler=range(40), num_workers=2)
    position = 0
    for batch in loader:
        for key, pixels in zip(batch["key"], batch["pixels"]):
            sample = alone[position]
            assert key == sample["key"]
            assert (pixels == sample["pixels"]).all()
            position += 1
    assert position == 40


def test_tars_are_not_opened_again_for_every_read(tmp_path, monkeypatch):
    source = TarSource(write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x") for i in range(9)]))
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments) or real(*arguments))
    contents(source)
    assert len(opened) == 1


# manifests


def test_a_csv_a_tsv_and_a_jsonl_say_the_same(tmp_path, photo_folder):
    rows = [("a.png", "dog", "a, b"), ("sub/c.webp", "cat", 'say "x"'), ("e e.jpeg", "dog", "ü\nline")]
    header, folder = ("Path", "label", "caption"), photo_folder
    import csv

    for name, delimiter in (("m.csv", ","), ("m.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    lines = [json.dumps({"file": path, "label": label, "caption": caption}) for path, label, caption in rows]
    (folder / "m.jsonl").write_text("\n\n".join(lines))
    for name in ("m.csv", "m.tsv", "m.jsonl"):
        source = open_source(folder / name)
        assert labels(source) == {"a.png": 1, "e e.jpeg": 1, "sub/c.webp": 0}
        assert contents(source) == {path: (folder / path).read_bytes() for path, *_ in rows}


def test_images_that_lie_elsewhere_and_images_that_are_missing(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "x.png").write_bytes(b"x")
    path = tmp_path / "lists/m.jsonl"
    paths = ("../x.png", "gone.png", f"{tmp_path}/far/y.png")
    path.write_text("\n".join(json.dumps({"path": path}) for path in paths))
    source = ManifestSource(path)
    outside = str(tmp_path).lstrip("/")
    assert keys(source) == sorted(["gone.png", f"{outside}/x.png", f"{outside}/far/y.png"])
    items = {item.key: item for item in source.items()}
    assert source.read(items[f"{outside}/x.png"]) == b"x"
    assert (items["gone.png"].size, items[f"{outside}/x.png"].size) == (0, 1)
    with pytest.raises(BadImage, match=r"gone\.png cannot be read \(No such file") as caught:
        source.read(items["gone.png"])
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "path\na.png\n./a.png\n", r"lists .*a\.png twice, in lines 2 and 3"),
        (
            "m.csv",
            "link,width\nx,3\n",
            "no column path or file or image or file_name or url in line 2, but link, width",
        ),
        ("m.csv", "path,label\n,3\n", "has '' as path in line 2"),
        ("m.csv", "path\na.png,b.png\n", "more cells than columns in line 2"),
        ("m.csv", 'path\n"a.png\n', "cannot be read as a table"),
        ("m.csv", "", "holds no images"),
        ("m.csv", "path,label\na.png,3\nb.png,dog\n", "labels of two kinds"),
        ("m.jsonl", '{"path": "a.png"}\n{"path": ', "is not JSON in line 2"),
        ("m.jsonl", '["a.png"]', "one JSON object a line"),
        ("m.jsonl", '{"image": {"bytes": 3}}', "as image in line 1; expected the path"),
        ("m.jsonl", '{"path": "a\\u0000.png"}', "expected the path"),
        ("m.jsonl", '{"path": "a\\ud800.png"}', "no name of a file"),
    ],
)
def test_manifests_that_cannot_be_understood(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        open_source(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_utf8(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"path\ncaf\xe9.png\n")
    with pytest.raises(RequestError, match=r"m\.csv is not UTF-8"):
        open_source(tmp_path / "m.csv")


# what is opened


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("t-{000..003}.tar", ["t-000.tar", "t-001.tar", "t-002.tar", "t-003.tar"]),
        ("t-{8..11}.tar", ["t-8.tar", "t-9.tar", "t-10.tar", "t-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x{,-more}.tar", ["x.tar", "x-more.tar"]),
    ],
)
def test_patterns_are_those_of_a_shell(pattern, names):
    assert expand_braces(pattern) == names
    assert subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True).stdout.split() == names


def test_a_pattern_opens_its_tars(tmp_path):
    for i in range(12):
        write_tar(tmp_path / f"t-{i:03d}.tar", [("a.jpg", b"%d" % i)])
    assert contents(open_source(f"{tmp_path}/t-{{009..010}}.tar")) == {
        "t-009.tar/a.jpg": b"9",
        "t-010.tar/a.jpg": b"10",
    }
    assert keys(open_source(f"{tmp_path}/t-{{009..009}}.tar")) == ["t-009.tar/a.jpg"]
    with pytest.raises(RequestError, match=r"2 of the 4 files of .* do not exist, .*t-012\.tar the first"):
        open_source(f"{tmp_path}/t-{{010..013}}.tar")
    with pytest.raises(RequestError, match="patterns are for tar and parquet"):
        open_source(f"{tmp_path}/t-{{010..013}}.jpg")
    for bad in ("{3..1}", "{a,a}", "{0..99999999}", "{0..999}{0..999}"):
        with pytest.raises(RequestError, match="stands for"):
            open_source(f"{tmp_path}/t-{bad}.tar")


def test_an_existing_name_with_braces_is_a_name(tmp_path):
    write_tar(tmp_path / "{0..1}.tar", [("a.jpg", b"x")])
    assert keys(open_source(tmp_path / "{0..1}.tar")) == ["a.jpg"]


def test_the_output_of_img2dataset_opens_as_tars(tmp_path):
    for i in range(2):
        write_tar(
            tmp_path / f"{i:05d}.tar", [("000.jpg", b"x"), ("000.json", b'{"url": "u"}'), ("000.txt", b"caption")]
        )
        pyarrow.parquet.write_table(pyarrow.table({"url": ["u"]}), tmp_path / f"{i:05d}.parquet")
        (tmp_path / f"{i:05d}_stats.json").write_text("{}")
    assert keys(open_source(tmp_path)) == ["00000.tar/000.jpg", "00001.tar/000.jpg"]


def test_a_folder_of_both_kinds_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("000.jpg", b"x")])
    write_parquet(tmp_path / "b.parquet", [{"bytes": b"", "path": None}])
    with pytest.raises(RequestError, match="1 tar and 1 parquet files"):
        open_source(tmp_path)


def test_archives_beside_images_are_named(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"x")
    write_tar(tmp_path / "a.tar", [("000.jpg", b"x")])
    assert keys(open_source(tmp_path)) == ["a.png"]
    assert "1 tar and parquet files beside the images are left out" in capsys.readouterr().err


def test_broken_images_in_a_tar_are_replaced_and_counted(tmp_path):
    members = [(f"{i}.png", png(i) if i != 3 else b"<html>") for i in range(6)]
    dataset = ImageDataset(open_source(write_tar(tmp_path / "x.tar", members)), size=16, augment=False)
    assert [sample["key"] for sample in dataset] == ["0.png", "1.png", "2.png", "4.png", "4.png", "5.png"]
    assert dataset.bad == {3: "not-an-image"}
