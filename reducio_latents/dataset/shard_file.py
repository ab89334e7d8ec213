"""A shard's file, mapped, and where its rows lie in it."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reducio_latents.dataset.reader import Ints
from reducio_latents.errors import StoreError
from reducio_latents.store import Store, zarr
from reducio_latents.store.index import IndexEntry
from reducio_latents.store.writer import row_checksum

SHOWN_ROWS = 8


class ShardFile(NamedTuple):
    """One column of one shard."""

    data: Tensor
    """uint8, the whole file."""
    ranges: Ints
    """(offset, length) of each row's payload; offset -1 where there is none that can be used."""
    problem: str
    """Why some rows cannot be used, or nothing."""


def open_shard(store: Store, entry: IndexEntry, *, check_rows: bool) -> ShardFile:
    """Map a shard's file and find its rows; raise StoreError if it is not as it was committed.

    The checksum of its index is proven; with `check_rows` that of every row, too.
    """
    where = f"{store.files.url}/{entry.file}"
    try:
        data = _map(store, entry.file)
    except FileNotFoundError as err:
        raise StoreError(f"{where} is missing. Run `verify` to see what it costs.") from err
    if len(data) != entry.file_bytes:
        raise StoreError(
            f"{where} has {len(data)} bytes, its commit says {entry.file_bytes}: it is truncated "
            "or was changed. Run `verify` to see what it costs; delete its commit and encode again "
            "to mend it."
        )
    ranges = _ranges(store, entry, data, where)
    bad = _bad_rows(store, entry, data, ranges) if check_rows else []
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


def _ranges(store: Store, entry: IndexEntry, data: Tensor, where: str) -> Ints:
    meta = store.meta.columns[entry.column]
    if store.meta.container == "zarr":
        tail = data[-zarr.index_bytes(store.meta.shard_rows) :].numpy().tobytes()
        rows = store.meta.shard_rows
        ranges = zarr.read_ranges(tail, meta.kind, rows, where, meta.compression)[: entry.rows]
    else:
        ranges = store.ranges(store.commit(entry.key, entry.column)).copy()
    offsets, sizes = ranges[ranges[:, 0] >= 0].T
    if (sizes < 0).any() or (offsets + sizes > len(data)).any():
        raise StoreError(f"{where} has rows that end beyond it. Run `verify` to see the damage.")
    if meta.kind == "array" and meta.compression == "none":
        row_bytes = math.prod(meta.row_shapes[entry.bucket]) * np.dtype(meta.dtype).itemsize
        if (sizes != row_bytes).any():
            raise StoreError(
                f"{where} has rows that are not {row_bytes} bytes long, as the store's "
                "description says. Run `verify` to see the damage."
            )
    return ranges


def _bad_rows(store: Store, entry: IndexEntry, data: Tensor, ranges: Ints) -> list[int]:
    """Return the rows whose bytes differ from what was committed."""
    expected = store.commit(entry.key, entry.column).row_crc32c
    view = data.numpy().data
    rows = enumerate(zip(expected, ranges.tolist(), strict=True))
    return [
        row
        for row, (crc, (offset, length)) in rows
        if offset >= 0 and row_checksum(view[offset : offset + length]) != crc
    ]
