"""How the rows of a shard lie in files: one small Protocol, one class a container."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, Files
from reducio_latents.store import zarr
from reducio_latents.store.commit import Commit, ShardKey
from reducio_latents.store.meta import ColumnMeta, StoreMeta


@dataclass(frozen=True)
class RowsFile:
    """Where one column of one shard has been put."""

    path: str
    parts: Sequence[Buffer]
    """The bytes of the file."""
    ranges: tuple[tuple[int, int], ...] = ()
    """As in `Commit.ranges`."""


class Layout(Protocol):
    """A container format: it decides names and bytes, and writes nothing itself."""

    def describe(
        self, meta: StoreMeta, rows: Mapping[str, int], columns: Iterable[str]
    ) -> Mapping[str, bytes]:
        """Return the small metadata files (path -> bytes) for `rows` rows in each bucket."""

    def pack(
        self,
        meta: StoreMeta,
        key: ShardKey,
        clip_ids: Sequence[str],
        columns: Mapping[str, Sequence[Buffer | None]],
    ) -> Mapping[str, RowsFile]:
        """Return the file of each column; columns may share one."""

    def locate(self, files: Files, meta: StoreMeta, commit: Commit) -> NDArray[np.int64]:
        """Return (offset, length) of each row's payload in `commit.file`; (-1, 0) if empty."""


class ZarrLayout:
    """One shard file per column; see `store.zarr`."""

    def describe(
        self, meta: StoreMeta, rows: Mapping[str, int], columns: Iterable[str]
    ) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {}
        for bucket, count in sorted(rows.items()):
            found[f"{bucket}/zarr.json"] = zarr.group_metadata()
            for name in columns:
                column = meta.columns[name]
                found[f"{bucket}/{name}/zarr.json"] = zarr.array_metadata(
                    column, bucket, count, meta.shard_rows
                )
        return found

    def pack(
        self,
        meta: StoreMeta,
        key: ShardKey,
        clip_ids: Sequence[str],
        columns: Mapping[str, Sequence[Buffer | None]],
    ) -> Mapping[str, RowsFile]:
        found = {}
        for name, rows in columns.items():
            column = meta.columns[name]
            path = zarr.shard_path(key, name, _ndim(column, key.bucket))
            parts = zarr.pack_shard(rows, column.kind, meta.shard_rows, column.compression)
            found[name] = RowsFile(path, parts)
        return found

    def locate(self, files: Files, meta: StoreMeta, commit: Commit) -> NDArray[np.int64]:
        length = zarr.index_bytes(meta.shard_rows)
        where = f"{files.url}/{commit.file}"
        try:
            tail = files.read_range(commit.file, -length, length)
        except (FileNotFoundError, OSError, ValueError) as err:
            raise StoreError(
                f"{where} is missing or truncated. Run `verify` to see what it costs."
            ) from err
        column = meta.columns[commit.column]
        ranges = zarr.read_ranges(tail, column.kind, meta.shard_rows, where, column.compression)
        return ranges[: commit.rows]


def _ndim(column: ColumnMeta, bucket: str) -> int:
    """Return the number of axes of one row."""
    return len(column.row_shapes[bucket]) if column.kind == "array" else 0


LAYOUTS: dict[str, Layout] = {"zarr": ZarrLayout()}
"""Container name -> how it lies in files."""
