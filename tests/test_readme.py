"""The README's code blocks run, its tables are what the code says, and its two commands install what they use."""

import re
import shlex
from pathlib import Path

import pytest

import latentae
from latentae.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("latentae ")
]


@pytest.mark.slow
def test_code_blocks_run(photo_folder, monkeypatch, capsys):
    monkeypatch.chdir(photo_folder.parent)  # holds photos/
    for command in COMMANDS:
        assert main(shlex.split(command)[1:]) == 0, command
    namespace: dict = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), namespace)
        for expected in re.findall(r"# (torch\.Size\(.*?\))$", block, re.MULTILINE):
            assert expected in capsys.readouterr().out


def test_there_is_something_to_run():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 8


def test_every_command_is_shown():
    from latentae.cli.main import COMMANDS as known

    for command in known:
        assert f"latentae {command}" in README, command


def test_preset_table_is_what_the_code_says():
    from latentae.families.presets import describe

    for name in latentae.presets():
        facts = describe(name)
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == facts["latents"]
        assert cells[2] == f"{facts['encoder_millions']:.2f} + {facts['decoder_millions']:.2f}"
        assert cells[3] == facts["source"]
