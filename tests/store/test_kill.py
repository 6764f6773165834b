"""kill -9: at every write, and out of nowhere while the real command runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from latentae.store.reader import LatentStore

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_write_a_store_is_finished_to_the_same_bytes(seven, tmp_path):
    (seven[0] / "cats/broken.png").write_bytes(b"\x89PNG")
    script = Path(__file__).with_name("kill_at_every_write.py")
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(script), str(seven[0]), str(tmp_path / "work")]
    child = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["failures"] == []
    assert result["killed"] == 2 * (2 + 3 * 3 + 1)  # plan and store.json, three files of three shards, quarantine


@pytest.mark.slow
def test_killed_and_terminated_at_random_the_command_finishes_to_the_same_bytes(tmp_path, write_images, tree):
    count = 80
    write_images(tmp_path / "photos", {f"{i:03d}.png": (64, 64) for i in range(count)})

    def start(store):
        command = [sys.executable, "-m", "latentae.cli.main", "encode", tmp_path / "photos", store]
        options = ["--model", "dc-ae-tiny", "--size", "64", "--shard-size", "1", "--batch-size", "1"]
        return subprocess.Popen([*command, *options], env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    def markers():
        return len(list((tmp_path / "store" / "shards").glob("*.json")))

    done = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(tmp_path / "store")
        goal = done + random.randint(1, count // 4)
        while markers() < goal and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), errors
        assert done < markers() < count
        assert LatentStore(tmp_path / "store").verify() == []
        done = markers()

    for store in ("store", "whole"):
        process = start(tmp_path / store)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    rows = [pyarrow.parquet.read_table(p)["key"].to_pylist() for p in (tmp_path / "store/shards").glob("*.parquet")]
    assert sorted(key for keys in rows for key in keys) == [f"{i:03d}.png" for i in range(count)]
