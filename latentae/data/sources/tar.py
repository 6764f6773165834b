"""Images in tar files, as WebDataset and img2dataset write them: listed once by their headers, read by offset."""

import json
import os
import posixpath
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from latentae.data.sources.base import (
    IMAGE_EXTENSIONS,
    LABEL_COLUMNS,
    Item,
    is_hidden,
    label_of,
    place_of_name,
    relative_key,
    uri_of,
)
from latentae.data.sources.columns import Carried
from latentae.data.sources.reading import UriReader
from latentae.data.sources.remote import open_place
from latentae.data.sources.table import ItemTable, ItemTableBuilder
from latentae.errors import DataError, RequestError

LISTING_THREADS = 8  # on a network, listing is waiting
METADATA_BYTES = 2**20
METADATA = (".cls", ".json", ".txt")
LINKS_IN_A_ROW = 40
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarSource:
    """The images of one tar or of several, chosen by the extension of their members, or files of other ``extensions``.

    A key is the path of the member. With ``root`` it begins with the path of its tar from there, as in
    ``train-003.tar/dog.jpg``, so that tars that repeat names never collide and a tar that is added changes no key;
    `open_source` gives a root for folders and patterns, even of one tar. Hidden members and ``__MACOSX`` are skipped;
    links to other members of the tar are followed. A ``uri`` holds the offset of the bytes.

    The label of ``dog.jpg`` is what ``dog.cls`` holds, or ``label`` (else ``cls``) in ``dog.json``; the image
    ``dog.left.jpg`` has these of ``dog.left`` or else of ``dog``. Labels that are texts are numbered in sorted order.
    The text in ``dog.txt`` is carried along as ``caption``, and so are the fields of ``dog.json``.

    Args:
        columns: names of the fields to carry along; None for all.

    Raises:
        RequestError: a tar is compressed, a member's name leads out of any folder, or a name occurs twice in a tar; or
            no field to carry of such a name.
        DataError: a tar is cut short or damaged.
    """

    def __init__(
        self,
        *paths: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        columns: Sequence[str] | None = None,
        extensions: Set[str] = IMAGE_EXTENSIONS,
    ):
        places = [place_of_name(path) for path in paths]
        carried = Carried(columns)
        self.reader = UriReader()
        self.other_files: Counter[str] = Counter()
        found = ItemTableBuilder()
        for place, listing in _listings(places, extensions, bool(carried)):
            self.other_files += listing.other_files
            prefix, uri = _readable(relative_key(place, root)), uri_of(place)
            for name, (offset, size) in listing.images.items():
                address = f"{uri}#offset={'' if offset is None else offset}"
                row = listing.metadata_of(name)
                label = label_of(row.get(LABEL))
                found.append(prefix + name, address, size, label, carried.of_row(row, (LABEL,)) if carried else {})
        where = places[0] if root is None else str(root)
        self._items = found.finish(where).sorted()
        if len(self._items):
            carried.check(where)

    def items(self) -> ItemTable:
        return self._items

    def read(self, item: Item) -> bytes:
        return self.reader.read(item)


LABEL = "\0label"  # under which a sample's label stands among its metadata, where no field can


@dataclass
class _Listing:
    """What is in one tar: where the images are, (None, 0) for a link to nothing, and metadata by name."""

    images: dict[str, tuple[int | None, int]] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    other_files: Counter[str] = field(default_factory=Counter)

    def add(self, stem: str, values: dict[str, Any], *, first: bool) -> None:
        """Add what a file says; ``first`` where it is to be believed more than others."""
        known = self.metadata.get(stem, {})
        self.metadata[stem] = {**known, **values} if first else {**values, **known}

    def metadata_of(self, image: str) -> dict[str, Any]:
        folder, name = posixpath.split(image)
        stems = (posixpath.join(folder, stem) for stem in (name.partition(".")[0], posixpath.splitext(name)[0]))
        row: dict[str, Any] = {}
        for stem in stems:
            row |= self.metadata.get(stem, {})
        return row


def _listings(places: list[str], extensions: Set[str], with_fields: bool) -> Iterator[tuple[str, _Listing]]:
    """The listings of tars, in their order; few of them are in memory at a time."""
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        window: deque[tuple[str, Future[_Listing]]] = deque()
        for place in places:
            window.append((place, pool.submit(_list_tar, place, extensions, with_fields)))
            if len(window) >= 2 * LISTING_THREADS:
                place, future = window.popleft()
                yield place, future.result()
        for place, future in window:
            yield place, future.result()


def _list_tar(path: str, extensions: Set[str], with_fields: bool) -> _Listing:
    try:
        with open_place(path) as stream:
            _refuse_compressed(path, stream.read(8))
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                return _list_members(path, tar, stream, extensions, with_fields)
    except (RequestError, DataError):
        raise
    except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:  # the latter from hostile headers
        raise DataError(f"{path} is cut short or no tar ({error}): fetch or write it again.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error


def _list_members(
    path: str, tar: tarfile.TarFile, stream: BinaryIO, extensions: Set[str], with_fields: bool
) -> _Listing:
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
        if extension in extensions:
            _refuse_unsafe(path, name)
            if name in regular or name in links:
                raise RequestError(f"{path} holds {name!r} twice: write it again with a name for each image.")
        elif extension not in METADATA:
            listing.other_files[extension or "no extension"] += 1
        if member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), _readable(member.linkname)))
        elif member.islnk():
            links[name] = posixpath.normpath(_readable(member.linkname))
        elif member.isreg() and not member.issparse():
            if extension not in METADATA:
                regular[name] = (member.offset_data, member.size)
            elif member.size <= METADATA_BYTES and (with_fields or extension != ".txt"):
                data = _bytes_at(stream, member.offset_data, member.size)
                if extension == ".json":
                    listing.add(stem, _json_fields(data, with_fields), first=False)
                elif extension == ".txt":
                    listing.add(stem, {"caption": data.decode("utf-8", "replace").strip()}, first=True)
                elif (label := label_of(data.decode("utf-8", "replace"))) is not None:
                    listing.add(stem, {LABEL: label}, first=True)
    _refuse_unfinished(path, end, stream)
    for name in (*regular, *links):
        if posixpath.splitext(name)[1].lower() in extensions:
            listing.images[name] = _follow(name, regular, links)
    return listing


def _bytes_at(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


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


def _json_fields(data: bytes, with_fields: bool) -> dict[str, Any]:
    """A sample's metadata, its label apart; metadata that cannot be read has none."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    labelled = next((name for name in LABEL_COLUMNS if name in metadata), None)
    label = label_of(metadata.pop(labelled)) if labelled else None
    return {**(metadata if with_fields else {}), **({} if label is None else {LABEL: label})}


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


def _refuse_unfinished(path: str, end: int, stream: BinaryIO) -> None:
    """`tarfile` takes a damaged header for the end; a tar that was written to its end has a block of zeros there, and
    nothing but zeros behind it."""
    block = _bytes_at(stream, end, tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut short: it stops after {end} bytes without a mark of its end; fetch it again.")
    if any(block):
        raise DataError(f"{path} is damaged at byte {end}: fetch or write it again.")
    if any(_bytes_at(stream, end, 2 * tarfile.RECORDSIZE)):
        raise RequestError(f"{path} goes on behind its end, as tars do that were joined by cat: give them one by one.")
