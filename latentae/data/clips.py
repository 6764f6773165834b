"""Clips: video files, animations, arrays and folders of frames, as one list of items."""

import copy
import hashlib
import os
import posixpath
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from latentae.console import say
from latentae.data.decode import DEFAULT_POLICY, BadImage, DecodePolicy
from latentae.data.sources import (
    ArrowSource,
    FileSource,
    FolderSource,
    Item,
    ItemTable,
    ItemTableBuilder,
    ManifestSource,
    ParquetSource,
    Source,
    open_source,
)
from latentae.data.sources.base import (
    IMAGE_EXTENSIONS,
    extension_of,
    file_uri,
    is_url,
    key_of,
    path_of,
    place_of_name,
    unreadable,
)
from latentae.data.sources.opening import NothingThere, Wanted, is_dataset, open_archive
from latentae.data.sources.reading import UriReader
from latentae.data.sources.remote import kind_of
from latentae.data.video import VIDEO_EXTENSIONS, BadVideo, ClipBytes, Video, VideoInfo, is_animated, open_video
from latentae.errors import RequestError
from latentae.files import sha256_file

MAYBE_ANIMATED = frozenset({".gif", ".webp", ".png", ".apng"})
CLIPS = Wanted("clips", VIDEO_EXTENSIONS | {".gif", ".apng"}, "video")
FILE_SYSTEM = "file://"


class ClipReader:
    """Clips by the URI of an item alone; safe in threads, and in processes that it was pickled to.

    Files and folders of frames on this machine are read where they lie. What is in an object store, in a tar or in the
    row of a table is taken into memory as a whole; each thread keeps the one that it read last.
    """

    def __init__(self) -> None:
        self._files = UriReader()
        self._last = threading.local()

    def open(self, item: Item, policy: DecodePolicy = DEFAULT_POLICY, info: VideoInfo | None = None) -> Video:
        """The clip of one item.

        Raises:
            BadVideo: with reason ``unreadable``.
            OSError: its storage is gone.
        """
        if (path := local_path(item)) is not None:
            return open_video(path, policy, info)
        try:
            return open_video(ClipBytes(self.read(item), item.key), policy, info)
        except BadImage as error:
            raise BadVideo(error.reason, error.explanation) from error

    def read(self, item: Item) -> bytes:
        """The bytes of a clip that is one file.

        Raises:
            BadImage, OSError, RequestError: as `UriReader.read`.
        """
        if local_path(item) is not None:
            return self._files.read(item)
        if getattr(self._last, "uri", None) != item.uri:
            self._last.data = None  # before the next one is there
            self._last.data, self._last.uri = self._files.read(item), item.uri
        return self._last.data

    def sha256(self, item: Item) -> str:
        """Of the bytes of the file; of the names and hashes of all files, for a folder of frames.

        Raises:
            BadImage: with reason ``unreadable``.
        """
        if (path := local_path(item)) is None:
            return hashlib.sha256(self.read(item)).hexdigest()
        try:
            if not path.is_dir():
                return sha256_file(path)
            frames = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_EXTENSIONS)
            lines = [f"{sha256_file(file)} {key_of(file.name)}\n" for file in frames]
        except OSError as error:
            raise unreadable(item, error) from error
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def local_path(item: Item) -> Path | None:
    """The file or folder of this machine that a clip is; None where it is a part of one, or elsewhere."""
    if not item.uri.startswith(FILE_SYSTEM) or "#" in item.uri:
        return None
    return Path(path_of(item.uri))


