"""Items by the million: columns of Arrow instead of objects, which are made when they are looked at."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, overload

import pyarrow
import pyarrow.compute as pc
import pyarrow.ipc

from latentae.data.sources.base import Item, label_of
from latentae.errors import RequestError

SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),
        ("uri", pyarrow.large_string()),
        ("bytes", pyarrow.int64()),
        ("label", pyarrow.int64()),
    ]
)
OWN = SCHEMA.names
GUESSED = {b"sizes": b"guessed"}  # metadata of such a table
ITEMS_AT_ONCE = 65536
MOST_PIECES = 256
NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})
CLASSES = b"classes"  # in the metadata of a table


class SameKey(RequestError):
    """Two items have one key."""

    def __init__(self, key: str, uri: str, other: str):
        super().__init__(f"{uri} and {other} would both get the key {key!r}: rename one.")
        self.key = key


class ItemTable(Sequence[Item]):
    """Items as a table: 10 million take about as many bytes as their keys and URIs have letters.

    ``table`` has the columns ``key``, ``uri``, ``bytes``, ``label`` and, after these, what a source carries along of
    its own (captions, columns of a manifest).
    """

    def __init__(self, table: pyarrow.Table):
        self.table = table

    @classmethod
    def of(cls, items: Iterable[Item]) -> "ItemTable":
        """A table of ``items``, in their order."""
        builder = ItemTableBuilder()
        for item in items:
            builder.append(item.key, item.uri, item.size, item.label, item.columns)
        return builder.finish()._joined()

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> "ItemTable": ...

    def __getitem__(self, index: int | slice) -> "Item | ItemTable":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(range(start, stop, step))
            return ItemTable(self.table.slice(start, max(stop - start, 0)))
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return next(iter(ItemTable(self.table.slice(index % len(self), 1))))

    def __iter__(self) -> Iterator[Item]:
        carried = self.carried
        for batch in self.table.to_batches(max_chunksize=ITEMS_AT_ONCE):
            columns = [batch.column(i).to_pylist() for i in range(batch.num_columns)]
            for key, uri, size, label, *values in zip(*columns):
                yield Item(key, uri, size, label, dict(zip(carried, values)))

    def take(self, indices: Any) -> "ItemTable":
        """The items at ``indices``, in that order."""
        return ItemTable(self.table.take(pyarrow.array(indices, pyarrow.int64())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ItemTable) and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        """Pickled, a slice is no longer than itself; the arrays of Arrow would take along what they are a slice of."""
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self.table.schema) as stream:
            stream.write_table(self.table)
        return _unpickled, (sink.getvalue(),)

    @property
    def carried(self) -> list[str]:
        """The names of the columns that are the source's own."""
        return self.table.column_names[len(SCHEMA) :]

    @property
    def keys(self) -> pyarrow.ChunkedArray:
        return self.table.column("key")

    @property
    def classes(self) -> dict[str, int]:
        """Labels by the names of their classes, where they had names: folders, or texts."""
        return json.loads((self.table.schema.metadata or {}).get(CLASSES, b"{}"))

    def with_classes(self, classes: Mapping[str, int]) -> "ItemTable":
        """The same items, and what their labels stand for."""
        return ItemTable(self.table.replace_schema_metadata({CLASSES: json.dumps(classes)} if classes else None))

    @property
    def labels(self) -> pyarrow.ChunkedArray:
        return self.table.column("label")

    @property
    def sizes_are_guessed(self) -> bool:
        """Whether lengths were not looked at one by one, so that others do not mean that inputs have changed."""
        return GUESSED.items() <= (self.table.schema.metadata or {}).items()

    def sorted(self) -> "ItemTable":
        """The same items in the order of their keys, letter by letter.

        Raises:
            SameKey: two items have one key.
        """
        keys = self.keys
        ascending = len(self) < 2 or pc.all(pc.less(keys[:-1], keys[1:])).as_py()
        table = self.table if ascending else self.table.take(pc.sort_indices(keys))
        keys = table.column("key")
        if not ascending and pc.any(same := pc.equal(keys[:-1], keys[1:])).as_py():
            first = pc.index(same, True).as_py()
            one, other = ItemTable(table.slice(first, 2))
            raise SameKey(one.key, one.uri, other.uri)
        return ItemTable(table)._joined()

    def _joined(self) -> "ItemTable":
        """The same items in few pieces; many pieces make looking at one item slow, and joining takes memory."""
        pieces = self.keys.num_chunks
        return ItemTable(self.table.combine_chunks()) if pieces > MOST_PIECES else self


def _unpickled(stream: pyarrow.Buffer) -> ItemTable:
    return ItemTable(pyarrow.ipc.open_stream(stream).read_all())


class Source(Protocol):
    """A set of inputs."""

    def items(self) -> ItemTable:
        """All items, sorted by key; the same at every call."""
        ...

    def read(self, item: Item) -> bytes:
        """The bytes of one item. Safe in threads and in processes that the source was pickled to.

        Raises:
            BadImage: with reason ``unreadable``: the item is gone, or may not be read.
            OSError: its storage is gone.
        """
        ...


