"""Whole files in a directory of this machine."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from reducio_latents.errors import StoreError
from reducio_latents.files.protocol import Buffer

PARTIAL_SUFFIX = ".partial"


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
            file.seek(start, os.SEEK_END if start < 0 else os.SEEK_SET)
            return file.read(length)

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        target = self.root / path
        # Unique to this writer: two processes may write the same shard at once, and either may win.
        unique = f"{os.getpid()}-{threading.get_ident()}"
        partial = target.with_name(f".{target.name}.{unique}{PARTIAL_SUFFIX}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                for part in [data] if isinstance(data, Buffer) else data:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            _sync_folder(target.parent)
        except OSError as err:
            raise _write_error(target, err) from err
        finally:
            partial.unlink(missing_ok=True)

    def size(self, path: str) -> int | None:
        try:
            return (self.root / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str) -> Iterator[str]:
        found = []
        for folder, _, names in os.walk(self.root / prefix):
            relative = Path(folder).relative_to(self.root)
            found += [(relative / n).as_posix() for n in names if not n.endswith(PARTIAL_SUFFIX)]
        yield from sorted(found)

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        return self.root / path


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
    else:
        why = err.strerror or str(err)
    return StoreError(f"cannot write {path}: {why}.")
