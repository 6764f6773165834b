"""Folders of images, and single files."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Set
from pathlib import Path

from latentae.data.sources.base import IMAGE_EXTENSIONS, Item, extension_of, file_uri, is_hidden, key_of, read_file
from latentae.data.sources.table import ItemTable, ItemTableBuilder
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
        self._root = len(str(self.path).rstrip(os.sep)) + 1
        self._items = self._scan()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return read_file(item)

    def _scan(self) -> ItemTable:
        found = ItemTableBuilder()
        self._add(str(self.path), (), None, found)
        self.archives.sort()
        return found.finish().sorted()

    def _add(self, folder: str, above: tuple[tuple[int, int], ...], label: int | None, found: ItemTableBuilder) -> None:
        """Add the files under ``folder``; ``above`` identifies the folders on the way down to it.

        Files are added as they are met: a folder may hold millions."""
        folders: list[tuple[str, tuple[int, int]]] = []
        try:
            identity = os.stat(folder)  # noqa: PTH116  # no object for each
            for entry in os.scandir(folder):
                if is_hidden(entry.name):
                    continue
                status = _status(entry)
                if status and stat.S_ISDIR(status.st_mode):
                    folders.append((entry.name, (status.st_dev, status.st_ino)))
                elif status is None or stat.S_ISREG(status.st_mode):
                    self._add_file(entry.path, status.st_size if status else 0, label, found)
        except OSError as error:
            raise RequestError(
                f"The folder {folder} cannot be read ({error.strerror}): change its permissions or move it away."
            ) from error
        inside = (*above, (identity.st_dev, identity.st_ino))
        number = 0
        for name, node in sorted(folders):
            if node not in inside:
                self._add(os.path.join(folder, name), inside, label if above else number, found)  # noqa: PTH118
                number += 1

    def _add_file(self, path: str, size: int, label: int | None, found: ItemTableBuilder) -> None:
        extension = extension_of(path)
        if extension in self.extensions:
            found.append(key_of(path[self._root :]), file_uri(path), size, label)
        else:
            self.other_files[extension or "no extension"] += 1
            if extension in ARCHIVE_EXTENSIONS:
                self.archives.append(path)


class FileSource:
    """A single image file; its key is its name."""

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path).absolute()
        self._items = ItemTable.of([Item(key_of(path.name), file_uri(os.fspath(path)), path.stat().st_size)])

    def items(self) -> ItemTable:
        return self._items

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
