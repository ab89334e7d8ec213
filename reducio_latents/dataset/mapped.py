"""Rows out of mapped files: one call gathers a batch from any number of shards.

Shard files are mapped, so a row is an address, and `MemoryView` makes all addresses rows of one
array. One indexing operation then copies the rows of a batch straight into the batch's tensor, as
from a single array, and without holding Python's interpreter lock. A loop over the rows in Python
costs a quarter of the speed (tools/bench_read.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.dataset.memory_view import MemoryView
from reducio_latents.dataset.reader import DamagedRowsError, Ints
from reducio_latents.dataset.shard_file import open_shard
from reducio_latents.errors import StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.compression import decompress_row

UNOPENED, BROKEN = -1, 0
"""What stands for a shard's slot where it has none. No shard is ever put into slot 0."""


class MappedColumn:
    """Reads one column of one bucket from files that are mapped, or held in memory if remote."""

    def __init__(
        self,
        store: Store,
        column: str,
        bucket: str,
        shards: Sequence[int],
        *,
        capacity: int,
        check_rows: bool,
    ) -> None:
        self._store, self._column, self._bucket = store, column, bucket
        self._entries = [store.index.entries[column, ShardKey(bucket, n)] for n in shards]
        self._check_rows = check_rows
        self._lock = threading.Lock()
        self._tick = 0
        self._why: dict[int, str] = {}
        self._slot_of = np.full(len(shards), UNOPENED)
        slots = min(capacity, len(shards)) + 1
        self._shard_in = np.full(slots, -1)
        self._used = np.zeros(slots, np.int64)
        self._base = np.zeros(slots, np.int64)
        self._buffers: NDArray[Any] = np.full(slots, None, object)
        self._ranges = np.full((slots, store.meta.shard_rows, 2), (-1, 0))
        meta = self._meta = store.meta.columns[column]
        self._view: MemoryView | None = None
        if meta.kind == "array":
            self._shape, self._dtype = meta.row_shapes[bucket], np.dtype(meta.dtype)
            if meta.compression == "none":
                self._view = MemoryView(self._shape, self._dtype)

    def arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool = False) -> Tensor:
        if self._view is None:
            return self._decompressed_arrays(shards, rows, pin_memory=pin_memory)
        with self._lock:
            slots = self._slots(shards)
            buffers = self._buffers[slots]  # keeps the files mapped until the rows are copied
            offsets = self._ranges[slots, rows, 0]
            addresses = self._base[slots] + offsets
            view = self._view
        self._require(offsets, shards, rows)
        return view.gather(addresses, buffers, offsets, pin_memory=pin_memory)

    def payloads(self, shards: Ints, rows: Ints) -> list[bytes]:
        with self._lock:
            slots = self._slots(shards)
            buffers = self._buffers[slots].tolist()
            offsets, lengths = self._ranges[slots, rows].T
        self._require(offsets, shards, rows)
        spans = zip(buffers, offsets.tolist(), (offsets + lengths).tolist(), strict=True)
        stored = [buffer[start:stop].tobytes() for buffer, start, stop in spans]
        if self._meta.compression == "none":
            return stored
        return [self._decompress(row, position) for position, row in enumerate(stored)]

    def _decompressed_arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool) -> Tensor:
        shape = (len(rows), *self._shape)
        dtype = torch.from_numpy(np.empty(0, self._dtype)).dtype
        out = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        target = out.numpy().reshape(len(rows), -1)
        for position, payload in enumerate(self.payloads(shards, rows)):
            values = np.frombuffer(payload, self._dtype)
            if len(values) != target.shape[1]:
                raise self._damaged(f"row has {len(values)} values", position)
            target[position] = values
        return out

    def _decompress(self, payload: bytes, position: int) -> bytes:
        try:
            return decompress_row(self._meta, payload)
        except StoreError as err:
            raise self._damaged(str(err), position) from err

    def _damaged(self, what: str, position: int) -> DamagedRowsError:
        where = f"{self._store.files.url}/{self._bucket}/{self._column}"
        return DamagedRowsError(f"{where}: {what}", [position])

    def _slots(self, shards: Ints) -> Ints:
        """Return where each of `shards` is open, after opening those that are not."""
        self._tick += 1
        slots = self._slot_of[shards]
        if len(slots) and slots.min() == UNOPENED:
            self._used[slots[slots != UNOPENED]] = self._tick  # so that they stay open
            wanted = np.unique(shards)
            if len(wanted) >= len(self._used):
                self._grow(len(wanted) + 1 - len(self._used))
            for shard in wanted[self._slot_of[wanted] == UNOPENED].tolist():
                self._open(shard)
            slots = self._slot_of[shards]
        self._used[slots] = self._tick
        return slots

    def _open(self, shard: int) -> None:
        try:
            file = open_shard(self._store, self._entries[shard], check_rows=self._check_rows)
        except StoreError as err:
            self._why[shard] = str(err)
            self._slot_of[shard] = BROKEN
            return
        if file.problem:
            self._why[shard] = file.problem
        slot = 1 + int(self._used[1:].argmin())  # an empty one, or what was unused for longest
        if self._shard_in[slot] >= 0:
            self._slot_of[self._shard_in[slot]] = UNOPENED
        self._slot_of[shard], self._shard_in[slot], self._used[slot] = slot, shard, self._tick
        self._base[slot] = file.data.data_ptr()
        self._buffers[slot] = file.data.numpy().data
        self._ranges[slot] = (-1, 0)
        self._ranges[slot, : len(file.ranges)] = file.ranges
        if self._view is not None:
            offsets = file.ranges[:, 0]
            self._view = self._view.covering(file.data.data_ptr() + offsets[offsets >= 0])

    def _grow(self, more: int) -> None:
        """Make room for a batch from more shards than were to stay open."""
        self._shard_in = np.pad(self._shard_in, (0, more), constant_values=-1)
        self._used = np.pad(self._used, (0, more))
        self._base = np.pad(self._base, (0, more))
        self._buffers = np.pad(self._buffers, (0, more), constant_values=None)  # type: ignore[call-overload]
        self._ranges = np.pad(self._ranges, ((0, more), (0, 0), (0, 0)))

    def _require(self, offsets: Ints, shards: Ints, rows: Ints) -> None:
        """Raise DamagedRowsError if any of the rows has no place."""
        if len(offsets) == 0 or offsets.min() >= 0:
            return
        bad = np.flatnonzero(offsets < 0)
        reasons = []
        for shard in np.unique(shards[bad]).tolist():
            missing = np.unique(rows[bad][shards[bad] == shard]).tolist()
            where = f"{self._store.files.url}/{self._entries[shard].file}"
            empty = (
                f"{where} has no row {', '.join(map(str, missing))}, though its commit says so. "
                "Run `verify` to see what it costs."
            )
            reasons.append(self._why.get(shard, empty))
        raise DamagedRowsError(" ".join(reasons), bad.tolist())
