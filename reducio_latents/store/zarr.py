"""The Zarr v3 container, byte by byte: one shard file per (column, shard).

Of an array, a shard file is its rows one after another, each an inner chunk, then the index that
Zarr's sharding codec defines: (offset, length) of each inner chunk as little-endian uint64,
2**64 - 1 twice if there is none, and the crc32c of that index.

Rows of any length are to Zarr one long row of uint8 for each shard, which all readers can slice:

    (offset, length) of each row, as in an index, and their crc32c
    the rows, one after another, equal ones once
    zeros up to a whole piece; a piece of the file is an inner chunk
    Zarr's index of the pieces that there are

How long a shard may be is said in the array's metadata, and missing pieces cost nothing. What lies
beyond, if rows are larger than `BytesRows.piece_bytes` reckons with, only this package reads.

In stores of format 1 such rows are inner chunks, too, of Zarr's type variable_length_bytes, each
with the header of its codec, which few readers know; and the metadata names no dimensions.
Source: the Zarr v3 specification, sharding codec 1.0; `tests/test_store_zarr.py` holds it against
zarr-python. We write it ourselves because building rows through a generic writer costs 0.4 ms each.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import google_crc32c
import numpy as np

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.limits import (
    COORDINATES,
    MAX_FILE_BYTES,
    Ranges,
    checked_ranges,
    column_folder,
)
from reducio_latents.store.meta import StoreMeta, consolidated
from reducio_latents.store.row_kinds import VLEN_HEADER, ArrayRows, BytesRows, ScoresRows, row_kind

EMPTY = 2**64 - 1
CRC_BYTES = 4
PIECES = 4
"""Of a shard of rows of any length, for each row that there may be."""
COORDINATE_SHARDS = 16
"""Whose clips a file of a coordinate names."""
DECISIVE = ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")
"""What an array's metadata must say for its shard files to be rows after rows."""
UNPREFIXED = ("motion", "frame_times", "scores")
"""Columns whose dimensions are called by the names of their axes alone. To xarray one name is one
size, and others have channels of their own."""


class ShardForm(NamedTuple):
    """How the rows of a column of a bucket lie in a shard file."""

    kind: BytesRows
    shard_rows: int
    piece: int
    """Bytes of an inner chunk of rows of any length; 0 where each row is an inner chunk."""

    @classmethod
    def of(cls, meta: StoreMeta, column: str, bucket: str) -> Self:
        kind = row_kind(meta.columns[column])
        is_sliced = meta.format_version > 1 and not isinstance(kind, ArrayRows)
        return cls(kind, meta.shard_rows, kind.piece_bytes(bucket) if is_sliced else 0)

    @property
    def pieces(self) -> int:
        return PIECES * self.shard_rows

    @property
    def has_headers(self) -> bool:
        return self.kind.has_header and not self.kind.is_compressed and not self.piece

    @property
    def places(self) -> tuple[int, int]:
        """Where a shard file says where rows lie: start, from the end if negative, and length."""
        length = self.shard_rows * 16 + CRC_BYTES
        return (0 if self.piece else -length), length

    @property
    def tail_bytes(self) -> int:
        """Of Zarr's index, at the end of a shard file."""
        return (self.pieces if self.piece else self.shard_rows) * 16 + CRC_BYTES


def shard_path(key: ShardKey, column: str, ndim: int) -> str:
    """Return the chunk key of a shard: `16x256x256/motion/c/0/0/0/0/0`."""
    return "/".join([key.bucket, column_folder(column), "c", str(key.shard), *["0"] * ndim])


