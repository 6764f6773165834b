"""Data sets of the Hugging Face ``datasets`` library, saved to disk or in memory."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow
import pyarrow.compute as pc

from latentae.data.decode import BadImage
from latentae.data.sources.base import Item, is_url, key_of, place_of_name, uri_of
from latentae.data.sources.columns import Carried
from latentae.data.sources.parquet import column_suffix
from latentae.data.sources.reading import UriReader, arrow_table
from latentae.data.sources.remote import fetch, kind_of, names_in
from latentae.data.sources.rows import (
    bytes_leaves,
    image_column,
    label_column,
    leaf_column,
    path_leaf,
    row_keys,
    row_uris,
)
from latentae.data.sources.table import ItemTable, ItemTableBuilder
from latentae.errors import DataError, RequestError

SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
IN_MEMORY = "dataset:"


class ArrowSource:
    """The rows of a folder that ``Dataset.save_to_disk`` wrote, or ``DatasetDict.save_to_disk``, or of an Arrow file.

    A key is the number of the row and the name of its image, ``00000012-dog.jpg``, behind the name of the split where
    there are splits, and behind that of the file in a folder of Arrow files without ``state.json``. Label, columns and
    the choice of the column are as of `ParquetSource`. A row without bytes stands for the file that it names.

    Files are mapped into memory; ``datasets`` is not needed.

    Args:
        column: the column of images, where there are several of which none is called ``image``.
        columns: names of the columns to carry along; None for all.

    Raises:
        RequestError: no column of images, or more than one to choose from; or no column to carry of such a name.
        DataError: a file is missing, cut short or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        column: str | None = None,
        columns: Sequence[str] | None = None,
        usual: str = "image",
    ):
        place = place_of_name(path)
        self.reader = UriReader()
        self.column: str | None = None
        carried = Carried(columns)
        found = ItemTableBuilder()
        for prefix, files in _parts(place):
            row = 0
            for file in files:
                table = _open(file)
                chosen = image_column(file, table.schema, column, usual)
                suffix = column_suffix(file, table.schema, chosen)
                uris = row_uris(uri_of(file), 0, table.num_rows, suffix)
                _add(table, chosen, prefix, row, uris, carried, found)
                self.column = chosen
                row += table.num_rows
        carried.check(place)
        self._items = found.finish(place).sorted()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)


class DatasetSource:
    """The rows of a ``datasets.Dataset`` in this process, their images as they were stored, not decoded.

    Keys and labels are as of `ArrowSource`; filtered and shuffled data sets are in their own order. Reading needs the
    data set: it travels with the source, the rows on disk as the names of their files.

    Args:
        dataset: the data set, one split.
        column: the column of images, where there are several of which none is called ``image``.
        columns: names of the columns to carry along; None for all.

    Raises:
        RequestError: no data set of rows that can be counted, no column of images, or no column of such a name.
    """

    def __init__(self, dataset: Any, column: str | None = None, columns: Sequence[str] | None = None):
        if isinstance(dataset, dict):
            raise RequestError(f"The data set has splits, {', '.join(dataset)}: give one, such as dataset['train'].")
        if not hasattr(dataset, "__len__"):
            raise RequestError("The data set is a stream without a length: load it without streaming=True.")
        table, indices = _rows_of(dataset)
        where = "The data set"
        chosen = image_column(where, table.schema, column)
        self.reader = DatasetReader(dataset, chosen)
        carried = Carried(columns)
        fields = carried.fields(table.schema, {chosen, label_column(table.schema.names)})
        carried.check(where)
        found = ItemTableBuilder()
        uris = row_uris(f"{IN_MEMORY}{quote(chosen, safe='')}", 0, len(dataset))
        _add(table, chosen, "", 0, uris, carried, found, indices, fields)
        self._items = found.finish(where).sorted()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)


class DatasetReader:
    """Reads the items of a `DatasetSource`; the data set is pickled with it."""

    def __init__(self, dataset: Any, column: str):
        self.dataset, self.column = dataset, column
        self._open()

    def _open(self) -> None:
        table, self._indices = _rows_of(self.dataset)
        self._images = leaf_column(table, bytes_leaves(table.schema)[self.column])
        self._files = UriReader()

    def read(self, item: Item) -> bytes:
        """As `UriReader.read`."""
        if not item.uri.startswith(IN_MEMORY):
            return self._files.read(item)
        row = int(item.uri.rpartition("=")[2])
        data = self._images[row if self._indices is None else self._indices[row].as_py()].as_py()
        if data is None:
            raise BadImage("unreadable", f"{item.key} cannot be read: its row holds no bytes.")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "column": self.column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _rows_of(dataset: Any) -> tuple[pyarrow.Table, pyarrow.ChunkedArray | None]:
    """All rows that a data set is made from, and which of them it has in which order, None for all."""
    indices = dataset._indices
    return dataset.data.table, None if indices is None else indices.table.column(0)


