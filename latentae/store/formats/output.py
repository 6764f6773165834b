"""What an export writes: files below one folder, each whole or absent, and a table of which key stands where."""

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from latentae.files import atomic_write, remove_stale_temporaries

WRITERS = 8  # threads; they wait for the disk
LONGEST_NAME = 200  # bytes of one part of a path; file systems end at 255
KEYS_AT_ONCE = 65536
KEYS_SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("label", pyarrow.int64()), ("file", pyarrow.string()), ("row", pyarrow.int64())]
)


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def safe_path(key: str, *, escaped: str = "") -> str:
    """A key as a relative path that cannot climb, with the characters of ``escaped`` written as ``%2E``.

    Other keys stay what they are, and no two keys get one path.
    """
    return "/".join(_safe_part(part, escaped) for part in key.split("/"))


def _safe_part(part: str, escaped: str) -> str:
    climbs = part.strip(".") == ""  # "", ".", ".." and the like
    letters = [_escape(c) if c in escaped or c in "%\\" or ord(c) < 32 or climbs else c for c in part]
    name = "".join(letters) or "%"
    if len(name.encode("utf-8", "surrogatepass")) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 6]}%{hashlib.sha256(part.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _escape(character: str) -> str:
    return f"%{ord(character):02X}"


class OutputFolder:
    """Files below ``path``, written in threads. Use as a context manager.

    Contents are functions of the entries, so a file that is there already, whole as all are, is not written again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._folders: set[Path] = set()
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "OutputFolder":
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="latentae-write")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            while self._pending:
                self._pending.popleft().result()

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A large file, written as it comes."""
        self._make((self.path / name).parent)
        with atomic_write(self.path / name) as stream:
            yield stream

    def write(self, name: str, content: bytes | Callable[[], bytes]) -> None:
        """Write a small file in a thread, which may make its content; waits while too many are on their way."""
        path = self.path / name
        self._make(path.parent)
        if path.exists():
            return
        while len(self._pending) >= 4 * WRITERS:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(_write, path, content))

    def _make(self, folder: Path) -> None:
        if folder not in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale_temporaries(folder)
            self._folders.add(folder)


def _write(path: Path, content: bytes | Callable[[], bytes]) -> None:
    data = content if isinstance(content, bytes) else content()
    with atomic_write(path) as stream:
        stream.write(data)


class KeyTable:
    """Rows of ``keys.parquet``: the key and the label of each entry, and the file and the row where its latents are."""

    def __init__(self, writer: pyarrow.parquet.ParquetWriter):
        self._writer = writer
        self._rows: list[tuple[str, int | None, str, int]] = []

    def add(self, item: dict[str, Any], file: str, row: int = 0) -> None:
        self._rows.append((item["key"], None if item["label"] < 0 else item["label"], file, row))
        if len(self._rows) >= KEYS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            columns = [pyarrow.array(values, field.type) for values, field in zip(zip(*self._rows), KEYS_SCHEMA)]
            self._writer.write_table(pyarrow.table(columns, schema=KEYS_SCHEMA))
            self._rows = []


@contextmanager
def key_table(folder: OutputFolder) -> Iterator[KeyTable]:
    """Write ``keys.parquet``, which appears when all rows are in it."""
    with (
        folder.open("keys.parquet") as stream,
        pyarrow.parquet.ParquetWriter(stream, KEYS_SCHEMA, compression="zstd") as writer,
    ):
        table = KeyTable(writer)
        yield table
        table.flush()
