"""Readers that do something else first, and workers that do not come far. In a file of their own, so that other
processes can import them."""

import errno
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latentae.store.job import ShardWorker


@dataclass(frozen=True)
class Faulty:
    """Does ``action`` before it reads ``key``, so many ``times`` in all processes together; None for any key."""

    reader: Any
    action: Callable[[], Any]
    folder: Path  # remembers how often
    key: str | None = None
    times: int = 1_000_000

    def read(self, item):
        if self.key in (None, item.key) and len(list(self.folder.iterdir())) < self.times:
            (self.folder / uuid.uuid4().hex).write_text(str(os.getpid()))
            self.action()
        return self.reader.read(item)


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleeping(seconds: float) -> Callable[[], None]:
    return partial(time.sleep, seconds)


class FullDisk(ShardWorker):
    """Encodes one shard and cannot write the next."""

    def run(self, shards, advance):
        for number, report in enumerate(super().run(shards, advance)):
            if number:
                raise OSError(errno.ENOSPC, "No space left on device", "somewhere.tmp")
            yield report


def die_while_opening(job: Any, device: str | None) -> None:
    kill_this_process()
