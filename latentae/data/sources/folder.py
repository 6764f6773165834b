"""Folders of images, and single files."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path

from latentae.data.sources.base import IMAGE_EXTENSIONS, Item, file_uri, is_hidden, key_of, read_file
from latentae.errors import RequestError

ARCHIVE_EXTENSIONS = frozenset({".tar", ".parquet"})


class FolderSource:
    """The images of a folder and of the folders below it, or files of other ``extensions``, listed once.

    Symbolic links are followed, but never into a folder that contains the link. Hidden files and folders and
    ``__MACOSX`` are skipped, and so is what is not a file. A label is the index of the first-level folder, in sorted
    order, that holds the image; images beside those folders have none. Names that are not UTF-8 get keys in which the
    offending bytes are written as ``\\xNN``; ``uri`` is a percent-encoded file URI and always exact.

    ``other_files`` counts what was passed over by extension, and ``archives`` are the tars and parquet files among it.

    Raises:
        RequestError: ``path`` is no folder, a folder in it may not be read, or two files would share a key.
    """

    def __init__(self, path: str | os.PathLike[str], extensions: Set[str] = IMAGE_EXTENSIONS):
        self.path, self.extensions = Path(path).absolute(), extensions
        if not self.path.is_dir():
            raise RequestError(f"{path} is not a folder: give a folder of images.")
        self.other_files: Counter[str] = Counter()
        self.archives: list[str] = []
        self._items = self._scan()

    def items(self) -> list[Item]:
        return list(self._items)

    def read(self, item: Item) -> bytes:
        return read_file(item)

    def _scan(self) -> list[Item]:
        labels: dict[str, int] = {}
        root = str(self.path).rstrip(os.sep) + os.sep
        items: dict[str, Item] = {}
        for path, size in self._walk(self.path, (), labels):
            relative = path[len(root) :]
            item = Item(key_of(relative), file_uri(path), size, labels.get(relative.partition(os.sep)[0]))
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
                if not is_hidden(entry.name)
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
                if extension in self.extensions:
                    yield entry.path, status.st_size if status else 0
                else:
                    self.other_files[extension or "no extension"] += 1
                    if extension in ARCHIVE_EXTENSIONS:
                        self.archives.append(entry.path)


class FileSource:
    """A single image file; its key is its name."""

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path).absolute()
        self._item = Item(key_of(path.name), file_uri(os.fspath(path)), path.stat().st_size)

    def items(self) -> list[Item]:
        return [self._item]

    def read(self, item: Item) -> bytes:
        return read_file(item)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What an entry is, links followed; None for a link to nothing, which is an input that reading will report."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
