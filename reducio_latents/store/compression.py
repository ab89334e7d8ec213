"""Rows that are compressed one by one, as Zarr's codecs would: (vlen-bytes,) zstd."""

from __future__ import annotations

from numcodecs.zstd import compress, decompress

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.zarr import VLEN_HEADER, ZSTD_LEVEL


def compress_row(column: ColumnMeta, payload: Buffer) -> bytes:
    """Return a row as a column with `compression` stores it."""
    data = bytes(payload)
    if column.kind == "bytes":
        data = VLEN_HEADER.pack(1, len(data)) + data
    return bytes(compress(data, ZSTD_LEVEL))


def decompress_row(column: ColumnMeta, payload: Buffer) -> bytes:
    """Return the row of a stored payload; one that is not compressed as it is.

    Raises StoreError for bytes that cannot be decompressed.
    """
    if column.compression == "none":
        return bytes(payload)
    try:
        data = bytes(decompress(payload))
    except (RuntimeError, ValueError) as err:
        raise StoreError(f"a row cannot be decompressed ({err}). Run `verify`.") from err
    return data[VLEN_HEADER.size :] if column.kind == "bytes" else data
