"""Which reader a column is read by."""

from __future__ import annotations

from collections.abc import Sequence

from reducio_latents.dataset.mapped import MappedColumn
from reducio_latents.dataset.reader import ColumnReader
from reducio_latents.dataset.zarr_rows import ZarrColumn
from reducio_latents.store import Store


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
    if store.layout.lies_otherwise(store.files, store.meta, column, bucket):
        return ZarrColumn(store, column, bucket, shards, check_rows=check_rows)
    return MappedColumn(store, column, bucket, shards, capacity=capacity, check_rows=check_rows)
