"""Images listed in a table: csv, tsv or one JSON object a line."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentae.data.sources.base import (
    FILE_ERRORS,
    LABEL_COLUMNS,
    Item,
    file_uri,
    key_of,
    label_of,
    read_file,
)
from latentae.data.sources.table import ItemTable, ItemTableBuilder
from latentae.errors import RequestError

MANIFEST_EXTENSIONS = frozenset({".csv", ".tsv", ".jsonl"})
PATH_COLUMNS = ("path", "file", "image", "file_name")


class ManifestSource:
    """The images that a table lists: a header and rows in csv or tsv, an object a line in jsonl, all UTF-8.

    The column ``path`` (or ``file``, ``image``, ``file_name``) names each image, relative to the folder of the
    manifest; ``label`` (or ``cls``), if there is one, its label: a number, or a text; texts are numbered in sorted
    order. Other columns, captions among them, are of no use to an autoencoder and are passed over. A key is the path
    within the folder of the manifest, or the absolute path without its first slash for an image that lies elsewhere.
    Files that are missing are inputs that cannot be read.

    Raises:
        RequestError: the manifest cannot be understood, or lists an image twice.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()
        folder = os.path.normpath(self.path.parent)
        lines: dict[str, int] = {}
        found = ItemTableBuilder()
        inside = folder.rstrip(os.sep) + os.sep
        for line, row in _rows(self.path):
            file = os.path.normpath(os.path.join(folder, self._path(line, row)))  # noqa: PTH118  # pathlib keeps ..
            if file in lines:
                raise RequestError(f"{self.path} lists {file} twice, in lines {lines[file]} and {line}: remove one.")
            lines[file] = line
            label = label_of(next((row[name] for name in LABEL_COLUMNS if name in row), None))
            found.append(key_of(file.removeprefix(inside).lstrip(os.sep)), file_uri(file), _size(file), label)
        self._items = found.finish(str(self.path)).sorted()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return read_file(item)

    def _path(self, line: int, row: dict[str, Any]) -> str:
        column = next((name for name in PATH_COLUMNS if name in row), None)
        if column is None:
            columns = ", ".join(map(str, row)) or "nothing"
            raise RequestError(
                f"{self.path} has no column {' or '.join(PATH_COLUMNS)} in line {line}, but {columns}: name the images."
            )
        value = row[column]
        if not isinstance(value, str) or not value.strip() or "\0" in value or "://" in value:
            raise RequestError(f"{self.path} has {value!r} as {column} in line {line}; expected the path of a file.")
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            raise RequestError(f"{self.path} has {value!r} as {column} in line {line}, no name of a file.") from None
        return value


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".jsonl":
                for line, text in enumerate(stream, 1):
                    if text.strip():
                        yield line, _json_row(path, line, text)
                return
            reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            for row in reader:
                if None in row:
                    raise RequestError(f"{path} has more cells than columns in line {reader.line_num}: quote them.")
                yield reader.line_num, row
    except csv.Error as error:
        raise RequestError(
            f"{path} cannot be read as a table ({error}): check it at line {reader.line_num}."
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error


def _json_row(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON in line {line} ({error}): give one object a line.") from error
    if not isinstance(row, dict):
        raise RequestError(f"{path} has {text.strip()[:40]!r} in line {line}: give one JSON object a line.")
    return row


def _size(file: str) -> int:
    try:
        return Path(file).stat().st_size
    except OSError as error:
        if error.errno in FILE_ERRORS:
            return 0
        raise
