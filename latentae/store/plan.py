"""The plan of a store: which input goes into which shard, decided before the first image is decoded.

    plan.parquet          key, uri, bytes, label and carried columns of every input, one row group for each shard
    plan-00001.parquet    the shards that an extension added, and so on

Inputs in the order of their keys are cut into shards of a fixed number. Where images have several shapes, or clips
several lengths, they are first grouped by shape, so that the latents of a shard are one tensor. A plan depends on the
inputs' keys, labels, carried columns and shapes and on the shard size, never on where the inputs lie, who encodes
them, or when. It is read shard by shard: 10 million inputs need no more memory than one thousand.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet

from latentae.data.sources.table import SCHEMA, ItemTable
from latentae.errors import DataError
from latentae.files import atomic_write
from latentae.store.tables import open_table

METADATA = b"latentae"
FIRST_FINGERPRINT = ""
PIXEL_COLUMNS = ("frames", "height", "width")  # of what enters the encoder; the first only of clips

UNKNOWN_SHAPE = (0, 0)
UNKNOWN_CLIP_SHAPE = (0, 0, 0)
"""The shapes under which inputs are planned whose header cannot be read; they end in the quarantine."""


@dataclass(frozen=True)
class Shard:
    """The unit of work: inputs whose pixels enter the encoder with one shape, (height, width), or of clips (frames,
    height, width). ``fingerprint`` is the hash of its keys, labels, carried columns and shape."""

    index: int
    shape: tuple[int, ...]
    inputs: int
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.index:05d}"


class PlanPart:
    """Shards that were planned together, in memory or in a file.

    Args:
        after: fingerprint of the plan that this part extends.
        classes: labels by the names of their classes, where they have names.
        table: the inputs in the order of the shards, where they are in memory.
        path: the file, where they are not.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        after: str,
        classes: Mapping[str, int],
        table: pyarrow.Table | None = None,
        path: Path | None = None,
    ):
        self.shards, self.after, self.classes, self.table, self.path = tuple(shards), after, classes, table, path
        self._ends = np.cumsum([0, *(shard.inputs for shard in shards)])
        self._file: pyarrow.parquet.ParquetFile | None = None
        self._lock = Lock()

    @classmethod
    def load(cls, path: Path) -> "PlanPart":
        with open_table(path) as file:
            try:
                facts = json.loads(file.schema_arrow.metadata[METADATA])
                shards = [
                    Shard(index, tuple(shape), inputs, print_) for index, shape, inputs, print_ in facts["shards"]
                ]
                return cls(shards, facts["after"], facts["classes"], path=path)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is not the plan of a store: restore it from a copy.") from error

    @property
    def inputs(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of this part and all before it."""
        return hashlib.sha256("\n".join([self.after, *(s.fingerprint for s in self.shards)]).encode()).hexdigest()

    def items(self, place: int) -> ItemTable:
        """The inputs of the shard at a place of this part."""
        if self.table is not None:
            return ItemTable(self.table.slice(self._ends[place], self.shards[place].inputs))
        with self._lock:
            if self._file is None:
                self._file = open_table(self._existing_path)
            try:
                table = self._file.read_row_group(place, use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{self.path} is damaged ({error}): restore it from a copy.") from error
        return ItemTable(_without_pixels(table))

    def read(self, columns: Sequence[str]) -> pyarrow.Table:
        """Columns of all inputs, in the order of the shards."""
        if self.table is not None:
            return self.table.select(list(columns))
        with open_table(self._existing_path) as file:
            return file.read(list(columns))

    @property
    def schema(self) -> pyarrow.Schema:
        """Of the table of inputs."""
        if self.table is not None:
            return self.table.schema
        with open_table(self._existing_path) as file:
            return _without_pixels(file.schema_arrow.empty_table()).schema

    @property
    def _existing_path(self) -> Path:
        assert self.path is not None
        return self.path

    def save(self, path: Path) -> None:
        """Write the part, unless there is one.

        Raises:
            FileExistsError: another process has written one.
        """
        shards = [[shard.index, shard.shape, shard.inputs, shard.fingerprint] for shard in self.shards]
        facts = {"after": self.after, "classes": self.classes, "shards": shards}
        empty = self._with_pixels(0, self.schema.empty_table())
        schema = empty.schema.with_metadata({METADATA: json.dumps(facts)})
        stream = BytesIO()
        with pyarrow.parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
            for place in range(len(self.shards)):
                table = self._with_pixels(place, self.items(place).table)
                writer.write_table(table.cast(schema), row_group_size=table.num_rows)
        with atomic_write(path, replace=False) as file:
            file.write(stream.getbuffer())

    def _with_pixels(self, place: int, table: pyarrow.Table) -> pyarrow.Table:
        """With the number of the shard and the shape, for other people's readers."""
        shard = self.shards[place]
        names = PIXEL_COLUMNS[-len(shard.shape) :]
        for name, value in reversed([("shard", shard.index), *((f"pixel_{n}", v) for n, v in zip(names, shard.shape))]):
            table = table.add_column(0, name, pyarrow.array(np.full(table.num_rows, value, np.int32)))
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


def _without_pixels(table: pyarrow.Table) -> pyarrow.Table:
    names = [
        name for name in table.column_names if name != "shard" and name not in {f"pixel_{n}" for n in PIXEL_COLUMNS}
    ]
    return table.select(names).replace_schema_metadata(None)


class Plan:
    """All shards of a store, in the parts in which they were planned."""

    def __init__(self, parts: Sequence[PlanPart]):
        self.parts = tuple(parts)
        self.shards: tuple[Shard, ...] = tuple(shard for part in parts for shard in part.shards)

    @classmethod
    def load(cls, store: Path) -> "Plan":
        """The plan of a store, with all extensions.

        Raises:
            DataError: it is missing, damaged, or an extension is not of this plan.
        """
        parts = [PlanPart.load(store / "plan.parquet")]
        while (path := part_path(store, len(parts))).exists():
            parts.append(PlanPart.load(path))
            if parts[-1].after != parts[-2].fingerprint:
                raise DataError(f"{path} extends another plan than the one in {store}: restore it from a copy.")
        later = sorted(file for file in store.glob("plan-*.parquet") if file > path)
        if later and not path.exists():  # parts are only ever added behind the last
            raise DataError(f"{path} is missing, which {later[0].name} extends: restore it from a copy.")
        return cls(parts)

    @cached_property
    def inputs(self) -> int:
        return sum(shard.inputs for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of what is encoded and in which order; the place of the inputs is left out, so that data may move."""
        return self.parts[-1].fingerprint

    @property
    def classes(self) -> dict[str, int]:
        """Labels by the names of their classes, where they have names."""
        return {name: label for part in self.parts for name, label in part.classes.items()}

    @property
    def holds_clips(self) -> bool:
        return len(self.shards[0].shape) == 3

    @cached_property
    def carried(self) -> dict[str, pyarrow.DataType]:
        """Names and types of the columns that the sources carry along."""
        schemas = [part.schema for part in self.parts]
        fields = pyarrow.unify_schemas(schemas, promote_options="permissive")
        return {field.name: field.type for field in list(fields)[len(SCHEMA) :]}

    def items(self, shard: Shard) -> ItemTable:
        """The inputs of a shard, in the order of its rows."""
        place = shard.index
        for part in self.parts:
            if place < len(part.shards):
                return part.items(place)
            place -= len(part.shards)
        raise IndexError(shard.index)

    def is_intact(self, shard: Shard) -> bool:
        """Whether the inputs of a shard are those that its fingerprint was made of."""
        return _fingerprint(shard.shape, self.items(shard).table) == shard.fingerprint

    def read(self, *columns: str) -> pyarrow.Table:
        """Columns of all inputs, in the order of shards and rows."""
        return pyarrow.concat_tables([part.read(columns) for part in self.parts])

    def relocated(self, items: ItemTable) -> "Plan":
        """The same shards, read from where those of ``items`` that are planned lie now."""
        now = items.table
        if all(self.read(name).column(0).equals(now.column(name)) for name in ("uri", "bytes")):
            return self  # which need not be held in memory
        return Plan([self._relocated(part, now) for part in self.parts])

    def _relocated(self, part: PlanPart, now: pyarrow.Table) -> PlanPart:
        places = pc.index_in(part.read(["key"]).column(0), now.column("key"))
        moved = {}
        for name in ("uri", "bytes"):
            before = part.read([name]).column(0)
            after = pc.coalesce(now.column(name).take(places), before)
            if not after.equals(before):
                moved[name] = after
        if not moved:
            return part
        table = part.read(part.schema.names)
        for name, column in moved.items():
            table = table.set_column(table.column_names.index(name), name, column)
        return PlanPart(part.shards, part.after, part.classes, table.combine_chunks())


def part_path(store: Path, number: int) -> Path:
    """The file of one part of a store's plan, counted from 0."""
    return store / (f"plan-{number:05d}.parquet" if number else "plan.parquet")


def make_plan(
    items: ItemTable, shapes: np.ndarray | tuple[int, ...], shard_size: int, *, extends: Plan | None = None
) -> PlanPart:
    """Cut ``items``, sorted by key, into shards of at most ``shard_size`` inputs of one shape.

    Args:
        shapes: height and width, of clips also frames before them, with which each item's pixels will enter the
            encoder, (N, 2) or (N, 3); or the one shape of all.
        extends: the plan that these items are not in yet, whose shards come first.

    Raises:
        RequestError: two inputs have the same key.
    """
    table = items.sorted().table
    if isinstance(shapes, tuple):
        groups = [(shapes, table)]
    else:
        kinds, of_kind = np.unique(shapes, axis=0, return_inverse=True)
        of_kind = of_kind.reshape(-1)
        table = table.take(np.argsort(of_kind, kind="stable")).combine_chunks()
        counts = np.bincount(of_kind, minlength=len(kinds))
        starts = np.cumsum([0, *counts])
        groups = [
            (tuple(map(int, kind)), table.slice(start, count)) for kind, start, count in zip(kinds, starts, counts)
        ]
    first = len(extends.shards) if extends else 0
    shards = list[Shard]()
    for shape, group in groups:
        for start in range(0, group.num_rows, shard_size):
            members = group.slice(start, shard_size)
            shards.append(Shard(first + len(shards), shape, members.num_rows, _fingerprint(shape, members)))
    return PlanPart(shards, extends.fingerprint if extends else FIRST_FINGERPRINT, items.classes, table)


def _fingerprint(shape: tuple[int, ...], members: pyarrow.Table) -> str:
    digest = hashlib.sha256(json.dumps([shape, members.column_names]).encode())
    for name in members.column_names:
        if name in ("uri", "bytes"):
            continue
        column = members.column(name).combine_chunks()
        if not pyarrow.types.is_integer(column.type):
            column = column.cast(pyarrow.large_string())
            lengths = pc.fill_null(pc.binary_length(column), -1)
            digest.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False)).astype("<i8").tobytes())
            digest.update("".join(pc.fill_null(column, "").to_pylist()).encode("utf-8", "surrogatepass"))
        else:
            digest.update(pc.is_null(column).to_numpy(zero_copy_only=False).tobytes())
            digest.update(pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PlanDifference:
    """How inputs differ from those that were planned."""

    new: ItemTable
    gone: list[str]
    relabelled: list[str]

    def lines(self) -> list[str]:
        """One line for each way in which they differ; none if they are the same."""
        new = [f"{_count(len(self.new))} not in the plan: {_some(self.new.keys[:4].to_pylist())}"] if self.new else []
        gone = [f"{_count(len(self.gone))} planned, but gone: {_some(self.gone)}"] if self.gone else []
        return new + gone + self.relabelled_lines()

    def relabelled_lines(self) -> list[str]:
        """At most one line, on labels."""
        keys = self.relabelled
        return [f"{_count(len(keys))} with another label: {_some(keys)}"] if keys else []


def plan_difference(planned: Plan, items: ItemTable) -> PlanDifference:
    """What came, went and changed its label since ``planned`` was made; ``items`` are sorted."""
    before = planned.read("key", "label")
    now = items.table.select(["key", "label"])
    if before.column("key").equals(now.column("key")) and before.column("label").equals(now.column("label")):
        return PlanDifference(items[:0], [], [])
    before = before.sort_by("key")
    known = pc.is_in(now.column("key"), before.column("key"))
    there = pc.is_in(before.column("key"), now.column("key"))
    old, same = before.filter(there), now.filter(known)
    changed = pc.not_equal(pc.fill_null(old.column("label"), -1), pc.fill_null(same.column("label"), -1))
    return PlanDifference(
        ItemTable(items.table.filter(pc.invert(known))),
        before.filter(pc.invert(there)).column("key").to_pylist(),
        same.filter(changed).column("key").to_pylist(),
    )


def column_difference(planned: Plan, items: ItemTable) -> list[str]:
    """One line for each carried column that is not as it was planned; ``items`` are of the planned keys."""
    before, now = planned.carried, items.carried
    lines = [f"column {name}: in the plan, but gone" for name in before if name not in now]
    lines += [f"column {name}: not in the plan" for name in now if name not in before]
    if lines:
        return lines
    for name in now:
        keys = list[str]()
        for part in planned.parts:
            if name in part.schema.names:
                keys += _changed(part, name, items)
        if keys:
            lines.append(f"{_count(len(keys))} with another {name}: {_some(keys)}")
    return lines


def _changed(part: PlanPart, name: str, items: ItemTable) -> list[str]:
    """The keys of inputs whose carried value is another one now."""
    keys, now = part.read(["key"]).column(0), items.table.column(name)
    if not keys.equals(items.keys):
        now = now.take(pc.index_in(keys, items.keys))
    before = part.read([name]).column(0)
    if before.equals(now):
        return []
    rows = enumerate(zip(before.to_pylist(), now.to_pylist()))
    return [keys[row].as_py() for row, (old, new) in rows if old != new and not (old != old and new != new)]  # NaN


def unmergeable(planned: Plan, items: ItemTable) -> list[str]:
    """One line for each carried column whose values are of another type than the planned ones."""
    lines = []
    for name, kind in planned.carried.items():
        if name in items.carried:
            schemas = [pyarrow.schema([(name, kind)]), pyarrow.schema([items.table.schema.field(name)])]
            try:
                pyarrow.unify_schemas(schemas, promote_options="permissive")
            except pyarrow.ArrowException:
                lines.append(f"column {name}: {kind} in the plan, {schemas[1].field(name).type} now")
    return lines


def class_clashes(planned: Plan, items: ItemTable) -> list[str]:
    """One line for each class of ``items`` that has another label than in the plan, or that of another one there."""
    before = planned.classes
    names = {label: name for name, label in before.items()}
    lines = []
    for name, label in items.classes.items():
        if before.get(name, label) != label:
            lines.append(f"class {name!r} has label {before[name]} in the plan, {label} now")
        elif names.get(label, name) != name:
            lines.append(f"class {name!r} has label {label}, which is that of {names[label]!r} in the plan")
    return lines


def _count(inputs: int) -> str:
    return "1 input" if inputs == 1 else f"{inputs} inputs"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
