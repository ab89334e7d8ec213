"""Writing: rows of a shard in, files and then commits out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import google_crc32c

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, Files, LocalFiles
from reducio_latents.files.lock import has_died
from reducio_latents.store.commit import (
    ClipQuality,
    Commit,
    Failure,
    ShardKey,
    clips_sha256,
    commit_path,
    list_commits,
)
from reducio_latents.store.container import LAYOUTS, Layout, array_nodes, array_rows
from reducio_latents.store.drop import sweep_lock
from reducio_latents.store.index import PATH as INDEX
from reducio_latents.store.index import require_same_clips, same_clips
from reducio_latents.store.meta import ROOT, Nodes, StoreMeta, require_same
from reducio_latents.store.plan import Plan, ShardSums, complete_parts, read_plan
from reducio_latents.store.reports import SHOTS
from reducio_latents.store.row_kinds import Row as Row
from reducio_latents.store.row_kinds import row_kind
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.turns import AT_WORK

log = logging.getLogger(__name__)

PROBED_FOLDER = "probed"
"""Of what a run that has no plan yet has found out."""
LISTED = "listed/tables"
"""What tables listed when the plan was made of them: a shortcut, and no part of the store."""
BEFORE = ("plan/", "runs/", f"{AT_WORK}/", f"{PROBED_FOLDER}/", LISTED, SHOTS)
"""How names begin that are there before a store's description."""


@dataclass(frozen=True, kw_only=True)
class ColumnRows:
    """What one encoder made of one shard."""

    rows: Sequence[Row]
    """One array or bytes per row of the plan; None where the clip failed."""
    failed: Sequence[Failure] = ()
    """Why rows are None."""
    statistics: Mapping[str, ChannelStatistics] = field(default_factory=dict)
    quality: Sequence[ClipQuality] = ()


