"""Files of object stores and of the web, by fsspec: what is there, its bytes, and which errors pass by themselves.

Credentials and addresses are those of the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``HF_TOKEN`` …) and
of fsspec's own configuration. A failure that may be over in a moment (a 5xx, a time-out, a connection that broke) is
retried with growing pauses, and is an `OSError` if it stays; a 404 is a `FileNotFoundError` at once.
"""

import asyncio
import errno
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, TypeVar

from latentae.data.sources.base import AS_IT_IS, FILE_ERRORS, GUESSED_BYTES, is_hidden, is_url
from latentae.errors import LatentAEError, MissingExtra, RequestError

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, each drawn anew from there to its double
BUFFER_BYTES = 2**22  # of those who read a file from the beginning
# A method of these packages raises errors that are no OSError where the network is to blame.
NETWORK_PACKAGES = {"aiohttp", "botocore", "aiobotocore", "httpx", "httpcore", "requests", "urllib3", "gcsfs", "google"}
PASSING_STATUS = {408, 425, 429}  # and 5xx
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"} | {
    "TokenRetrievalError", "DefaultCredentialsError", "RefreshError", "LocalTokenNotFoundError"
}  # fmt: skip
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}

Result = TypeVar("Result")


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the name in it.

    Raises:
        RequestError: there is none, or a package for it is missing.
    """
    import fsspec

    scheme = url.partition("://")[0].lower()
    try:
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)  # an object that is kept by fsspec
    except ImportError as error:
        if scheme in ("s3", "s3a"):
            raise MissingExtra(f"Reading {scheme}://", "s3") from error
        package = PACKAGES.get(scheme, "the package that fsspec names")
        raise RequestError(f"{url} needs a package that is not installed: pip install {package} ({error}).") from error
    except ValueError as error:
        raise RequestError(
            f"{url} cannot be opened ({error}): give a path, s3://, gs://, hf:// or https://."
        ) from error


def retried(url: str, call: Callable[[], Result]) -> Result:
    """What ``call`` gives, called again after failures that may pass.

    Raises:
        FileNotFoundError: nothing is there; also what a web server refuses (401, 403, 410).
        RequestError: there are no credentials, or they do not let us read.
        OSError: it still fails after the last pause.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:
            lasting = _lasting(url, error)
            if lasting is not None:
                raise lasting from error
            if pause is None:
                said = " ".join(str(error).split()) or type(error).__name__
                raise OSError(errno.EIO, f"{said}, {len(PAUSES) + 1} times in a row", url) from error
        time.sleep(pause * (1 + random.random()))
    raise AssertionError("unreachable")


def _lasting(url: str, error: Exception) -> Exception | None:
    """What to raise at once for ``error``; None where trying again may help."""
    if isinstance(error, LatentAEError | MemoryError):
        return error
    said = " ".join(str(error).split()) or type(error).__name__
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS
    if isinstance(error, FileNotFoundError) or (refused and url.startswith(AS_IT_IS)):
        return FileNotFoundError(errno.ENOENT, f"HTTP {status}" if refused else os.strerror(errno.ENOENT), url)
    if isinstance(error, PermissionError) or type(error).__name__ in NO_CREDENTIALS or status in (401, 403):
        return RequestError(f"{url} may not be read ({said}): check the credentials in your environment.")
    if isinstance(error, OSError) and error.errno in FILE_ERRORS | {errno.EINVAL, errno.ENOSYS}:
        return error
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError | TimeoutError | asyncio.TimeoutError) or package in NETWORK_PACKAGES:
        return None
    return error


def fetch(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file, or those from ``start`` to ``end``, fewer where it is shorter.

    Raises:
        OSError, RequestError: as `retried`; also for a web server that gives nothing but whole files.
    """
    if start is not None and start == end:
        return b""
    system, name = filesystem(url)
    try:
        data = retried(url, lambda: system.cat_file(name, start=start, end=end))
    except OSError as error:
        if start and "range" in str(error).lower() and error.errno == errno.EINVAL:  # it begins behind the end
            return b""
        raise
    if start is not None and end is not None and len(data) > end - start:
        raise RequestError(f"{url} lies on a server that gives no parts of files: download it first.")
    return data


def size_of_url(url: str) -> int | None:
    """The length of a file, None where its server does not tell.

    Raises:
        OSError, RequestError: as `retried`.
    """
    system, name = filesystem(url)
    return retried(url, lambda: system.info(name)).get("size")


def kind_of(place: str) -> Literal["file", "folder"] | None:
    """What is at a place, None for nothing.

    Raises:
        OSError, RequestError: as `retried`.
    """
    if not is_url(place):
        return "folder" if os.path.isdir(place) else "file" if os.path.exists(place) else None  # noqa: PTH110, PTH112
    system, name = filesystem(place)
    try:
        return "folder" if retried(place, lambda: system.info(name))["type"] == "directory" else "file"
    except FileNotFoundError:
        return None


def walk(url: str) -> Iterator[tuple[str, str, int]]:
    """The files below a folder: the path of each from there, its URL, and its length, a guess where nobody tells it.

    Folders are listed one by one, and what fsspec remembers of them is dropped. Hidden ones are passed over.

    Raises:
        OSError, RequestError: as `retried`.
    """
    system, root = filesystem(url)
    root = root.rstrip("/")
    folders = [root]
    while folders:
        folder = folders.pop()
        entries = retried(url, lambda folder=folder: system.ls(folder, detail=True))  # type: ignore[misc]
        system.invalidate_cache(folder)
        for entry in entries:
            name = entry["name"].rstrip("/")
            relative = name.removeprefix(root).lstrip("/")
            if name.rpartition("/")[2] in (".", ".."):
                raise RequestError(f"{url} has names with {name.rpartition('/')[2]!r} in them ({name}): rename these.")
            if name == folder or is_hidden(name.rpartition("/")[2]):
                continue
            if entry["type"] == "directory":
                folders.append(name)
            elif not entry["name"].endswith("/"):  # else an empty object that stands for a folder
                size = entry.get("size")
                yield relative, f"{url}/{relative}", GUESSED_BYTES if size is None else size


def names_in(url: str) -> set[str]:
    """The names of the files that lie in a folder itself."""
    system, folder = filesystem(url)
    entries = retried(url, lambda: system.ls(folder, detail=True))
    return {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] != "directory"}


class RemoteFile(io.RawIOBase):
    """A file of an object store for those who want a file. Each read is a request; nothing is kept open."""

    def __init__(self, url: str, size: int | None = None):
        size = size_of_url(url) if size is None else size
        if size is None:
            raise RequestError(f"{url} lies on a server that does not tell its length: download it first.")
        self.url, self.size, self.position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence], 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = fetch(self.url, self.position, max(min(self.position + len(buffer), self.size), self.position))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = fetch(self.url, self.position, max(self.size, self.position))
        self.position += len(data)
        return data


def open_place(place: str) -> BinaryIO:
    """A file to read from its beginning on, wherever it is.

    Raises:
        OSError, RequestError: as `retried`.
    """
    if is_url(place):
        return io.BufferedReader(RemoteFile(place), BUFFER_BYTES)
    return open(place, "rb")  # noqa: PTH123
