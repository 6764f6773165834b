"""Families that diffusers does not have, exported with their code: opened without latentae, with equal results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel
from safetensors.torch import save_file

import latentae
from latentae.cli.main import main
from latentae.families.presets import PRESETS, family_class
from latentae.loading import export, export_with_code, flattening, load
from latentae.loading.export import STOCK_CLASS
from latentae.loading.flattening import flatten

TINY = [(name, {}) for name in PRESETS if PRESETS[name].is_tiny]
TINY += [("dc-ae-tiny", {"quantizer": {"kind": "vq", "codes": 64}})]
TINY += [("dc-ae-tiny", {"quantizer": {"kind": "fsq", "levels": [5, 4, 3, 3, 3, 3, 3, 3]}})]
TINY += [("litevae-tiny", {"decoder_norm": "self_modulated", "wavelet": "db2"})]  # folded, and taps of PyWavelets
FAMILIES = sorted({preset.family for preset in PRESETS.values()})

# Runs without the package: its name is blocked, and -I keeps this folder and the environment's paths out.
OPEN_AND_COMPARE = """
import sys
sys.modules["latentae"] = None
import torch
from diffusers import AutoModel
from safetensors.torch import load_file
torch.set_num_threads(1)
folder, expected = sys.argv[1], load_file(sys.argv[2])
autoencoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert not autoencoder.training
with torch.no_grad():
    z = autoencoder.encode(expected["pixels"]).latent_dist.mode()
    assert torch.equal(z, expected["latents"]), (z - expected["latents"]).abs().max()
    sample = autoencoder.decode(z).sample
    assert (sample - expected["sample"]).abs().max() <= float(sys.argv[4]), (sample - expected["sample"]).abs().max()
    autoencoder.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    assert (autoencoder.decode(z).sample - expected["tiled"]).abs().max() <= float(sys.argv[4])
