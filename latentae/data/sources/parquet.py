"""Images in parquet files, as the Hugging Face hub holds them: row groups read when they are needed."""

import bisect
import os
import re
from collections import OrderedDict
from itertools import accumulate
from threading import Lock
from typing import Any

import pyarrow
import pyarrow.parquet

from latentae.data.decode import BadImage
from latentae.data.sources.base import (
    FILE_ERRORS,
    LABEL_COLUMNS,
    Item,
    file_uri,
    key_of,
    label_of,
    path_of,
)
from latentae.data.sources.table import ItemTable, ItemTableBuilder
from latentae.errors import DataError, RequestError

CACHE_BYTES = 128 * 2**20


class ParquetSource:
    """The rows of one parquet file or of several, each an image: a column of bytes, or of {bytes, path} as the
    ``datasets`` library writes it.

    A key is the number of the row and the name in ``path``, ``00000012-dog.jpg``, so that the order of the keys is that
    of the file; with ``root`` it begins with the path of the file from there. `open_source` gives a root for folders
    and patterns, even of one file. The label is in the column ``label`` (else ``cls``); texts are numbered in sorted
    order.

    Reading an image reads its row group, and the last ones are kept, up to 128 MiB in each process. Encoding goes
    through the rows in order and reads every group once; training, which jumps, reads about a group for each image:
    write small groups (100 rows, as the hub's), or tars.

    Args:
        column: the column of images, where there are several of which none is called ``image``.

    Raises:
        RequestError: no column of images, or more than one to choose from.
        DataError: a file is cut short or damaged.
    """

    def __init__(
        self, *paths: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, column: str | None = None
    ):
        files = [os.path.abspath(path) for path in paths]  # noqa: PTH100  # names may not be UTF-8
        self._groups: dict[str, list[int]] = {}  # of each file, the rows up to the end of each group
        self._leaves: dict[str, str] = {}
        found = ItemTableBuilder()
        for file in files:
            prefix = "" if root is None else key_of(os.path.relpath(file, root)) + "/"
            with _open(file) as parquet:
                leaf = self._leaves[file] = _image_leaf(file, parquet.schema_arrow, column)
                sizes, self._groups[file] = _sizes(parquet, leaf)
                names, file_labels = _names_and_labels(file, parquet, leaf)
            uri = file_uri(file)
            for row, (name, size, label) in enumerate(zip(names, sizes, file_labels)):
                found.append(f"{prefix}{row:08d}{name}", f"{uri}#row={row}", size, label)
        self._items = found.finish(files[0] if root is None else str(root)).sorted()
        self._cache = _Cache()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        uri, _, row = item.uri.partition("#row=")
        path = path_of(uri)
        ends = self._groups[path]
        group = bisect.bisect_right(ends, int(row))
        try:
            images = self._cache.get(path, group, self._leaves[path])
        except (OSError, pyarrow.ArrowException) as error:
            number = getattr(error, "errno", None)
            if number is not None and number not in FILE_ERRORS:
                raise
            reason = " ".join(str(error).split())
            raise BadImage("unreadable", f"{item.key} cannot be read: its row group is damaged ({reason}).") from error
        place = int(row) - (ends[group - 1] if group else 0)
        data = images[place].as_py() if place < len(images) else None
        if data is None:
            raise BadImage("unreadable", f"{item.key} cannot be read: its row holds no bytes.")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cache=_Cache())


class _Cache:
    """Columns of the row groups that were read last."""

    def __init__(self) -> None:
        self._columns: OrderedDict[tuple[str, int], pyarrow.ChunkedArray] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, path: str, group: int, leaf: str) -> pyarrow.ChunkedArray:
        with self._lock:  # threads that want one group wait for one reading of it
            if (path, group) not in self._columns:
                with pyarrow.parquet.ParquetFile(path) as parquet:
                    table = parquet.read_row_group(group, columns=[leaf], use_threads=False)
                column = self._columns[path, group] = _leaf_column(table, leaf)
                self._bytes += column.nbytes
                while self._bytes > CACHE_BYTES and len(self._columns) > 1:
                    self._bytes -= self._columns.popitem(last=False)[1].nbytes
            self._columns.move_to_end((path, group))
            return self._columns[path, group]


def _open(path: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is cut short or no parquet file: fetch or write it again.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error


def _image_leaf(path: str, schema: pyarrow.Schema, wanted: str | None) -> str:
    """The path in the schema of the images' bytes."""
    leaves = {field.name: leaf for field in schema if (leaf := _bytes_leaf(field)) is not None}
    if wanted is not None and wanted not in leaves:
        raise RequestError(f"{path} has no column {wanted!r} of images: {_columns(schema)}.")
    if not leaves:
        raise RequestError(f"{path} has no column of images (bytes, or a struct that holds them): {_columns(schema)}.")
    if wanted is None and len(leaves) > 1 and "image" not in leaves:
        raise RequestError(
            f"{path} has several columns of images, {', '.join(leaves)}: name one, "
            f"ParquetSource(path, column={next(iter(leaves))!r}), or call it image."
        )
    return leaves[wanted or ("image" if "image" in leaves else next(iter(leaves)))]


def _bytes_leaf(field: pyarrow.Field) -> str | None:
    types = pyarrow.types
    kind = field.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return field.name
    if types.is_struct(kind) and any(inner.name == "bytes" and _bytes_leaf(inner) for inner in kind):
        return f"{field.name}.bytes"
    return None


def _columns(schema: pyarrow.Schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _sizes(parquet: pyarrow.parquet.ParquetFile, leaf: str) -> tuple[list[int], list[int]]:
    """The average size of an image in its row group, for each row; and the rows up to the end of each group."""
    sizes, rows = list[int](), list[int]()
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        columns = (group.column(i) for i in range(group.num_columns))
        total = next(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)
        sizes += [total // max(group.num_rows, 1)] * group.num_rows
        rows.append(group.num_rows)
    return sizes, list(accumulate(rows))


def _names_and_labels(
    path: str, parquet: pyarrow.parquet.ParquetFile, leaf: str
) -> tuple[list[str], list[int | str | None]]:
    """For each row ``-NAME`` of its path, or nothing, and its label, without reading any image."""
    schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    labelled = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    path_leaf = leaf.removesuffix(".bytes") + ".path"
    with_path = path_leaf in {parquet.schema.column(i).path for i in range(len(parquet.schema.names))}
    columns = ([path_leaf] if with_path else []) + ([labelled] if labelled else [])
    try:
        table = parquet.read(columns=columns, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}): fetch or write it again.") from error
    paths = _leaf_column(table, path_leaf).to_pylist() if with_path else [None] * rows
    labels = table.column(labelled).to_pylist() if labelled else [None] * rows
    return [_name(value) for value in paths], [label_of(label) for label in labels]


def _name(path: object) -> str:
    """``-NAME`` for a path, which may come from anywhere and say anything."""
    name = re.split(r"[/\\]", path.strip())[-1].replace("\0", "")[-100:] if isinstance(path, str) else ""
    return f"-{name}" if name.strip(".") else ""


def _leaf_column(table: pyarrow.Table, leaf: str) -> pyarrow.ChunkedArray:
    """The column at a path such as ``image.bytes``, of a table that was read with nothing else in that column."""
    if leaf in table.column_names:
        return table.column(leaf)
    name = leaf.rpartition(".")[0]
    return table.column(name).flatten()[0]
