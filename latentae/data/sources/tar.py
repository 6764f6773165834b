"""Images in tar files, as WebDataset and img2dataset write them: listed once by their headers, read by offset."""

import json
import os
import posixpath
import tarfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from latentae.data.decode import BadImage
from latentae.data.sources.base import (
    IMAGE_EXTENSIONS,
    LABEL_COLUMNS,
    Item,
    file_uri,
    is_hidden,
    label_of,
    path_of,
    unreadable,
)
from latentae.data.sources.table import ItemTable, ItemTableBuilder
from latentae.errors import DataError, RequestError

OPEN_TARS = 64
LISTING_THREADS = 8  # on a network, listing is waiting
LABEL_BYTES = 2**20
LINKS_IN_A_ROW = 40
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarSource:
    """The images of one tar or of several, chosen by the extension of their members.

    A key is the path of the member. With ``root`` it begins with the path of its tar from there, as in
    ``train-003.tar/dog.jpg``, so that tars that repeat names never collide and a tar that is added changes no key;
    `open_source` gives a root for folders and patterns, even of one tar. Hidden members and ``__MACOSX`` are skipped;
    links to other members of the tar are followed. A ``uri`` holds the offset of the bytes.

    The label of ``dog.jpg`` is what ``dog.cls`` holds, or ``label`` (else ``cls``) in ``dog.json``; the image
    ``dog.left.jpg`` has these of ``dog.left`` or else of ``dog``. Labels that are texts are numbered in sorted order.

    Raises:
        RequestError: a tar is compressed, a member's name leads out of any folder, or a name occurs twice in a tar.
        DataError: a tar is cut short or damaged.
    """

    def __init__(self, *paths: str | os.PathLike[str], root: str | os.PathLike[str] | None = None):
        files = [os.path.abspath(path) for path in paths]  # noqa: PTH100  # names may not be UTF-8
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            listings = list(pool.map(_list_tar, files))
        self.other_files: Counter[str] = Counter()
        found = ItemTableBuilder()
        for file, listing in zip(files, listings):
            self.other_files += listing.other_files
            prefix = "" if root is None else Path(os.path.relpath(file, root)).as_posix() + "/"
            prefix, uri = _readable(prefix), file_uri(file)
            for name, (offset, size) in listing.images.items():
                address = uri if offset is None else f"{uri}#offset={offset}"
                found.append(prefix + name, address, size, listing.label(name))
        self._items = found.finish(files[0] if root is None else str(root)).sorted()
        self._open = _OpenFiles()

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        uri, _, offset = item.uri.partition("#offset=")
        if not offset:
            raise BadImage("unreadable", f"{item.key} is a link to nothing in its tar.")
        try:
            data = self._open[path_of(uri)].read(int(offset), item.size)
        except OSError as error:
            raise unreadable(item, error) from error
        if len(data) < item.size:
            raise BadImage("unreadable", f"{item.key} cannot be read (its tar is shorter than when it was listed).")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=_OpenFiles())


class _OpenFile:
    """A file that threads may read at the same time; it is closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """The files that were read last, kept open."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, path: str) -> _OpenFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = _OpenFile(path)
                if len(self._files) > OPEN_TARS:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


@dataclass
class _Listing:
    """What is in one tar: where the images are, (None, 0) for a link to nothing, and labels by name without suffix."""

    images: dict[str, tuple[int | None, int]] = field(default_factory=dict)
    classes: dict[str, int | str] = field(default_factory=dict)
    other_files: Counter[str] = field(default_factory=Counter)

    def label(self, image: str) -> int | str | None:
        folder, name = posixpath.split(image)
        for stem in (posixpath.splitext(name)[0], name.partition(".")[0]):
            if (known := posixpath.join(folder, stem)) in self.classes:
                return self.classes[known]
        return None


def _list_tar(path: str) -> _Listing:
    try:
        with Path(path).open("rb") as stream:
            _refuse_compressed(path, stream.read(8))
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                return _list_members(path, tar, _OpenFile(path))
    except (RequestError, DataError):
        raise
    except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:  # the latter from hostile headers
        raise DataError(f"{path} is cut short or no tar ({error}): fetch or write it again.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error


def _list_members(path: str, tar: tarfile.TarFile, content: _OpenFile) -> _Listing:
    listing = _Listing()
    regular: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    end = 0
    while (member := tar.next()) is not None:
        if tar.offset <= end:  # type: ignore[attr-defined]
            raise DataError(f"{path} is damaged at byte {end}: a member has a negative size; fetch or write it again.")
        end = tar.offset  # type: ignore[attr-defined]
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.isdir():
            continue
        name = posixpath.normpath(_readable(member.name))
        stem, extension = posixpath.splitext(name)
        extension = extension.lower()
        if any(is_hidden(part) for part in name.split("/") if part != ".."):
            continue
        if extension in IMAGE_EXTENSIONS:
            _refuse_unsafe(path, name)
            if name in regular or name in links:
                raise RequestError(f"{path} holds {name!r} twice: write it again with a name for each image.")
        elif extension not in (".cls", ".json"):
            listing.other_files[extension or "no extension"] += 1
        if member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), _readable(member.linkname)))
        elif member.islnk():
            links[name] = posixpath.normpath(_readable(member.linkname))
        elif member.isreg() and not member.issparse():
            regular[name] = (member.offset_data, member.size)
            if extension in (".cls", ".json") and member.size <= LABEL_BYTES:
                data = content.read(member.offset_data, member.size)
                label = label_of(data.decode("utf-8", "replace")) if extension == ".cls" else _json_label(data)
                if label is not None and (extension == ".cls" or stem not in listing.classes):
                    listing.classes[stem] = label
    _refuse_unfinished(path, end, content)
    for name in (*regular, *links):
        if posixpath.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
            listing.images[name] = _follow(name, regular, links)
    return listing


def _follow(
    name: str, regular: dict[str, tuple[int, int]], links: dict[str, str]
) -> tuple[int, int] | tuple[None, int]:
    for _ in range(LINKS_IN_A_ROW):
        if name in regular:
            return regular[name]
        if name not in links:
            break
        name = links[name]
    return None, 0


def _json_label(data: bytes) -> int | str | None:
    """The label in a sample's metadata; metadata that cannot be read has none."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metadata, dict):
        return None
    return label_of(next((metadata[name] for name in LABEL_COLUMNS if name in metadata), None))


def _readable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse_compressed(path: str, beginning: bytes) -> None:
    for signature, kind in COMPRESSED.items():
        if beginning.startswith(signature):
            raise RequestError(
                f"{path} is compressed with {kind}, so that no image in it can be read without those before it: "
                "uncompress it first."
            )


def _refuse_unsafe(path: str, name: str) -> None:
    if name.startswith(("/", "../")) or "\0" in name:
        raise RequestError(
            f"{path} holds {name!r}, which lies outside of any folder that it is unpacked to: write it again with "
            "relative names."
        )


def _refuse_unfinished(path: str, end: int, content: _OpenFile) -> None:
    """`tarfile` takes a damaged header for the end; a tar that was written to its end has a block of zeros there, and
    nothing but zeros behind it."""
    block = content.read(end, tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut short: it stops after {end} bytes without a mark of its end; fetch it again.")
    if any(block):
        raise DataError(f"{path} is damaged at byte {end}: fetch or write it again.")
    if any(content.read(end, 2 * tarfile.RECORDSIZE)):
        raise RequestError(f"{path} goes on behind its end, as tars do that were joined by cat: give them one by one.")
