"""Rows through zarr-python, for arrays that another tool has written anew.

What this package writes, compressed or not, `mapped` reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reducio_latents.core.parsing import parse_json
from reducio_latents.dataset.reader import DamagedRowsError, Ints
from reducio_latents.errors import StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import Commit, ShardKey
from reducio_latents.store.limits import MAX_ROW_BYTES, Ranges, column_folder
from reducio_latents.store.row_kinds import zstd_size
from reducio_latents.store.writer import row_checksum
from reducio_latents.store.zarr import ShardForm, read_ranges

CODECS = {"bytes", "vlen-bytes", "zstd", "blosc", "crc32c", "transpose", "sharding_indexed"}
"""Codecs that are let work on what may be a stranger's bytes."""
MAX_CHUNK_BYTES = MAX_ROW_BYTES
MAX_ITEM_BYTES = 8


class ZarrColumn:
    """Reads what any Zarr v3 reader can, at a hundredth of the speed of mapped files."""

    def __init__(
        self, store: Store, column: str, bucket: str, shards: Sequence[int], *, check_rows: bool
    ) -> None:
        self._where = f"{store.files.url}/{bucket}/{column_folder(column)}"
        self._kind, self._bucket = store.kind(column), bucket
        self._form = form = ShardForm.of(store.meta, column, bucket)
        self._shards = list(shards)
        self._size = store.meta.shard_rows
        row_shape = self._kind.shape(bucket)
        if form.piece:
            row_shape = (form.pieces * form.piece,)
        _require_bounded(store, f"{bucket}/{column_folder(column)}/zarr.json", row_shape)
        self._array = _open_array(self._where)
        # Checksums are of rows as they were stored: what was compressed then is not known now,
        # unless to Zarr rows are any bytes.
        self._check_rows = check_rows and (bool(form.piece) or not self._kind.is_compressed)

        @cache
        def commit(shard: int) -> Commit:
            return store.commit(ShardKey(bucket, shard), column)

        @cache
        def ranges(shard: int) -> Ranges:
            start, length = form.places
            index = bytes(self._array[shard, start:length])
            return read_ranges(index, form, row_shape[0] + form.tail_bytes, self._where)

        self._commit, self._ranges = commit, ranges

    def arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool = False) -> Tensor:
        shape = (len(rows), *self._kind.shape(self._bucket))
        out = np.empty(shape, self._array.dtype)
        for position, row in enumerate(self._rows(shards, rows)):
            out[position] = row
        tensor = torch.from_numpy(out)
        return tensor.pin_memory() if pin_memory else tensor

    def payloads(self, shards: Ints, rows: Ints) -> list[bytes]:
        return [bytes(row) for row in self._rows(shards, rows)]

    def _rows(self, shards: Ints, rows: Ints) -> list[Any]:
        numbers = zip(shards.tolist(), rows.tolist(), strict=True)
        return [self._row(i, self._shards[shard], row) for i, (shard, row) in enumerate(numbers)]

    def _row(self, position: int, shard: int, row: int) -> Any:
        number = shard * self._size + row
        try:
            if self._form.piece:
                start, length = self._ranges(shard)[row].tolist()
                value = self._array[shard, start : start + length] if start >= 0 else b""
            else:
                # A slice: asked for one value of any length, zarr gives an array in an array.
                value = self._array[number : number + 1][0]
            if self._check_rows:
                payload = value.tobytes() if isinstance(value, np.ndarray) else bytes(value)
                if self._commit(shard).row_crc32c[row] != row_checksum(payload):
                    raise StoreError("it does not match its checksum")
            return self._kind.unpack(bytes(value), self._bucket) if self._form.piece else value
        except Exception as err:  # codecs raise what they like
            raise DamagedRowsError(
                f"{self._where}: row {number} cannot be read ({err}). Run `verify`.", [position]
            ) from err


def _require_bounded(store: Store, path: str, row_shape: tuple[int, ...]) -> None:
    """Raise StoreError for an array that would have zarr take more memory than rows may need."""
    try:
        said = parse_json(store.files.read(path))
        _, *rows = said["shape"]
        shapes = list(_chunk_shapes(said["codecs"], said["chunk_grid"]["configuration"]))
        good = tuple(rows) == row_shape and all(len(shape) == len(rows) + 1 for shape in shapes)
        good = good and all(0 < side <= MAX_ROW_BYTES for shape in shapes for side in shape)
        size = 1 if said["data_type"] == "uint8" else MAX_ITEM_BYTES
        good = good and math.prod(shapes[-1]) * size <= MAX_CHUNK_BYTES
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise StoreError(
            f"{store.files.url}/{path} describes an array of other rows than the store's, or one "
            "that this version does not read. Restore it from a copy."
        )


def _chunk_shapes(codecs: Any, grid: Any) -> Any:
    """Yield the shape of each chunk, outer ones first; raise ValueError for an unknown codec."""
    yield grid["chunk_shape"]
    for codec in codecs:
        settings = codec.get("configuration", {})
        if codec["name"] not in CODECS:
            raise ValueError(codec["name"])
        if codec["name"] == "sharding_indexed":
            yield from _chunk_shapes(settings["codecs"], settings)


def _open_array(where: str) -> Any:
    import zarr
    from zarr.storage import WrapperStore

    class Bounded(WrapperStore):  # type: ignore[misc]
        """A store whose compressed chunks may not unpack to more than rows may need."""

        async def get(self, key: str, *rest: Any, **settings: Any) -> Any:
            data = await super().get(key, *rest, **settings)
            if data is not None and not key.endswith("zarr.json"):
                _require_small(data.to_bytes()[:18], len(data))
            return data

    try:
        plain = zarr.open_array(where, mode="r").store_path
        return zarr.open_array(Bounded(plain.store), path=plain.path, mode="r")
    except Exception as err:
        raise StoreError(f"{where} is not an array that zarr can open ({err}).") from err


def _require_small(head: bytes, length: int) -> None:
    """Raise StoreError for a chunk that unpacks to too much, as its head of zstd or blosc says."""
    unpacked = zstd_size(head) or 0
    if int.from_bytes(head[12:16], "little") == length:  # else it is not of blosc
        unpacked = max(unpacked, int.from_bytes(head[4:8], "little"))
    if unpacked > MAX_CHUNK_BYTES:
        raise StoreError(f"a chunk unpacks to {unpacked} bytes")
