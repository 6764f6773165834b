"""Whether the outermost parts of a file fit into each other: what is cut off or torn in the middle, demuxers pass over.

A demuxer that comes upon a damaged part looks for the next whole one, and the clip is silently shorter. So the lengths
that the file states are added up first; only headers are read.
"""

import os
import re
from pathlib import Path
from typing import BinaryIO

from latentae.data.video.base import BadVideo, ClipBytes

BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}  # that mp4 and mov files begin with
EBML, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
CHUNK = re.compile(rb"LIST|JUNK|idx1|\d\d(dc|db|pc|wb|tx|iv|__)|ix\d\d|[A-Za-z][A-Za-z0-9_ ]{3}")
IN_SEGMENT = {CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0xEC, 0xBF}
IN_CLUSTER = {0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0xEC, 0xBF}


def check_structure(path: Path | ClipBytes) -> None:
    """Refuse an empty file, one whose parts reach beyond its end, and Matroska and AVI files torn in the middle.

    Raises:
        BadVideo: ``empty``, ``truncated``, ``damaged`` or ``unreadable``.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(16)
            file.seek(0)
            if not size:
                raise BadVideo("empty", "the file has no bytes.")
            if is_iso(head):
                end = _end_of_boxes(file, size)
            elif is_matroska(head):
                end = _end_of_segment(file, size)
            elif head.startswith(b"RIFF"):
                end = 8 + int.from_bytes(head[4:8], "little")
                if head[8:12] == b"AVI " and end <= size:
                    file.seek(12)
                    _check_chunks(file, end)
            else:
                end = size
    except OSError as error:
        raise BadVideo("unreadable", f"the file cannot be read ({error.strerror or error}).") from error
    if end > size:
        raise BadVideo("truncated", f"the file has {size} bytes and says that it has {end}.")


def is_iso(head: bytes) -> bool:
    """Whether a file with these first bytes is an mp4 or mov."""
    return head[4:8] in BOXES


def is_matroska(head: bytes) -> bool:
    """Whether a file with these first bytes is an mkv or webm."""
    return head.startswith(EBML.to_bytes(4, "big"))


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box of an ISO file ends by its own account."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: to the end of the file; others are no boxes
            return size
        start += length
    return start


def _check_chunks(file: BinaryIO, end: int, lists: tuple[bytes, ...] = (b"movi", b"rec ")) -> None:
    """Refuse an AVI file whose chunks, from here to ``end``, do not follow each other; ``lists`` lie in each other."""
    while file.tell() + 8 <= end:
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        after = file.tell() + length + length % 2
        _refuse_torn(CHUNK.fullmatch(name) is not None and after <= end + 1, file)
        if name == b"LIST" and lists and file.read(4) == lists[0]:
            _check_chunks(file, after, lists[1:])
        file.seek(after)


def _end_of_segment(file: BinaryIO, size: int) -> int:
    """Where a Matroska file ends by its own account, 0 where it does not say (live recordings)."""
    _, header = _element(file)
    file.seek(header or 0, os.SEEK_CUR)
    identity, length = _element(file)
    if identity != SEGMENT or length is None:
        return 0
    end = file.tell() + length
    if end > size:
        return end
    while file.tell() < end:
        identity, length = _element(file)
        if length is None:
            return end
        after = file.tell() + length
        _refuse_torn(identity in IN_SEGMENT and after <= end, file)
        while identity == CLUSTER and file.tell() < after:
            part, length = _element(file)
            _refuse_torn(part in IN_CLUSTER and length is not None and file.tell() + length <= after, file)
            file.seek(length or 0, os.SEEK_CUR)
        file.seek(after)
    return end


def _refuse_torn(fits: bool, file: BinaryIO) -> None:
    if not fits:
        raise BadVideo("damaged", f"the parts of the file do not fit into each other before byte {file.tell()}.")


def _element(file: BinaryIO) -> tuple[int, int | None]:
    """The name and the length of the Matroska element that begins here; None for a length that is not known."""
    identity, _ = _number(file)
    marked, bytes_used = _number(file)
    length = marked - (1 << 7 * bytes_used)  # without the bit that marks how many bytes there are
    return identity, None if length == (1 << 7 * bytes_used) - 1 else length


def _number(file: BinaryIO) -> tuple[int, int]:
    """A number whose leading zero bits say how many bytes it takes, and these."""
    first = file.read(1)
    _refuse_torn(first > b"\0", file)
    count = 9 - first[0].bit_length()
    return int.from_bytes(first + file.read(count - 1), "big"), count
