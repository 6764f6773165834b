"""Opening and writing: ours, stock classes, runs, the authors' files, and what must be refused."""

import json
import pickle
import socket

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import save_file

import latentae
from latentae import DCAE
from latentae.errors import MissingWeights, RequestError
from latentae.families.presets import PRESETS
from latentae.loading import export, load, load_model, weights_hash


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_our_folder_and_its_stock_export(tiny_dcae, tmp_path):
    tiny_dcae.save_pretrained(tmp_path / "ours")
    assert export(tiny_dcae, tmp_path / "stock") == "AutoencoderDC"
    for name in ("ours", "stock"):
        opened = load(tmp_path / name)
        assert isinstance(opened, DCAE)
        assert not opened.training
        assert same(opened, tiny_dcae)
        assert same(AutoencoderDC.from_pretrained(tmp_path / name), tiny_dcae)
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["_class_name"] == "AutoencoderDC"


def test_stock_classes_stay_stock_and_export_as_they_are(tmp_path):
    stock = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    stock.save_pretrained(tmp_path / "kl")
    opened = load(str(tmp_path / "kl"))
    assert type(opened) is AutoencoderKL
    assert export(opened, tmp_path / "again") == "AutoencoderKL"
    assert same(AutoencoderKL.from_pretrained(tmp_path / "again"), stock)


def test_training_checkpoints_open_with_the_average_if_there_is_one(tiny_dcae, tmp_path):
    config = json.loads(tiny_dcae.to_json_string())
    raw = {f"autoencoder.{key}": value + 1 for key, value in tiny_dcae.state_dict().items()}
    about = {"class_name": "DCAE", "config": config, "format": 1}
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = {"state_dict": {**raw, "adversary.x": torch.ones(1)}, "latentae": about}
    torch.save({**checkpoint, "latentae_ema": tiny_dcae.state_dict()}, folder / "last.ckpt")
    assert same(load(tmp_path / "run"), tiny_dcae)
    torch.save(checkpoint, tmp_path / "raw.ckpt")
    assert torch.equal(load(tmp_path / "raw.ckpt").encoder.conv_out.bias, tiny_dcae.encoder.conv_out.bias + 1)


def test_hub_folders_of_the_authors_name_their_preset(tmp_path):
    (tmp_path / "config.json").write_text('{"model_name": "dc-ae-f32c32-in-1.0"}')
    with pytest.raises(MissingWeights, match=r"model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_the_authors(golden_tool, tmp_path, suffix):
    golden = json.loads(golden_tool.GOLDEN.read_text())["sana"]
    weights = golden_tool.formula_weights(golden["shapes"])
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    opened = load(path)
    assert isinstance(opened, DCAE)
    assert opened.config.upsample_block_type == "interpolate"
    with torch.no_grad():
        z = opened.encode(golden_tool.formula_pixels()).latent
    assert golden_tool.samples(z, z)["latents"] == pytest.approx(golden["latents"], abs=1e-4)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"latentae": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.ckpt", "evil2.pt"):
        with pytest.raises(RequestError, match="refused"):
            load(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


def test_a_folder_whose_weights_are_such_a_pickle_is_refused(tiny_dcae, tmp_path, capsys):
    tiny_dcae.save_config(tmp_path)
    torch.save(Evil(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(RequestError):
        load(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_damaged_files_are_explained(tiny_dcae, tmp_path):
    tiny_dcae.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises((RequestError, MissingWeights), match=str(tmp_path)):
        load(tmp_path)
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(RequestError, match="checkpoint"):
        load(tmp_path / "half.ckpt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match="not JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], torch.zeros(3), {"encoder.stages.0": torch.zeros(1)}, {"latentae": {}}, {"latentae": 3},
        {"latentae": {"class_name": "DCAE", "config": {"latent_channels": "many"}}, "state_dict": {}},
    ],
)  # fmt: skip
def test_other_checkpoints_are_explained(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(RequestError) as error:
        load(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "3", '{"_class_name": ["x"]}', "{}"])
def test_other_configurations_are_explained(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RequestError) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_cut_short_is_explained(tmp_path):
    torch.save({"state_dict": torch.zeros(100_000)}, tmp_path / "whole.ckpt")
    content = (tmp_path / "whole.ckpt").read_bytes()
    for length in (0, 10, 1000, len(content) - 10):
        (tmp_path / "cut.ckpt").write_bytes(content[:length])
        with pytest.raises(RequestError, match=r"cut\.ckpt"):
            load(tmp_path / "cut.ckpt")


def test_a_full_disk_while_exporting_is_the_operating_systems_error(tiny_dcae, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(tiny_dcae), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left") as error:
        export(tiny_dcae, tmp_path / "out")
    assert error.value.errno == 28


def test_weights_of_another_shape_are_explained(tiny_dcae, tmp_path):
    tiny_dcae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 4}))
    with pytest.raises(RequestError, match="cannot be opened as DCAE"):
        load(tmp_path)


def test_what_is_not_there(tmp_path):
    for name in ("dc-ae-tini", "no-such-folder/", "a/b/c", str(tmp_path / "x"), "x.safetensors"):
        with pytest.raises(RequestError) as error:
            load(name)
        assert "\n" not in str(error.value)
    with pytest.raises(RequestError, match="did you mean dc-ae-tiny"):
        load("dc-ae-tini")
    with pytest.raises(MissingWeights, match="holds no autoencoder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(RequestError, match="no autoencoder of latentae or diffusers"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RequestError, match="not a checkpoint"):
        load(tmp_path / "notes.txt")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def fail(*_):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(MissingWeights, match="some-org/some-model") as error:
        load("some-org/some-model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in PRESETS if not PRESETS[name].is_tiny])
def test_presets_without_weights_are_refused_unless_random_ones_are_asked_for(name):
    with pytest.raises(
        MissingWeights, match=PRESETS[name].hub_id.split("/")[0] if PRESETS[name].hub_id else "latentae fit"
    ):
        load(name)
    with torch.device("meta"):
        assert load_model(name, random_weights=True) is not None


def test_tiny_presets_load():
    assert isinstance(load("dc-ae-tiny"), DCAE)


def test_the_hash_follows_weights_and_nothing_else(tiny_dcae, tmp_path):
    before = weights_hash(tiny_dcae)
    tiny_dcae.register_to_config(scaling_factor=3.0)
    assert weights_hash(tiny_dcae) == before
    export(tiny_dcae, tmp_path)
    assert weights_hash(load(tmp_path)) == before
    tiny_dcae.encoder.conv_out.bias.data[0] += 1e-6
    assert weights_hash(tiny_dcae) != before
    assert len(weights_hash(tiny_dcae.bfloat16())) == 64


def test_face():
    assert latentae.presets() == list(PRESETS)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = latentae.nonsense
    with pytest.raises(RequestError, match="no argument widht"):
        latentae.create("dc-ae-tiny", widht=3)
