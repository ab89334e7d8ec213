"""Whole files in a directory of this machine."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from reducio_latents.errors import StoreError
from reducio_latents.files.protocol import Buffer

PARTIAL = ".partial"
"""Folder of files that are being written. What is in there is not in the store."""
WRITE_BYTES = 8 << 20
"""What is written at once, where parts are small: the kernel then keeps the file in huge pages."""
ATTEMPTS = 3
_numbers = count()


class LocalFiles:
    """Files in a directory of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with (self.root / path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size + start) if start < 0 else start)
            return file.read(length)

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        target = self.root / path
        parts = [data] if isinstance(data, Buffer) else data
        try:
            self._write(target, parts)
        except OSError as err:
            raise _write_error(target, err) from err

    def _write(self, target: Path, parts: Sequence[Buffer]) -> None:
        made = _make_folders(target.parent)
        for attempt in range(ATTEMPTS):
            partial = self._partial_of(target)
            try:
                _write_durably(partial, parts)
                partial.replace(target)
                break
            except FileNotFoundError:  # `sweep` took it between its creation and its lock
                if attempt == ATTEMPTS - 1:
                    raise
            finally:
                with suppress(OSError):
                    partial.unlink()
        for folder in {target.parent, *made}:
            _sync_folder(folder)

    def _partial_of(self, target: Path) -> Path:
        """Return a name that no other writer has, on the file system of `target`."""
        folder = self.root
        if target.parent.stat().st_dev != folder.stat().st_dev:  # a part of the store is a mount
            folder = target.parent
        folder /= PARTIAL
        folder.mkdir(exist_ok=True)
        return folder / f"{target.name}.{os.uname().nodename}-{os.getpid()}-{next(_numbers)}"

    def sweep(self) -> None:
        """Remove what writers that were killed have left half-written; living ones hold a lock."""
        folder = self.root / PARTIAL
        with suppress(OSError):
            for path in list(folder.iterdir()):
                with suppress(OSError), path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()

    def size(self, path: str) -> int | None:
        target = self.root / path
        try:
            return target.stat().st_size if target.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str) -> Iterator[str]:
        found = []
        for folder, folders, names in os.walk(self.root / prefix):
            folders[:] = [name for name in folders if name != PARTIAL]
            relative = Path(folder).relative_to(self.root)
            found += [(relative / name).as_posix() for name in names]
        yield from sorted(found)

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        return self.root / path


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the ones that got a new entry."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
    return [new.parent for new in missing]


def _write_durably(path: Path, parts: Sequence[Buffer]) -> None:
    with path.open("xb", buffering=WRITE_BYTES) as file:
        with suppress(OSError):  # a file system without locks: nothing will be swept either
            fcntl.flock(file, fcntl.LOCK_EX)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: without it a power cut can bring back the old directory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path, err: OSError) -> StoreError:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        why = (
            "the disk is full. Free some space and run the same command again: finished shards stay"
        )
    elif isinstance(err, PermissionError):
        why = "permission denied. Check who owns the folder"
    elif isinstance(err, NotADirectoryError | FileExistsError | IsADirectoryError):
        why = f"{err.strerror}: {err.filename}. Give a folder of its own"
    else:
        why = err.strerror or str(err)
    return StoreError(f"cannot write {path}: {why}.")
