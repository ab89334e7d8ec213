"""Regular files, which can be read to an end: what may be opened of all that somebody names.

Reading a pipe waits for ever for somebody to write, reading a device never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

SMALL_BYTES = 64 << 20
"""No config that somebody wrote is longer."""
A_FOLDER = "a folder"
FILE_KINDS = (
    (stat.S_ISDIR, A_FOLDER),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotAFileError(OSError):
    """It is there, and it is a folder, pipe, socket or device."""

    def __init__(self, path: str | Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is {kind}, not a file", str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def file_kind(mode: int) -> str | None:
    """Return what is no regular file, by its mode, in words; None for a regular file."""
    return next((words for test, words in FILE_KINDS if test(mode)), None)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raise NotAFileError, at once, for anything else.
    """
    if kind := file_kind(Path(path).stat().st_mode):
        raise NotAFileError(path, kind)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if kind := file_kind(os.fstat(descriptor).st_mode):  # put in its place since
        os.close(descriptor)
        raise NotAFileError(path, kind)
    return os.fdopen(descriptor, "rb")


def read_small(path: str | Path) -> bytes:
    """Return all of a small file; raise OSError for a long one and for what is no file."""
    with open_regular(path) as file:
        data = file.read(SMALL_BYTES + 1)
    if len(data) > SMALL_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {SMALL_BYTES >> 20} MiB", str(path))
    return data


def require_files(folder: Path) -> None:
    """Raise NotAFileError if a library that reads a folder's files would wait for ever."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir() and (kind := file_kind(path.stat().st_mode)):
            raise NotAFileError(path, kind)
