"""What a store asks of the place it lies in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from reducio_latents.core.text import printable
from reducio_latents.errors import StoreError

Buffer = bytes | bytearray | memoryview
MOST_JSON_BYTES = 1 << 30
"""An index of 100 million clips has half of that."""


def joined(data: Buffer | Sequence[Buffer]) -> bytes:
    return bytes(data) if isinstance(data, Buffer) else b"".join(data)


def require_readable(url: str, path: str, size: int) -> None:
    """Raise StoreError for a file of so many bytes that it cannot be read whole.

    A file of nothing but a hole costs its maker nothing, and who reads it all memory.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if path.endswith(".json"):
        most = min(most, MOST_JSON_BYTES)
    if size > most:
        raise StoreError(
            f"{url}/{printable(path)} has {size:,} bytes, and cannot be right: it is read whole, "
            f"and at most {most:,} are. Restore it from a copy."
        )


LISTING = "listing.txt"
"""The names of a store's plan and commits, one a line, sorted: what `list` has where a place can
be read but not listed, as on a web server."""


class Files(Protocol):
    """Named blobs. Paths are relative to the root, with `/` between their parts.

    A path that leads out of the root, by its name or by a link, is a StoreError for every method.
    """

    @property
    def url(self) -> str:
        """Where the root is, as a user would write it."""

    def read(self, path: str) -> bytes:
        """Return a whole file; raise FileNotFoundError if there is none."""

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length), fewer where the file ends before that.

        A negative `start` counts from the end.
        """

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole file, replacing one of that name; durable when it returns."""

    def create(self, path: str, data: Buffer | Sequence[Buffer]) -> bool:
        """Write a whole file unless there is one; return whether it holds `data` now.

        However many do this at once, one file appears, whole, and is never replaced. Who comes
        second with the same bytes is told True as well: so is who tries again and does not know
        that the first try arrived.
        """

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """Write `new` if the file holds `old` (None: is not there); return whether it holds `new`.

        Safe against everybody who changes this file by `swap` or `create`.
        """

    def size(self, path: str) -> int | None:
        """Return the size in bytes, or None if there is no such file."""

    def sizes(self, paths: Collection[str]) -> dict[str, int]:
        """Return the size in bytes of those of these files that are there, and maybe of others.

        What takes a request a file is asked for by listing folders.
        """

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the path of every file below the folder `prefix` ("" for all), sorted."""

    def delete(self, path: str) -> None:
        """Remove a file; a missing one is no error."""

    def local_path(self, path: str) -> Path | None:
        """Return where the file lies on this machine, for mapping it; None if it is remote."""


class Origin(Files, Protocol):
    """Files of a remote place: fetched piece by piece, and telling whether one has changed."""

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield a whole file in pieces."""

    def version(self, path: str) -> str | None:
        """Return what changes whenever the file does, or None if there is no such file."""
