"""What every source has in common: items, their names and addresses, labels."""

import errno
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from latentae.data.decode import BadImage

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k"}
)
LABEL_COLUMNS = ("label", "cls")  # the first that is there; also in the metadata of a tar's samples
SKIPPED_FOLDERS = frozenset({"__MACOSX"})
# Errors that belong to one file; others (a network share that went away) are not the image's fault.
FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


@dataclass(frozen=True, slots=True)
class Item:
    """One input. ``key`` is its relative posix path with extension, ``uri`` finds its bytes, ``size`` counts them.

    The size is exact but for parquet files, which tell it without being read only on average. ``columns`` are what the
    source carries along: a caption, the columns of a manifest.
    """

    key: str
    uri: str
    size: int
    label: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)


def file_uri(path: str) -> str:
    """The percent-encoded URI of an absolute path, always exact."""
    return "file://" + quote_from_bytes(os.fsencode(path))


def path_of(uri: str) -> str:
    """The path that `file_uri` was made of."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def key_of(relative: str) -> str:
    """A relative path as a key: posix, and bytes that are not UTF-8 written as ``\\xNN``."""
    return os.fsencode(relative).decode("utf-8", "backslashreplace").replace(os.sep, "/")


def extension_of(name: str) -> str:
    """The extension of a path or key in small letters, with its dot; empty without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  # of millions


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out by its name: hidden ones, and what archivers leave behind."""
    return name.startswith(".") or name in SKIPPED_FOLDERS


def read_file(item: Item) -> bytes:
    """The bytes of the file that ``item.uri`` names."""
    try:
        return Path(path_of(item.uri)).read_bytes()
    except OSError as error:
        raise unreadable(item, error) from error


def unreadable(item: Item, error: OSError) -> Exception:
    """What to raise for ``error``: a bad image where the file is to blame, else ``error`` itself."""
    if error.errno not in FILE_ERRORS:
        return error
    return BadImage("unreadable", f"{item.key} cannot be read ({error.strerror}).")


def label_of(value: object) -> int | str | None:
    """A label as files hold it: a whole number (also as text, also as 3.0), or text. Empty ones, negative numbers and
    what is neither mean that there is none."""
    if isinstance(value, str):
        value = value.strip()
        try:
            value = float(value) if "." in value or value.lower() == "nan" else int(value)
        except ValueError:
            return str(value) or None
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value == int(value) else None
    return value if isinstance(value, int) and 0 <= value < 2**63 else None
