"""Object stores and the web: memory://, a local S3 server, a local web server, and failures that pass."""

import asyncio
import http.server
import io
import os
import pickle
import tarfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from latentae.data.clips import ClipSource, open_inputs
from latentae.data.decode import BadImage
from latentae.data.sources import FolderSource, Item, UriReader, open_source, remote
from latentae.data.sources.base import place_of, uri_of
from latentae.errors import DataError, MissingExtra, RequestError

ODD_NAMES = ["a#1.png", "b?x=1.png", "c%20d.png", "e f.png", "g::h.png", "sub/日本.png", "sub/#/%.png", "z.PNG"]


def write(root, files):
    system, folder = remote.filesystem(root)
    for name, data in files.items():
        system.pipe_file(f"{folder}/{name}", data)


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def parquet_of(images, **columns):
    stream = io.BytesIO()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": data, "path": name} for name, data in images.items()]
    table = pyarrow.table({"image": pyarrow.array(rows, kind), **columns})
    pyarrow.parquet.write_table(table, stream, row_group_size=3)
    return stream.getvalue()


def contents(source):
    """By the URI alone, as a worker elsewhere reads it."""
    reader = pickle.loads(pickle.dumps(UriReader()))
    return {item.key: reader.read(Item(item.key, item.uri, item.size)) for item in source.items()}


def numbered(count, ending="png"):
    return {f"{i:02d}.{ending}": bytes([i]) * (100 + i) for i in range(count)}


@pytest.fixture
def memory():
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    if MemoryFileSystem().exists(f"/{name}"):
        MemoryFileSystem().rm(f"/{name}", recursive=True)


