"""Which reader a column is read by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from reducio_latents.dataset.mapped import MappedColumn
from reducio_latents.dataset.reader import ColumnReader
from reducio_latents.dataset.zarr_rows import ZarrColumn
from reducio_latents.errors import StoreError
from reducio_latents.store import Store, zarr

PLAIN = ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")
"""What an array's metadata must say for its shard files to be rows after rows."""


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
        return MappedColumn(store, column, bucket, shards, capacity=capacity, check_rows=check_rows)
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
