"""Weight files are fetched only when asked, into the documented folder, whole and checked or not at all."""

import hashlib
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentae import weights
from latentae.bench.fetching import fetch_weight_file, fetch_weights
from latentae.errors import MissingWeights, RequestError
from latentae.weights import WEIGHT_FILES, find_weight_file, search_folders, weights_from

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def server():
    """A server on this machine; ``/short`` breaks off and ``/absent`` is not there."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/absent":
                self.send_error(404)
                return
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000] if self.path == "/short" else CONTENT)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.asked, server.address = asked, f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def published(tmp_path, monkeypatch, server):
    """Makes the file of a path on the server the published one; returns where it must arrive."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(tmp_path / "own"))

    def publish(path, content=CONTENT):
        sha256 = hashlib.sha256(content).hexdigest()
        file = replace(WEIGHT_FILES["vgg16"], url=server.address + path, sha256_prefix=sha256[:8])
        monkeypatch.setitem(WEIGHT_FILES, "vgg16", file)
        return tmp_path / "own" / file.name

    return publish


@pytest.mark.parametrize("path", ["/file", "/moved"])
def test_it_arrives_whole_and_once(published, server, path):
    target = published(path)
    assert fetch_weight_file("vgg16") == target
    assert target.read_bytes() == CONTENT
    requests = len(server.asked)
    assert fetch_weight_file("vgg16") == find_weight_file("vgg16") == target
    assert len(server.asked) == requests
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_metrics_bring_their_files(published, server):
    target = published("/file")
    fetch_weights(["psnr", "ms_ssim"])
    assert not server.asked
    fetch_weights(["dists", "lpips_vgg", "ssim"])
    assert target.exists()
    assert len(server.asked) == 1


def test_looking_for_it_never_fetches(published, server):
    published("/file")
    with pytest.raises(MissingWeights, match="--fetch-weights"):
        find_weight_file("vgg16")
    assert not server.asked


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/file", b"another", r"gave 1,280,000 bytes of 1,280,000 that are not the published file"),
        ("/short", CONTENT, r"gave 1,000 bytes of 1,280,000 that are not|IncompleteRead|cannot be fetched"),
        ("/absent", CONTENT, r"cannot be fetched \(Not Found\)"),
    ],
)
def test_what_is_not_the_published_file_leaves_nothing(published, path, content, message):
    target = published(path, content)
    with pytest.raises(RequestError, match=message):
        fetch_weight_file("vgg16")
    assert list(target.parent.iterdir()) == []


def test_without_a_server_it_says_so(published, server, monkeypatch):
    published("/file")
    gone = replace(WEIGHT_FILES["vgg16"], url="http://127.0.0.1:9/file")
    monkeypatch.setitem(WEIGHT_FILES, "vgg16", gone)
    with pytest.raises(RequestError, match=r"cannot be fetched .*copy it to .*own/vgg16-397923af\.pth"):
        fetch_weight_file("vgg16")


def test_a_folder_given_by_hand_comes_first(published, tmp_path):
    published("/file")
    before = search_folders()
    with weights_from(tmp_path / "given"):
        assert search_folders() == [tmp_path / "given", *before]
        with weights_from(None):
            assert search_folders()[0] == tmp_path / "given"
        assert fetch_weight_file("vgg16").parent == tmp_path / "given"
    assert search_folders() == before
    assert weights.search_folders()[0].name == "own"
