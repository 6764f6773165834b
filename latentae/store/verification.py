"""Whether a store still is what was written, and its inputs what was read."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentae.console import Progress
from latentae.data.clips import ClipReader
from latentae.data.decode import BadImage
from latentae.data.sources import Item
from latentae.data.sources.reading import UriReader
from latentae.errors import ResumableError
from latentae.store.configuration import check_counts
from latentae.store.plan import Shard
from latentae.store.reader import LatentStore
from latentae.store.shard import read_rows, shard_files


@dataclass(frozen=True)
class Verification:
    """How many shards and inputs were read, how many are not encoded yet, and one sentence for each problem."""

    shards: int
    shards_left: int
    inputs: int
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify_store(path: str | Path, *, inputs: bool = False, workers: int = 4) -> Verification:
    """Hash the plan and the files of every shard that has a marker, and with ``inputs`` also what they were made of.

    Raises:
        RequestError: ``path`` is no store.
        ResumableError: the storage of the inputs does not answer.
    """
    check_counts(workers=workers)
    store = LatentStore(path)
    shards = [shard for shard in store.plan.shards if shard_files(store.path, shard)[2].exists()]
    problems, read = store.damages_of_plan(), 0
    with ThreadPoolExecutor(workers) as pool, Progress("verify", len(shards), "shards") as progress:
        for shard, found in zip(shards, pool.map(store.damages, shards)):
            problems += found
            if inputs and not found:
                changed = list(pool.map(lambda row: _changed(store, row), _encoded(store, shard)))
                read += len(changed)
                problems += [sentence for sentence in changed if sentence]
            progress.advance(problems=len(problems))
    return Verification(len(shards), len(store.plan.shards) - len(shards), read, problems)


def _encoded(store: LatentStore, shard: Shard) -> Iterator[tuple[Item, str]]:
    rows = read_rows(store.path, shard, ["key", "uri", "bytes", "sha256", "status"])
    for key, uri, size, sha256, status in zip(*rows.values()):
        if status == "ok":
            yield Item(key, uri, size), sha256


def _changed(store: LatentStore, row: tuple[Item, str]) -> str | None:
    item, expected = row
    try:
        read = UriReader().read
        found = ClipReader().sha256(item) if store.holds_clips else hashlib.sha256(read(item)).hexdigest()
    except BadImage as error:
        return f"{item.uri} cannot be read any more: {error}"
    except OSError as error:
        raise ResumableError(f"{item.uri} cannot be read ({error}): try again when its storage is back.") from error
    return None if found == expected else f"{item.uri} has changed since it was encoded: encode into a new store."
