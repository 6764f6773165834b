"""The plan of a store: which input goes into which shard, decided before the first image is decoded.

Inputs in the order of their keys are cut into shards of a fixed number. Where images keep their own sizes, or clips
their lengths, they are first grouped by padded shape, so that the latents of a shard are one tensor. A plan depends on
the inputs' keys, labels and shapes and on the shard size, never on where the inputs lie, who encodes them, or when.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from latentae.data.sources import Item
from latentae.errors import RequestError
from latentae.store.tables import read_table, write_table

PLAN_COLUMNS = {
    "shard": "int32",
    "key": "string",
    "uri": "string",
    "label": "int64",
    "bytes": "int64",
    "height": "int32",
    "width": "int32",
}
CLIP_PLAN_COLUMNS = {name: kind for name, kind in PLAN_COLUMNS.items() if name not in ("height", "width")} | {
    "frames": "int32",
    "height": "int32",
    "width": "int32",
}

UNKNOWN_SHAPE = (0, 0)
UNKNOWN_CLIP_SHAPE = (0, 0, 0)
"""The shapes under which inputs are planned whose header cannot be read; they end in the quarantine."""


@dataclass(frozen=True)
class Shard:
    """The unit of work: inputs whose pixels enter the encoder with one shape, (height, width), or of clips (frames,
    height, width), in the order of their rows."""

    index: int
    items: tuple[Item, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.index:05d}"


@dataclass(frozen=True)
class Plan:
    """All shards of a store."""

    shards: tuple[Shard, ...]

    def items(self) -> Iterator[Item]:
        """Every input, in the order of shards and rows."""
        return (item for shard in self.shards for item in shard.items)

    @cached_property
    def inputs(self) -> int:
        return sum(len(shard.items) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what is encoded and in which order; the place of the inputs is left out, so that data may move."""
        digest = hashlib.sha256()
        for shard in self.shards:
            members = [[item.key, item.label] for item in shard.items]
            digest.update(json.dumps([shard.index, shard.shape, members]).encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        types = CLIP_PLAN_COLUMNS if any(len(shard.shape) == 3 for shard in self.shards) else PLAN_COLUMNS
        columns: dict[str, list] = {name: [] for name in types}
        for shard in self.shards:
            for item in shard.items:
                values = (shard.index, item.key, item.uri, item.label, item.size, *shard.shape)
                for column, value in zip(columns.values(), values):
                    column.append(value)
        write_table(path, types, columns)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        columns = read_table(path)
        shards = []
        types = CLIP_PLAN_COLUMNS if "frames" in columns else PLAN_COLUMNS
        for index, rows in groupby(zip(*(columns[name] for name in types)), key=lambda row: row[0]):
            members = list(rows)
            items = tuple(Item(key, uri, size, label) for _, key, uri, label, size, *_ in members)
            shards.append(Shard(index, items, tuple(members[0][5:])))
        return cls(tuple(shards))

    def with_items(self, items: Sequence[Item]) -> "Plan":
        """The same shards, read from where ``items`` (of the same keys) lie now."""
        by_key = {item.key: item for item in items}
        return Plan(tuple(Shard(s.index, tuple(by_key[i.key] for i in s.items), s.shape) for s in self.shards))


def make_plan(items: Sequence[Item], shapes: Sequence[tuple[int, ...]], shard_size: int) -> Plan:
    """Cut ``items``, sorted by key, into shards of at most ``shard_size`` inputs of one shape.

    Args:
        shapes: height and width, of clips also frames before them, with which each item's pixels will enter the
            encoder.

    Raises:
        RequestError: two inputs have the same key.
    """
    by_shape: dict[tuple[int, ...], list[Item]] = {}
    seen: dict[str, str] = {}
    for item, shape in zip(items, shapes, strict=True):
        if item.key in seen:
            raise RequestError(f"Two inputs have the key {item.key!r}: {seen[item.key]} and {item.uri}; rename one.")
        seen[item.key] = item.uri
        by_shape.setdefault(shape, []).append(item)
    chunks = [
        (shape, tuple(group[start : start + shard_size]))
        for shape, group in sorted(by_shape.items())
        for start in range(0, len(group), shard_size)
    ]
    return Plan(tuple(Shard(index, chunk, shape) for index, (shape, chunk) in enumerate(chunks)))


def plan_difference(planned: Plan, items: Sequence[Item]) -> list[str]:
    """One line for each way in which ``items`` differ from the inputs that were planned; empty if they are the same."""
    before = {item.key: item.label for item in planned.items()}
    now = {item.key: item.label for item in items}
    groups = {
        "not in the plan": [key for key in now if key not in before],
        "planned, but gone": [key for key in before if key not in now],
        "with another label": [key for key in now if key in before and before[key] != now[key]],
    }
    return [f"{len(keys)} {_plural(keys)} {what}: {_some(keys)}" for what, keys in groups.items() if keys]


def _plural(keys: Sequence[str]) -> str:
    return "input" if len(keys) == 1 else "inputs"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
