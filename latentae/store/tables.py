"""Parquet files as named columns of plain values: the plan, the rows of a shard, the quarantine."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from latentae.errors import DataError
from latentae.files import atomic_write


def table_bytes(types: dict[str, str], columns: dict[str, list[Any]]) -> bytes:
    """A parquet file of ``columns``; ``types`` gives each column's Arrow type by name, in the order of the file."""
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()])
    stream = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), stream, compression="zstd")
    return stream.getvalue()


def write_table(path: Path, types: dict[str, str], columns: dict[str, list[Any]]) -> None:
    """Write `table_bytes` atomically."""
    content = table_bytes(types, columns)
    with atomic_write(path) as stream:
        stream.write(content)


def read_table(path: Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """The columns of a table by name.

    Raises:
        DataError: the file is absent or not whole.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # read_table would take 'a=b' in a path for a column
            return file.read(columns).to_pydict()
    except (pyarrow.ArrowException, FileNotFoundError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is not a whole parquet file ({error})"
        raise DataError(f"{path} {reason}: restore it from a copy, or encode into a new folder.") from error
