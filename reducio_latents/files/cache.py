"""A bounded cache of whole remote files on this machine's disk, shared by all of its processes.

A file is fetched once: into a temporary name, its checksum proven, then renamed. Whoever needs it
meanwhile waits for the lock of the one who fetches. What lies in the cache is no truth: its size is
looked at whenever it is asked for, its bytes (crc32c, of its own) when a process first does so; a
copy that is damaged is dropped and fetched anew, with a warning.

The least recently used files go when the cache is full. On Linux a file that is removed stays
readable for whoever has it open or mapped, so a reader is never broken; and none is removed in the
first seconds after it was handed out, so that there is time to open it. By so much the cache may be
larger than its bound.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import google_crc32c

from reducio_latents.core.regular import open_regular
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files.inside import require_inside
from reducio_latents.files.protocol import Buffer, Origin

log = logging.getLogger(__name__)

DEFAULT_BYTES = 64 << 30
FETCHERS = 4
"""Files fetched at once, ahead of need."""
HANDED_OUT_S = 10.0
"""A file that was asked for so recently is not removed."""
ABANDONED_S = 3600.0
"""A fetch that has written nothing for this long has died."""
PIECE_BYTES = 1 << 20
FETCH_ATTEMPTS = 3
AHEAD_FAILED = "cannot fetch ahead: %s"
LOCKS = 4096
BLOB, FETCHING = ".blob", ".fetching"
SUMS = "sums"
"""Folder of what each copy must be: its size and crc32c."""


def cache_folder() -> Path:
    """Return $REDUCIO_CACHE, or reducio-latents in the user's cache folder."""
    if folder := os.environ.get("REDUCIO_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reducio-latents"


def cache_bytes() -> int:
    """Return $REDUCIO_CACHE_BYTES, or 64 GiB."""
    text = os.environ.get("REDUCIO_CACHE_BYTES", str(DEFAULT_BYTES))
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(
            f"REDUCIO_CACHE_BYTES is {text!r} in the environment; give bytes above 0."
        )
    return int(text)


class CachedFiles:
    """Files of `origin`, with those that are mapped kept on this machine.

    Small files that may change (descriptions, commits, the index) are always read from the origin.
    """

    def __init__(
        self,
        origin: Origin,
        folder: Path | None = None,
        max_bytes: int | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        """`sha256` holds the checksums of files, as far as they are known."""
        self.origin, self.url = origin, origin.url
        self.read, self.read_range = origin.read, origin.read_range
        self.size, self.sizes, self.list = origin.size, origin.sizes, origin.list
        self.folder = folder if folder is not None else cache_folder()
        self.max_bytes = max_bytes if max_bytes is not None else cache_bytes()
        self.sha256 = dict(sha256 or {})
        self._keys: dict[str, str] = {}
        self._proven: dict[str, int] = {}
        """Copies whose bytes this process has proven, and their inodes."""
        self._waiting: deque[str] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0
        self._warned = False
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[CachedFiles], tuple[Any, ...]]:
        return type(self), (self.origin, self.folder, self.max_bytes, self.sha256)

    def make_folder(self) -> None:
        """Make the cache's folder unless it is there; raise StoreError if it cannot be."""
        try:
            for name in ("locks", SUMS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(
                f"cannot make the cache folder {self.folder}: {err.strerror}. "
                "Set REDUCIO_CACHE to a folder of your own."
            ) from err

    def local_path(self, path: str) -> Path:
        """Return where the file lies on this machine, fetching it if need be.

        Open it within `HANDED_OUT_S`; then it may be gone, which does not hurt who has it open.
        Raise FileNotFoundError if the origin has no such file, StoreError if it cannot be fetched
        or does not have its checksum.
        """
        key = self._key(require_inside(path, self.url))
        blob = self.folder / f"{key}{BLOB}"
        if _touch(blob) and self._is_sound(blob):
            return blob
        self.make_folder()
        with _locked(self.folder / "locks" / f"{int(key[:8], 16) % LOCKS:04x}"):
            if _touch(blob):
                if self._is_sound(blob):  # somebody has fetched it while we waited
                    return blob
                log.warning("%s: its copy %s is damaged; fetching it anew.", self._at(path), blob)
            self._fetch(path, blob)
        return blob

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _is_sound(self, blob: Path) -> bool:
        """Whether a copy has the size, and is proven to have the bytes, that were fetched."""
        try:
            wanted = (self.folder / SUMS / blob.stem).read_text()
            with open_regular(blob) as file:
                status = os.fstat(file.fileno())
                if wanted.partition(" ")[0] != str(status.st_size):
                    return False
                if self._proven.get(blob.stem) != status.st_ino:
                    crc = 0
                    while piece := file.read(PIECE_BYTES):
                        crc = google_crc32c.extend(crc, piece)
                    if wanted != _sum_text(status.st_size, crc):
                        return False
        except (OSError, ValueError):  # none of it can be read: the origin can
            return False
        self._proven[blob.stem] = status.st_ino
        return True

    def prefetch(self, paths: Iterable[str]) -> None:
        """Fetch these files in the background, in this order, instead of what still waits.

        One that cannot be fetched raises when it is asked for; the first such one is logged.
        """
        with self._lock:
            self._waiting = deque(paths)
            if self._pool is None or self._pool_pid != os.getpid():
                self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
                self._pool_pid = os.getpid()
            for _ in self._waiting:
                self._pool.submit(self._fetch_next)

    def close(self) -> None:
        """Drop what still waits to be fetched, and wait for what is on its way."""
        with self._lock:
            self._waiting.clear()
            pool, self._pool = self._pool, None
        if pool is not None and self._pool_pid == os.getpid():
            pool.shutdown()

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        self._keys.pop(path, None)
        self.origin.write(path, data)

    def create(self, path: str, data: Buffer | Sequence[Buffer]) -> bool:
        self._keys.pop(path, None)
        return self.origin.create(path, data)

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        self._keys.pop(path, None)
        return self.origin.swap(path, old, new)

    def delete(self, path: str) -> None:
        self._keys.pop(path, None)
        self.origin.delete(path)

    def _key(self, path: str) -> str:
        """Name the file's bytes: by their checksum, or by where they are and in which version.

        Asked once for a path: a reader keeps to the version that it began with.
        """
        if sha256 := self.sha256.get(path):
            if not re.fullmatch("[0-9a-f]{64}", sha256):
                raise StoreError(f"{self.url}/{path}: {sha256!r} is no sha256. Run `verify`.")
            return sha256
        if path not in self._keys:
            self._keys[path] = self._versioned_key(path)
        return self._keys[path]

    def _versioned_key(self, path: str) -> str:
        version = self.origin.version(path)
        if version is None:
            raise FileNotFoundError(f"{self.url}/{path} does not exist")
        return hashlib.sha256(f"{self.url}\0{path}\0{version}".encode()).hexdigest()

    def _fetch_next(self) -> None:
        with self._lock:
            path = self._waiting.popleft() if self._waiting else None
        if path is not None:
            try:
                self.local_path(path)
            except (OSError, ValueError) as err:
                with self._lock:  # several threads fail at once, and one of them warns
                    level = logging.DEBUG if self._warned else logging.WARNING
                    self._warned = True
                log.log(level, AHEAD_FAILED, err)

    def _fetch(self, path: str, blob: Path) -> None:
        size = self.origin.size(path)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{path} does not exist")
        if size > self.max_bytes:
            raise StoreError(
                f"{self.url}/{path} has {size:,} bytes, the cache may hold {self.max_bytes:,}. "
                "Set REDUCIO_CACHE_BYTES to several times that."
            )
        partial = blob.with_suffix(FETCHING)
        try:
            self._make_room(size, partial)
            for attempt in range(1, FETCH_ATTEMPTS + 1):
                found, crc = self._download(path, partial)
                if found == self.sha256.get(path, found):
                    break
                if attempt == FETCH_ATTEMPTS:
                    raise StoreError(
                        f"{self.url}/{path} arrived {FETCH_ATTEMPTS} times with sha256 "
                        f"{found[:12]}...; its commit says {self.sha256[path][:12]}... "
                        "Run `verify` on the store."
                    )
            if path not in self.sha256 and self._versioned_key(path) != blob.stem:
                raise StoreError(
                    f"{self.url}/{path} has been replaced since it was opened. Start again."
                )
            if partial.stat().st_size != size:
                raise StoreError(
                    f"{self._at(path)} has been replaced while it was read. Start again."
                )
            blob.unlink(missing_ok=True)  # a damaged one; whoever has it mapped keeps it
            (self.folder / SUMS / blob.stem).write_text(_sum_text(size, crc))
            partial.replace(blob)
        except OSError as err:
            if isinstance(err, StoreError | FileNotFoundError):
                raise
            raise _write_error(self.folder, err) from err
        finally:
            partial.unlink(missing_ok=True)

    def _download(self, path: str, target: Path) -> tuple[str, int]:
        """Write the file to `target` and return its sha256 and crc32c."""
        digest, crc = hashlib.sha256(), 0
        with target.open("r+b") as file:
            for piece in self.origin.stream(path):
                digest.update(piece)
                crc = google_crc32c.extend(crc, piece)
                file.write(piece)
            file.truncate()
        return digest.hexdigest(), crc

    def _make_room(self, size: int, partial: Path) -> None:
        """Remove the least recently used files, then take `size` bytes for `partial`."""
        with _locked(self.folder / "locks" / "eviction"):
            now, total, entries = time.time(), size, []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    if entry.name.endswith(FETCHING) and now - stat.st_mtime > ABANDONED_S:
                        Path(entry.path).unlink(missing_ok=True)
                    elif entry.name.endswith((BLOB, FETCHING)):
                        total += stat.st_size
                        entries.append((stat.st_mtime, stat.st_size, entry.path))
            free = shutil.disk_usage(self.folder).free
            for used, bytes_, name in sorted(entries):
                if (total <= self.max_bytes and free > size) or now - used < HANDED_OUT_S:
                    break
                if name.endswith(BLOB):
                    Path(name).unlink(missing_ok=True)
                    (self.folder / SUMS / Path(name).stem).unlink(missing_ok=True)
                    total, free = total - bytes_, free + bytes_
            with partial.open("wb") as file:
                file.truncate(size)  # so that those who fetch at once count one another


def _sum_text(size: int, crc: int) -> str:
    return f"{size} {crc:08x}"


def _touch(blob: Path) -> bool:
    """Mark a file as used now; return whether it exists."""
    try:
        os.utime(blob)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:  # another user's, in a cache that is shared
        return True
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which ends with this process at the latest."""
    try:
        file = path.open("ab")
    except OSError as err:
        raise _write_error(path.parent.parent, err) from err
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_error(folder: Path, err: OSError) -> StoreError:
    return StoreError(
        f"cannot write to the cache {folder}: {err.strerror or err}. Free some space, or set "
        "REDUCIO_CACHE to another folder or REDUCIO_CACHE_BYTES to less."
    )
