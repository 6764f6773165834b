"""The errors that users meet. Each class carries the exit code that the command line returns for it.

0 done, 1 a bug of ours, 2 the request cannot be met as given, 3 the inputs or the data are bad beyond the allowed
number, 4 stopped but resumable, 130 and 143 signals. A message is one sentence that says what is wrong and what to do.
"""

import errno


class LatentAEError(Exception):
    """Base of every error that latentae raises on purpose."""

    exit_code = 1


class RequestError(LatentAEError, ValueError):
    """The request cannot be met as given: a wrong option, shape, name or configuration."""

    exit_code = 2


class MissingWeights(RequestError):
    """A weight file is not on this machine; the message names the file, where it was looked for and how to get it."""


class MissingExtra(RequestError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str):
        super().__init__(f"{feature} needs packages that are not installed: pip install 'latentae[{extra}]'.")


class DataError(LatentAEError):
    """The inputs are bad beyond the allowed number, or stored data does not match its hash."""

    exit_code = 3


class ResumableError(LatentAEError):
    """The work stopped early and nothing is lost: the same command continues it."""

    exit_code = 4


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


def explain_os_error(error: OSError) -> LatentAEError | None:
    """Our error for an operating system error that users can act on, or None for any other."""
    where = error.filename or "the output"
    if error.errno in _DISK_FULL:
        return ResumableError(f"No space left while writing {where}: free some and run the same command again.")
    if error.errno in _NO_PERMISSION:
        return RequestError(f"No permission for {where}: choose another folder or change its permissions.")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return RequestError(f"{where} is a file, or under one, where a folder is to be: choose another path.")
    return None
