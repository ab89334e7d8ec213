"""A shard's file, mapped, and where its rows lie in it."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from reducio_latents.errors import StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import Commit
from reducio_latents.store.index import PATH, IndexEntry
from reducio_latents.store.limits import Ranges
from reducio_latents.store.writer import row_checksum

SHOWN_ROWS = 8


class ShardFile(NamedTuple):
    """One column of one shard."""

    data: Tensor
    """uint8, the whole file."""
    ranges: Ranges
    """(offset, length) of each row's payload; offset -1 if there is none that can be used."""
    problem: str
    """Why some rows cannot be used, or nothing."""


def open_shard(store: Store, entry: IndexEntry, *, check_rows: bool) -> ShardFile:
    """Map a shard's file and find its rows; raise StoreError if it is not as it was committed.

    The checksum of its index is proven; with `check_rows` that of every row, too.
    """
    where = f"{store.files.url}/{entry.file}"
    try:
        data = _map(store, entry.file)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise StoreError(f"{where} is missing. Run `verify` to see what it costs.") from err
    if len(data) != entry.file_bytes:
        raise StoreError(
            f"{where} has {len(data)} bytes, its commit says {entry.file_bytes}: it is truncated "
            "or was changed. Run `verify` to see what it costs; delete its commit and encode again "
            "to mend it."
        )
    commit = None
    if check_rows or not store.layout.files_tell_ranges:
        commit = store.commit(entry.key, entry.column)
        if IndexEntry.of(commit) != entry:
            raise StoreError(
                f"{store.files.url}/{PATH} disagrees with the commit of {entry.key} "
                f"{entry.column}. Delete it: it is made again from the commits."
            )
    mapped = _Mapped(store.files.url, data)
    ranges = store.layout.locate(mapped, store.meta, commit or entry).copy()
    wanted = store.kind(entry.column).row_bytes(entry.bucket)
    if wanted is not None and (ranges[ranges[:, 0] >= 0, 1] != wanted).any():
        raise StoreError(
            f"{where} has rows that are not {wanted} bytes long, as the store's description says. "
            "Run `verify` to see the damage."
        )
    bad = _bad_rows(commit, data, ranges) if commit and check_rows else []
    if not bad:
        return ShardFile(data, ranges, "")
    ranges[bad, 0] = -1
    rows = ", ".join(map(str, bad[:SHOWN_ROWS])) + (", ..." if len(bad) > SHOWN_ROWS else "")
    problem = (
        f"{where}: row {rows} does not match its checksum. Run `verify` to see all the damage; "
        'on_error="skip" reads on without such rows.'
    )
    return ShardFile(data, ranges, problem)


def _map(store: Store, path: str) -> Tensor:
    local = store.files.local_path(path)
    if local is None:
        return torch.frombuffer(bytearray(store.files.read(path)), dtype=torch.uint8)
    size = local.stat().st_size
    try:
        # Private, so that nothing can reach the file; and unlike mmap, it keeps no descriptor.
        data = torch.from_file(str(local), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as err:
        raise StoreError(f"{local} cannot be mapped: {err}") from err
    _advise_huge_pages(data)
    return data


def _advise_huge_pages(data: Tensor) -> None:
    """Ask the kernel to read a mapped file in pieces of 2 MiB and to map those whole.

    An epoch over files that are not in memory then takes half the time and CPU, a later one a sixth
    less. A kernel or file system that cannot do it goes on as before.
    """
    if sys.platform == "linux":
        start, length = ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.numel())
        ctypes.CDLL(None).madvise(start, length, mmap.MADV_HUGEPAGE)


class _Mapped(NamedTuple):
    """A file's bytes, as a container reads them."""

    url: str
    data: Tensor

    def read_range(self, path: str, start: int, length: int) -> bytes:
        data = self.data[start:] if start < 0 else self.data[start : start + length]
        return data[:length].numpy().tobytes()


def _bad_rows(commit: Commit, data: Tensor, ranges: Ranges) -> list[int]:
    """Return the rows whose bytes differ from what was committed."""
    view = data.numpy().data
    rows = enumerate(zip(commit.row_crc32c, ranges.tolist(), strict=True))
    return [
        row
        for row, (crc, (offset, length)) in rows
        if offset >= 0 and row_checksum(view[offset : offset + length]) != crc
    ]
