"""Parquet files as named columns of plain values: the plan, the rows of a shard, the quarantine."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from latentae.errors import DataError
from latentae.files import atomic_write

Types = Mapping[str, str | pyarrow.DataType]


def table_bytes(types: Types, columns: dict[str, list[Any]]) -> bytes:
    """A parquet file of ``columns``; ``types`` gives the Arrow type of each, or its name, in the file's order."""
    schema = pyarrow.schema(
        [(name, pyarrow.type_for_alias(kind) if isinstance(kind, str) else kind) for name, kind in types.items()]
    )
    stream = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), stream, compression="zstd")
    return stream.getvalue()


def write_table(path: Path, types: Types, columns: dict[str, list[Any]]) -> None:
    """Write `table_bytes` atomically."""
    content = table_bytes(types, columns)
    with atomic_write(path) as stream:
        stream.write(content)


def open_table(path: Path | BytesIO) -> pyarrow.parquet.ParquetFile:
    """A parquet file to be read in parts; close it, or use it as a context manager.

    Raises:
        DataError: the file is absent or not whole.
    """
    try:
        return pyarrow.parquet.ParquetFile(path)  # read_table would take 'a=b' in a path for a column
    except (pyarrow.ArrowException, FileNotFoundError) as error:
        raise _damaged(path, error) from error


def read_table(path: Path | BytesIO, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """The columns of a table by name.

    Raises:
        DataError: the file is absent or not whole.
    """
    try:
        with open_table(path) as file:
            return file.read(columns).to_pydict()
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error


def _damaged(path: Path | BytesIO, error: Exception) -> DataError:
    reason = "is missing" if isinstance(error, FileNotFoundError) else f"is not a whole parquet file ({error})"
    return DataError(f"{path} {reason}: restore it from a copy, or encode into a new folder.")