def array_metadata(meta: StoreMeta, column: str, bucket: str, rows: int) -> dict[str, Any]:
    """Return the array's `zarr.json` for `rows` rows."""
    form = ShardForm.of(meta, column, bucket)
    kind, row_shape = form.kind, form.kind.shape(bucket)
    shape, shard = [rows, *row_shape], [form.shard_rows, *row_shape]
    inner, codecs = [1, *row_shape], kind.zarr_codecs()
    attributes: dict[str, Any] = {"content": kind.column.content}
    prefix = "" if column in UNPREFIXED else f"{column_folder(column)}_"
    dimensions = ["clip", *(prefix + axis for axis in kind.axes(bucket))]
    if form.piece:
        length = form.pieces * form.piece
        shape, shard, inner = [-(-rows // form.shard_rows), length], [1, length], [1, form.piece]
        codecs = [{"name": "bytes"}]
        dimensions = ["shard", f"{prefix}byte"]
        attributes |= {"shard_rows": form.shard_rows, "compression": kind.column.compression}
    elif isinstance(kind, ScoresRows):
        attributes["names"] = list(kind.names)
    sharding = {
        "chunk_shape": inner,
        "codecs": codecs,
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    is_format_1 = meta.format_version == 1
    metadata = _node(
        shape,
        "uint8" if form.piece else kind.zarr_type,
        shard,
        0 if form.piece else kind.zarr_fill,
        {"name": "sharding_indexed", "configuration": sharding},
        {"content": kind.column.content} if is_format_1 else attributes,
    )
    return metadata if is_format_1 else {**metadata, "dimension_names": dimensions}


def _node(
    shape: list[int], kind: str, chunk: list[int], fill: Any, codec: Any, attributes: Any
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [codec],
        "attributes": attributes,
        "storage_transformers": [],
    }


def coordinate_metadata(name: str, rows: int, shard_rows: int) -> dict[str, Any]:
    """Return the `zarr.json` of a fact of each clip, of `COORDINATES`."""
    codec: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    fill, chunk = "NaN", COORDINATE_SHARDS * shard_rows
    if COORDINATES[name] == "string":
        codec, fill = {"name": "vlen-utf8", "configuration": {}}, ""
    node = _node([rows], COORDINATES[name], [chunk], fill, codec, {})
    return {**node, "dimension_names": ["clip"]}


def coordinate_bytes(name: str, values: Sequence[Any], shard_rows: int) -> bytes:
    """Return a file of a coordinate. The last one of a bucket is filled up."""
    rows = COORDINATE_SHARDS * shard_rows
    left = rows - len(values)
    if COORDINATES[name] != "string":
        return np.array([*values, *[np.nan] * left], "<f8").tobytes()
    texts = [text.encode() for text in values]
    parts = [part for text in texts for part in (struct.pack("<I", len(text)), text)]
    return b"".join([struct.pack("<I", rows), *parts, bytes(4 * left)])


def bucket_metadata(
    arrays: Mapping[str, Mapping[str, Any]], *, is_format_1: bool
) -> dict[str, Any]:
    """Return the `zarr.json` of a bucket with these arrays, by name."""
    if is_format_1:
        return {"zarr_format": 3, "node_type": "group", "attributes": {}}
    attributes = {"coordinates": " ".join(COORDINATES)}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return group | consolidated(arrays)


def to_bytes(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, indent=2).encode() + b"\n"


def pack_shard(rows: Sequence[Buffer | None], form: ShardForm) -> list[Buffer]:
    """Return a shard file of stored rows, in parts."""
    index = np.full((form.shard_rows, 2), EMPTY, dtype="<u8")
    parts: list[Buffer] = []
    offset = form.places[1] if form.piece else 0
    stored: dict[bytes | int, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        if row is None:
            continue
        # By value: which rows are equal is a property of the data, which are one object is not.
        same = bytes(row) if form.kind.shares_equal_rows else number
        if same not in stored:
            start, size = offset, memoryview(row).nbytes
            if form.has_headers:
                parts.append(VLEN_HEADER.pack(1, size))
                size += VLEN_HEADER.size
            parts.append(row)
            stored[same] = (start, size)
            offset += size
        index[number] = stored[same]
    if not form.piece:
        return [*parts, *_sealed(index)]
    padding = -offset % form.piece
    whole = min((offset + padding) // form.piece, form.pieces)
    pieces = np.full((form.pieces, 2), EMPTY, dtype="<u8")
    pieces[:whole, 0] = np.arange(whole) * form.piece
    pieces[:whole, 1] = form.piece
    return [*_sealed(index), *parts, bytes(padding), *_sealed(pieces)]


def _sealed(index: Any) -> Iterable[bytes]:
    table = index.tobytes()
    return table, struct.pack("<I", google_crc32c.value(table))


def read_ranges(index: bytes, form: ShardForm, file_bytes: int, where: str) -> Ranges:
    """Return (offset, length) of each row's payload, (shard_rows, 2); (-1, 0) for an empty one.

    `index` is what lies at `form.places` in the file called `where`.
    """
    table, crc = index[:-CRC_BYTES], index[-CRC_BYTES:]
    if len(index) != form.places[1] or google_crc32c.value(table) != int.from_bytes(crc, "little"):
        raise StoreError(
            f"{where} has a damaged index: it is truncated or was changed. Run `verify` to see "
            "what it costs; delete the shard's commits and encode again to mend it."
        )
    raw = np.frombuffer(table, dtype="<u8").reshape(form.shard_rows, 2)
    empty = (raw == EMPTY).all(axis=1)
    # As they are, 2**63 and more would come out negative.
    ranges = np.where(empty[:, None], (-1, 0), np.minimum(raw, MAX_FILE_BYTES + 1)).astype(np.int64)
    if form.has_headers:
        ranges[~empty] += (VLEN_HEADER.size, -VLEN_HEADER.size)
    return checked_ranges(ranges, file_bytes - form.tail_bytes, where)