@dataclass
class StoreWriter:
    """Adds shards to one store. Any number of processes may hold one at once."""

    files: Files
    meta: StoreMeta

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.meta.container]

    @classmethod
    def open(cls, files: Files, meta: StoreMeta, rows: Mapping[str, int]) -> Self:
        """Create the store, or resume one that was made by the same means.

        `rows` counts the rows of each bucket in the plan. Raise StoreError where the place is taken
        by something else, or by a store that was made differently.
        """
        read_meta_if_any(files)  # refuses a place that is taken by something else

        def joined_to(stored: StoreMeta | None) -> StoreMeta:
            columns = meta.columns
            if stored is not None:
                require_same(meta, stored, files.url)
                # The stored description first: what it measured stays as it was written.
                columns = {**columns, **stored.columns}
            kept = ("buckets", "counts", "statistics") if stored is not None else ()
            return replace(
                meta,
                columns=dict(sorted(columns.items())),
                format_version=(stored or meta).format_version,
                **{name: getattr(stored, name) for name in kept},
            )

        # The description comes first: a place that has it is ours, whatever else is missing.
        writer = cls(files, StoreMeta.update(files, joined_to))
        writer.sweep()
        complete_parts(files)
        writer.meta = StoreMeta.update(
            files, lambda stored: stored or writer.meta, lambda now: writer.describe(now, rows)
        )
        return writer

    def describe(self, meta: StoreMeta, rows: Mapping[str, int]) -> Nodes:
        """Write the small files that say which arrays there are; return what they say now."""
        described = self.layout.describe(meta, rows, meta.columns)
        return array_nodes({p: _settle(self.files, p, data) for p, data in described.items()})

    def complete(self, plan: Plan, change: Callable[[StoreMeta | None], StoreMeta]) -> None:
        """Change the description as `StoreMeta.update` does, with all that others are told."""
        rows = array_rows(self.write_coordinates(plan).shards(), self.meta.shard_rows)
        self.meta = StoreMeta.update(self.files, change, lambda now: self.describe(now, rows))

    def write_coordinates(self, plan: Plan) -> Plan:
        """Write which clip each row is of, for other readers; nothing where it is there already.

        Return the plan as it is then: who writes last has seen all of its parts.
        """
        while True:
            for path, data in self.layout.coordinates(self.meta, plan):
                if self.files.size(path) != len(data) or self.files.read(path) != data:
                    self.files.write(path, data)
            now = read_plan(self.files)
            if now is None or now.parts <= plan.parts:
                return plan
            plan = now

    def write_shard(
        self,
        key: ShardKey,
        clip_ids: Sequence[str],
        columns: Mapping[str, ColumnRows],
        timings: Mapping[str, float] | None = None,
        *,
        details: Sequence[Mapping[str, Any]] = (),
    ) -> list[Commit]:
        """Write the rows of one shard, then one commit a column, which makes them count.

        `details` is what else is known of each clip (its `video` and `start_s`), for containers
        that say so beside the rows.
        """
        clips = [
            {"clip_id": clip_id, **about}
            for clip_id, about in zip(clip_ids, details or [{}] * len(clip_ids), strict=True)
        ]
        for name, column in columns.items():
            self._check_rows(key, name, column, len(clips))
        payloads = {}
        for name, column in columns.items():
            store = row_kind(self.meta.columns[name]).store
            rows = [None if row is None else store(row) for row in column.rows]
            payloads[name] = replace(column, rows=rows)
        return self.write_payloads(key, clips, payloads, timings)

    def write_payloads(
        self,
        key: ShardKey,
        clips: Sequence[Mapping[str, Any]],
        columns: Mapping[str, ColumnRows],
        timings: Mapping[str, float] | None = None,
    ) -> list[Commit]:
        """Write rows that are bytes as they are stored; else the same as `write_shard`."""
        rows = {name: _as_buffers(column.rows) for name, column in columns.items()}
        packed = self.layout.pack(self.files, self.meta, key, clips, rows)
        written: dict[str, tuple[int, str]] = {}
        for file in packed.values():
            if file.path not in written:
                written[file.path] = _size_and_sha256(file.parts)
                if not file.must_be_new:
                    self.files.write(file.path, file.parts)
                elif not self.files.create(file.path, file.parts):
                    return self.write_payloads(key, clips, columns, timings)
        commits = []
        for name, column in columns.items():
            size, sha256 = written[packed[name].path]
            commit = Commit(
                bucket=key.bucket,
                column=name,
                shard=key.shard,
                rows=len(clips),
                fingerprint=self.meta.columns[name].fingerprint,
                file=packed[name].path,
                file_bytes=size,
                file_sha256=sha256,
                row_crc32c=tuple(None if b is None else row_checksum(b) for b in rows[name]),
                ranges=packed[name].ranges,
                failed=tuple(column.failed),
                clips_sha256=clips_sha256(clip["clip_id"] for clip in clips),
                statistics=dict(column.statistics),
                quality=tuple(column.quality),
                timings={k: round(v, 4) for k, v in (timings or {}).items()},
            )
            commits.append(self._commit(commit))
        return commits

    def _commit(self, commit: Commit) -> Commit:
        """Store a commit unless another process has been first; return the one that counts.

        Two machines may make rows of one shard that differ in their last bits. Both write the file
        before they commit, so the second one finds in it the bytes that stay: they decide.
        """
        path, data = commit_path(commit.key, commit.column), commit.to_json()
        while not self.files.create(path, data):
            try:
                there = self.files.read(path)
            except FileNotFoundError:
                continue
            if theirs := self._standing(commit):
                return theirs
            if self.files.swap(path, there, data):
                break
        return commit

    def _standing(self, ours: Commit) -> Commit | None:
        """Return the commit that is stored in the place of this one, if its rows stand."""
        try:
            theirs = Commit.read(self.files, ours.key, ours.column)
            if (theirs.clips_sha256, theirs.fingerprint) != (ours.clips_sha256, ours.fingerprint):
                return None
            if (theirs.file, theirs.file_sha256) == (ours.file, ours.file_sha256):
                return theirs if theirs.failed == ours.failed else None
            sha256 = _size_and_sha256([self.files.read(theirs.file)])[1]
        except (FileNotFoundError, StoreError):
            return None
        return theirs if sha256 == theirs.file_sha256 else None

    def sweep(self) -> None:
        """Remove what killed processes left: files half-written, of which object stores have none,
        and locks."""
        if isinstance(self.files, LocalFiles):
            self.files.sweep()
        sweep_lock(self.files)
        for path in list(self.files.list(AT_WORK)):
            if has_died(self.files, path):
                self.files.delete(path)

    def take_in_columns(self) -> None:
        """Take in the columns that another process has described since; ours stay what they are."""
        stored = StoreMeta.read(self.files).columns
        columns = dict(sorted({**stored, **self.meta.columns}.items()))
        self.meta = replace(self.meta, columns=columns)

    def drop_bad_commits(self, plan: Plan, columns: Collection[str]) -> None:
        """Make shards count as not done whose commits are of other clips than the plan's; in these
        columns also those whose file is gone or has another size."""
        lost, sums = Counter[str](), ShardSums(self.files)
        sound = same_clips(self.files, with_rows=True)
        for column, key in sorted(set(list_commits(self.files)) - sound):
            try:
                commit = Commit.read(self.files, key, column)
                require_same_clips(self.files, commit, sums)
            except StoreError:
                self.drop_commit(key, column)
                continue
            if commit.removed != plan.removed.get(key, frozenset()):
                continue  # a removal was killed, and the next one knows what it had done
            if self.files.size(commit.file) != commit.file_bytes:  # nor was it made again meanwhile
                lost[column] += 1
                if column in columns:
                    self.drop_commit(key, column)
        for column, number in sorted(lost.items()):
            mend = f"add-column {self.files.url} {column} makes them again"
            log.warning(
                "%s: the files of %d shards are gone, or not as long as their commits say; %s.",
                column,
                number,
                "they are made again" if column in columns else mend,
            )

    def drop_commit(self, key: ShardKey, column: str) -> None:
        """Make a shard count as not done. Its rows stay until they are written anew."""
        self.files.delete(INDEX)  # which would go on to say that it is done
        self.files.delete(commit_path(key, column))

    def _check_rows(self, key: ShardKey, name: str, given: ColumnRows, count: int) -> None:
        rows = given.rows
        if len(rows) != count:
            raise StoreError(f"{key} {name}: {len(rows)} rows given for {count} clips.")
        if count > self.meta.shard_rows:
            raise StoreError(f"{key}: {count} clips, a shard has {self.meta.shard_rows} at most.")
        empty = {number for number, row in enumerate(rows) if row is None}
        if empty != {failure.row for failure in given.failed}:
            raise StoreError(f"{key} {name}: rows without a value are not those that failed.")
        kind = row_kind(self.meta.columns[name])
        for row in rows:
            if row is not None and (misfit := kind.misfit(row, key.bucket)):
                raise StoreError(f"{key} {name}: {misfit}.")


