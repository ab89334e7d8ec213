"""What a reader of one column of one bucket does, whatever holds the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.errors import StoreError
from reducio_latents.store import Store, zarr

Ints = NDArray[np.int64]
PLAIN = ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")
"""What an array's metadata must say for its shard files to be rows after rows."""


class DamagedRowsError(StoreError):
    """Rows that cannot be read."""

    def __init__(self, message: str, positions: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)
        """Which of the rows that were asked for."""


class ColumnReader(Protocol):
    """Reads rows by (position of the shard among those it was opened for, row in the shard).

    Both methods raise DamagedRowsError. Safe to call from several threads at once.
    """

    def arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool = False) -> Tensor:
        """Return rows of one shape as one tensor (N, *shape), in the order asked for."""

    def payloads(self, shards: Ints, rows: Ints) -> list[bytes]:
        """Return rows of any length, in the order asked for."""


def open_column(
    store: Store,
    column: str,
    bucket: str,
    shards: Sequence[int],
    *,
    capacity: int,
    check_rows: bool,
) -> ColumnReader:
    """Return the fastest reader that can read the column.

    At most `capacity` shards stay open. With `check_rows`, every row's checksum is proven when its
    shard is opened.
    """
    if store.meta.container != "zarr" or _is_plain(store, column, bucket):
        from reducio_latents.dataset.mapped import MappedColumn

        return MappedColumn(store, column, bucket, shards, capacity=capacity, check_rows=check_rows)
    from reducio_latents.dataset.zarr_rows import ZarrColumn

    return ZarrColumn(store, column, bucket, shards)


def _is_plain(store: Store, column: str, bucket: str) -> bool:
    """Whether the array's shard files lie as this package writes them: uncompressed, row by row."""
    path = f"{bucket}/{column}/zarr.json"
    meta = store.meta
    try:
        found: dict[str, Any] = json.loads(store.files.read(path))
    except FileNotFoundError as err:
        raise StoreError(
            f"{store.files.url}/{path} is missing. Run the encode command again to write it anew."
        ) from err
    except ValueError as err:
        raise StoreError(
            f"{store.files.url}/{path} is not JSON ({err}). Restore it from a copy."
        ) from err
    ours = json.loads(zarr.array_metadata(meta.columns[column], bucket, 0, meta.shard_rows))
    return all(found.get(key) == ours[key] for key in PLAIN)
