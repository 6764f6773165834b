"""Jobs on small images, what goes wrong with them, and runs in processes that tests can kill."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def faults(monkeypatch):
    """What goes wrong, importable in the workers too."""
    monkeypatch.syspath_prepend(str(HERE))
    import faults

    return faults


@pytest.fixture
def memory(tmp_path):
    """A folder by which processes remember what they did."""
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


@pytest.fixture
def job_for(tmp_path, write_images):
    """Begin a store of 18 images, one of them broken, in six shards, and return the job of encoding it."""
    from latentae.store.planning import Request, job_of, open_request, plan_store

    write_images(tmp_path / "photos", {f"{i:03d}.png": (32, 32) for i in range(18)})
    (tmp_path / "photos/004.png").write_bytes(b"\x89PNG")

    def begin(name: str):
        request = Request(tmp_path / "photos", tmp_path / name, "dc-ae-tiny", size=32, shard_size=3, device="cpu")
        planned = plan_store(open_request(request))
        return job_of(planned.opened, planned.plan, planned.fingerprint, batch_size=2, by_name=True)

    return begin


@pytest.fixture
def published(tree):
    """The files of a store by name and hash, but for those that killed processes have left half written."""

    def files(store: Path) -> dict[str, str]:
        return {name: value for name, value in tree(store).items() if not name.endswith(".tmp")}

    return files


@pytest.fixture
def whole(job_for, published):
    """The files of a store that this process has made alone."""
    from latentae.store.engines import run_local

    job = job_for("whole")
    for _ in run_local(job, range(6), processes=1, devices=["cpu"], advance=lambda inputs, bad: None):
        pass
    return published(job.store)


class Run:
    """A driver in a process of its own, with all its relatives, which are marked by their environment."""

    def __init__(self, job, folder: Path, engine: str = "local"):
        self.mark = f"LATENTAE_TEST={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        path = folder / "job.pickle"
        path.write_bytes(pickle.dumps(job))
        environment = {**os.environ, name: value, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "run_engine.py"), str(path), engine]
        self.driver = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def alive(self, but: str | None = None) -> list[int]:
        """Its processes, without those whose command line has the word ``but``."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                command = path.with_name("cmdline").read_text()
                if self.mark.encode() in path.read_bytes() and not (but and but in command):
                    found.append(int(path.parent.name))
            except OSError:  # has ended, or is somebody else's
                continue
        return found

    def wait_for(self, what, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """Start a run; nothing of it is left when the test ends."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("looks for processes in /proc")
    runs = []

    def begin(job, engine: str = "local") -> Run:
        runs.append(Run(job, tmp_path, engine))
        return runs[-1]

    yield begin
    for run in runs:
        for process in run.alive():
            os.kill(process, 9)
        run.driver.communicate()


@pytest.fixture
def nothing_left():
    """Whether this process has neither workers nor zombies."""

    def check() -> bool:
        stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
        zombies = [parent for state, parent, *_ in stats if state == "Z" and int(parent) == os.getpid()]
        return not zombies and not multiprocessing.active_children()

    return check