def _add(
    table: pyarrow.Table,
    column: str,
    prefix: str,
    first: int,
    uris: pyarrow.Array,
    carried: Carried,
    found: ItemTableBuilder,
    indices: pyarrow.ChunkedArray | None = None,
    fields: list[str] | None = None,
) -> None:
    """Add the rows of a table, or those at ``indices``; a row without bytes has the URI of the file that it names."""
    labelled = label_column(table.schema.names)
    if fields is None:
        fields = carried.fields(table.schema, {column, labelled})
    sizes = pc.binary_length(leaf_column(table, bytes_leaves(table.schema)[column]))
    named = path_leaf(table.schema, column)
    paths = leaf_column(table, named) if named else None
    table = table.select([*fields, *([labelled] if labelled else [])])
    if indices is not None:
        sizes, table = sizes.take(indices), table.take(indices)
        paths = None if paths is None else paths.take(indices)
    sizes = sizes.combine_chunks()
    if paths is not None and sizes.null_count:
        elsewhere = pc.and_(pc.is_null(sizes), pc.fill_null(pc.not_equal(paths.combine_chunks(), ""), False))
        names = paths.combine_chunks().filter(elsewhere).to_pylist()
        files = pyarrow.array([uri_of(place_of_name(name)) for name in names], uris.type)
        uris = pc.replace_with_mask(uris, elsewhere, files)
    columns = carried.of_table(table, fields)
    labels = table.column(labelled) if labelled else None
    keys = row_keys(prefix, first, len(sizes), paths)
    found.extend(keys, uris, pc.fill_null(sizes, 0).cast(pyarrow.int64()), labels, columns)


def is_saved_dataset(place: str) -> bool:
    """Whether a folder is one that ``save_to_disk`` wrote."""
    descriptions = _descriptions(place)
    return SPLITS in descriptions or (bool(descriptions) and bool(_arrow_files(place)))


def _descriptions(place: str) -> set[str]:
    """Which descriptions lie in a folder; the folder, which may hold millions, is not listed."""
    return {name for name in (SPLITS, STATE, INFO) if kind_of(f"{place}/{name}") == "file"}


def _arrow_files(place: str) -> list[str]:
    names = names_in(place) if is_url(place) else {path.name for path in Path(place).glob("*.arrow")}
    return sorted(name for name in names if name.endswith(".arrow") and not name.startswith("cache-"))


def _parts(place: str) -> list[tuple[str, list[str]]]:
    """What the keys of the rows of files begin with; rows are counted through the files of one part."""
    if place.lower().endswith(".arrow"):
        return [("", [place])]
    descriptions = _descriptions(place)
    if SPLITS in descriptions:
        splits = _json(f"{place}/{SPLITS}", "splits")
        parts = []
        for split in splits:
            if is_url(place) or Path(place, split).is_dir():
                parts += [(f"{split}/{prefix}", files) for prefix, files in _parts(f"{place}/{split}")]
        return parts
    if STATE in descriptions:
        return [("", [f"{place}/{part['filename']}" for part in _json(f"{place}/{STATE}", "_data_files")])]
    files = _arrow_files(place)
    return [("" if len(files) == 1 else f"{key_of(name)}/", [f"{place}/{name}"]) for name in files]


def _json(place: str, name: str) -> Any:
    try:
        data = fetch(place) if is_url(place) else Path(place).read_bytes()
        return json.loads(data)[name]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} does not tell its {name} ({error}): save the data set again.") from error
    except OSError as error:
        raise RequestError(f"{place} cannot be read ({error.strerror}): check the file.") from error


def _open(place: str) -> pyarrow.Table:
    try:
        return arrow_table(place)
    except (pyarrow.ArrowException, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place} is missing, cut short or no Arrow file ({reason}): save it again.") from error
    except OSError as error:
        if error.errno is None:
            raise DataError(
                f"{place} is cut short or damaged ({' '.join(str(error).split())}): save it again."
            ) from error
        raise RequestError(f"{place} cannot be read ({error.strerror or error}): check the file.") from error
