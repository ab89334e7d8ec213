"""Rows out of mapped files: one call gathers a batch from any number of shards.

Shard files are mapped, so a row is an address, and `MemoryView` makes all addresses rows of one
array. One indexing operation then copies the rows of a batch straight into the batch's tensor, as
from a single array, and without holding Python's interpreter lock. A loop over the rows in Python
costs a quarter of the speed (tools/bench_read.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

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
from reducio_latents.store.row_kinds import ArrayRows

UNOPENED, BROKEN = 0, 1
"""Slots that no shard is ever put into: no row of theirs has an address."""
FIRST_SLOT = 2
NOWHERE = -1
ValueT = TypeVar("ValueT")


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
        self._capacity = capacity
        self._lock = threading.Lock()
        self._why: dict[int, str] = {}
        self._slot_of = np.full(len(shards), UNOPENED)
        self._open: list[int] = []
        """Shards that are open, in the order of their opening; the i-th is not in the i-th slot."""
        self._buffers: tuple[memoryview, ...] = (memoryview(b""),) * FIRST_SLOT
        """Of each slot; replaced, not changed, so who holds it keeps the files mapped."""
        empty = (FIRST_SLOT, store.meta.shard_rows)
        self._addresses = np.full(empty, NOWHERE)
        self._base = np.zeros(FIRST_SLOT, np.int64)
        self._lengths = np.zeros(empty, np.int64)
        self._kind = store.kind(column)
        self._view: MemoryView | None = None
        if isinstance(self._kind, ArrayRows) and not self._kind.is_compressed:
            self._view = MemoryView(self._kind.shape(bucket), self._kind.dtype)

    def arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool = False) -> Tensor:
        with self._lock:
            addresses = self._locate(shards, rows)
            view, held = self._view, self._buffers
            stored = (
                None
                if view is not None and view.can_gather
                else self._stored(addresses, shards, rows)
            )
        if view is None or stored is not None:
            return self._stacked(stored or [], pin_memory=pin_memory)
        tensor = view.gather(addresses, pin_memory=pin_memory)
        del held  # the files were mapped until here
        return tensor

    def payloads(self, shards: Ints, rows: Ints) -> list[bytes]:
        with self._lock:
            stored = self._stored(self._locate(shards, rows), shards, rows)
        if not self._kind.is_compressed:
            return stored
        return self._each(self._kind.unpack, stored)

    def _stored(self, addresses: Ints, shards: Ints, rows: Ints) -> list[bytes]:
        """Return the bytes of rows as they are in the files."""
        slots = self._slot_of[shards]
        starts = addresses - self._base[slots]
        stops = starts + self._lengths[slots, rows]
        places = zip(slots.tolist(), starts.tolist(), stops.tolist(), strict=True)
        buffers = self._buffers
        return [buffers[slot][start:stop].tobytes() for slot, start, stop in places]

    def _stacked(self, stored: Sequence[bytes], *, pin_memory: bool) -> Tensor:
        kind = self._kind
        assert isinstance(kind, ArrayRows)
        dtype = torch.from_numpy(np.empty(0, kind.dtype)).dtype
        shape = (len(stored), *kind.shape(self._bucket))
        out = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        for target, row in zip(out.numpy(), self._each(kind.decode, stored), strict=True):
            target[...] = row
        return out

    def _each(self, read: Callable[[bytes, str], ValueT], stored: Sequence[bytes]) -> list[ValueT]:
        found = []
        for position, row in enumerate(stored):
            try:
                found.append(read(row, self._bucket))
            except StoreError as err:
                where = f"{self._store.files.url}/{self._bucket}/{self._column}"
                raise DamagedRowsError(f"{where}: {err}", [position]) from err
        return found

    def _locate(self, shards: Ints, rows: Ints) -> Ints:
        """Return the addresses of rows, after opening what is not open; with the lock held."""
        addresses: Ints = self._addresses[self._slot_of[shards], rows]
        if len(addresses) == 0 or addresses.min() != NOWHERE:
            return addresses
        wanted = np.unique(shards)
        for shard in wanted[self._slot_of[wanted] == UNOPENED].tolist():
            self._open_shard(shard, keep=set(wanted.tolist()))
        addresses = self._addresses[self._slot_of[shards], rows]
        if addresses.min() == NOWHERE:
            raise self._missing(np.flatnonzero(addresses == NOWHERE), shards, rows)
        return addresses

    def _open_shard(self, shard: int, keep: set[int]) -> None:
        try:
            file = open_shard(self._store, self._entries[shard], check_rows=self._check_rows)
        except StoreError as err:
            self._why[shard] = str(err)
            self._slot_of[shard] = BROKEN
            return
        if file.problem:
            self._why[shard] = file.problem
        slot = self._make_room(keep)
        self._open.append(shard)
        self._slot_of[shard] = slot
        base, (offsets, lengths) = file.data.data_ptr(), file.ranges.T
        buffers = list(self._buffers)
        buffers[slot] = file.data.numpy().data
        self._buffers = tuple(buffers)
        self._base[slot] = base
        self._addresses[slot] = NOWHERE
        self._addresses[slot, : len(offsets)] = np.where(offsets < 0, NOWHERE, base + offsets)
        self._lengths[slot, : len(lengths)] = lengths
        if self._view is not None:
            self._view = self._view.covering(base + offsets[offsets >= 0])

    def _make_room(self, keep: set[int]) -> int:
        """Return a free slot: that of the shard opened first, if as many are open as may be."""
        if len(self._open) >= self._capacity:
            oldest = next((shard for shard in self._open if shard not in keep), None)
            if oldest is not None:  # else one batch needs more than may be open
                self._open.remove(oldest)
                slot = int(self._slot_of[oldest])
                self._slot_of[oldest] = UNOPENED
                return slot
        slot = len(self._buffers)
        if slot == len(self._addresses):
            more = len(self._addresses)
            self._addresses = np.pad(self._addresses, ((0, more), (0, 0)), constant_values=NOWHERE)
            self._lengths = np.pad(self._lengths, ((0, more), (0, 0)))
            self._base = np.pad(self._base, (0, more))
        self._buffers = (*self._buffers, memoryview(b""))
        return slot

    def _missing(self, bad: NDArray[np.intp], shards: Ints, rows: Ints) -> DamagedRowsError:
        """Return the error that says which rows, by position in the request, have no address."""
        reasons = []
        for shard in np.unique(shards[bad]).tolist():
            missing = np.unique(rows[bad][shards[bad] == shard]).tolist()
            where = f"{self._store.files.url}/{self._entries[shard].file}"
            empty = (
                f"{where} has no row {', '.join(map(str, missing))}, though its commit says so. "
                "Run `verify` to see what it costs."
            )
            reasons.append(self._why.get(shard, empty))
        if len(reasons) > 1:
            reasons[1:] = [f"Of the batch {len(reasons) - 1} more shards cannot be read."]
        return DamagedRowsError(" ".join(reasons), bad.tolist())
