"""Folders of images, and single files."""

import errno
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Set
from pathlib import Path
from urllib.parse import unquote

from latentae.data.sources.base import (
    AS_IT_IS,
    GUESSED_BYTES,
    IMAGE_EXTENSIONS,
    Item,
    extension_of,
    file_uri,
    is_hidden,
    is_url,
    key_of,
    place_of_name,
    uri_of,
)
from latentae.data.sources.reading import UriReader
from latentae.data.sources.remote import kind_of, size_of_url, walk
from latentae.data.sources.table import ItemTable, ItemTableBuilder
from latentae.errors import RequestError

ARCHIVE_EXTENSIONS = frozenset({".tar", ".parquet"})


class FolderSource:
    """The images of a folder and of the folders below it, or files of other ``extensions``, listed once.

    Symbolic links are followed, but never into a folder that contains the link. Hidden files and folders and
    ``__MACOSX`` are skipped, and so is what is not a file. A label is the index of the first-level folder, in sorted
    order, that holds the image; images beside those folders have none. Names that are not UTF-8 get keys in which the
    offending bytes are written as ``\\xNN``; ``uri`` is percent-encoded and always exact. In an object store only the
    folders that hold something exist, and so do labels.

    ``other_files`` counts what was passed over by extension, and ``archives`` are the tars and parquet files among it.

    Raises:
        RequestError: ``path`` is no folder, a folder in it may not be read, or two files would share a key.
    """

    def __init__(self, path: str | os.PathLike[str], extensions: Set[str] = IMAGE_EXTENSIONS):
        self.place, self.extensions = place_of_name(path), extensions
        if kind_of(self.place) != "folder":
            raise RequestError(f"{path} is not a folder: give a folder of images.")
        self.other_files: Counter[str] = Counter()
        self.archives: list[str] = []
        self.reader = UriReader()
        self._root = len(self.place.rstrip("/")) + 1
        self._classes: dict[str, int] = {}
        found = ItemTableBuilder()
        if is_url(self.place):
            self._add_remote(found)
        else:
            self._add(self.place, (), None, found)
        self.archives.sort()
        items = found.finish().sorted()
        self._items = items.with_classes(self._classes) if self._classes else items

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)

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
                elif (status is None or stat.S_ISREG(status.st_mode)) and self._is_wanted(entry.path):
                    key = key_of(entry.path[self._root :])
                    found.append(key, file_uri(entry.path), status.st_size if status else 0, label)
        except OSError as error:
            raise RequestError(
                f"The folder {folder} cannot be read ({error.strerror}): change its permissions or move it away."
            ) from error
        inside = (*above, (identity.st_dev, identity.st_ino))
        number = 0
        for name, node in sorted(folders):
            if node not in inside:
                if not above:
                    self._classes[key_of(name)] = number
                self._add(os.path.join(folder, name), inside, label if above else number, found)  # noqa: PTH118
                number += 1

    def _add_remote(self, found: ItemTableBuilder) -> None:
        encoded = self.place.startswith(AS_IT_IS)
        for relative, url, size in walk(self.place):
            if self._is_wanted(url):
                key = unquote(relative) if encoded else relative
                folder = key.partition("/")[0] if "/" in key else None
                found.append(key, uri_of(url), size, folder)

    def _is_wanted(self, place: str) -> bool:
        extension = extension_of(place)
        if extension in self.extensions:
            return True
        self.other_files[extension or "no extension"] += 1
        if extension in ARCHIVE_EXTENSIONS:
            self.archives.append(place)
        return False


class FileSource:
    """A single image file; its key is its name."""

    def __init__(self, path: str | os.PathLike[str]):
        place = place_of_name(path)
        self.reader = UriReader()
        if is_url(place):
            size = size_of_url(place)
            name = posixpath.basename(place.partition("?")[0] if place.startswith(AS_IT_IS) else place)
            item = Item(name, uri_of(place), GUESSED_BYTES if size is None else size)
        else:
            item = Item(key_of(Path(place).name), file_uri(place), Path(place).stat().st_size)
        self._items = ItemTable.of([item])

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What an entry is, links followed; None for a link to nothing, which is an input that reading will report."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
