"""How the rows of a shard lie in files: one small Protocol, one class a container."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, islice, repeat
from typing import Any, NamedTuple, Protocol

from reducio_latents.core.parsing import parse_json
from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, Files
from reducio_latents.store import tar, zarr
from reducio_latents.store.commit import Commit, ShardKey, commit_path
from reducio_latents.store.index import IndexEntry
from reducio_latents.store.limits import COORDINATES, Ranges, checked_ranges, column_folder
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import Plan
from reducio_latents.store.plan.plan import PlannedShard
from reducio_latents.store.row_kinds import ArrayRows, row_kind

Clips = Sequence[Mapping[str, Any]]
"""What is known of each row's clip, its `clip_id` at least."""
Payloads = Mapping[str, Sequence[Buffer | None]]
"""Column -> each row as it is stored."""


@dataclass(frozen=True)
class RowsFile:
    """Where one column of one shard has been put."""

    path: str
    parts: Sequence[Buffer]
    """The bytes of the file."""
    ranges: tuple[tuple[int, int], ...] = ()
    """As in `Commit.ranges`."""
    must_be_new: bool = False
    """Whether a file that another run has put there meanwhile would have to be looked at first."""


class HeldFile(NamedTuple):
    """A file that holds columns of a shard."""

    key: ShardKey
    clips: Clips
    data: bytes
    columns: Collection[str]


class Repacked(NamedTuple):
    """What a file that was packed anew holds of one column."""

    rows: Sequence[Buffer | None]
    """As they are stored."""
    ranges: tuple[tuple[int, int], ...]
    """As in `Commit.ranges`."""


class Ranged(Protocol):
    """A place whose files can be read in part."""

    @property
    def url(self) -> str:
        """Where it is, for messages."""

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """As in `Files`."""


class Layout:
    """A container format: it decides names and bytes, and writes nothing itself."""

    files_tell_ranges: bool
    """Whether `locate` needs no more than the line of a commit in the index."""

    def describe(
        self, meta: StoreMeta, rows: Mapping[str, int], columns: Iterable[str]
    ) -> Mapping[str, bytes]:
        """Return the small metadata files (path -> bytes) for `rows` rows in each bucket."""
        return {}

    def pack(
        self, files: Files, meta: StoreMeta, key: ShardKey, clips: Clips, columns: Payloads
    ) -> Mapping[str, RowsFile]:
        """Return the file of each column; columns may share one.

        What the shard has already at `files` is looked at, and not changed.
        """
        raise NotImplementedError

    def repack(
        self, meta: StoreMeta, file: HeldFile, without: Collection[int]
    ) -> tuple[bytes, Mapping[str, Repacked]]:
        """Return a file with some rows of its columns left out, and what each holds then.

        Where rows are is told by the file alone, so that its commits may be of an earlier one.
        Raise StoreError if it does not tell.
        """
        raise NotImplementedError

    def locate(self, files: Ranged, meta: StoreMeta, commit: Commit | IndexEntry) -> Ranges:
        """Return (offset, length) of each row's payload in `commit.file`; (-1, 0) if empty.

        All lie inside `commit.file_bytes`. Raise StoreError where that cannot be said.
        """
        raise NotImplementedError

    def coordinates(self, meta: StoreMeta, plan: Plan) -> Iterator[tuple[str, bytes]]:
        """Yield files (path, bytes) that tell other readers which clip each row is of."""
        yield from ()

    def paths(self, meta: StoreMeta, key: ShardKey, column: str) -> Collection[str]:
        """Return where the rows of a column of a shard may lie."""
        raise NotImplementedError

    def lies_otherwise(self, files: Files, meta: StoreMeta, column: str, bucket: str) -> bool:
        """Whether another tool has written a column's rows anew, so that only it can read them."""
        return False


