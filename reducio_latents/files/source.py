"""Where the bytes of one video are: a file, a URL, or a member of a tar."""

from __future__ import annotations

import io
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.explained import reason
from reducio_latents.files.filesystems import open_filesystem


@dataclass(frozen=True)
class VideoSource:
    """Address of one video. Small and picklable: it is what travels to a decode worker."""

    url: str
    """Local path, or any URL that fsspec opens."""
    offset: int | None = None
    """First byte inside `url` when the video is a member of a tar, else None."""
    length: int | None = None
    """Bytes of that member."""

    @property
    def is_plain_file(self) -> bool:
        return self.offset is None and "://" not in self.url

    def __str__(self) -> str:
        return self.url if self.offset is None else f"{self.url}@{self.offset}"


class Slice(io.RawIOBase):
    """A read-only window [offset, offset + length) on a seekable file, which it owns."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def is_url(text: str) -> bool:
    return "://" in text


def join_url(root: str, path: str) -> str:
    """Return `path` below `root`; a path that is absolute or a URL stays what it is."""
    if is_url(path) or path.startswith("/"):
        return path
    if is_url(root):  # object stores know no `..`
        scheme, _, place = root.partition("://")
        return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"
    return f"{root.rstrip('/')}/{path}"


def open_source(source: VideoSource) -> BinaryIO:
    """Open the video's bytes for reading and seeking; raise VideoError if they cannot be had."""
    try:
        file = _open_url(source.url) if "://" in source.url else Path(source.url).open("rb")
    except FileNotFoundError as err:
        raise VideoError(f"{source.url}: there is no such file.") from err
    except OSError as err:
        raise VideoError(f"{source.url}: cannot be opened: {err.strerror or err}.") from err
    if source.offset is None:
        return file
    return cast(
        BinaryIO, io.BufferedReader(Slice(file, source.offset, source.length or 0), 1 << 18)
    )


def _open_url(url: str) -> BinaryIO:
    try:
        filesystem, path = open_filesystem(url)
        filesystem.info(path)  # obstore's files break when they end, if they were never there
        return cast(BinaryIO, filesystem.open(path, "rb"))
    except OSError:
        raise
    except ImportError as err:
        raise ConfigError(f"{url}: {err}.") from err  # it says what to install
    except Exception as err:  # each kind of server has errors of its own
        raise VideoError(f"{url}: cannot be opened: {reason(str(err))}") from err
