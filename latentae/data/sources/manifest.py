"""Images or clips listed in a table: csv, tsv, one JSON object a line, or parquet."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.csv

from latentae.data.sources.base import (
    AS_IT_IS,
    GUESSED_BYTES,
    Item,
    extension_of,
    file_uri,
    is_url,
    key_of,
    label_of,
    path_of,
    place_of,
    place_of_name,
    size_of_path,
    uri_of,
)
from latentae.data.sources.columns import Carried
from latentae.data.sources.parquet import open_parquet
from latentae.data.sources.reading import UriReader
from latentae.data.sources.remote import open_place, size_of_url
from latentae.data.sources.rows import TEXT, is_text, joined, label_column
from latentae.data.sources.table import GUESSED, OWN, ItemTable, ItemTableBuilder, SameKey
from latentae.errors import LatentAEError, RequestError

MANIFEST_EXTENSIONS = frozenset({".csv", ".tsv", ".jsonl"})
PATH_COLUMNS = ("path", "file", "image", "file_name", "url")
KEY = "key"
BLOCK_BYTES = 2**23
ROWS_AT_ONCE = 65536
MOST_SIZES = 100_000  # rows up to which every file is looked at
SAMPLED_FILES, SAMPLED_OBJECTS = 1000, 32
NOT_PLAIN = r"(^|/)\.{0,2}(/|$)"  # a path that is absolute, or a URL, or has a part that is empty, . or ..
NOT_ENCODED = "[^A-Za-z0-9_.~/-]"


class ManifestSource:
    """The images that a table lists: a header and rows in csv or tsv, an object a line in jsonl, all UTF-8, or parquet.

    The column ``path`` (or ``file``, ``image``, ``file_name``, ``url``) names each image, relative to the folder of the
    manifest, or by an absolute path or URL; ``label`` (or ``cls``), if there is one, its label: a number, or a text;
    texts are numbered in sorted order. The other columns are carried along, those of csv and tsv as text, and nested
    values as JSON. A key is the path within the folder of the manifest, or the absolute path without its first slash
    for an image that lies elsewhere, or what follows ``://``; or what the column ``key`` says, if there is one. Files
    that are missing are inputs that cannot be read.

    Sizes are looked up on the disk, of a manifest with up to 100,000 rows. They are a guess in longer ones, where it
    would take longer than the listing itself, and of URLs: the average of some files, rounded up to a power of two.

    Args:
        columns: names of the columns to carry along; None for all.

    Raises:
        RequestError: the manifest cannot be understood, or lists an image twice; or no column of such a name.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str] | None = None):
        self.place = place_of_name(path)
        self.reader = UriReader()
        self._carried = Carried(columns)
        if is_url(self.place):
            self._folder, self._encoded_folder = self.place.rpartition("/")[0], uri_of(self.place).rpartition("/")[0]
        else:
            self._folder = os.path.normpath(os.path.dirname(self.place))  # noqa: PTH120
            self._encoded_folder = file_uri(self._folder).rstrip("/")
        found = ItemTableBuilder()
        try:
            self._list(found)
        except OSError as error:
            raise RequestError(f"{self.place} cannot be read ({error.strerror or error}): check the file.") from error
        self._carried.check(self.place)
        items = found.finish(self.place)
        try:
            self._items = _with_sizes(items.sorted())
        except SameKey as error:
            places = np.flatnonzero(pc.equal(items.keys, error.key).to_numpy(zero_copy_only=False))[:2].tolist()
            one, other = (self._line(int(place)) for place in places)
            what = place_of(items[places[1]].uri) if items[places[0]].uri == items[places[1]].uri else error.key
            raise RequestError(f"{self.place} lists {what} twice, in lines {one} and {other}: remove one.") from error

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)

    def _list(self, found: ItemTableBuilder) -> None:
        extension = extension_of(self.place)
        if extension == ".jsonl":
            self._add_rows(_rows(self.place), found)
            return
        done = 0
        try:
            for table in _parquet_tables(self.place) if extension == ".parquet" else _csv_tables(self.place):
                self._add_table(table, done, found)
                done += table.num_rows
        except (
            pyarrow.ArrowInvalid,
            csv.Error,
        ):  # a csv that Arrow takes no notice of, or none: the slow reader says which
            self._add_rows(islice(_rows(self.place), done, None), found)

    def _add_table(self, table: pyarrow.Table, before: int, found: ItemTableBuilder) -> None:
        column = next((name for name in PATH_COLUMNS if name in table.column_names), None)
        if column is None:
            self._refuse_columns(self._line(before) if table.num_rows else 1, table.column_names)
        values = table.column(column).cast(pyarrow.large_string()).combine_chunks()
        blank = pc.fill_null(
            pc.or_(pc.equal(pc.utf8_trim_whitespace(values), ""), pc.match_substring(values, "\0")), True
        )
        if (bad := pc.index(blank, True).as_py()) >= 0:
            self._path(self._line(before + bad), {column: values[bad].as_py()})
        keys, uris = self._located(values)
        if KEY in table.column_names:
            keys = table.column(KEY).cast(pyarrow.large_string()).combine_chunks()
            if (bad := pc.index(pc.fill_null(pc.equal(keys, ""), True), True).as_py()) >= 0:
                self._key(self._line(before + bad), {})
        labelled = label_column(table.column_names)
        carried = self._carried.fields(table.schema, {column, labelled, KEY})
        columns = self._carried.of_table(table, carried)
        labels = table.column(labelled) if labelled else None
        found.extend(keys, uris, np.zeros(len(keys), np.int64), labels, columns)

    def _located(self, values: pyarrow.Array) -> tuple[pyarrow.Array, pyarrow.Array]:
        """Keys and URIs of paths as the manifest has them: most are in a simple form, and are put together at once."""
        rest = pc.replace_substring_regex(values, "^/", "")
        odd = pc.match_substring_regex(rest, NOT_PLAIN)
        quoted = _replaced(rest, pc.and_not(pc.match_substring_regex(rest, NOT_ENCODED), odd), quote)
        relative = pc.equal(values, rest)
        inside, outside = pyarrow.scalar(f"{self._encoded_folder}/", TEXT), pyarrow.scalar("file:///", TEXT)
        uris = joined(pc.if_else(relative, inside, outside), quoted)
        keys = rest
        within = "" if is_url(self._folder) else self._folder.strip("/") + "/"
        if within.strip("/") and not pc.all(relative).as_py():
            below = pc.and_not(pc.starts_with(rest, within), relative)
            keys = pc.if_else(below, pc.utf8_slice_codeunits(rest, len(within)), rest)
        if pc.any(odd).as_py():
            located = [self._locate(value) for value in values.filter(odd).to_pylist()]
            keys = _put(keys, odd, [key for key, _ in located])
            uris = _put(uris, odd, [uri for _, uri in located])
        return keys, uris

    def _locate(self, value: str) -> tuple[str, str]:
        """Key and URI of one path or URL."""
        if is_url(value) and not value.lower().startswith("file://"):
            return value.partition("://")[2].lstrip("/"), uri_of(value)
        if is_url(self._folder) and not value.startswith(("/", "file://")):
            relative = posixpath.normpath(value)
            encoded = quote(relative) if self._folder.startswith(AS_IT_IS) else relative
            return relative, uri_of(f"{self._folder}/{encoded}")
        path = path_of(value) if is_url(value) else os.path.join(self._folder, value)  # noqa: PTH118
        path = os.path.normpath(path)  # pathlib keeps ..
        within = self._folder.rstrip(os.sep) + os.sep
        return key_of(path.removeprefix(within).lstrip(os.sep)), file_uri(path)

    def _add_rows(self, rows: Iterable[tuple[int, dict[str, Any]]], found: ItemTableBuilder) -> None:
        rows = iter(rows)
        while block := list(islice(rows, ROWS_AT_ONCE)):
            paths = [self._path(line, row) for line, row in block]
            for (line, row), (column, _), (key, uri) in zip(
                block, paths, self._locate_all([path for _, path in paths])
            ):
                labelled = label_column(row)
                label = label_of(row[labelled]) if labelled else None
                columns = self._carried.of_row(row, (column, labelled, KEY)) if self._carried else {}
                found.append(self._key(line, row) if KEY in row else key, uri, 0, label, columns)

    def _locate_all(self, paths: list[str]) -> Iterable[tuple[str, str]]:
        try:
            keys, uris = self._located(pyarrow.array(paths, TEXT))
        except UnicodeEncodeError:  # a name that is not UTF-8 is among them, as Python writes it
            return map(self._locate, paths)
        return zip(keys.to_pylist(), uris.to_pylist())

    def _path(self, line: int, row: dict[str, Any]) -> tuple[str, str]:
        column = next((name for name in PATH_COLUMNS if name in row), None)
        if column is None:
            self._refuse_columns(line, row)
        value = row[column]
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise RequestError(f"{self.place} has {value!r} as {column} in line {line}; expected the path of a file.")
        try:
            value.isascii() or os.fsencode(value)
        except UnicodeEncodeError:
            raise RequestError(f"{self.place} has {value!r} as {column} in line {line}, no name of a file.") from None
        return column, value

    def _key(self, line: int, row: dict[str, Any]) -> str:
        key = row.get(KEY)
        if key is None or isinstance(key, dict | list) or not str(key):
            raise RequestError(f"{self.place} has no key in line {line}: give each image one, or leave the column out.")
        return str(key).encode("utf-8", "backslashreplace").decode()

    def _refuse_columns(self, line: int, names: Iterable[str]) -> NoReturn:
        columns = ", ".join(map(str, names)) or "nothing"
        raise RequestError(
            f"{self.place} has no column {' or '.join(PATH_COLUMNS)} in line {line}, but {columns}: name the images."
        )

    def _line(self, row: int) -> int:
        """The line of the file in which a row is, counted from 0; of parquet files its number, from 1."""
        if extension_of(self.place) == ".parquet":
            return row + 1
        return next((line for line, _ in islice(_rows(self.place), row, None)), row + 2)