class ZarrLayout(Layout):
    """One shard file per column; see `store.zarr`."""

    files_tell_ranges = True

    def describe(
        self, meta: StoreMeta, rows: Mapping[str, int], columns: Iterable[str]
    ) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {}
        is_format_1, columns = meta.format_version == 1, list(columns)
        for bucket, length in sorted(rows.items()):
            arrays = {
                column_folder(name): zarr.array_metadata(meta, name, bucket, length)
                for name in columns
            }
            if not is_format_1:
                arrays |= {
                    name: zarr.coordinate_metadata(name, length, meta.shard_rows)
                    for name in COORDINATES
                }
            group = zarr.bucket_metadata(arrays, is_format_1=is_format_1)
            found[f"{bucket}/zarr.json"] = zarr.to_bytes(group)
            for name, array in arrays.items():
                found[f"{bucket}/{name}/zarr.json"] = zarr.to_bytes(array)
        return found

    def coordinates(self, meta: StoreMeta, plan: Plan) -> Iterator[tuple[str, bytes]]:
        if meta.format_version == 1:
            return
        for bucket, shards in groupby(plan.shards(), lambda shard: shard.bucket):
            clips = _by_row(plan, shards, meta.shard_rows)
            for number in count():
                part = list(islice(clips, zarr.COORDINATE_SHARDS * meta.shard_rows))
                if not part:
                    break
                for name, values in zip(COORDINATES, zip(*part, strict=True), strict=True):
                    path = f"{bucket}/{name}/c/{number}"
                    yield path, zarr.coordinate_bytes(name, values, meta.shard_rows)

    def pack(
        self, files: Files, meta: StoreMeta, key: ShardKey, clips: Clips, columns: Payloads
    ) -> Mapping[str, RowsFile]:
        found = {}
        for name, rows in columns.items():
            parts = zarr.pack_shard(rows, zarr.ShardForm.of(meta, name, key.bucket))
            [path] = self.paths(meta, key, name)
            found[name] = RowsFile(path, parts)
        return found

    def repack(
        self, meta: StoreMeta, file: HeldFile, without: Collection[int]
    ) -> tuple[bytes, Mapping[str, Repacked]]:
        (key, clips, data), [name] = file[:3], file.columns
        form = zarr.ShardForm.of(meta, name, key.bucket)
        start, length = form.places
        ranges = zarr.read_ranges(data[start:][:length], form, len(data), f"{key} {name}")
        rows = _left_of(data, ranges[: len(clips)].tolist(), without)
        return b"".join(zarr.pack_shard(rows, form)), {name: Repacked(rows, ())}

    def locate(self, files: Ranged, meta: StoreMeta, commit: Commit | IndexEntry) -> Ranges:
        form = zarr.ShardForm.of(meta, commit.column, commit.bucket)
        where = f"{files.url}/{commit.file}"
        try:
            index = files.read_range(commit.file, *form.places)
        except (FileNotFoundError, OSError, ValueError) as err:
            raise StoreError(
                f"{where} is missing or truncated. Run `verify` to see what it costs."
            ) from err
        return zarr.read_ranges(index, form, commit.file_bytes, where)[: commit.rows]

    def paths(self, meta: StoreMeta, key: ShardKey, column: str) -> Collection[str]:
        kind = row_kind(meta.columns[column])
        if isinstance(kind, ArrayRows):
            axes = len(kind.shape(key.bucket)) if kind.has_bucket(key.bucket) else 0
        else:
            axes = meta.format_version - 1
        return [zarr.shard_path(key, column, axes)]

    def lies_otherwise(self, files: Files, meta: StoreMeta, column: str, bucket: str) -> bool:
        path = f"{bucket}/{column_folder(column)}/zarr.json"
        where = f"{files.url}/{path}"
        try:
            found = parse_json(files.read(path))
        except FileNotFoundError as err:
            raise StoreError(
                f"{where} is missing. Run the encode command again to write it anew."
            ) from err
        except ValueError as err:
            raise StoreError(f"{where} is not JSON ({err}). Restore it from a copy.") from err
        ours = zarr.array_metadata(meta, column, bucket, 0)
        said = found if isinstance(found, dict) else {}
        return any(said.get(name) != ours[name] for name in zarr.DECISIVE)


