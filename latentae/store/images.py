"""Files out: their names, kept inside one folder whatever the keys say, and their writing in threads."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image
from torch import Tensor

from latentae.errors import DataError, RequestError
from latentae.files import atomic_write, remove_stale_temporaries
from latentae.nn.pixels import to_uint8

Writer = TypeVar("Writer", bound="FileWriter")

SAVE_OPTIONS = {"png": {"compress_level": 4}, "webp": {"lossless": True, "quality": 20, "method": 2}}
"""Both formats keep every pixel as it is; the options trade file size for time."""


def output_names(keys: Sequence[str], format: str) -> dict[str, str]:
    """A relative path for each key: its extension replaced by ``format``'s, so that ``a/b.jpg`` becomes ``a/b.png``.

    Where that would give several keys one name (``a.png`` and ``a.jpg``), they keep their extension and get another
    one: ``a.png.png`` and ``a.jpg.png``.

    Raises:
        DataError: a key would lead out of the folder that the names are for, or two names cannot be told apart.
    """
    hostile = [key for key in keys if not is_safe(key)]
    if hostile:
        raise DataError(f"{len(hostile)} keys do not name a file below one folder, such as {hostile[0]!r}: refused.")
    short = {key: str(PurePosixPath(key).with_suffix(f".{format}")) for key in keys}
    taken = Counter(name.casefold() for name in short.values())
    names = {key: name if taken[name.casefold()] == 1 else f"{key}.{format}" for key, name in short.items()}
    if len({name.casefold() for name in names.values()}) < len(names):
        names = {key: f"{key}.{format}" for key in keys}
    if len(set(names.values())) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise DataError(f"The key {twice!r} occurs more than once.")
    return names


def is_safe(key: str) -> bool:
    """Whether ``key`` is a relative path to a file that cannot climb: no root, no ``..``, no NUL, not empty."""
    path = PurePosixPath(key)
    return not (path.is_absolute() or ".." in path.parts or "\0" in key or path.name == "")


class FileWriter:
    """Writes a file for each of ``keys`` below ``folder``, in threads, each whole or not at all.

    Use as a context manager. See `output_names` for the files' names.

    Args:
        inputs: URIs of files that must not be overwritten, whatever links lead to them.

    Raises:
        RequestError: the format is not known, a file would replace one of the inputs, or a symbolic link below
            ``folder`` leads out of it.
        DataError: a key is refused by `output_names`.
    """

    formats: tuple[str, ...] = ()
    most_pending = 4  # for each worker

    def __init__(self, folder: Path, keys: Sequence[str], inputs: Iterable[str], *, format: str, workers: int):
        if format not in self.formats:
            raise RequestError(f"format={format!r}; expected one of {', '.join(self.formats)}.")
        self.folder, self.format, self.workers = folder.resolve(), format, workers
        self.paths = {key: self.folder / name for key, name in output_names(keys, format).items()}
        self._refuse_to_overwrite(inputs)
        self._pending: deque[Future[None]] = deque()

    def _refuse_to_overwrite(self, inputs: Iterable[str]) -> None:
        existing = {os.path.realpath(path) for path in self.paths.values() if path.exists()}
        files = (os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))) for uri in inputs) if existing else ()
        for file in files:
            if os.path.realpath(file) in existing:
                raise RequestError(f"{file} is an input and would be overwritten: choose another folder.")

    def __enter__(self: Writer) -> Writer:
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in {path.parent for path in self.paths.values()}:
            if not folder.resolve().is_relative_to(self.folder):
                raise RequestError(f"{folder} leads out of {self.folder} by a symbolic link: remove the link.")
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale_temporaries(folder)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="latentae-write")
        return self

    def _submit(self, save: Callable[..., None], *arguments: Any) -> None:
        """Call ``save`` in a thread; waits while too many files are on their way."""
        if len(self._pending) >= self.most_pending * self.workers:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(save, *arguments))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


class ImageWriter(FileWriter):
    """Writes an image for each of ``keys``; see `FileWriter`."""

    formats = tuple(SAVE_OPTIONS)

    def write(self, key: str, pixels: Tensor) -> None:
        """Write float pixels (3, H, W) in [-1, 1]; waits while too many images are on their way."""
        image = to_uint8(pixels).permute(1, 2, 0).contiguous().cpu().numpy()  # (H, W, 3)
        self._submit(self._save, self.paths[key], image)

    def _save(self, path: Path, image: np.ndarray) -> None:
        with atomic_write(path) as stream:
            Image.fromarray(image).save(stream, format=self.format, **SAVE_OPTIONS[self.format])