def is_manifest(schema: pyarrow.Schema) -> bool:
    """Whether a parquet file lists images instead of holding them."""
    return any(name in schema.names and is_text(schema.field(name).type) for name in PATH_COLUMNS)


def _parquet_tables(place: str) -> Iterator[pyarrow.Table]:
    with open_parquet(place) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, use_threads=False):
            yield pyarrow.Table.from_batches([batch])


def _csv_tables(place: str) -> Iterator[pyarrow.Table]:
    """A csv or tsv by Arrow, every column as text.

    Raises:
        pyarrow.ArrowInvalid: it is not as regular as Arrow wants it; tables may have been given before.
    """
    with open_place(place) as stream:
        if sum(block.count(b'"') for block in iter(lambda: stream.read(BLOCK_BYTES), b"")) % 2:
            raise pyarrow.ArrowInvalid("a quote is not closed, which Arrow takes for the end")
    parsing = pyarrow.csv.ParseOptions(delimiter=_delimiter(place), newlines_in_values=True)
    reading = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    with open_place(place) as stream:
        header = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
        lines = csv.reader(header, delimiter=_delimiter(place), strict=True)
        names = next((names for names in lines if names), [])
        header.detach()
    types = dict.fromkeys(names, pyarrow.large_string())
    converting = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    with open_place(place) as stream:
        reader = pyarrow.csv.open_csv(stream, read_options=reading, parse_options=parsing, convert_options=converting)
        lower = [name.strip().lower() for name in reader.schema.names]
        last = {name: place for place, name in enumerate(lower)}  # of columns of one name
        for batch in reader:
            yield pyarrow.table({name: batch.column(place) for name, place in last.items()})