class TarLayout(Layout):
    """One tar for the columns that are written together, one more for each that comes later."""

    files_tell_ranges = False

    def pack(
        self, files: Files, meta: StoreMeta, key: ShardKey, clips: Clips, columns: Payloads
    ) -> Mapping[str, RowsFile]:
        members = {
            name: tar.member_of(row_kind(meta.columns[name]), name, key.bucket, rows)
            for name, rows in columns.items()
        }
        shared = tar.tar_path(key)
        others = [name for name in meta.columns if name not in columns]
        try:  # columns that the tar says it holds, none if it does not say
            held_by = tar.columns_of(files.read_range(shared, 0, tar.HEAD_BYTES)) or set[str]()
        except FileNotFoundError:
            held_by = None
        is_theirs = held_by is not None and not held_by <= columns.keys()
        if not is_theirs and not any(_is_committed_in(shared, files, key, n) for n in others):
            data, ranges = tar.pack_tar(clips, key.bucket, members)
            new = held_by is None
            return {n: RowsFile(shared, [data], ranges[n], must_be_new=new) for n in columns}
        # Other columns live in the shared tar, or another run has just put them there: it stays,
        # and these come beside it. Unless a run was killed when it had written the tar and not yet
        # all of its commits.
        held = _held_rows(files, shared, held_by, clips, members)
        found = {}
        for name, member in members.items():
            if name in held:
                found[name] = held[name]
            else:
                data, ranges = tar.pack_tar(clips, key.bucket, {name: member})
                found[name] = RowsFile(tar.tar_path(key, name), [data], ranges[name])
        return found

    def repack(
        self, meta: StoreMeta, file: HeldFile, without: Collection[int]
    ) -> tuple[bytes, Mapping[str, Repacked]]:
        key, clips, data, columns = file
        places = tar.member_places(data)
        if places is None:
            raise StoreError(f"{tar.tar_path(key)} is no whole tar.")
        members = {}
        for name in columns:
            member = tar.member_of(row_kind(meta.columns[name]), name, key.bucket, ())
            found = [tar.row_place(places, clip, member) for clip in clips]
            members[name] = member._replace(rows=_left_of(data, found, without))
        packed, ranges = tar.pack_tar(clips, key.bucket, members)
        return bytes(packed), {n: Repacked(members[n].rows, ranges[n]) for n in columns}

    def locate(self, files: Ranged, meta: StoreMeta, commit: Commit | IndexEntry) -> Ranges:
        assert isinstance(commit, Commit)
        if len(commit.ranges) != commit.rows:
            raise StoreError(
                f"{files.url}/{commit_path(commit.key, commit.column)} says where "
                f"{len(commit.ranges)} of its {commit.rows} rows are. Delete it and encode again."
            )
        return checked_ranges(commit.ranges, commit.file_bytes, f"{files.url}/{commit.file}")

    def paths(self, meta: StoreMeta, key: ShardKey, column: str) -> Collection[str]:
        return [tar.tar_path(key), tar.tar_path(key, column)]


def _left_of(
    data: bytes, ranges: Sequence[Sequence[int]], without: Collection[int]
) -> list[Buffer | None]:
    """Return the rows that lie at `ranges`, None for empty ones and for those to be left out."""
    return [
        None if start < 0 or row in without else data[start : start + size]
        for row, (start, size) in enumerate(ranges)
    ]


def _is_committed_in(path: str, files: Files, key: ShardKey, column: str) -> bool:
    there = files.size(commit_path(key, column)) is not None
    return there and Commit.read(files, key, column).file == path


def _held_rows(
    files: Files,
    path: str,
    named: set[str] | None,
    clips: Clips,
    members: Mapping[str, tar.Member],
) -> dict[str, RowsFile]:
    """Return those columns whose rows the tar at `path`, which names `named`, holds already."""
    if named is None:
        return {}
    wanted = members.keys() & (named or members.keys())
    data = files.read(path) if wanted else b""
    ranges = {name: tar.find_rows(data, clips, members[name]) for name in wanted}
    return {
        name: RowsFile(path, [data], found) for name, found in ranges.items() if found is not None
    }


def _by_row(plan: Plan, shards: Iterable[PlannedShard], shard_rows: int) -> Iterator[Sequence[Any]]:
    """Yield what `COORDINATES` names of each row of a bucket, also of rows that hold no clip."""
    at = 0
    for shard in shards:
        begin = shard.shard * shard_rows
        yield from repeat(("", "", math.nan), begin - at)
        clips = plan.shard_clips(shard.bucket, shard.shard, [*COORDINATES])
        yield from zip(*(clips[name].to_pylist() for name in COORDINATES), strict=True)
        at = begin + len(clips)


def array_nodes(described: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the groups and arrays of described metadata, as the root names them."""
    nodes = {}
    for path, data in described.items():
        node = parse_json(data)
        node.pop("consolidated_metadata", None)
        nodes[path.removesuffix("/zarr.json")] = node
    return nodes


def array_rows(shards: Iterable[tuple[str, int, int]], shard_rows: int) -> dict[str, int]:
    """Return how long each bucket's arrays must be for these shards: (bucket, number, rows).

    Shards before the last count as full.
    """
    rows: dict[str, int] = {}
    for bucket, shard, length in shards:
        rows[bucket] = max(rows.get(bucket, 0), shard * shard_rows + length)
    return rows


LAYOUTS: dict[str, Layout] = {"zarr": ZarrLayout(), "webdataset": TarLayout()}
"""Container name -> how it lies in files."""
