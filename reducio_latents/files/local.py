"""Whole files in a directory of this machine."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import BinaryIO

from reducio_latents.core.regular import NotAFileError, file_kind, open_regular
from reducio_latents.core.text import printable
from reducio_latents.errors import StoreError
from reducio_latents.files.inside import place_inside, require_inside
from reducio_latents.files.protocol import Buffer, joined, require_readable

PARTIAL = ".partial"
"""Folder of files that are being written. What is in there is not in the store."""
WRITE_BYTES = 8 << 20
"""What is written at once, where parts are small: the kernel then keeps the file in huge pages."""
ATTEMPTS = 3
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
"""What file systems without hard links answer."""
_numbers = count()


class LocalFiles:
    """Files in a directory of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes:
        with self._open(path) as file:
            require_readable(self.url, path, os.fstat(file.fileno()).st_size)
            return file.read()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with self._open(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size + start) if start < 0 else start)
            return file.read(length)

    @contextmanager
    def _open(self, path: str) -> Iterator[BinaryIO]:
        with _explained("read", self._at(path)), open_regular(self._at(path)) as file:
            yield file

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        with _explained("write", self._at(path)):
            self._write(path, data, Path.replace)

    def create(self, path: str, data: Buffer | Sequence[Buffer]) -> bool:
        while True:
            with _explained("write", self._at(path)):
                try:
                    if not self._at(path).exists():
                        self._write(path, data, self._link)
                        return True
                except FileExistsError as err:
                    if err.filename2 != str(self._at(path)):  # a file where a folder should be
                        raise
            with suppress(FileNotFoundError):  # it has gone again
                return self.read(path) == joined(data)

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        with _explained("write", self._at(path)):
            _make_folders(self.root)
            with self._alone():
                link = partial(self._link, alone=True)
                found = None
                with suppress(FileNotFoundError):
                    found = self.read(path)
                if found == old:
                    self._write(path, new, Path.replace if old is not None else link)
                    return True
        return found == new

    def _write(
        self,
        path: str,
        data: Buffer | Sequence[Buffer],
        put: Callable[[Path, Path], object],
    ) -> None:
        """Write under a temporary name, then `put` that in the place of the file."""
        target = self._at(path)
        made = _make_folders(target.parent)
        for attempt in range(ATTEMPTS):
            part = self._partial_of(target)
            try:
                _write_durably(part, [data] if isinstance(data, Buffer) else data)
                put(part, target)
                break
            except FileNotFoundError:  # `sweep` took it between its creation and its lock
                if attempt == ATTEMPTS - 1:
                    raise
            finally:
                with suppress(OSError):
                    part.unlink()
        for folder in {target.parent, *made}:
            sync_path(folder)

    def _link(self, part: Path, target: Path, *, alone: bool = False) -> None:
        """Give the file its name unless another has it: what a rename would not respect.

        `alone`: no other creates or swaps files now, which matters where there are no links.
        """
        try:
            os.link(part, target)
        except OSError as err:
            if err.errno not in NO_LINKS:
                raise
            if not alone:
                with self._alone():
                    self._link(part, target, alone=True)
                return
            if target.exists():
                exists = (errno.EEXIST, os.strerror(errno.EEXIST), str(part), None, str(target))
                raise FileExistsError(*exists) from err
            part.replace(target)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep out everybody else who swaps files of this folder, also from other machines."""
        path = _partial_folder(self.root) / "swapping"
        while True:
            file = _open_own(path, os.O_CREAT)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    break
            file.close()  # who held it has removed it
        with file:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _partial_of(self, target: Path) -> Path:
        """Return a name that no other writer has, on the file system of `target`."""
        folder = self.root
        if target.parent.stat().st_dev != folder.stat().st_dev:  # a part of the store is a mount
            folder = target.parent
        own = f"{os.uname().nodename}-{os.getpid()}-{next(_numbers)}"
        return _partial_folder(folder) / f"{target.name}.{own}"

    def sweep(self) -> None:
        """Remove what writers that were killed have left half-written; living ones hold a lock."""
        with suppress(OSError):
            for path in list(_partial_folder(self.root, make=False).iterdir()):
                with suppress(OSError), _open_own(path) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()

    def size(self, path: str) -> int | None:
        with _explained("look up", self._at(path)):
            try:
                status = self._at(path).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def sizes(self, paths: Collection[str]) -> dict[str, int]:
        found = {}
        with _explained("look up", self.root):
            for path in paths:
                with suppress(FileNotFoundError, NotADirectoryError):
                    place = f"{self.root}/{require_inside(path, self.url)}"
                    found[path] = Path(place).stat().st_size
        return found

    def list(self, prefix: str) -> Iterator[str]:
        found = []
        top = self._at(prefix) if prefix else self.root
        with _explained("list", top):
            for folder, folders, names in os.walk(top, onerror=_unless_missing):
                folders[:] = [name for name in folders if name != PARTIAL]
                relative = Path(folder).relative_to(self.root)
                found += [(relative / name).as_posix() for name in names]
        yield from sorted(found)

    def delete(self, path: str) -> None:
        with _explained("delete", self._at(path)):
            self._at(path).unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        full = self._at(path)
        with suppress(FileNotFoundError), _explained("read", full):
            if kind := file_kind(full.stat().st_mode):
                raise NotAFileError(full, kind)
        return full

    def _at(self, path: str) -> Path:
        return place_inside(self.root, path)


def _partial_folder(folder: Path, *, make: bool = True) -> Path:
    """Return where files of `folder` are written; raise StoreError for a link to another place,
    where they would be written and whose files would be swept up."""
    partial = folder / PARTIAL
    if make:
        partial.mkdir(exist_ok=True)
    if stat.S_ISLNK(partial.lstat().st_mode):
        raise StoreError(f"{printable(str(partial))} is a link, not a folder. Remove it.")
    return partial


def _open_own(path: Path, flags: int = 0) -> BinaryIO:
    """Open a file that is being written, and nothing that somebody has put in its place."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    if kind := file_kind(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(path, kind)
    return os.fdopen(descriptor, "r+b", buffering=0)