def read_meta_if_any(files: Files) -> StoreMeta | None:
    """Return the description of the store, or None where the place is free.

    Raise StoreError where it is taken by something that is not a latent store.
    """
    if files.size(ROOT) is not None:
        return StoreMeta.read(files)
    taken = next((p for p in files.list("") if not p.startswith(BEFORE)), None)
    if taken is not None and next(list_commits(files), None) is not None:
        raise StoreError(
            f"{files.url} holds commits of a latent store, but its {ROOT} is gone. "
            "Restore it from a copy."
        )
    if taken is not None:
        raise StoreError(
            f"{files.url} holds something else ({taken}) and is no latent store. "
            "Give a new or empty folder."
        )
    return None


def _settle(files: Files, path: str, data: bytes) -> bytes:
    """Write a small file that says how long arrays are, unless it says that they are longer: then a
    run that has planned more was here first. Return what stands."""
    while True:
        try:
            there = files.read(path)
        except FileNotFoundError:
            there = None
        if there and (there == data or _says_longer(there, data)):
            return there
        if files.swap(path, there, data):
            return data


def _says_longer(there: bytes, data: bytes) -> bool:
    try:
        old, new = json.loads(there), json.loads(data)
        lengths = _take_lengths(old), _take_lengths(new)
        longer = all(a >= b for a, b in zip(*lengths, strict=True)) and lengths[0] != lengths[1]
        return old == new and longer
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _take_lengths(node: Any) -> list[int]:
    """Take out of a group or an array how long it says that arrays are."""
    inside = node.get("consolidated_metadata", {"metadata": {}})["metadata"].values()
    arrays = [array for array in [node, *inside] if "shape" in array]
    return [array["shape"].pop(0) for array in arrays]


def row_checksum(payload: Buffer) -> int:
    """Return the crc32c of one row's payload."""
    return int(google_crc32c.value(bytes(payload)))


def _as_buffers(rows: Sequence[Row]) -> list[Buffer | None]:
    """Narrow rows that are known to be bytes."""
    return [row if row is None or isinstance(row, Buffer) else row.tobytes() for row in rows]


def _size_and_sha256(parts: Sequence[Buffer]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        size += memoryview(part).nbytes
    return size, digest.hexdigest()