class ClipSource:
    """The clips of a folder and of the folders below it, or one clip; of tars, tables and manifests those in them.

    A clip is a video file, a ``.npy``, an animated GIF, WebP or PNG, or a folder that itself holds images and none of
    these: its frames. The key of a file is its path with extension, that of a folder of frames its path, and its own
    name where it is ``path`` itself. Labels are as of `FolderSource`, but a folder of frames is not its own label.

    What else `open_source` takes is taken too: in tars and object stores clips are what ends as a video does, and GIFs,
    and there are no folders of frames; in tables they are in the column ``video``, or the only one that holds bytes.

    Args:
        columns: names of the columns, or fields, to carry along; None for all.

    Raises:
        RequestError: nothing is there, or no clip in it.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str] | None = None):
        place = place_of_name(path)
        self.reader = ClipReader()
        try:
            kind = kind_of(place)
        except OSError as error:
            raise RequestError(f"{path} cannot be read ({error.strerror or error}): check the address.") from error
        if kind == "file" and extension_of(place) in VIDEO_EXTENSIONS | MAYBE_ANIMATED:
            self._items = FileSource(place).items()
            return
        if kind == "folder" and not is_url(place) and (clips := _clips_in(Path(place)).sorted()):
            self._items = clips
            return
        try:
            self._items = open_archive(path, columns, CLIPS).items()
        except NothingThere as error:
            endings = " ".join(sorted(VIDEO_EXTENSIONS | MAYBE_ANIMATED))
            raise RequestError(f"{path} holds no clips: they end in {endings}, or are folders of images.") from error

    @classmethod
    def of(cls, items: ItemTable) -> "ClipSource":
        """A source of items that are known."""
        source = cls.__new__(cls)
        source.reader, source._items = ClipReader(), items
        return source

    def items(self) -> ItemTable:
        return self._items

    def only(self, items: ItemTable) -> "ClipSource":
        """Some of the clips as a source, to train on these and hold out the others."""
        source = copy.copy(self)
        source._items = items
        return source

    def open(self, item: Item, policy: DecodePolicy = DEFAULT_POLICY, info: VideoInfo | None = None) -> Video:
        """As `ClipReader.open`."""
        return self.reader.open(item, policy, info)

    def read(self, item: Item) -> bytes:
        """As `ClipReader.read`."""
        return self.reader.read(item)

    def sha256(self, item: Item) -> str:
        """As `ClipReader.sha256`."""
        return self.reader.sha256(item)


def open_inputs(path: Any, *, clips: bool, columns: Sequence[str] | None = None) -> Source | ClipSource:
    """Clips, where they are asked for or nothing else is there; else images.

    A video file, what holds videos and no images, and a manifest of nothing but videos are clips. Everything else is
    what `open_source` makes of it, and videos beside images are left out with a note, unless ``clips`` says that all of
    it are clips.

    Args:
        columns: names of the columns, or fields, to carry along; None for all.

    Raises:
        RequestError, DataError: as `ClipSource` and `open_source`.
    """
    if is_dataset(path):
        if clips:
            raise RequestError(
                "A data set in memory is read as images: give the folder that it was saved to for clips."
            )
        return open_source(path, columns)
    if clips or (extension_of(os.fspath(path)) in VIDEO_EXTENSIONS and not Path(path).is_dir()):
        return ClipSource(path, columns)
    try:
        source = open_source(path, columns)
    except NothingThere as error:
        try:
            return ClipSource(path, columns)
        except RequestError:
            raise error from None
    if _holds_clips(source):
        return ClipSource(path, columns)
    if isinstance(source, FolderSource) and (count := sum(source.other_files[end] for end in VIDEO_EXTENSIONS)):
        say(f"{path}: {count} videos beside the images are left out; with a number of --frames all of it are clips.")
    return source


def _holds_clips(source: Source) -> bool:
    """Whether a manifest, or the rows of a table, have names of nothing but videos, or the column is called so."""
    if isinstance(source, ParquetSource | ArrowSource) and source.column == CLIPS.column:
        return True
    if isinstance(source, FolderSource) or not len(source.items()):
        return False
    endings = "|".join(sorted(end.removeprefix(".") for end in VIDEO_EXTENSIONS))
    column = "uri" if isinstance(source, ManifestSource) else "key"
    is_video = pc.match_substring_regex(source.items().table.column(column), rf"\.({endings})$", ignore_case=True)
    return pc.all(is_video).as_py()


def _clips_in(root: Path) -> ItemTable:
    """Files that are clips, and the other images taken together, folder by folder."""
    clips = ItemTableBuilder()
    with_clips: set[str] = set()
    sizes: Counter[str] = Counter()  # of the frames of each folder
    labels: dict[str, int | None] = {}
    files = FolderSource(root, VIDEO_EXTENSIONS | IMAGE_EXTENSIONS).items()
    for item in files:
        folder = os.path.dirname(path_of(item.uri))  # noqa: PTH120
        extension = extension_of(item.key)
        if extension in VIDEO_EXTENSIONS or (extension in MAYBE_ANIMATED and is_animated(Path(path_of(item.uri)))):
            clips.append(item.key, item.uri, item.size, item.label)
            with_clips.add(folder)
        else:
            sizes[folder] += item.size
            labels[folder] = item.label if "/" in posixpath.dirname(item.key) else None
    for folder in sizes.keys() - with_clips:
        key = key_of(os.path.relpath(folder, root)) if folder != str(root) else key_of(root.name)
        clips.append(key, file_uri(folder), sizes[folder], labels[folder])
    return clips.finish().with_classes(files.classes)