@pytest.fixture(scope="module")
def s3_server():
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    import boto3
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/data"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["memory", "s3"])
def store(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    return pauses


# what is listed and read


def test_a_folder(store):
    names = [
        name for name in ODD_NAMES if not (store.startswith("memory") and "::" in name)
    ]  # fsspec's memory has none
    files = {name: name.encode() for name in names}
    write(store, {**files, "notes.txt": b"", ".hidden.png": b"", "sub/.git/x.png": b"", "__MACOSX/y.png": b""})
    source = open_source(store)
    assert isinstance(source, FolderSource)
    assert contents(source) == files
    assert [item.key for item in source.items()] == sorted(files)
    assert [item.size for item in source.items()] == [len(name.encode()) for name in sorted(files)]
    assert {item.key: item.label for item in source.items() if item.label is not None} == {
        "sub/日本.png": 0,
        "sub/#/%.png": 0,
    }
    assert source.other_files == {".txt": 1}
    for item in source.items():
        item.uri.encode("ascii")
        assert item.uri.startswith(f"{store}/")
        assert "#" not in item.uri


def test_labels_are_those_of_the_same_folder_on_a_disk(memory, tmp_path):
    files = {f"{folder}/{i}.png": b"x" for folder in ("b", "a-b", "a", "c/d") for i in range(2)} | {"top.png": b""}
    write(memory, files)
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert [(item.key, item.label) for item in open_source(memory).items()] == [
        (item.key, item.label) for item in open_source(tmp_path).items()
    ]


def test_one_image(store):
    write(store, {"some #1 photo.JPG": b"abc"})
    source = open_source(f"{store}/some #1 photo.JPG")
    assert contents(source) == {"some #1 photo.JPG": b"abc"}
    assert source.read(source.items()[0]) == b"abc"


def test_tars(store):
    files = {f"t-{i:03d}.tar": tar_of({**numbered(4), "00.json": b'{"label": 3, "caption": "x"}'}) for i in range(3)}
    write(store, files)
    whole = {f"t-{i:03d}.tar/{name}": data for i in range(3) for name, data in numbered(4).items()}
    assert contents(open_source(store)) == whole
    pattern = open_source(f"{store}/t-{{001..002}}.tar")
    assert contents(pattern) == {key: data for key, data in whole.items() if not key.startswith("t-000")}
    one = open_source(f"{store}/t-001.tar")
    assert contents(one) == numbered(4)
    assert (one.items()[0].label, one.items()[0].columns) == (3, {"caption": "x"})
    with pytest.raises(RequestError, match=r"1 of the 3 files of .* do not exist, .*t-003\.tar the first"):
        open_source(f"{store}/t-{{001..003}}.tar")


def test_parquet(store):
    write(store, {"p/0.parquet": parquet_of(numbered(8), label=list(range(8))), "p/1.parquet": parquet_of(numbered(2))})
    source = open_source(f"{store}/p/0.parquet")
    assert contents(source) == {f"{i:08d}-{name}": data for i, (name, data) in enumerate(numbered(8).items())}
    assert source.items().labels.to_pylist() == list(range(8))
    assert len(open_source(f"{store}/p").items()) == 10
    with ThreadPoolExecutor(4) as pool:
        reader = UriReader()
        assert dict(zip([i.key for i in source.items()], pool.map(reader.read, source.items()))) == contents(source)


def test_a_manifest_in_a_store(store, tmp_path):
    write(store, {"a/x y.png": b"1", "b.png": b"2"})
    rows = f"path,caption\na/x y.png,one\n./b.png,two\n{store}/c.png,three\n"
    write(store, {"m.csv": rows.encode()})
    source = open_source(f"{store}/m.csv")
    elsewhere = f"{store.partition('://')[2]}/c.png"
    assert [item.key for item in source.items()] == sorted(["a/x y.png", "b.png", elsewhere])
    reader = UriReader()
    items = {item.key: item for item in source.items()}
    assert reader.read(items["a/x y.png"]) == b"1"
    assert items["b.png"].columns == {"caption": "two"}
    with pytest.raises(BadImage, match=r"unreadable: .*c\.png cannot be read"):
        reader.read(items[elsewhere])
    (tmp_path / "local.csv").write_text(rows.replace("a/x", f"{store}/a/x").replace("./b", f"{store}/b"))
    local = open_source(tmp_path / "local.csv")
    assert {reader.read(item) for item in local.items() if "c.png" not in item.key} == {b"1", b"2"}


def test_clips(store, tmp_path, clips):
    data = clips.write(tmp_path / "a.mp4", 12).read_bytes()
    write(store, {"v/a.mp4": data, "x.tar": tar_of({"b.mp4": data})})
    for path, key in ((f"{store}/v", "a.mp4"), (f"{store}/v/a.mp4", "a.mp4"), (f"{store}/x.tar", "b.mp4")):
        source = open_inputs(path, clips=False)
        assert isinstance(source, ClipSource)
        (item,) = source.items()
        assert item.key == key
        assert clips.read(source.open(item).clip()) == list(range(12))


# addresses


@pytest.mark.parametrize("name", [*ODD_NAMES, "x.tar#offset=3", "%23#%", "a+b&c=d;e,f@g"])
def test_addresses_go_there_and_back(name):
    for place in (f"s3://bucket/{name}", f"memory://{name}", f"/data/{name}", f"gs://bucket/{name}"):
        uri = uri_of(place)
        assert place_of(uri) == place_of(f"{uri}#offset=17") == place
        uri.encode("ascii")
        assert "#" not in uri


# errors


def test_nothing_there(store):
    with pytest.raises(RequestError, match="does not exist: give a folder") as caught:
        open_source(f"{store}/nowhere")
    assert caught.value.exit_code == 2
    write(store, {"e/notes.txt": b"x", "cut.tar": tar_of(numbered(3))[:2000], "bad.parquet": b"PAR1 no"})
    with pytest.raises(RequestError, match=r"holds no images but other files \(1 \.txt\)"):
        open_source(f"{store}/e")
    with pytest.raises(DataError, match=r"cut\.tar is cut short"):
        open_source(f"{store}/cut.tar")
    with pytest.raises(DataError, match=r"bad\.parquet is cut short or no parquet"):
        open_source(f"{store}/bad.parquet")


def test_an_object_that_is_gone_is_a_bad_image(store):
    write(store, {"a.png": b"1", "x.tar": tar_of(numbered(3)), "x.parquet": parquet_of(numbered(3))})
    sources = [open_source(store), open_source(f"{store}/x.tar"), open_source(f"{store}/x.parquet")]
    items = [source.items()[2 * bool(place)] for place, source in enumerate(sources)]
    write(store, {"x.tar": tar_of(numbered(1))[:600]})
    with pytest.raises(BadImage, match=r"unreadable: .*shorter than when it was listed"):
        UriReader().read(items[1])
    system, folder = remote.filesystem(store)
    system.rm(folder, recursive=True)
    system.invalidate_cache()
    for item in items:
        with pytest.raises(BadImage, match=r"unreadable: .* cannot be read") as caught:
            UriReader().read(item)
        assert caught.value.reason == "unreadable"


def test_a_missing_package_is_named(monkeypatch):
    def refuse(scheme):
        raise ImportError(f"Install it to access {scheme}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", refuse)
    with pytest.raises(MissingExtra, match=r"Reading s3:// needs .*pip install 'latentae\[s3\]'"):
        open_source("s3://bucket/folder")
    with pytest.raises(RequestError, match="pip install gcsfs"):
        open_source("gs://bucket/folder")


def test_a_scheme_that_nobody_knows():
    with pytest.raises(RequestError, match="nosuch://x/y cannot be opened"):
        open_source("nosuch://x/y")


def test_no_credentials(s3_server, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match=r"s3://nobody/x may not be read \(.*\): check the credentials"):
        open_source("s3://nobody/x")
    s3fs.S3FileSystem.clear_instance_cache()


# failures that pass, and others


class Flaky(MemoryFileSystem):
    """Fails ``failures`` times, with the ``error``, before each call that succeeds."""

    protocol = "flaky"
    failures = 0
    error: Exception = ConnectionResetError("reset by peer")
    calls = 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _maybe_fail(self):
        Flaky.calls += 1
        if Flaky.calls <= Flaky.failures:
            raise Flaky.error

    def cat_file(self, *arguments, **options):
        self._maybe_fail()
        return super().cat_file(*arguments, **options)

    def ls(self, *arguments, **options):
        self._maybe_fail()
        return super().ls(*arguments, **options)

    def info(self, *arguments, **options):
        self._maybe_fail()
        return super().info(*arguments, **options)


@pytest.fixture
def flaky(memory, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "failures", 0)
    write(memory, {"a.png": b"1", "x.tar": tar_of(numbered(3)), "p/x.parquet": parquet_of(numbered(5))})
    return memory.replace("memory://", "flaky://")


class Status(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


Status.__module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        asyncio.TimeoutError(),
        OSError(16, "Slow"),
        Status(503),
        Status(429),
    ],
)
def test_failures_that_pass(flaky, monkeypatch, no_pauses, error):
    source = open_source(flaky)
    for path in (flaky, f"{flaky}/x.tar", f"{flaky}/p/x.parquet"):
        monkeypatch.setattr(Flaky, "error", error)
        monkeypatch.setattr(Flaky, "calls", 0)
        monkeypatch.setattr(Flaky, "failures", 2)
        no_pauses.clear()
        listed = open_source(path)
        assert len(no_pauses) == 2
        assert 0.5 <= no_pauses[0] < 1 <= no_pauses[1] < 2
        monkeypatch.setattr(Flaky, "calls", 0)
        assert UriReader().read(listed.items()[0]) in (b"1", *numbered(1).values())
        assert len(no_pauses) == 4
    assert len(source.items()) == 1


