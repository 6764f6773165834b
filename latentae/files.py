"""Files that are either whole or absent: atomic writes, hashes, canonical JSON."""

import errno
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_write(path: Path | str, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears under its name only when it is complete and on disk.

    The bytes go to a temporary name in the same folder; then fsync, rename, fsync of the folder. On any exception
    (disk full included) the temporary file is removed and whatever stood under ``path`` before stays untouched.

    Args:
        replace: whether a file of that name is replaced; else the first of several writers wins.

    Raises:
        FileExistsError: there is a file of that name, which was not to be replaced.
    """
    path = Path(path)
    temporary = path.with_name(f"{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(temporary, path)  # noqa: PTH105  (the name that fault tests intercept)
        else:
            _claim(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync_folder(path.parent)


def _claim(temporary: Path, path: Path) -> None:
    """Rename, but never over another file."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # a filesystem without hard links: two writers within microseconds are not told apart here
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)  # noqa: PTH105
        return
    temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, value: Any, *, replace: bool = True) -> None:
    """Write ``value`` atomically as indented JSON; NaN and infinity are refused because JSON has no word for them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, replace=replace) as stream:
        stream.write(text.encode() + b"\n")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_file(path: Path | str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def remove_stale_temporaries(folder: Path, older_than_seconds: float = 3600) -> None:
    """Remove what killed processes left half written in ``folder``: at once if they ran here, else when it is old."""
    limit = time.time() - older_than_seconds
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        writer = re.fullmatch(rf"([0-9a-f]+)\.(\d+)\.[0-9a-f]+{re.escape(TEMPORARY_SUFFIX)}", path.name)
        if writer is None:
            continue  # not one of ours
        dead = writer[1] == _host() and not _is_alive(int(writer[2]))
        with suppress(FileNotFoundError):  # its writer has just finished it
            if dead or path.stat().st_mtime < limit:
                path.unlink()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
