"""Whether a video is still the one that was planned: by its place's stamp, else by its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reducio_latents.errors import VideoError
from reducio_latents.files.remote import open_filesystem
from reducio_latents.files.source import VideoSource, open_source

HASHED_BYTES = 1 << 20
"""How much of a file is read at a time to hash it."""
CHANGED = "has changed since it was"
"""In the reason why a clip of another video than the expected one has failed."""
_REMOTE_STAMPS = ("ETag", "etag", "e_tag", "LastModified", "last_modified", "mtime", "updated")

_proven: dict[VideoSource, tuple[str, str]] = {}
"""Stamp and hash of what this process has hashed: a video of many clips is hashed once."""


@dataclass(frozen=True)
class Expected:
    """What a video must still be. Its hash is looked at where the stamp is another or unknown."""

    bytes: int
    sha256: str
    stamp: str = ""
    """As `stamp_of` was when the hash was taken; "" if that is not known any more."""
    since: str = "planned"
    """When the hash was taken, for messages."""


def stamp_of(source: VideoSource) -> str:
    """Return what changes when a file is replaced, so that equal stamps mean equal bytes.

    "" where nothing of the kind can be had, or the file is gone. It is compared with itself only,
    so no two clocks have to agree.
    """
    try:
        if "://" not in source.url:
            found = Path(source.url).stat()
            parts = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        else:
            filesystem, path = open_filesystem(source.url)
            info = filesystem.info(path)
            parts = [info[name] for name in _REMOTE_STAMPS if info.get(name)]
            parts = [info.get("size"), *parts] if parts else []
    except Exception:  # each kind of server has errors of its own; opening the file will tell
        return ""
    return " ".join(map(str, parts))


def size_and_sha256(
    source: VideoSource, on_chunk: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Return the bytes of a video and their hash; `on_chunk` is called in between.

    Raise VideoError if they cannot be read to their end.
    """
    digest, size = hashlib.sha256(), 0
    with open_source(source) as file:
        try:
            while chunk := file.read(HASHED_BYTES):
                digest.update(chunk)
                size += len(chunk)
                on_chunk()
        except OSError as err:
            raise VideoError(f"{source}: it cannot be read: {err.strerror or err}.") from err
    return size, digest.hexdigest()


def require_unchanged(
    video: str, source: VideoSource, expected: Expected, on_chunk: Callable[[], None]
) -> None:
    """Raise VideoError if the video is gone, or has other bytes than `expected`."""
    stamp = stamp_of(source)
    if stamp and (stamp == expected.stamp or _proven.get(source) == (stamp, expected.sha256)):
        return
    changed = f"{video} {CHANGED} {expected.since}"
    if source.is_plain_file and stamp and int(stamp.split()[0]) != expected.bytes:
        raise VideoError(f"{changed}: it had {expected.bytes} bytes, now {stamp.split()[0]}.")
    try:
        _, sha256 = size_and_sha256(source, on_chunk)
    except VideoError as err:
        gone = isinstance(err.__cause__, FileNotFoundError)
        why = "there is no such file" if gone else str(err).removeprefix(f"{source}: ").rstrip(".")
        raise VideoError(f"{video} is no longer at {source.url}: {why}.") from err
    if sha256 != expected.sha256:
        raise VideoError(f"{changed}: its hash differs.")
    _proven[source] = (stamp, sha256)
