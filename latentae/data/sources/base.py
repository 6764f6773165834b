"""What every source has in common: items, their names and addresses, labels.

A *place* is an absolute path of this machine or the URL of an object store. A *URI* is a place written so that it is
always exact, percent-encoded, and behind a ``#`` what is meant of the file there.
"""

import errno
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes, unquote, unquote_to_bytes

from latentae.data.decode import BadImage

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k"}
)
LABEL_COLUMNS = ("label", "cls")  # the first that is there; also in the metadata of a tar's samples
SKIPPED_FOLDERS = frozenset({"__MACOSX"})
# Errors that belong to one file; others (a network share that went away) are not the image's fault.
FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
GUESSED_BYTES = 2**17  # of an input whose length nobody tells
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
AS_IT_IS = ("http://", "https://")  # these are percent-encoded already


@dataclass(frozen=True, slots=True)
class Item:
    """One input. ``key`` is its relative posix path with extension, ``uri`` finds its bytes, ``size`` counts them.

    The size is exact but for parquet files, long manifests and web pages, where it is about right: they tell it only
    on average, or not at all, without being read. ``columns`` are what the source carries along: a caption, the columns
    of a manifest.
    """

    key: str
    uri: str
    size: int
    label: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a name is the URL of an object store, and no path of this machine."""
    return isinstance(place, str) and URL.match(place) is not None


def place_of_name(name: str | os.PathLike[str]) -> str:
    """The absolute path, or the URL, that a user gives; ``file://`` is a path too."""
    if is_url(name):
        given = str(name).rstrip("/") if not str(name).endswith("://") else str(name)
        return path_of(given) if given.lower().startswith("file://") else given
    return os.path.abspath(name)  # noqa: PTH100  # names may not be UTF-8


def uri_of(place: str) -> str:
    """The URI of a place."""
    if not is_url(place):
        return file_uri(place)
    if place.startswith(AS_IT_IS):
        return place.replace("#", "%23")
    scheme, _, rest = place.partition("://")
    return f"{scheme}://{quote(rest)}"


def place_of(uri: str) -> str:
    """The place that `uri_of` was made of, without what stands behind the ``#``."""
    address = uri.partition("#")[0]
    if address.startswith("file://"):
        return path_of(address)
    if address.startswith(AS_IT_IS):
        return address
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{unquote(rest)}"


def file_uri(path: str) -> str:
    """The percent-encoded URI of an absolute path, always exact."""
    return "file://" + quote_from_bytes(os.fsencode(path))


def path_of(uri: str) -> str:
    """The path that `file_uri` was made of."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def key_of(relative: str) -> str:
    """A relative path as a key: posix, and bytes that are not UTF-8 written as ``\\xNN``."""
    return os.fsencode(relative).decode("utf-8", "backslashreplace").replace(os.sep, "/")


def relative_key(place: str, root: str | os.PathLike[str] | None) -> str:
    """What the keys of the items of an archive begin with: its path from ``root``, and a slash; nothing without."""
    if root is None:
        return ""
    if is_url(place):
        return place.removeprefix(place_of_name(root).rstrip("/") + "/") + "/"
    return key_of(os.path.relpath(place, root)) + "/"


def extension_of(name: str) -> str:
    """The extension of a path or key in small letters, with its dot; empty without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  # of millions


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out by its name: hidden ones, and what archivers leave behind."""
    return name.startswith(".") or name in SKIPPED_FOLDERS


def size_of_path(path: str) -> int:
    """The size of a file, 0 for one that cannot be looked at, which reading will report."""
    try:
        return Path(path).stat().st_size
    except OSError as error:
        if error.errno in FILE_ERRORS:
            return 0
        raise


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