def test_failures_that_stay_are_the_storage_s(flaky, monkeypatch, no_pauses):
    items = [open_source(path).items()[0] for path in (flaky, f"{flaky}/x.tar", f"{flaky}/p/x.parquet")]
    monkeypatch.setattr(Flaky, "error", OSError(5, "500 InternalError"))
    monkeypatch.setattr(Flaky, "failures", 10**9)
    for item in items:
        no_pauses.clear()
        with pytest.raises(OSError, match=r"500 InternalError, 5 times in a row") as caught:
            UriReader().read(item)
        assert not isinstance(caught.value, BadImage)
        assert len(no_pauses) == 4
    with pytest.raises(RequestError, match="cannot be read"):
        open_source(flaky)


def test_what_will_not_pass_is_not_tried_again(flaky, monkeypatch, no_pauses):
    item = open_source(flaky).items()[0]
    monkeypatch.setattr(Flaky, "failures", 10**9)
    for error, raised in (
        (FileNotFoundError("gone"), BadImage),
        (PermissionError("AccessDenied"), RequestError),
        (ZeroDivisionError("a bug"), ZeroDivisionError),
    ):
        monkeypatch.setattr(Flaky, "error", error)
        with pytest.raises(raised):
            UriReader().read(item)
    assert not no_pauses


# the web


class Pages(http.server.BaseHTTPRequestHandler):
    """Files of a dict, with ranges."""

    files: dict[str, bytes] = {}
    failures = 0
    with_ranges = True

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        data = self.files.get(self.path)
        status, headers = 200, {}
        if self.path.startswith("/forbidden"):
            status, data = 403, b""
        elif Pages.failures:
            Pages.failures -= 1
            status, data = 503, b""
        elif data is None:
            status, data = 404, b""
        elif self.with_ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            status, whole = 206, len(data)
            data = data[int(first) : int(last or whole - 1) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(monkeypatch):
    files = {"/a%20b.png?x=1": b"1", "/x.tar": tar_of(numbered(3)), "/p.parquet": parquet_of(numbered(4))}
    monkeypatch.setattr(Pages, "files", files)
    monkeypatch.setattr(Pages, "failures", 0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_files_of_the_web(web, tmp_path):
    assert contents(open_source(f"{web}/x.tar")) == numbered(3)
    assert list(contents(open_source(f"{web}/p.parquet")).values()) == list(numbered(4).values())
    (tmp_path / "m.jsonl").write_text(f'{{"url": "{web}/a%20b.png?x=1", "label": 4}}\n{{"url": "{web}/forbidden.png"}}')
    source = open_source(tmp_path / "m.jsonl")
    host = web.removeprefix("http://")
    one, other = source.items()
    assert (one.key, one.uri, one.label) == (f"{host}/a%20b.png?x=1", f"{web}/a%20b.png?x=1", 4)
    assert one.size > 0
    Pages.failures = 2
    assert source.read(one) == b"1"
    with pytest.raises(BadImage, match=r"unreadable: .*forbidden\.png cannot be read \(HTTP 403\)"):
        source.read(other)
    with pytest.raises(RequestError, match="does not exist"):
        open_source(f"{web}/nowhere.tar")


def test_a_server_without_ranges(web, monkeypatch):
    item = open_source(f"{web}/x.tar").items()[1]
    monkeypatch.setattr(Pages, "with_ranges", False)
    with pytest.raises(RequestError, match="gives no parts of files: download it first"):
        UriReader().read(item)


# threads and processes


def test_a_forked_process_reads_on(s3):
    write(s3, {f"{i}.png": np.full(10, i, np.uint8).tobytes() for i in range(4)})
    source = open_source(s3)
    assert source.read(source.items()[0]) == bytes(10)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writing, source.read(source.items()[3]))
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 100) == bytes([3]) * 10
    os.waitpid(child, 0)