class ItemTableBuilder:
    """Collects items without keeping an object for each.

    Labels are whole numbers, or texts, which are numbered from 0 in sorted order in the end.
    Values of carried columns may be numbers, booleans, text or None; an item that lacks a column has None there, and a
    column of several types becomes text.
    """

    def __init__(self) -> None:
        self._tables: list[pyarrow.Table] = []
        self._rows: list[tuple[str, str, int, int | None]] = []
        self._carried: dict[str, list[Any]] = {}
        self._classes: dict[str, int] = {}  # labels that are texts, in the order of their first appearance
        self._number: int | None = None  # a label that is a number

    def append(
        self, key: str, uri: str, size: int, label: int | str | None = None, columns: Mapping[str, Any] = NO_COLUMNS
    ) -> None:
        row = len(self._rows)
        self._rows.append((key, uri, size, self._numbered(label)))
        for name, value in columns.items():
            values = self._carried.setdefault(name, [])
            values += [None] * (row - len(values))
            values.append(value)
        if len(self._rows) >= ITEMS_AT_ONCE:
            self._flush()

    def extend(
        self,
        keys: pyarrow.Array,
        uris: pyarrow.Array,
        sizes: Any,
        labels: pyarrow.ChunkedArray | None = None,
        columns: Mapping[str, pyarrow.Array] = NO_COLUMNS,
    ) -> None:
        """Append many items at once: arrays of Arrow, labels as files hold them (`label_of`)."""
        if self._rows:
            self._flush()
        numbers = pyarrow.nulls(len(keys), pyarrow.int64()) if labels is None else self._numbered_column(labels)
        table = pyarrow.table([keys, uris, pyarrow.array(sizes, pyarrow.int64()), numbers], names=OWN).cast(SCHEMA)
        for name, column in columns.items():
            table = table.append_column(name, column)
        self._tables.append(table)

    def _numbered_column(self, labels: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
        if isinstance(labels, pyarrow.Array):
            labels = pyarrow.chunked_array([labels])
        if pyarrow.types.is_dictionary(labels.type):
            labels = labels.cast(labels.type.value_type)
        if pyarrow.types.is_integer(labels.type) and not pyarrow.types.is_uint64(labels.type):
            numbers = labels.cast(pyarrow.int64())
            numbers = pc.if_else(pc.greater_equal(numbers, 0), numbers, None)
            self._number = pc.max(numbers).as_py() if self._number is None else self._number
            return numbers
        coded = labels.combine_chunks().dictionary_encode()
        if isinstance(coded, pyarrow.ChunkedArray):
            coded = coded.combine_chunks()
        meant = [self._numbered(label_of(value)) for value in coded.dictionary.to_pylist()]
        return pyarrow.array(meant, pyarrow.int64()).take(coded.indices)

    def _numbered(self, label: int | str | None) -> int | None:
        if isinstance(label, str):
            return self._classes.setdefault(label, len(self._classes))
        if label is not None:
            self._number = label
        return label

    def _flush(self) -> None:
        columns = [pyarrow.array(values, field.type) for values, field in zip(zip(*self._rows), SCHEMA)]
        table = pyarrow.table(columns, schema=SCHEMA)
        for name, values in self._carried.items():
            table = table.append_column(name, _carried_array(values + [None] * (len(self._rows) - len(values))))
        self._tables.append(table)
        self._rows, self._carried = [], {}

    def finish(self, where: str = "the source") -> ItemTable:
        """All items that were appended, in their order; the builder is empty then.

        Raises:
            RequestError: some labels are numbers and some are text; it says that ``where`` has them.
        """
        if self._classes and self._number is not None:
            text = min(self._classes)
            raise RequestError(f"{where} has labels of two kinds, such as {self._number} and {text!r}: give one kind.")
        if self._rows:
            self._flush()
        if not self._tables:
            return ItemTable(SCHEMA.empty_table())
        kinds: dict[str, set[pyarrow.DataType]] = {}
        for table in self._tables:
            for field in table.schema:
                if not pyarrow.types.is_null(field.type):
                    kinds.setdefault(field.name, set()).add(field.type)
        for number, table in enumerate(self._tables):
            for place, field in enumerate(table.schema):
                if _differ(kinds.get(field.name, set())):
                    table = table.set_column(place, field.name, _as_text(table.column(place)))
            self._tables[number] = table
        table = pyarrow.concat_tables(self._tables, promote_options="permissive")
        self._tables = []
        if self._classes:
            ranks = {text: rank for rank, text in enumerate(sorted(self._classes))}
            numbers = pyarrow.array([ranks[text] for text in self._classes], pyarrow.int64())
            place = OWN.index("label")
            table = table.set_column(place, SCHEMA.field(place), numbers.take(table.column(place)))
            return ItemTable(table).with_classes(ranks)
        return ItemTable(table)


def _differ(kinds: set[pyarrow.DataType]) -> bool:
    """Whether one column has values of several kinds; whole numbers and others are of one."""
    return len(kinds) > 1 and not all(map(_is_number, kinds))


def _is_number(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)


def _carried_array(values: list[Any]) -> pyarrow.Array:
    """Values as Arrow has them; as text where they are of several types or Arrow has no word for them."""
    try:
        array = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return pyarrow.array([_text(value) for value in values], pyarrow.large_string())
    return array.cast(pyarrow.large_string()) if pyarrow.types.is_string(array.type) else array


def _as_text(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    return pyarrow.chunked_array([[_text(value) for value in column.to_pylist()]], pyarrow.large_string())


def _text(value: object) -> str | None:
    """A value as text; half of a surrogate pair, which is no text, as ``\\udNNN``."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()
