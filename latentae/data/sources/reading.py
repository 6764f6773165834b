"""The bytes of an item by its URI alone, so that a worker on any machine needs the plan and nothing else.

| URI                              | its bytes                                                                     |
|----------------------------------|-------------------------------------------------------------------------------|
| ``file:///a.jpg``                | the file                                                                      |
| ``file:///x.tar#offset=1536``    | ``item.size`` bytes from there on; without a number, a link to nothing        |
| ``file:///x.parquet#row=12``     | the image in that row, of the usual column or of ``&column=left``             |
| ``file:///x.arrow#row=12``       | the same of an Arrow file                                                     |
| ``s3://bucket/…``, ``https://…`` | the same of object stores, by fsspec; see `latentae.data.sources.remote`      |
"""

import bisect
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar
from urllib.parse import unquote

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from latentae.data.decode import BadImage
from latentae.data.sources.base import Item, is_url, place_of, unreadable
from latentae.data.sources.remote import RemoteFile, fetch
from latentae.data.sources.rows import bytes_leaves, image_column, leaf_column
from latentae.errors import RequestError

OPEN_FILES = 64
CACHE_BYTES = 128 * 2**20  # of rows in memory, in each process

Value = TypeVar("Value")


class UriReader:
    """Reads items. Safe in threads; a pickled copy begins with nothing open.

    The files that were read last stay open, up to 64, and of parquet files the last row groups in memory, up to
    128 MiB. Arrow files are mapped; in object stores they are read whole, once.
    """

    def __init__(self) -> None:
        self._files = LastUsed[OpenFile](OPEN_FILES)
        self._facts = LastUsed[_Facts](OPEN_FILES)
        self._mapped = LastUsed[pyarrow.ChunkedArray](OPEN_FILES)
        self._rows = LastUsed[pyarrow.ChunkedArray](None)

    def read(self, item: Item) -> bytes:
        """The bytes of one item.

        Raises:
            BadImage: with reason ``unreadable``: the item is gone, damaged, or may not be read.
            OSError: its storage is gone, or still fails after several attempts.
            RequestError: its storage wants credentials, or a package that is missing.
        """
        if "://" not in item.uri:
            raise RequestError(f"{item.uri} is no address of a file: {item.key} can only be read by its source.")
        place = place_of(item.uri)
        wanted = dict(part.partition("=")[::2] for part in item.uri.partition("#")[2].split("&"))
        try:
            if "offset" in wanted:
                return self._part(item, place, wanted["offset"])
            if "row" in wanted:
                return self._row(item, place, int(wanted["row"]), unquote(wanted.get("column", "")) or None)
            return fetch(place) if is_url(place) else Path(place).read_bytes()
        except OSError as error:
            raise unreadable(item, error) from error

    def _part(self, item: Item, place: str, offset: str) -> bytes:
        if not offset:
            raise BadImage("unreadable", f"{item.key} is a link to nothing in its tar.")
        start = int(offset)
        if is_url(place):
            data = fetch(place, start, start + item.size)
        else:
            data = self._files.get(place, lambda: OpenFile(place)).read(start, item.size)
        if len(data) < item.size:
            raise BadImage("unreadable", f"{item.key} cannot be read (its tar is shorter than when it was listed).")
        return data

    def _row(self, item: Item, place: str, row: int, column: str | None) -> bytes:
        read = self._arrow_row if place.lower().endswith(".arrow") else self._parquet_row
        try:
            data = read(place, row, column)
        except (OSError, RequestError, pyarrow.ArrowException, IndexError) as error:
            if getattr(error, "errno", None) is not None or (is_url(place) and isinstance(error, RequestError)):
                raise
            reason = " ".join(str(error).split())
            raise BadImage("unreadable", f"{item.key} cannot be read: its row group is damaged ({reason}).") from error
        if data is None:
            raise BadImage("unreadable", f"{item.key} cannot be read: its row holds no bytes.")
        return data

    def _parquet_row(self, place: str, row: int, column: str | None) -> bytes | None:
        facts = self._facts.get((place, column), lambda: _Facts(place, column))
        group = bisect.bisect_right(facts.ends, row)
        if group == len(facts.ends):
            raise IndexError(f"it has no row {row}")
        images = self._rows.get((place, group, facts.leaf), lambda: facts.read(group), lambda images: images.nbytes)
        return images[row - (facts.ends[group - 1] if group else 0)].as_py()

    def _arrow_row(self, place: str, row: int, column: str | None) -> bytes | None:
        if is_url(place):
            images = self._rows.get((place, column), lambda: _arrow_images(place, column), lambda images: images.nbytes)
        else:
            images = self._mapped.get((place, column), lambda: _arrow_images(place, column))
        return images[row].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class LastUsed(Generic[Value]):
    """What was used last; threads that want the same wait for one making of it.

    Args:
        count: how many there may be; None for as many as fit into `CACHE_BYTES`, at least one.
    """

    def __init__(self, count: int | None):
        self.count = count
        self.values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._making: dict[Hashable, Lock] = {}
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int] = lambda _: 0) -> Value:
        with self._lock:
            if key in self.values:
                self.values.move_to_end(key)
                return self.values[key][0]
            making = self._making.setdefault(key, Lock())
        with making:
            with self._lock:
                if key in self.values:
                    return self.values[key][0]
            try:
                value = make()
            finally:
                with self._lock:
                    self._making.pop(key, None)
            with self._lock:
                self.values[key] = value, size(value)
                self._bytes += self.values[key][1]
                while len(self.values) > 1 and self._is_full():
                    self._bytes -= self.values.popitem(last=False)[1][1]
            return value

    def _is_full(self) -> bool:
        return self._bytes > CACHE_BYTES if self.count is None else len(self.values) > self.count


class OpenFile:
    """A file that threads may read at the same time; it is closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Facts:
    """Where the images of a parquet file are; its footer is read once."""

    def __init__(self, place: str, column: str | None):
        self.place = place
        source = parquet_input(place)
        self.size = source.size if isinstance(source, RemoteFile) else None
        with pyarrow.parquet.ParquetFile(source) as parquet:
            self.metadata, schema = parquet.metadata, parquet.schema_arrow
        self.leaf = bytes_leaves(schema)[image_column(place, schema, column)]
        groups = range(self.metadata.num_row_groups)
        self.ends = list(accumulate(self.metadata.row_group(number).num_rows for number in groups))

    def read(self, group: int) -> pyarrow.ChunkedArray:
        with pyarrow.parquet.ParquetFile(parquet_input(self.place, self.size), metadata=self.metadata) as parquet:
            return leaf_column(parquet.read_row_group(group, columns=[self.leaf], use_threads=False), self.leaf)


def parquet_input(place: str, size: int | None = None) -> Any:
    """What `pyarrow.parquet.ParquetFile` takes for a place; the ``size`` of a remote one, if known, spares asking."""
    return RemoteFile(place, size) if is_url(place) else place


def arrow_table(place: str) -> pyarrow.Table:
    """The rows of an Arrow stream, or file, that are read from the disk when they are looked at."""
    source = pyarrow.BufferReader(fetch(place)) if is_url(place) else pyarrow.memory_map(place)
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_file(source).read_all()


def _arrow_images(place: str, column: str | None) -> pyarrow.ChunkedArray:
    table = arrow_table(place)
    leaf = bytes_leaves(table.schema)[image_column(place, table.schema, column)]
    return leaf_column(table, leaf)
