"""encode, decode and reconstruct as users type them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentae.cli.main import main

MODEL = ["--model", "dc-ae-tiny"]


@pytest.fixture
def encode(seven, tmp_path):
    def run(*options):
        return main(["encode", str(seven[0]), str(tmp_path / "store"), *MODEL, "--size", "32", *options])

    return run


def test_there_and_back(encode, tmp_path, capsys):
    assert encode("--shard-size", "3") == 0
    assert "7 of 7 images in 3 shards (7 now, " in capsys.readouterr().out
    assert main(["decode", str(tmp_path / "store"), str(tmp_path / "out")]) == 0
    assert "7 images" in capsys.readouterr().out
    assert sum(path.suffix == ".png" for path in (tmp_path / "out").rglob("*")) == 7


def test_json_summaries_are_all_of_standard_output(encode, seven, tmp_path, capsys):
    (seven[0] / "bad.png").write_bytes(b"")
    assert encode("--max-bad", "1", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["inputs"], summary["encoded"], summary["reasons"]) == (8, 7, {"empty": 1})
    assert main(["decode", str(tmp_path / "store"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 7
    command = ["reconstruct", str(seven[0]), str(tmp_path / "again"), *MODEL, "--max-bad", "1", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == {"bad.png": "empty"}


def test_exit_3_beyond_max_bad_and_a_larger_one_finishes(encode, seven, capsys):
    (seven[0] / "bad.png").write_bytes(b"")
    assert encode() == 3
    assert "error: 1 of 8 inputs are bad (1 empty)" in capsys.readouterr().err
    assert encode("--max-bad", "1") == 0
    captured = capsys.readouterr()
    assert "7 of 8 images" in captured.out
    assert "none new" in captured.out
    assert "bad: 1 empty; see" in captured.err


def test_exit_2_with_a_diff_when_something_changed(encode, capsys):
    assert encode() == 0
    assert encode("--dtype", "float16") == 2
    assert 'dtype: "float32" in the store, "float16" now' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "{seven}", "{seven}/s", *MODEL], "inputs of the next run"),
        (["encode", "{tmp}/nowhere", "{tmp}/s", *MODEL], "nowhere does not exist"),
        (["encode", "{tmp}/texts", "{tmp}/s", *MODEL], "holds no images but other files"),
        (["encode", "{seven}", "{tmp}/s", "--model", "no-such-model"], "no-such-model"),
        (["encode", "{seven}", "{tmp}/s", "--model", "dc-ae-f32c32-in-1.0"], "--random-weights"),
        (["encode", "{seven}", "{tmp}/s", *MODEL, "--size", "250"], "size=250 is not a multiple of 8"),
        (["encode", "{seven}", "{tmp}/s", *MODEL, "--size", "big"], "--size big: expected a number of pixels"),
        (["encode", "{seven}", "{tmp}/s", *MODEL, "--kind", "moments"], "use kind='mode'"),
        (["decode", "{tmp}/nowhere", "{tmp}/out"], "is not a store of latents"),
        (["reconstruct", "{seven}", "{seven}/out", *MODEL], "choose another folder"),
        (["reconstruct", "{seven}", "{tmp}/out", *MODEL, "--format", "gif"], "expected one of png, webp"),
        (["reconstruct", "{seven}", "{tmp}/out", *MODEL, "--decode-steps", "4"], "DCAE decodes at once, not by steps"),
        (["reconstruct", "{seven}", "{tmp}/out", "--model", "dito-tiny", "--decode-steps", "0"], "at least 1, not 0"),
    ],
)
def test_exit_2_and_one_line_for_what_cannot_be_done(arguments, message, seven, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    assert main([word.format(tmp=tmp_path, seven=seven[0]) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "out").exists()


def test_exit_2_where_nothing_may_be_written(encode, tmp_path, capsys, monkeypatch):
    def forbid(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", forbid)  # a mode would not stop root
    assert encode() == 2
    assert f"No permission for {tmp_path / 'store'}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_exit_4_on_a_full_disk_and_the_same_command_goes_on(encode, tmp_path, capsys, monkeypatch):
    real = open

    def full(path, mode="r", *args, **kwargs):
        return real("/dev/full" if "w" in mode and "shards" in str(path) else path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("io.open", full)  # what Path.open calls
        assert encode() == 4
    assert "error: No space left while writing" in capsys.readouterr().err
    assert encode() == 0


def test_exit_4_at_a_limit_of_file_size(encode, seven, tmp_path):
    """The kernel's own refusal, in a process that has the limit from its start."""
    code = (
        "import resource, sys, torch; torch.set_num_threads(1);"
        "from latentae.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY));"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["encode", str(seven[0]), str(tmp_path / "store"), *MODEL, "--size", "128", "--shard-size", "3"]
    child = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert child.returncode == 4, child.stderr
    assert "error: No space left while writing" in child.stderr
    assert not list((tmp_path / "store").rglob("*.tmp"))
    assert not list((tmp_path / "store").rglob("shards/*.json"))
    assert main(arguments) == 0


def test_a_sampling_decoder_by_its_steps_and_seed(seven, tmp_path):
    model = ["--model", "dito-tiny"]
    assert main(["encode", str(seven[0]), str(tmp_path / "store"), *model, "--size", "32"]) == 0
    for name, options in {"a": ["--seed", "1"], "b": ["--seed", "1"], "c": []}.items():
        assert main(["decode", str(tmp_path / "store"), str(tmp_path / name), "--decode-steps", "2", *options]) == 0
    command = ["reconstruct", str(seven[0]), str(tmp_path / "d"), *model, "--decode-steps", "2", "--seed", "1"]
    assert main(command) == 0
    a, b, c, d = (np.asarray(Image.open(tmp_path / name / "cats" / "a.png")).astype(int) for name in "abcd")
    assert np.array_equal(a, b)
    assert np.abs(a - c).mean() > 1
    assert np.abs(a - d).max() <= 1  # the batch is another


def test_a_dry_run_tells_disk_and_time_and_writes_nothing(encode, seven, tmp_path, capsys):
    assert encode("--dry-run", "--shard-size", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "7 images in 3 shards; nothing was written"
    assert lines[1].startswith("disk: about ")
    assert lines[2].startswith("time: about ")
    assert not (tmp_path / "store").exists()
    assert main(["plan", str(seven[0]), str(tmp_path / "store"), *MODEL, "--size", "32", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == 7
    assert not (tmp_path / "store").exists()


def test_plan_then_jobs_then_more_inputs(encode, seven, tmp_path, capsys):
    plan = ["plan", str(seven[0]), str(tmp_path / "store"), *MODEL, "--size", "32", "--shard-size", "3"]
    assert main(plan) == 0
    assert capsys.readouterr().out == f"{tmp_path}/store: 7 inputs in 3 shards\n"
    assert encode("--shard-size", "3", "--shard-index", "1", "--shard-count", "2") == 0
    assert "3 of 7 images in 3 shards (3 now" in (out := capsys.readouterr().out)
    assert "2 shards are left to other jobs" in out
    assert encode("--shard-size", "3", "--shard-index", "0", "--shard-count", "2") == 0
    assert "7 of 7 images" in capsys.readouterr().out
    Image.new("RGB", (40, 40)).save(seven[0] / "dogs/new.png")
    assert main(plan) == 2
    assert "1 input not in the plan: dogs/new.png" in (error := capsys.readouterr().err)
    assert "--extend" in error
    assert main([*plan, "--extend", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 1
    assert encode("--shard-size", "3") == 0
    assert "8 of 8 images in 4 shards (1 now" in capsys.readouterr().out


def test_verify_tells_damage_by_its_exit_code(encode, seven, tmp_path, capsys):
    assert encode() == 0
    assert main(["verify", str(tmp_path / "store"), "--inputs"]) == 0
    assert "1 shards and 7 inputs read, 0 problems" in capsys.readouterr().out
    Image.new("RGB", (32, 32)).save(seven[0] / "dogs/a.png")
    assert main(["verify", str(tmp_path / "store")]) == 0
    assert main(["verify", str(tmp_path / "store"), "--inputs", "--json"]) == 3
    captured = capsys.readouterr()
    assert len(json.loads(captured.out.splitlines()[-1])["problems"]) == 1
    assert "dogs/a.png has changed since it was encoded" in captured.err
    path = tmp_path / "store/shards/00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    assert main(["verify", str(tmp_path / "store")]) == 3
    assert "00000.safetensors is not what was written: delete" in capsys.readouterr().err


def test_crops_sizes_and_columns_by_their_options(encode, tmp_path, capsys):
    assert encode("--size", "16,32", "--crop", "buckets", "--flip", "--columns", "none") == 0
    described = json.loads((tmp_path / "store/store.json").read_text())["preprocess"]
    assert described["size"] == [16, 32]
    assert described["crop"].startswith("bicubic to cover the bucket")
    assert described["flip"] is True
    assert encode("--size", "16,big") == 2
    assert "error: --size 16,big: expected a number of pixels, several, or 'native'." in capsys.readouterr().err
    assert encode("--columns", "caption") == 2
    assert "caption" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_what_one_writes(encode, seven, tmp_path, tree):
    assert encode("--shard-size", "2", "--processes", "2", "--batch-size", "2") == 0
    command = ["encode", str(seven[0]), str(tmp_path / "one"), *MODEL, "--size", "32", "--shard-size", "2"]
    assert main([*command, "--batch-size", "2"]) == 0
    assert tree(tmp_path / "store") == tree(tmp_path / "one")


def test_a_job_of_many_says_which_and_of_how_many(encode, capsys):
    for option in (["--shard-index", "0"], ["--shard-count", "4"]):
        assert encode(*option) == 2
        assert "--shard-index and --shard-count belong together" in capsys.readouterr().err
