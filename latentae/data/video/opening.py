"""From a path to the clip that lies there, by what the file begins with and not by its name."""

import os
from pathlib import Path

from latentae.data.decode import DEFAULT_POLICY, DecodePolicy
from latentae.data.video.base import BadVideo, ClipBytes, Video, VideoInfo
from latentae.data.video.container import ContainerVideo
from latentae.data.video.stills import AnimatedImage, FrameArray, FrameFolder, animated_format

VIDEO_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".npy"})
"""Names of files that can be nothing but clips; GIF, WebP and PNG may be animated."""

NUMPY = b"\x93NUMPY"


def open_video(
    path: str | os.PathLike[str] | ClipBytes, policy: DecodePolicy = DEFAULT_POLICY, info: VideoInfo | None = None
) -> Video:
    """The clip in a file, in memory, or in a folder of frames.

    Args:
        policy: the largest frame, and what shows through transparency.
        info: what an earlier opening found, to spare looking for it again.

    Raises:
        BadVideo: ``unreadable``. What else is wrong with a clip comes out when its `Video.info` or frames are read.
    """
    if not isinstance(path, ClipBytes):
        path = Path(path)
    if isinstance(path, Path) and path.is_dir():
        return FrameFolder(path, policy, info)
    try:
        animation = animated_format(path)
        with path.open("rb") as file:
            array = file.read(len(NUMPY)) == NUMPY
    except OSError as error:
        raise BadVideo("unreadable", f"{path} cannot be read ({error.strerror}).") from error
    kind = AnimatedImage if animation else FrameArray if array else ContainerVideo
    return kind(path, policy, info)


def is_animated(path: Path) -> bool:
    """Whether a GIF, WebP or PNG has several frames; False for what cannot be read."""
    if path.suffix.lower() not in (".gif", ".webp", ".png", ".apng"):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return False
    if head.startswith(b"RIFF"):
        return head[12:16] == b"VP8X" and bool(head[20] & 2)
    if head.startswith(b"GIF8"):
        return True
    return b"acTL" in head
