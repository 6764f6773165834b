"""Sending to the Hugging Face hub, seen from a small server that answers as the hub does and keeps what it is sent.

The client is real: a process of its own, with ``HF_ENDPOINT`` at the server, as its constants are read on import. The
server takes every file as part of the commit, so that nothing is sent to a storage beside it.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load

from latentae.cli.main import main
from latentae.families.presets import PRESETS

TOKEN = "hf_of_a_test"
TINY = [name for name in PRESETS if name.endswith("-tiny")]


class Hub(ThreadingHTTPServer):
    """``files`` of each repository, whether it was made ``private``, ``commits``, and all ``tokens`` that came."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = defaultdict(dict)
        self.private = {}
        self.commits = []
        self.tokens = set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        repo, _, name = self.path.lstrip("/").partition("/resolve/main/")
        content = self.server.files.get(repo, {}).get(name)
        self.answer(404 if content is None else 200, content or b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            if repo.startswith("others/"):
                return self.answer(403, b'{"error": "You may not write to others."}')
            self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return self.answer(200, json.dumps({"url": f"{self.server.address}/{repo}"}).encode())
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        if "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    assert value["encoding"] == "base64"
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
                else:
                    self.server.commits.append((repo, line["value"]["summary"]))
            url = f"{self.server.address}/{repo}/commit/{'a' * 40}"
            return self.answer(200, json.dumps({"success": True, "commitUrl": url, "commitOid": "a" * 40}).encode())
        return self.answer(200, b"{}")  # of the card, whose head it checks

    def answer(self, code, content, headers=()):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in dict(headers).items() if code == 404 else ():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


PUSH = """
import sys
import diffusers
import latentae
from latentae.cli.main import main
from latentae.loading import export_with_code

folder = sys.argv[1]
for name in sys.argv[2:]:
    latentae.create(name).push_to_hub(f"me/{name}", commit_message=f"all of {name}")

litevae = latentae.create("litevae-tiny", seed=1)
export_with_code(litevae, f"{folder}/code")
opened = diffusers.AutoModel.from_pretrained(f"{folder}/code", trust_remote_code=True)
assert type(opened).__module__ != "latentae", type(opened).__module__
opened.push_to_hub("me/opened-with-code", private=True)


def export(model, name, *options):
    return main(["export", f"{folder}/{model}", f"{folder}/{name}", "--push-to-hub", *options])


litevae.save_pretrained(f"{folder}/litevae")
latentae.create("dc-ae-tiny", seed=2).save_pretrained(f"{folder}/dc-ae")
assert export("litevae", "a", "me/command", "--with-code", "--private") == 0
assert export("dc-ae", "b", "stock") == 0
assert export("dc-ae", "c", "others/stock") == 2

from diffusers import FlowMatchEulerDiscreteScheduler
from latentae.denoisers import create_denoiser

denoiser = create_denoiser({"preset": "dit-tiny", "num_layers": 2}, (4, 4, 4), 3)
latentae.ClassConditionalFlowPipeline(
    transformer=denoiser.transformer, vae=litevae, scheduler=FlowMatchEulerDiscreteScheduler(),
    class_embedder=denoiser.class_embedder, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, latent_size=[4, 4],
).push_to_hub("me/pipeline")
"""


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """The server after everything was sent to it, and what the commands printed."""
    folder = tmp_path_factory.mktemp("push")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PUSH, str(folder), *TINY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return hub, folder, done


@pytest.mark.parametrize("name", TINY)
def test_every_family_arrives_with_weights_configuration_and_card(pushed, name):
    import latentae

    files = pushed[0].files[f"me/{name}"]
    assert set(files) == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    assert json.loads(files["config.json"])["_class_name"] == PRESETS[name].family
    weights, expected = load(files["diffusion_pytorch_model.safetensors"]), latentae.create(name).state_dict()
    assert set(weights) == set(expected)
    assert all(weights[key].equal(value) for key, value in expected.items())
    assert "library_name: diffusers" in files["README.md"].decode()
    assert (f"me/{name}", f"all of {name}") in pushed[0].commits


def test_the_token_of_the_environment_is_sent(pushed):
    assert pushed[0].tokens == {f"Bearer {TOKEN}"}


def test_a_model_that_was_opened_with_its_code_takes_it_along(pushed):
    hub, folder, _ = pushed
    files = hub.files["me/opened-with-code"]
    assert files["modeling_litevae.py"] == (folder / "code" / "modeling_litevae.py").read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == {"AutoModel": "modeling_litevae.LiteVAE"}
    assert hub.private["me/opened-with-code"] is True


def test_the_command_sends_the_folder_and_the_card_names_the_repository(pushed):
    hub, folder, done = pushed
    files = dict(hub.files["me/command"])
    card = files.pop("README.md").decode()
    assert "litevae-tiny" in card
    assert 'AutoModel.from_pretrained("me/command", trust_remote_code=True)' in card
    assert files == {path.name: path.read_bytes() for path in (folder / "a").iterdir() if path.name != "README.md"}
    assert 'from_pretrained("FOLDER"' in (folder / "a" / "README.md").read_text()
    assert hub.private["me/command"] is True
    assert f"{folder / 'a'}: sent to {hub.address}/me/command" in done.stdout.splitlines()


def test_a_name_alone_is_the_users_own_and_dc_ae_is_sent_as_the_stock_class(pushed):
    hub = pushed[0]
    assert hub.private["somebody/stock"] is False
    files = hub.files["somebody/stock"]
    assert json.loads(files["config.json"])["_class_name"] == "AutoencoderDC"
    assert 'AutoencoderDC.from_pretrained("somebody/stock")' in files["README.md"].decode()


def test_a_refusal_of_the_hub_is_one_sentence_and_the_folder_stays(pushed):
    _, folder, done = pushed
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "did not take it as others/stock (You may not write to others.)" in error
    assert f"'hf upload others/stock {folder / 'c'}' sends it then" in error
    assert (folder / "c" / "config.json").is_file()


def test_a_pipeline_arrives_whole(pushed):
    files = pushed[0].files["me/pipeline"]
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "ClassConditionalFlowPipeline"
    assert index["vae"] == ["latentae", "LiteVAE"]
    weights = "diffusion_pytorch_model.safetensors"
    for part in ("vae", "transformer"):
        assert {f"{part}/config.json", f"{part}/{weights}"} <= set(files)
    assert {"README.md", "scheduler/scheduler_config.json"} <= set(files)


@pytest.fixture
def exported(tiny_dcae, tmp_path, monkeypatch):
    """Runs export of a small model with other options, as with a token and a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    tiny_dcae.save_pretrained(tmp_path / "model")
    return lambda *options: main(["export", str(tmp_path / "model"), str(tmp_path / "out"), *options])


def test_without_a_token_nothing_is_written(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert exported("--push-to-hub", "me/vae") == 2
    assert "set HF_TOKEN, or run 'hf auth login'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_offline_is_said_before_the_work(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert exported("--push-to-hub", "me/vae") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--push-to-hub", "https://huggingface.co/me/vae"], "is no name of a repository"),
        (["--push-to-hub", "me/my vae"], "is no name of a repository"),
        (["--private"], "name it by --push-to-hub"),
    ],
)
def test_what_cannot_be_sent_is_refused_first(exported, tmp_path, capsys, options, complaint):
    assert exported(*options) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_network_is_one_sentence_and_the_folder_stays(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert exported("--push-to-hub", "me/vae") == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9 did not take it as me/vae" in error
    assert "that there is a network" in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "out" / "config.json").is_file()
