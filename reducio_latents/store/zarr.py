"""The Zarr v3 container, byte by byte: one shard file per (column, shard), one inner chunk a row.

A shard file is its rows one after another, then the index that Zarr's sharding codec defines:
(offset, length) of each inner chunk as little-endian uint64, 2**64 - 1 twice if there is none,
and the crc32c of that index. Rows of kind `bytes` carry the header of the `vlen-bytes` codec.
Source: the Zarr v3 specification, sharding codec 1.0; `tests/test_store_zarr.py` holds it against
zarr-python. We write it ourselves because building rows through a generic writer costs 0.4 ms each.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.limits import MAX_FILE_BYTES, Ranges, checked_ranges, column_folder
from reducio_latents.store.row_kinds import VLEN_HEADER, BytesRows

EMPTY = 2**64 - 1
CRC_BYTES = 4
DECISIVE = ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")
"""What an array's metadata must say for its shard files to be rows after rows."""


def shard_path(key: ShardKey, column: str, ndim: int) -> str:
    """Return the chunk key of a shard: `16x256x256/motion/c/0/0/0/0/0`."""
    return "/".join([key.bucket, column_folder(column), "c", str(key.shard), *["0"] * ndim])


def array_metadata(kind: BytesRows, bucket: str, rows: int, shard_rows: int) -> bytes:
    """Return the array's `zarr.json` for `rows` rows."""
    row_shape = kind.shape(bucket)
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *row_shape],
        "data_type": kind.zarr_type,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [shard_rows, *row_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": kind.zarr_fill,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *row_shape],
                    "codecs": kind.zarr_codecs(),
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {"content": kind.column.content},
        "storage_transformers": [],
    }
    return json.dumps(metadata, indent=2).encode() + b"\n"


def group_metadata() -> bytes:
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    return json.dumps(group, indent=2).encode() + b"\n"


def pack_shard(rows: Sequence[Buffer | None], kind: BytesRows, shard_rows: int) -> list[Buffer]:
    """Return a shard file of stored rows, in parts."""
    index = np.full((shard_rows, 2), EMPTY, dtype="<u8")
    parts: list[Buffer] = []
    offset = 0
    stored: dict[bytes | int, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        if row is None:
            continue
        # By value: which rows are equal is a property of the data, which are one object is not.
        same = bytes(row) if kind.shares_equal_rows else number
        if same not in stored:
            start, size = offset, memoryview(row).nbytes
            if kind.has_header:
                parts.append(VLEN_HEADER.pack(1, size))
                size += VLEN_HEADER.size
            parts.append(row)
            stored[same] = (start, size)
            offset += size
        index[number] = stored[same]
    table = index.tobytes()
    return [*parts, table, struct.pack("<I", google_crc32c.value(table))]


def index_bytes(shard_rows: int) -> int:
    """Return the size of the index at the end of a shard file."""
    return shard_rows * 16 + CRC_BYTES


def read_ranges(
    tail: bytes, kind: BytesRows, shard_rows: int, file_bytes: int, where: str
) -> Ranges:
    """Return (offset, length) of each row's payload, (shard_rows, 2); (-1, 0) for an empty one.

    `tail` is the last `index_bytes(shard_rows)` bytes of the file called `where`.
    """
    table, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if len(tail) != index_bytes(shard_rows) or google_crc32c.value(table) != _u32(crc):
        raise StoreError(
            f"{where} has a damaged index: it is truncated or was changed. Run `verify` to see "
            "what it costs; delete the shard's commits and encode again to mend it."
        )
    raw = np.frombuffer(table, dtype="<u8").reshape(shard_rows, 2)
    empty = (raw == EMPTY).all(axis=1)
    # As they are, 2**63 and more would come out negative.
    ranges = np.where(empty[:, None], (-1, 0), np.minimum(raw, MAX_FILE_BYTES + 1)).astype(np.int64)
    if kind.has_header:
        ranges[~empty] += (VLEN_HEADER.size, -VLEN_HEADER.size)
    return checked_ranges(ranges, file_bytes - len(tail), where)


def _u32(data: bytes) -> int:
    return int(struct.unpack("<I", data)[0])
