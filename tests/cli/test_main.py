"""The command line as its users meet it: help at once, one-line errors, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latentae.cli import main as cli
from latentae.errors import DataError, RequestError, ResumableError

HEAVY = ["torch", "diffusers", "pytorch_lightning", "numpy", "jsonargparse"]


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_imports_nothing_heavy(command):
    argv = ["--help"] if command is None else [command, "--help"]
    code = (
        "import sys\nfrom latentae.cli.main import main\n"
        f"try: main({argv!r})\nexcept SystemExit as e: assert not e.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: latentae" in result.stdout


def test_every_command_has_a_file_and_every_file_a_command():
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "main"}
    assert files == set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["encod"], "did you mean 'encode'?"),
        (["zzz"], "'latentae --help' lists them"),
        (["presets", "--jsn"], "--jsn is not an option of latentae presets; did you mean --json?"),
        (["export", "dc-ae-tiny"], "the following arguments are required: DIR"),
        (["info", "dc-ae-tinny"], "did you mean dc-ae-tiny"),
        (["export", "dc-ae-f32c32-in-1.0", "x"], "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"),
    ],
)
def test_mistakes_get_one_line_and_exit_2(argv, message, capsys):
    try:
        code = cli.main(argv)
    except SystemExit as error:
        code = error.code
    stderr = capsys.readouterr().err
    assert code == 2
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("a"), 2),
        (DataError("a"), 3),
        (ResumableError("a"), 4),
        (OSError(28, "No space left on device", "out.bin"), 4),
        (PermissionError(13, "Permission denied", "out.bin"), 2),
        (OSError(30, "Read-only file system", "out.bin"), 2),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
        (ZeroDivisionError("ours"), 1),
        (OSError(5, "Input/output error", "x"), 1),
    ],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "run_command", fail)
    assert cli.main(["info", "x"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys):
    assert cli.main(["info", "no-such-model", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m latentae --help | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 141)
    assert "Traceback" not in result.stderr


def test_no_arguments_is_help(capsys):
    assert cli.main([]) == 0
    assert "latentae demo" in capsys.readouterr().out


def test_version(capsys):
    import latentae

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentae {latentae.__version__}\n"


def test_presets_and_info(capsys, tiny_dcae, tmp_path):
    assert cli.main(["presets"]) == 0
    assert "dc-ae-f128c512-mix-1.0" in capsys.readouterr().out
    tiny_dcae.save_pretrained(tmp_path)
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class"] == "DCAE"
    assert facts["parameters"] == sum(p.numel() for p in tiny_dcae.parameters())


def test_presets_count_arithmetic_beside_stable_diffusions(capsys, monkeypatch, tiny_dcae):
    from latentae.bench.speed import count_gmac
    from latentae.codec import LatentCodec

    monkeypatch.setattr("latentae.families.presets.presets", lambda: ["dc-ae-tiny"])
    assert cli.main(["presets", "--macs", "--json"]) == 0
    tiny, reference = json.loads(capsys.readouterr().out)
    with_weights = count_gmac(LatentCodec(tiny_dcae), 256)
    assert (tiny["encoder_gmac"], tiny["decoder_gmac"]) == tuple(with_weights.values())
    # LiteVAE (arXiv 2405.14477) states 34.16 M parameters and 137 "GFLOPs" for this encoder
    assert reference["encoder_millions"] == 34.16
    assert reference["encoder_gmac"] == pytest.approx(137, rel=0.01)
    assert cli.main(["presets", "--macs"]) == 0
    header, *_, last = capsys.readouterr().out.splitlines()
    assert "encoder GMAC" in header
    assert "SD-VAE" in last


def test_export_writes_a_stock_folder_and_does_not_overwrite(tiny_dcae, tmp_path, capsys):
    from diffusers import AutoencoderDC

    tiny_dcae.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "model"), str(out)]) == 0
    assert isinstance(AutoencoderDC.from_pretrained(out), AutoencoderDC)
    assert cli.main(["export", str(tmp_path / "model"), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_export_needs_no_latentae_to_be_opened(tiny_dcae, tmp_path):
    from latentae.loading import export

    export(tiny_dcae, tmp_path)
    code = (
        "import sys; sys.modules['latentae'] = None\nfrom diffusers import AutoencoderDC, AutoModel\n"
        f"assert type(AutoencoderDC.from_pretrained({str(tmp_path)!r})) is AutoencoderDC\n"
        f"assert type(AutoModel.from_pretrained({str(tmp_path)!r})) is AutoencoderDC"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
