"""Folders to look through: on this machine with os.scandir, elsewhere with fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from reducio_latents.core.regular import A_FOLDER, NotAFileError, file_kind, open_regular
from reducio_latents.corpus.entry import is_utf8
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.files.explained import reason
from reducio_latents.files.remote import open_filesystem
from reducio_latents.files.source import is_url, public_url, remote_file

MAX_TEXT_BYTES = 1 << 20
"""A larger text beside a video is no caption, whatever it is."""
TOO_LARGE = "it is larger than 1 MiB"
TAR_BLOCK_BYTES = 1 << 16
"""Read-ahead on remote tars: enough for a header with its texts, little enough not to fetch the
videos that are skipped over."""


@dataclass(frozen=True, slots=True)
class Found:
    """One name that a walk came across."""

    path: str
    """Relative to the tree's root, with `/` between its parts; a folder, only met with a problem,
    ends in `/`."""
    problem: str | None = None
    """Why it is of no use, if that is known."""


class LocalTree:
    """What a listing asks of the place the corpus is in. All paths are relative to `root`."""

    def __init__(self, root: str) -> None:
        self.root = root

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root  # noqa: PTH118

    def kind(self, path: str) -> Literal["file", "folder"] | None:
        """Return what the path is; None if there is nothing. Raise NotAFileError for a pipe, a
        socket or a device, which a listing never opens."""
        full = Path(self._full(path))
        try:
            kind = file_kind(full.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if kind not in (None, A_FOLDER):
            raise NotAFileError(full, str(kind))
        return "folder" if kind == A_FOLDER else "file"

    def walk(self, folder: str, max_depth: int | None) -> Iterator[Found]:
        """Yield everything below `folder` that is not hidden, in any order.

        A `max_depth` of 1 means the folder's own files only. Raise OSError if `folder` itself
        cannot be listed; of a sub-folder that cannot, yield the problem.
        """
        stack: list[tuple[str, int, frozenset[tuple[int, int]]]] = [(folder, 1, frozenset())]
        while stack:
            path, depth, ancestors = stack.pop()
            try:
                found, folders, identity = self._scan(path)
            except OSError as err:
                if path == folder:
                    raise
                yield Found(f"{path}/", f"the folder cannot be listed: {err.strerror or err}")
                continue
            if identity in ancestors:
                continue  # a symbolic link to a folder that this one lies in
            yield from found
            if max_depth is None or depth < max_depth:
                stack += [(below, depth + 1, ancestors | {identity}) for below in folders]

    def _scan(self, path: str) -> tuple[list[Found], list[str], tuple[int, int]]:
        """Return the files of one folder, its sub-folders, and what tells it from any other."""
        found, folders = [], []
        status = Path(self._full(path)).stat()
        with os.scandir(self._full(path)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = f"{path}/{entry.name}" if path else entry.name
                is_folder, problem = _classify(entry)
                if is_folder and problem is None:
                    folders.append(below)
                else:
                    found.append(Found(f"{below}/" if is_folder else below, problem))
        return found, folders, (status.st_dev, status.st_ino)

    def read_all(self, paths: Sequence[str]) -> list[bytes | OSError]:
        """Return the contents of small files, or why one cannot be read; of each one, no more than
        `MAX_TEXT_BYTES` and 1."""
        found: list[bytes | OSError] = []
        for path in paths:
            try:
                with self.open(path) as file:
                    found.append(file.read(MAX_TEXT_BYTES + 1))
            except (FileNotFoundError, PermissionError) as err:  # of this file, not of the disk
                found.append(err)
        return found

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        return open_regular(self._full(path))


def _classify(entry: os.DirEntry[str]) -> tuple[bool, str | None]:
    """Return whether it is a folder, and why it is of no use, if so. No call to the system but for
    symbolic links."""
    try:
        is_folder = entry.is_dir()
        kind = None if is_folder or entry.is_file() else file_kind(entry.stat().st_mode)
    except FileNotFoundError:
        kind = None  # a dangling link: it fails when it is opened
    except OSError as err:
        return False, f"it cannot be followed: {err.strerror or err}"
    if not is_utf8(entry.name):
        return is_folder, "its name is not UTF-8. Rename it"
    return is_folder, None if kind is None else f"it is {kind}, not a file"


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn whatever an fsspec implementation raises into one line; its errors are not all OSErrors,
    and their classes belong to packages that may not be installed."""
    try:
        yield
    except (OSError, ConfigError):
        raise
    except ImportError as err:
        raise ConfigError(f"{public_url(url)}: {err}.") from err
    except Exception as err:
        raise CorpusError(f"{public_url(url)} cannot be read: {reason(str(err))}") from err


class RemoteTree:
    """The same of a URL."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        with _reaching(root):
            self._fs, top = open_filesystem(root)
        self._top = top.rstrip("/")
        self._large = set[str]()
        """JSON that may be a table, and is no text beside a video."""

    def _full(self, path: str) -> str:
        return f"{self._top}/{path}" if path else self._top

    def kind(self, path: str) -> Literal["file", "folder"] | None:
        try:
            with _reaching(self.root):
                info: dict[str, Any] = self._fs.info(self._full(path))
        except FileNotFoundError:
            return None
        return "folder" if info["type"] == "directory" else "file"

    def walk(self, folder: str, max_depth: int | None) -> Iterator[Found]:
        with _reaching(self.root):
            names: dict[str, Any] = self._fs.find(
                self._full(folder), maxdepth=max_depth, detail=True
            )
        for full, info in names.items():
            path = full.removeprefix(self._top).lstrip("/")
            below = path.removeprefix(folder).lstrip("/")
            if not any(part.startswith(".") for part in below.split("/")):
                large = (info.get("size") or 0) > MAX_TEXT_BYTES
                if large and path.endswith(".json"):
                    self._large.add(path)
                yield Found(path, TOO_LARGE if large and path.endswith(".txt") else None)

    def read_all(self, paths: Sequence[str]) -> list[bytes | OSError]:
        contents: dict[str, bytes] = {}
        large = [self._full(path) for path in paths if path in self._large]
        with _reaching(self.root):
            if small := [self._full(path) for path in paths if path not in self._large]:
                contents |= self._fs.cat(small)
            for path in large:
                contents[path] = self._fs.cat_file(path, start=0, end=MAX_TEXT_BYTES + 1)
        return [contents[self._full(path)] for path in paths]

    def open(self, path: str) -> BinaryIO:
        with _reaching(self.root):
            return remote_file(self._fs, self._full(path), TAR_BLOCK_BYTES)


Tree: TypeAlias = LocalTree | RemoteTree


def open_tree(root: str) -> Tree:
    """Return the tree at an absolute local path or a URL."""
    return RemoteTree(root) if is_url(root) else LocalTree(root)
