"""Encode in processes that are killed at every single write; print, as JSON, where the store did not recover.

    python kill_at_every_write.py IMAGES WORK

One process imports, and forks a child for each step: the child encodes, and kills itself right before, or right after,
its n-th rename or link; another child runs the same command again.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

import latentae
import latentae.store.encode  # here, so that no child has to import it
from latentae.cli.main import main

torch.set_num_threads(1)  # no threads may run when a process forks
latentae.load("dc-ae-tiny")  # imports the rest


def encode(images: Path, store: Path) -> int:
    options = ["--model", "dc-ae-tiny", "--size", "32", "--shard-size", "3", "--batch-size", "2", "--max-bad", "1"]
    return main(["encode", str(images), str(store), *options])


def in_child(function) -> int:
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(step: int, after: bool) -> None:
    calls = 0

    def deadly(real):
        def call(source, target):
            nonlocal calls
            calls += 1
            if calls == step and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    os.replace, os.link = deadly(os.replace), deadly(os.link)


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def run(images: Path, work: Path) -> dict:
    assert in_child(lambda: encode(images, work / "whole")) == 0
    expected = snapshot(work / "whole")
    failures, killed = [], 0
    for after in (False, True):
        for step in range(1, 100):
            store = work / f"{'after' if after else 'before'}-{step}"

            def until_killed(store=store, step=step, after=after):
                kill_at(step, after)
                return encode(images, store)

            first = in_child(until_killed)
            if first == 0:  # the run has fewer steps than that
                break
            killed += first == -signal.SIGKILL
            second = in_child(lambda store=store: encode(images, store))
            if (first, second) != (-signal.SIGKILL, 0) or snapshot(store) != expected:
                failures.append(
                    {"step": step, "after": after, "codes": [first, second], "files": sorted(snapshot(store))}
                )
    return {"killed": killed, "failures": failures}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]))))
