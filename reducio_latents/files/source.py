"""Where the bytes of one video are: a file, a URL, or a member of a tar."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from reducio_latents.core.regular import NotAFileError, open_regular
from reducio_latents.core.text import without_secrets, without_user
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.explained import reason
from reducio_latents.files.remote import open_filesystem


@dataclass(frozen=True, slots=True)
class VideoSource:
    """Address of one video. Small and picklable: it is what travels to a decode worker."""

    url: str
    """Local path, or any URL that fsspec opens; it may hold a password or a signature."""
    offset: int | None = None
    """First byte inside `url` when the video is a member of a tar, or its row in a Parquet file
    that holds videos; else None."""
    length: int | None = None
    """Bytes of that member."""

    @property
    def is_plain_file(self) -> bool:
        return self.offset is None and "://" not in self.url

    def __str__(self) -> str:
        shown = public_url(self.url)
        return shown if self.offset is None else f"{shown}@{self.offset}"


NO_PARTS = "the web server gives no parts of files (HTTP range requests). Copy the file here"


class Slice(io.RawIOBase):
    """A read-only window [offset, offset + length) on a seekable file, which it owns.

    Whatever its reading raises is an OSError: each kind of server has errors of its own.
    """

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
        try:
            self._file.seek(self._offset + self._position)
            data = self._file.read(size)
        except OSError:
            raise
        except Exception as err:
            why = NO_PARTS if "range requests" in str(err) else reason(str(err))
            raise OSError(errno.EIO, why) from err
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


PARQUET = ".parquet"


def is_url(text: str) -> bool:
    return "://" in text


SECRET = re.compile(
    r"(?i)sig(nature)?$|token|secret|passw|pwd|credential|auth(?!or)|api.?key|access.?key|session"
    r"|^x-(amz|goog|ms|oss|cos)-|^(expires|policy|key-pair-id|googleaccessid|jwt)$"
)
"""Names of what grants access in a query, and of what is signed along with it."""
AZURE = {"sv", "ss", "srt", "sp", "se", "st", "spr", "sr", "si", "skoid", "sktid", "skt", "ske"}
"""What stands beside a `sig` in Azure's signatures."""


def public_url(url: str) -> str:
    """Return a URL without what grants access: user, password, token, signature.

    What is left is what the video is called: it is stored and printed, and the same when the URL
    was signed anew. Paths of this machine stay what they are.

    >>> public_url("https://me:pw@host/watch?v=1&X-Amz-Signature=2f")
    'https://host/watch?v=1'
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    place, query_mark, query = without_user(rest).partition("?")
    fields = query.split("&")
    names = [field.partition("=")[0] for field in fields]
    dropped = AZURE if "sig" in names else set()
    kept = [
        field
        for name, field in zip(names, fields, strict=True)
        if name not in dropped and not SECRET.search(unquote(name))
    ]
    query = "&".join(kept)
    mark_again = query_mark if query or not query_mark else ""
    return f"{scheme}://{place}{mark_again}{query}"


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
        local = source.url.removeprefix("file://")
        file = _open_url(source.url) if is_url(local) else open_regular(local)
    except FileNotFoundError as err:
        raise VideoError(f"{public_url(source.url)}: there is no such file.") from err
    except NotAFileError as err:
        raise VideoError(f"{source.url}: {err.strerror}.") from err
    except OSError as err:
        why = without_secrets(err.strerror or str(err))
        raise VideoError(f"{public_url(source.url)}: cannot be opened: {why}.") from err
    if source.offset is None:
        return file
    if source.url.lower().endswith(PARQUET):
        return io.BytesIO(_row(file, source))
    return cast(
        BinaryIO, io.BufferedReader(Slice(file, source.offset, source.length or 0), 1 << 18)
    )


def _row(file: BinaryIO, source: VideoSource) -> bytes:
    """Return the video in one row of a Parquet file; of those before it, one is in memory."""
    import pyarrow as pa

    from reducio_latents.files.parquet import read_video

    try:
        with file:
            found = read_video(file, source.offset or 0)
    except (pa.ArrowException, OSError) as err:
        raise VideoError(f"{source}: the row cannot be read: {reason(str(err))}") from err
    if not found:
        raise VideoError(f"{source}: the row holds no video.")
    return found


def remote_file(filesystem: Any, path: str, block_bytes: int = 5 << 20) -> BinaryIO:
    """Open a file that fsspec reaches; reading it raises OSError and nothing else."""
    file = filesystem.open(path, "rb", block_size=block_bytes)
    size = getattr(file, "size", None)
    if size is None:  # a server that tells no length: read once, from its beginning
        return cast(BinaryIO, file)
    return cast(BinaryIO, io.BufferedReader(Slice(file, 0, size), 1 << 18))


def _open_url(url: str) -> BinaryIO:
    try:
        filesystem, path = open_filesystem(url)
        kind = filesystem.info(path)["type"]  # obstore's files break at their end if not there
        if kind not in ("file", "link"):
            raise NotAFileError(public_url(url), f"a {kind}")
        return remote_file(filesystem, path)
    except OSError:
        raise
    except ImportError as err:
        raise ConfigError(f"{public_url(url)}: {err}.") from err  # it says what to install
    except Exception as err:  # each kind of server has errors of its own
        raise VideoError(f"{public_url(url)}: cannot be opened: {reason(str(err))}") from err
