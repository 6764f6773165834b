"""Images in parquet files, as the Hugging Face hub holds them: row groups read when they are needed."""

import os
from collections.abc import Sequence
from urllib.parse import quote

import numpy as np
import pyarrow
import pyarrow.parquet

from latentae.data.sources.base import Item, place_of_name, relative_key, uri_of
from latentae.data.sources.columns import Carried
from latentae.data.sources.reading import UriReader, parquet_input
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


class ParquetSource:
    """The rows of one parquet file or of several, each an image: a column of bytes, or of {bytes, path} as the
    ``datasets`` library writes it.

    A key is the number of the row and the name in ``path``, ``00000012-dog.jpg``, so that the order of the keys is that
    of the file; with ``root`` it begins with the path of the file from there. `open_source` gives a root for folders
    and patterns, even of one file. The label is in the column ``label`` (else ``cls``); texts are numbered in sorted
    order. The other columns are carried along; those that hold bytes are not.

    Reading an image reads its row group, and the last ones are kept, up to 128 MiB in each process. Encoding goes
    through the rows in order and reads every group once; training, which jumps, reads about a group for each image:
    write small groups (100 rows, as the hub's), or tars.

    Args:
        column: the column of images, where there are several of which none is called ``image``.
        columns: names of the columns to carry along; None for all.
        usual: the name of a column that is taken without being asked for.

    Raises:
        RequestError: no column of images, or more than one to choose from; or no column to carry of such a name.
        DataError: a file is cut short or damaged.
    """

    def __init__(
        self,
        *paths: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        column: str | None = None,
        columns: Sequence[str] | None = None,
        usual: str = "image",
    ):
        places = [place_of_name(path) for path in paths]
        self.reader = UriReader()
        self.column: str | None = None
        self._carried = Carried(columns)
        found = ItemTableBuilder()
        for place in places:
            with open_parquet(place) as parquet:
                chosen = image_column(place, parquet.schema_arrow, column, usual)
                self._add(place, parquet, relative_key(place, root), chosen, found)
            self.column = chosen
        where = places[0] if root is None else str(root)
        self._carried.check(where)
        self._items = found.finish(where).sorted()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)

    def _add(
        self, place: str, parquet: pyarrow.parquet.ParquetFile, prefix: str, column: str, found: ItemTableBuilder
    ) -> None:
        schema = parquet.schema_arrow
        uri, suffix = uri_of(place), column_suffix(place, schema, column)
        leaf, names = bytes_leaves(schema)[column], path_leaf(schema, column)
        labelled = label_column(schema.names)
        carried = self._carried.fields(schema, {column, labelled})
        columns = [name for name in (names, labelled, *carried) if name]
        try:
            table = parquet.read(columns=columns, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            if getattr(error, "errno", None) is not None:
                raise RequestError(f"{place} cannot be read ({error.strerror}): run the same command again.") from error
            reason = " ".join(str(error).split())
            raise DataError(f"{place} is damaged ({reason}): fetch or write it again.") from error
        count = parquet.metadata.num_rows
        found.extend(
            row_keys(prefix, 0, count, leaf_column(table, names) if names else None),
            row_uris(uri, 0, count, suffix),
            _sizes(parquet.metadata, leaf),
            table.column(labelled) if labelled else None,
            self._carried.of_table(table, carried),
        )


def _sizes(metadata: pyarrow.parquet.FileMetaData, leaf: str) -> np.ndarray:
    """For each row, the average size of an image in its row group."""
    sizes, counts = [], []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)
        sizes.append(size // max(group.num_rows, 1))
        counts.append(group.num_rows)
    return np.repeat(np.array(sizes, np.int64), counts)


def open_parquet(place: str) -> pyarrow.parquet.ParquetFile:
    """A parquet file.

    Raises:
        DataError: it is damaged.
        RequestError: it cannot be read.
    """
    try:
        return pyarrow.parquet.ParquetFile(parquet_input(place))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{place} is cut short or no parquet file: fetch or write it again.") from error
    except OSError as error:
        raise RequestError(f"{place} cannot be read ({error.strerror or error}): check the file.") from error


def column_suffix(place: str, schema: pyarrow.Schema, column: str) -> str:
    """What the addresses of rows end in: nothing where a reader finds the column by itself."""
    try:
        by_itself = image_column(place, schema, None)
    except RequestError:
        by_itself = None
    return "" if column == by_itself else f"&column={quote(column, safe='')}"
