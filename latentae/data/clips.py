"""Clips: video files, animations, arrays and folders of frames, as one list of items."""

import copy
import hashlib
import os
import posixpath
from collections import Counter
from pathlib import Path

from latentae.console import say
from latentae.data.decode import DEFAULT_POLICY, DecodePolicy
from latentae.data.sources import FolderSource, Item, ItemTable, ItemTableBuilder, Source, open_source
from latentae.data.sources.base import IMAGE_EXTENSIONS, extension_of, file_uri, key_of, path_of, unreadable
from latentae.data.video import VIDEO_EXTENSIONS, Video, VideoInfo, is_animated, open_video
from latentae.errors import RequestError
from latentae.files import sha256_file

MAYBE_ANIMATED = frozenset({".gif", ".webp", ".png", ".apng"})


class ClipSource:
    """The clips of a folder and of the folders below it, or one clip.

    A clip is a video file, a ``.npy``, an animated GIF, WebP or PNG, or a folder that itself holds images and none of
    these: its frames. The key of a file is its path with extension, that of a folder of frames its path, and its own
    name where it is ``path`` itself. Labels are as of `FolderSource`, but a folder of frames is not its own label.

    Raises:
        RequestError: nothing is there, or no clip in it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        if not path.exists():
            raise RequestError(f"{path} does not exist: give a video, a folder of videos, or a folder of frames.")
        if path.is_dir():
            self._items = _clips_in(path.absolute()).sorted()
        else:
            uri = file_uri(os.path.abspath(path))  # noqa: PTH100
            self._items = ItemTable.of([Item(key_of(path.name), uri, path.stat().st_size)])
        if not self._items:
            endings = " ".join(sorted(VIDEO_EXTENSIONS | MAYBE_ANIMATED))
            raise RequestError(f"{path} holds no clips: they end in {endings}, or are folders of images.")

    def items(self) -> ItemTable:
        return self._items

    def only(self, items: ItemTable) -> "ClipSource":
        """Some of the clips as a source, to train on these and hold out the others."""
        source = copy.copy(self)
        source._items = items
        return source

    def open(self, item: Item, policy: DecodePolicy = DEFAULT_POLICY, info: VideoInfo | None = None) -> Video:
        """The clip of one item.

        Raises:
            BadVideo: with reason ``unreadable``.
        """
        return open_video(path_of(item.uri), policy, info)

    def read(self, item: Item) -> bytes:
        """The bytes of a clip that is one file."""
        try:
            return Path(path_of(item.uri)).read_bytes()
        except OSError as error:
            raise unreadable(item, error) from error

    def sha256(self, item: Item) -> str:
        """Of the bytes of the file; of the names and hashes of all files, for a folder of frames.

        Raises:
            BadImage: with reason ``unreadable``.
        """
        path = Path(path_of(item.uri))
        try:
            if not path.is_dir():
                return sha256_file(path)
            frames = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_EXTENSIONS)
            lines = [f"{sha256_file(file)} {key_of(file.name)}\n" for file in frames]
        except OSError as error:
            raise unreadable(item, error) from error
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_inputs(path: str | os.PathLike[str], *, clips: bool) -> Source | ClipSource:
    """Clips, where they are asked for or nothing else is there; else images.

    A video file and a folder with videos and without images are clips. Everything else is what `open_source` makes of
    it, and videos beside images are left out with a note, unless ``clips`` says that all of it are clips.

    Raises:
        RequestError, DataError: as `ClipSource` and `open_source`.
    """
    path = Path(path)
    if clips or (path.is_file() and path.suffix.lower() in VIDEO_EXTENSIONS):
        return ClipSource(path)
    try:
        source = open_source(path)
    except RequestError:
        if path.is_dir() and _clips_in(path.absolute()):
            return ClipSource(path)
        raise
    if isinstance(source, FolderSource) and (count := sum(source.other_files[end] for end in VIDEO_EXTENSIONS)):
        say(f"{path}: {count} videos beside the images are left out; with a number of --frames all of it are clips.")
    return source


def _clips_in(root: Path) -> ItemTable:
    """Files that are clips, and the other images taken together, folder by folder."""
    clips = ItemTableBuilder()
    with_clips: set[str] = set()
    sizes: Counter[str] = Counter()  # of the frames of each folder
    labels: dict[str, int | None] = {}
    for item in FolderSource(root, VIDEO_EXTENSIONS | IMAGE_EXTENSIONS).items():
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
    return clips.finish()