def _delimiter(place: str) -> str:
    return "\t" if extension_of(place) == ".tsv" else ","


def _rows(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of csv, tsv or jsonl with the numbers of their lines."""
    try:
        with io.TextIOWrapper(open_place(place), "utf-8-sig", newline="") as stream:
            if extension_of(place) == ".jsonl":
                for line, text in enumerate(stream, 1):
                    if text.strip():
                        yield line, _json_row(place, line, text)
                return
            reader = csv.DictReader(stream, delimiter=_delimiter(place), strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            for row in reader:
                if None in row:
                    raise RequestError(f"{place} has more cells than columns in line {reader.line_num}: quote them.")
                yield reader.line_num, row
    except csv.Error as error:
        raise RequestError(
            f"{place} cannot be read as a table ({error}): check it at line {reader.line_num}."
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error


def _json_row(place: str, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} is not JSON in line {line} ({error}): give one object a line.") from error
    if not isinstance(row, dict):
        raise RequestError(f"{place} has {text.strip()[:40]!r} in line {line}: give one JSON object a line.")
    return row


def _replaced(values: pyarrow.Array, chosen: pyarrow.Array, function: Any) -> pyarrow.Array:
    """``function`` applied to the chosen values."""
    if not pc.any(chosen).as_py():
        return values
    return _put(values, chosen, [function(value) for value in values.filter(chosen).to_pylist()])


def _put(values: pyarrow.Array, chosen: pyarrow.Array, new: list[str]) -> pyarrow.Array:
    return pc.replace_with_mask(values, chosen, pyarrow.array(new, values.type))


def _with_sizes(items: ItemTable) -> ItemTable:
    """Items with the lengths of their files, where these are found out."""
    uris = items.table.column("uri")
    local = pc.starts_with(uris, "file://").to_numpy(zero_copy_only=False)
    sizes = np.zeros(len(items), np.int64)
    everywhere = np.flatnonzero(local) if local.sum() <= MOST_SIZES else np.array([], np.int64)
    for place in everywhere.tolist():
        sizes[place] = size_of_path(path_of(uris[place].as_py()))
    if len(everywhere) < local.sum():
        sizes[local] = _about(
            [size_of_path(path_of(uri)) for uri in _some(uris.filter(pyarrow.array(local)), SAMPLED_FILES)]
        )
    if not local.all():
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(_remote_size, _some(uris.filter(pyarrow.array(~local)), SAMPLED_OBJECTS))
            sizes[~local] = _about(list(found))
    table = items.table.set_column(OWN.index("bytes"), "bytes", pyarrow.array(sizes))
    return ItemTable(table if len(everywhere) == len(items) else table.replace_schema_metadata(GUESSED))


def _some(uris: pyarrow.ChunkedArray, count: int) -> list[str]:
    places = np.unique(np.linspace(0, len(uris) - 1, min(count, len(uris))).astype(np.int64))
    return uris.take(pyarrow.array(places)).to_pylist()


def _about(sizes: list[int]) -> int:
    """A round number about as large as most of these; zeros are files that are not there."""
    known = [size for size in sizes if size]
    return 2 ** (round(sum(known) / len(known)) - 1).bit_length() if known else GUESSED_BYTES


def _remote_size(uri: str) -> int:
    """The length of an object, 0 where it is not to be had; pages of the web are not asked."""
    if uri.startswith(AS_IT_IS):
        return 0
    try:
        return size_of_url(place_of(uri)) or 0
    except (OSError, LatentAEError):
        return 0
