"""How the rows of a shard lie in files: one small Protocol, one class a container."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, Files
from reducio_latents.store import tar, zarr
from reducio_latents.store.commit import Commit, ShardKey, commit_path
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
        files: Files,
        meta: StoreMeta,
        key: ShardKey,
        clips: Sequence[Mapping[str, Any]],
        columns: Mapping[str, Sequence[Buffer | None]],
    ) -> Mapping[str, RowsFile]:
        """Return the file of each column; columns may share one.

        `clips` holds what is known of each row's clip, its `clip_id` at least; `columns` each row
        as it is stored. What the shard has already at `files` is looked at, and not changed.
        """

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
        files: Files,
        meta: StoreMeta,
        key: ShardKey,
        clips: Sequence[Mapping[str, Any]],
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


class TarLayout:
    """One tar for the columns that are written together, one more for each that comes later."""

    def describe(
        self, meta: StoreMeta, rows: Mapping[str, int], columns: Iterable[str]
    ) -> Mapping[str, bytes]:
        return {}

    def pack(
        self,
        files: Files,
        meta: StoreMeta,
        key: ShardKey,
        clips: Sequence[Mapping[str, Any]],
        columns: Mapping[str, Sequence[Buffer | None]],
    ) -> Mapping[str, RowsFile]:
        members = {
            name: tar.member_of(meta.columns[name], name, key.bucket, rows)
            for name, rows in columns.items()
        }
        shared = tar.tar_path(key)
        others = [name for name in meta.columns if name not in columns]
        if not any(_committed_file(files, key, name) == shared for name in others):
            parts, ranges = tar.pack_tar(clips, key.bucket, members)
            return {name: RowsFile(shared, parts, ranges[name]) for name in columns}
        # Other columns live in the shared tar: it stays, and these come beside it. Unless a run was
        # killed when it had written the tar and not yet all of its commits.
        held = _held_rows(files, shared, clips, members)
        found = {}
        for name, member in members.items():
            if name in held:
                found[name] = held[name]
            else:
                parts, ranges = tar.pack_tar(clips, key.bucket, {name: member})
                found[name] = RowsFile(tar.tar_path(key, name), parts, ranges[name])
        return found

    def locate(self, files: Files, meta: StoreMeta, commit: Commit) -> NDArray[np.int64]:
        if len(commit.ranges) != commit.rows:
            raise StoreError(
                f"{files.url}/{commit_path(commit.key, commit.column)} says where "
                f"{len(commit.ranges)} of its {commit.rows} rows are. Delete it and encode again."
            )
        return np.array(commit.ranges, np.int64).reshape(-1, 2)


def _committed_file(files: Files, key: ShardKey, column: str) -> str | None:
    if files.size(commit_path(key, column)) is None:
        return None
    return Commit.read(files, key, column).file


def _held_rows(
    files: Files,
    path: str,
    clips: Sequence[Mapping[str, Any]],
    members: Mapping[str, tar.Member],
) -> dict[str, RowsFile]:
    """Return those columns whose rows the tar at `path` holds already."""
    try:
        names = tar.columns_of(files.read_range(path, 0, tar.HEAD_BYTES))
        wanted = members.keys() if names is None else members.keys() & names
        data = files.read(path) if wanted else b""
    except FileNotFoundError:
        return {}
    ranges = {name: tar.find_rows(data, clips, members[name]) for name in wanted}
    return {
        name: RowsFile(path, [data], found) for name, found in ranges.items() if found is not None
    }


def array_rows(shards: Iterable[tuple[str, int, int]], shard_rows: int) -> dict[str, int]:
    """Return how long each bucket's arrays must be for these shards: (bucket, number, rows).

    Shards before the last count as full.
    """
    rows: dict[str, int] = {}
    for bucket, shard, count in shards:
        rows[bucket] = max(rows.get(bucket, 0), shard * shard_rows + count)
    return rows


LAYOUTS: dict[str, Layout] = {"zarr": ZarrLayout(), "webdataset": TarLayout()}
"""Container name -> how it lies in files."""