def _unless_missing(err: OSError) -> None:
    if not isinstance(err, FileNotFoundError | NotADirectoryError):
        raise err


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


def sync_path(path: Path) -> None:
    """Make a file durable, or a rename in a folder, which a power cut can take back else."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SYSTEM_CAUSES = {
    errno.ENOSPC: "the disk is full. Free some space and run the same command again: finished "
    "shards stay",
    errno.EDQUOT: "your quota is used up. Free some space and run the same command again: finished "
    "shards stay",
    errno.EROFS: "the file system is read-only. If it was not before, its disk may have failed: "
    "check it, then run the same command again",
    errno.EIO: "the disk or the network did not answer (input/output error). Check it, then run "
    "the same command again",
    errno.ESTALE: "the network file system has lost the file (stale handle). Mount it anew, then "
    "run the same command again",
    errno.EACCES: "permission denied. Check who owns the folder",
    errno.EPERM: "permission denied. Check who owns the folder",
}


@contextmanager
def _explained(verb: str, path: Path) -> Iterator[None]:
    """Turn what the system says into a StoreError of one line; a missing file stays one."""
    try:
        yield
    except StoreError:
        raise
    except MemoryError as err:
        raise StoreError(
            f"cannot {verb} {printable(str(path))}: there is no memory for it."
        ) from err
    except OSError as err:
        if verb != "write" and isinstance(err, FileNotFoundError | NotADirectoryError):
            raise
        why = SYSTEM_CAUSES.get(err.errno or 0) or err.strerror or str(err)
        if isinstance(err, NotADirectoryError | FileExistsError | IsADirectoryError):
            why = f"{err.strerror}: {err.filename}. Give a folder of its own"
        raise StoreError(f"cannot {verb} {printable(str(path))}: {printable(why)}.") from err
