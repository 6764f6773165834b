"""Where images come from: a source lists its items in an order that depends on nothing but their names, and reads
their bytes. Training and encoding share sources, so that both see the same keys.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote_from_bytes, unquote_to_bytes

from latentae.data.decode import BadImage
from latentae.errors import RequestError

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k"}
)
SKIPPED_FOLDERS = frozenset({"__MACOSX"})
# Errors that belong to one file; others (a network share that went away) are not the image's fault.
FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


@dataclass(frozen=True, slots=True)
class Item:
    """One input. ``key`` is its relative posix path with extension, ``uri`` finds its bytes, ``size`` counts them."""

    key: str
    uri: str
    size: int
    label: int | None = None


class Source(Protocol):
    """A set of inputs."""

    def items(self) -> list[Item]:
        """All items, sorted by key; the same list at every call."""
        ...

    def read(self, item: Item) -> bytes:
        """The bytes of one item. Safe in threads and in processes that the source was pickled to.

        Raises:
            BadImage: with reason ``unreadable``: the item is gone, or may not be read.
        """
        ...


class FolderSource:
    """The images of a folder and of the folders below it, chosen by extension, listed once.

    Symbolic links are followed, but never into a folder that contains the link. Hidden files and folders and
    ``__MACOSX`` are skipped, and so is what is not a file. A label is the index of the first-level folder, in sorted
    order, that holds the image; images beside those folders have none. Names that are not UTF-8 get keys in which the
    offending bytes are written as ``\\xNN``; ``uri`` is a percent-encoded file URI and always exact.

    Raises:
        RequestError: ``path`` is no folder, a folder in it may not be read, or two files would share a key.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()
        if not self.path.is_dir():
            raise RequestError(f"{path} is not a folder: give a folder of images.")
        self.other_files: Counter[str] = Counter()
        self._items = self._scan()

    def items(self) -> list[Item]:
        return list(self._items)

    def read(self, item: Item) -> bytes:
        return _read_file(item)

    def _scan(self) -> list[Item]:
        labels: dict[str, int] = {}
        root = str(self.path).rstrip(os.sep) + os.sep
        items: dict[str, Item] = {}
        for path, size in self._walk(self.path, (), labels):
            relative = path[len(root) :]
            item = Item(_key(relative), _uri(path), size, labels.get(relative.partition(os.sep)[0]))
            if item.key in items:
                raise RequestError(
                    f"{items[item.key].uri} and {item.uri} would both get the key {item.key!r}: rename one of them."
                )
            items[item.key] = item
        return [items[key] for key in sorted(items)]

    def _walk(
        self, folder: Path, above: tuple[tuple[int, int], ...], labels: dict[str, int]
    ) -> Iterator[tuple[str, int]]:
        """Image files under ``folder`` with their sizes; ``above`` identifies the folders on the way down to it."""
        try:
            identity = folder.stat()
            entries = [
                (entry, _status(entry))
                for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
                if not entry.name.startswith(".") and entry.name not in SKIPPED_FOLDERS
            ]
        except OSError as error:
            raise RequestError(
                f"The folder {folder} cannot be read ({error.strerror}): change its permissions or move it away."
            ) from error
        inside = (*above, (identity.st_dev, identity.st_ino))
        for entry, status in entries:
            if status and stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) not in inside:
                    if not above:
                        labels[entry.name] = len(labels)
                    yield from self._walk(Path(entry.path), inside, labels)
            elif status is None or stat.S_ISREG(status.st_mode):
                extension = Path(entry.name).suffix.lower()
                if extension in IMAGE_EXTENSIONS:
                    yield entry.path, status.st_size if status else 0
                else:
                    self.other_files[extension or "no extension"] += 1


class FileSource:
    """A single image file; its key is its name."""

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path).absolute()
        self._item = Item(_key(path.name), _uri(os.fspath(path)), path.stat().st_size)

    def items(self) -> list[Item]:
        return [self._item]

    def read(self, item: Item) -> bytes:
        return _read_file(item)


def open_source(path: str | os.PathLike[str]) -> Source:
    """The source for a folder of images or for a single image file.

    Raises:
        RequestError: nothing is there, or no image is in it.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path} does not exist: give a folder of images or an image file.")
    if not path.is_dir():
        if path.suffix.lower() not in IMAGE_EXTENSIONS:
            raise RequestError(f"{path} is not an image file by its name: give a folder or one of {_extensions()}.")
        return FileSource(path)
    source = FolderSource(path)
    if not source.items():
        kinds = ", ".join(f"{count} {extension}" for extension, count in source.other_files.most_common(3))
        found = f"other files ({kinds})" if kinds else "no files"
        raise RequestError(f"{path} holds no images but {found}: images end in {_extensions()}.")
    return source


def _extensions() -> str:
    return " ".join(sorted(IMAGE_EXTENSIONS))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What an entry is, links followed; None for a link to nothing, which is an input that reading will report."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _uri(path: str) -> str:
    return "file://" + quote_from_bytes(os.fsencode(path))


def _key(relative: str) -> str:
    return os.fsencode(relative).decode("utf-8", "backslashreplace").replace(os.sep, "/")


def _read_file(item: Item) -> bytes:
    try:
        return Path(os.fsdecode(unquote_to_bytes(item.uri.removeprefix("file://")))).read_bytes()
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        raise BadImage("unreadable", f"{item.key} cannot be read ({error.strerror}).") from error