assert autoencoder.config.spatial_compression_ratio == int(sys.argv[3])
print(type(autoencoder).__module__, len([name for name in sys.modules if name.split(".")[0] == "latentae"]))
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case, marks=[] if case[0] == "litevae-tiny" else [pytest.mark.slow]) for case in TINY],
)
def test_opens_where_latentae_is_not_and_computes_the_same(name, options, randomise, tmp_path, monkeypatch):
    autoencoder = randomise(latentae.create(name, **options))
    folder = tmp_path / "exported"
    code = export_with_code(autoencoder, folder)
    autoencoder = autoencoder.folded()
    assert code.name == f"modeling_{type(autoencoder).__name__.lower()}.py"

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    side = 4 * autoencoder.spatial_compression_ratio
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent_dist.mode()
        tensors = {"pixels": pixels, "latents": z, "sample": autoencoder.decode(z).sample}
        autoencoder.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
        tensors["tiled"] = autoencoder.decode(z).sample
    torch.set_num_threads(threads)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "expected.safetensors")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # steps of a sampler enlarge what the alignment of weights in a mapped file changes in the last bits
    tolerance = 1e-5 if getattr(autoencoder, "samples", False) else 0
    facts = [str(autoencoder.spatial_compression_ratio), str(tolerance)]
    arguments = [str(folder), str(tmp_path / "expected.safetensors"), *facts]
    done = subprocess.run(
        [sys.executable, "-I", "-c", OPEN_AND_COMPARE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [code.stem, "1"], "the blocked name alone"
    assert "packages that were not found" not in done.stderr

    # the same folder, where latentae is installed: its own class, and equal weights
    opened = load(folder)
    assert type(opened) is type(autoencoder)
    assert all(torch.equal(a, b) for a, b in zip(opened.state_dict().values(), autoencoder.state_dict().values()))
    opened.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


SAVE_PIPELINE = """
import sys
from diffusers import AutoModel, DDIMScheduler, StableDiffusionPipeline
sys.modules["latentae"] = None
vae = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
rest = dict.fromkeys(["unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
pipe = StableDiffusionPipeline(vae=vae, scheduler=DDIMScheduler(), requires_safety_checker=False, **rest)
pipe.save_pretrained(sys.argv[2])
"""
OPEN_PIPELINE = """
import sys
from diffusers import StableDiffusionPipeline
sys.modules["latentae"] = None
rest = dict.fromkeys(["unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"])
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True, **rest)
print(type(pipe.vae).__name__, sum(p.numel() for p in pipe.vae.parameters()))
"""


def test_a_pipeline_that_holds_one_opens_in_another_process(tmp_path, monkeypatch):
    autoencoder = latentae.create("litevae-tiny")
    export_with_code(autoencoder, tmp_path / "model")
    for number, script in enumerate((SAVE_PIPELINE, OPEN_PIPELINE)):
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / f"modules{number}"))
        command = [sys.executable, "-I", "-c", script, str(tmp_path / "model"), str(tmp_path / "pipeline")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["LiteVAE", str(sum(p.numel() for p in autoencoder.parameters()))]


@pytest.mark.parametrize("name", ["dito-tiny", pytest.param("swycc-tiny", marks=pytest.mark.slow)])
def test_code_of_a_diffusion_decoder_beside_the_package_itself(name, randomise, tmp_path, monkeypatch):
    """Both define the operator that draws the canvas; neither takes it from the other."""
    ours = randomise(latentae.create(name))
    export_with_code(ours, tmp_path / "model")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = AutoModel.from_pretrained(str(tmp_path / "model"), trust_remote_code=True)
    assert not isinstance(theirs, latentae.Autoencoder)
    z = torch.randn(2, 4, 3, 2)
    with torch.no_grad():
        expected = ours.decode(z).sample
        for autoencoder in (theirs, ours):
            compiled = torch.compile(lambda z, a=autoencoder: a.decode(z).sample, fullgraph=True, backend="eager")
            torch.testing.assert_close(autoencoder.decode(z).sample, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(compiled(z), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


SAVE_AGAIN = """
import sys
sys.modules["latentae"] = None
from diffusers import AutoModel
first = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)  # which makes the class anew
first.save_pretrained(sys.argv[2])
second = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
assert all((a == b).all() for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
assert {**first.config, "_name_or_path": ""} == {**second.config, "_name_or_path": ""}
"""


def test_what_diffusers_saves_again_keeps_its_code(randomise, tmp_path, monkeypatch):
    code = export_with_code(randomise(latentae.create("litevae-tiny")), tmp_path / "exported")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = [str(tmp_path / "exported"), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SAVE_AGAIN, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "again" / code.name).read_text() == code.read_text()
    assert type(load(tmp_path / "again")) is latentae.LiteVAE


def test_without_trust_diffusers_says_what_to_do(tiny_dcae, tmp_path):
    export_with_code(tiny_dcae, tmp_path)
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_python_that_linter_and_formatter_accept(family, tmp_path):
    text = flatten(family_class(family))
    code = tmp_path / "modeling.py"
    code.write_text(text)
    assert "import latentae" not in text
    assert "from latentae" not in text
    assert re.search(rf"class {family}\((Diffusion)?Autoencoder\):", text)
    assert ".__module__ =" not in text
    config = str(Path(__file__).parents[2] / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", config, str(code)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


# Sources that cannot be joined

BASE = "class Base:\n    pass\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make modules of a small package from texts, and flatten the class ``Family`` in its module ``family``."""

    def make(**texts):
        folder = tmp_path / "small_package"
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(flattening, "PACKAGE", "small_package")
        cls = type("Family", (), {"__init__": lambda self: None})
        cls.__init__.__module__ = "small_package.family"
        return flatten(cls)

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "small_package"]:
        del sys.modules[name]


FAMILY = """from small_package.other import helper


class Family:
    def run(self):
        return helper() + mine()


"""


def test_only_what_is_needed_is_copied_with_its_comments(package):
    text = package(
        family='"""The family."""\n\nimport math\n\nfrom small_package.other import helper\n\nUNUSED = 1\n# twice\n'
        "FACTOR = math.pi  # pi\n\n\nclass Family:\n    def run(self):\n"
        "        from small_package.late import late\n\n        return helper() * FACTOR + late()\n",
        other='import json\nimport math\n\n\ndef unused():\n    return json\n\n\ndef helper():\n    return math.e\n',
        late="def late():\n    return 1\n",
    )  # fmt: skip
    assert "UNUSED" not in text
    assert "json" not in text
    assert "# twice\nFACTOR = math.pi  # pi" in text
    assert text.count("import math") == 1
    namespace = {}
    exec(compile(text, "flattened", "exec"), namespace)
    assert namespace["Family"]().run() == pytest.approx(2.718281828 * 3.141592654 + 1)


@pytest.mark.parametrize(
    ("other", "family", "complaint"),
    [
        ("mine = 1\nhelper = [mine].copy\n", "mine = 2\n", "mine of"),
        ("import math as m\nhelper = m.e\n", "import cmath as m\nmine = m.e\n", "m is"),
        ("import math as mine\nhelper = mine.e\n", "mine = 2\n", "mine of"),
        ("any = 1\nhelper = any\n", "mine = helper\n", "builtins"),
        ("import os.path\nhelper = os.path\n", "mine = helper\n", "without a name"),
        ("helper = 1\nprint(helper)\n", "mine = helper\n", "defines nothing"),
        ("helper = 1\n", "from small_package.other import helper as mine\n", "by its own name"),
    ],
)
def test_what_cannot_be_joined_is_refused(package, other, family, complaint):
    with pytest.raises(ValueError, match=complaint):
        package(family=FAMILY + family, other=other)


# The command and the card


def family_without_stock_class(monkeypatch):
    """DC-AE as if diffusers did not have it."""
    monkeypatch.delitem(STOCK_CLASS, "DCAE")


def test_the_command_says_in_one_line_what_opens_the_folder(tiny_dcae, tmp_path, capsys, monkeypatch):
    tiny_dcae.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    assert main(["export", model, str(tmp_path / "stock"), "--with-code"]) == 0
    assert "diffusers.AutoencoderDC.from_pretrained" in capsys.readouterr().out
    assert not list((tmp_path / "stock").glob("*.py")), "stock diffusers has this code"

    family_without_stock_class(monkeypatch)
    assert main(["export", model, str(tmp_path / "plain")]) == 0
    out = capsys.readouterr().out
    assert "latentae.load(" in out
    assert "--with-code" in out
    assert len(out.splitlines()) == 1
    assert not list((tmp_path / "plain").glob("*.py"))
    assert isinstance(load(tmp_path / "plain"), latentae.DCAE)

    assert main(["export", model, str(tmp_path / "code"), "--with-code"]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert json.loads((tmp_path / "code" / "config.json").read_text())["auto_map"] == {
        "AutoModel": "modeling_dcae.DCAE"
    }
    files = {path.name for path in (tmp_path / "code").iterdir()}
    assert files == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "modeling_dcae.py"}


def test_the_card_opens_the_folder_and_keeps_what_people_write(tiny_dcae, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    export(tiny_dcae, tmp_path / "stock")
    export_with_code(tiny_dcae, tmp_path / "code")
    for name in ("stock", "code"):
        card = (tmp_path / name / "README.md").read_text()
        for fact in ("f8c8", "arXiv 2410.10733", "`dc-ae-tiny`", "0.05 M parameters"):
            assert fact in card
        program = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / name))
        namespace = {}
        exec(program, namespace)
        assert namespace["posterior"].latent.shape == (1, 8, 32, 32)

    assert "samples in" not in card

    card = tmp_path / "stock" / "README.md"
    card.write_text(card.read_text().replace("8", "9"))
    export(tiny_dcae, tmp_path / "stock")
    assert "f8c8" in card.read_text(), "its own text is written anew"
    card.write_text("mine")
    export(tiny_dcae, tmp_path / "stock")
    assert card.read_text() == "mine"


def test_the_card_of_a_sampling_decoder_says_how(tmp_path):
    export(latentae.create("swycc-tiny", num_inference_steps=1, decode_seed=7), tmp_path)
    card = (tmp_path / "README.md").read_text()
    for fact in (
        "`swycc-tiny`",
        "3.48 M parameters",
        "samples in 1 step of",
        "predicts x0 on the cosine path",
        "seed 7",
    ):
        assert fact in card
    export(latentae.create("swycc-tiny", decoder_layers=2), tmp_path)
    assert "`swycc" not in (tmp_path / "README.md").read_text(), "another network than that of any preset"
