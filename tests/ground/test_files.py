"""Files that are whole or absent, whatever goes wrong while they are written."""

import errno
import hashlib
import os
import subprocess
import sys
import time

import pytest

from latentae import files
from latentae.cli.main import main
from latentae.errors import RequestError, ResumableError, explain_os_error
from latentae.files import atomic_write, read_json, remove_stale_temporaries, sha256_file, sha256_json, write_json


def test_a_file_appears_whole_under_its_name(tmp_path):
    with atomic_write(tmp_path / "a") as stream:
        stream.write(b"half")
        assert not (tmp_path / "a").exists()
        stream.write(b" and half")
    assert (tmp_path / "a").read_bytes() == b"half and half"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def write():
        with atomic_write(tmp_path / "a") as stream:
            stream.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_as_long_as_the_file_system_takes(tmp_path):
    with atomic_write(tmp_path / ("x" * 255)) as stream:
        stream.write(b"1")


def test_a_full_disk_is_resumable_and_names_the_file(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device")

    def write():
        with atomic_write(tmp_path / "store.json"):
            raise error

    with pytest.raises(OSError, match=r"store\.json"):
        write()
    explained = explain_os_error(error)
    assert isinstance(explained, ResumableError)
    assert "store.json" in str(explained)
    assert isinstance(explain_os_error(PermissionError(errno.EACCES, "", "x")), RequestError)
    assert explain_os_error(OSError(errno.EIO, "")) is None


def test_a_file_where_a_folder_is_to_be_is_no_bug_of_ours(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/below"):
        assert main(["export", "dc-ae-tiny", str(tmp_path / folder)]) == 2
        assert "is a file, or under one, where a folder is to be" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def orphan(folder):
    """A temporary file of a process that was killed while writing."""
    code = (
        "import os, sys, signal\nfrom latentae.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as s:\n    s.write(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "a")], check=False)
    (path,) = folder.iterdir()
    return path


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = orphan(tmp_path)
    host, _, rest = dead.name.split(".", 2)
    alive = tmp_path / f"{host}.{os.getpid()}.{rest}"
    elsewhere = tmp_path / f"00000000.{dead.name.split('.')[1]}.{rest}"
    foreign = tmp_path / "notes.tmp"
    for path in (alive, elsewhere, foreign):
        path.write_bytes(b"")
    remove_stale_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, elsewhere.name, foreign.name}
    old = time.time() - 7200
    os.utime(elsewhere, (old, old))
    os.utime(foreign, (old, old))
    remove_stale_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, foreign.name}


def test_temporaries_that_are_finished_meanwhile_are_no_error(tmp_path, monkeypatch):
    path = orphan(tmp_path)
    monkeypatch.setattr(files, "_is_alive", lambda process: not path.unlink())
    remove_stale_temporaries(tmp_path)


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_json_round_trip_and_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1.5, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"ä": [1.5, None]}
