"""What a source carries along beside its images: captions, columns of a manifest, fields of a sample's metadata."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute as pc

from latentae.errors import RequestError

# Names that plans and stores give a meaning of their own.
RESERVED = (
    frozenset({"key", "uri", "bytes", "label", "labels", "status", "reason", "message", "sha256", "height", "width"})
    | {"crop_top", "crop_left", "crop_height", "crop_width", "row", "frames", "fps", "shard"}
    | {"latents", "latents_flip", "moments", "moments_flip", "pixel_frames", "pixel_height", "pixel_width"}
)
PREFIX = "input_"


def carried_name(name: str) -> str:
    """The name under which a column is carried: its own, or with ``input_`` before it where that one is taken."""
    bare = name
    while bare.startswith(PREFIX):
        bare = bare.removeprefix(PREFIX)
    return PREFIX + name if bare in RESERVED else name


class Carried:
    """Which columns are carried along.

    Args:
        wanted: their names in the source; None for all, an empty sequence for none.
    """

    def __init__(self, wanted: Sequence[str] | None):
        self.wanted = None if wanted is None else frozenset(wanted)
        self.known: dict[str, None] = {}
        self._names: dict[str, str | None] = {}

    def __bool__(self) -> bool:
        return self.wanted is None or bool(self.wanted)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The names that are carried, of those that are there."""
        names = [name for name in names if name and name.strip()]
        self.known.update(dict.fromkeys(names))
        return [name for name in names if self.wanted is None or name in self.wanted]

    def of_row(self, row: Mapping[str, Any], taken: Collection[str | None] = ()) -> dict[str, Any]:
        """The carried values of a row or object, without the ``taken`` ones; what is nested becomes JSON."""
        carried = {}
        for name, value in row.items():
            if name not in taken and (carried_as := self._carried_as(name)):
                carried[carried_as] = _scalar(value)
        return carried

    def _carried_as(self, name: str) -> str | None:
        if name not in self._names:
            self._names[name] = carried_name(name) if name in self.chosen([name]) else None
        return self._names[name]

    def fields(self, schema: pyarrow.Schema, taken: Collection[str | None] = ()) -> list[str]:
        """The names of the columns of a table that are carried; those that hold bytes never are."""
        return self.chosen(field.name for field in schema if field.name not in taken and not _holds_bytes(field.type))

    def of_table(self, table: pyarrow.Table, names: Iterable[str]) -> dict[str, pyarrow.Array]:
        """Columns of a table under the names that they are carried by."""
        return {carried_name(name): _plain(table.column(name)) for name in names}

    def check(self, where: str) -> None:
        """Refuse names that were not met.

        Raises:
            RequestError: there are such.
        """
        if unknown := sorted((self.wanted or frozenset()) - self.known.keys()):
            known = ", ".join(self.known) or "none"
            raise RequestError(f"{where} has no column {unknown[0]!r} to carry along; it has {known}.")


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind) or types.is_map(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _plain(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    """A column as numbers, booleans or text."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_float32(kind) or types.is_float64(kind):
        return column
    if types.is_float16(kind):
        return column.cast(pyarrow.float32())
    if types.is_nested(kind):
        texts = [None if value is None else _scalar(value) for value in column.to_pylist()]
        return pyarrow.chunked_array([pyarrow.array(texts, pyarrow.large_string())])
    try:
        return pc.cast(column, pyarrow.large_string())
    except pyarrow.ArrowException:
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        return pyarrow.chunked_array([pyarrow.array(texts, pyarrow.large_string())])
