"""All parts of a plan as one: its tables, its shards, what is not in it yet."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.core.clips import TimeSpan
from reducio_latents.core.config import convert
from reducio_latents.core.parsing import parse_json
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.files.source import VideoSource, join_url
from reducio_latents.store.limits import MAX_SHARD_ROWS, MAX_SHARDS
from reducio_latents.store.plan.parts import (
    PLACE,
    AnyPart,
    Kind,
    ShardRange,
    ShardSpan,
    StoredPart,
    read_parts,
    span_of,
)
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import (
    CLIP_SCHEMA,
    REMOVED,
    VIDEO_SCHEMA,
    VIDEO_SPAN_SCHEMA,
    VIDEO_STATUS,
    concat_parts,
    with_columns,
)

KEPT_BYTES = 256 << 20
"""Of tables of clips that a plan keeps for those who ask for shards nearby."""


class PlannedShard(NamedTuple):
    """A shard, and how many rows the plan gives it."""

    bucket: str
    shard: int
    rows: int


class Known(NamedTuple):
    """What the plan remembers of a video."""

    status: str
    reason: str | None
    sha256: str | None
    spans: int | None = None
    """How many the corpus listed of it, if any."""


class KnownVideos:
    """What the plan remembers of all its videos, in columns: some 100 bytes each."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self._tables = tuple(tables)
        self._keys: dict[int, NDArray[np.uint64]] = {}

    def plus(self, videos: pa.Table) -> KnownVideos:
        """Return it with the videos of one more part, which may be planned again."""
        new = with_columns(videos, ["video", *Known._fields])
        for name in ("status", "reason"):
            new = new.set_column(new.schema.names.index(name), name, new[name].dictionary_encode())
        found, kept = KnownVideos([]), list[pa.Table]()
        for i, table in enumerate(self._tables):
            if len(here := _among(table, new["video"])):
                table = table.filter(
                    pc.invert(pc.is_in(table["video"], here["video"].combine_chunks()))
                )
            elif i in self._keys:
                found._keys[len(kept)] = self._keys[i]
            kept += [table] if len(table) else []
        found._tables = (*kept, new)
        return found

    @property
    def names(self) -> pa.ChunkedArray:
        chunks = [chunk for table in self._tables for chunk in table["video"].chunks]
        return pa.chunked_array(chunks, pa.string())

    def named(self, names: Sequence[str]) -> dict[str, Known]:
        """Return those of `names`, which are sorted, that there are."""
        found: dict[str, Known] = {}
        for table in self._tables:
            here = _among(table, pa.chunked_array([names], pa.string()))
            columns = (here[name].to_pylist() for name in ("video", *Known._fields))
            found |= {name: Known(*rest) for name, *rest in zip(*columns, strict=True)}
        return found

    def with_status(self, status: str) -> pa.ChunkedArray:
        """Return the names of the videos of a status."""
        tables = [table.filter(pc.equal(table["status"], status)) for table in self._tables]
        return KnownVideos(tables).names

    def planned_with(self, hashes: Sequence[str]) -> dict[str, str]:
        """Return sha256 -> video, of those of `hashes` that a planned video without spans has."""
        return self._with(hashes, "planned", lambda table: pc.is_null(table["spans"]))

    def removed_with(self, hashes: Sequence[str]) -> dict[str, str]:
        """Return sha256 -> video, of those of `hashes` that a removed video has."""
        return self._with(hashes, REMOVED, lambda table: pc.is_valid(table["sha256"]))

    def _with(
        self, hashes: Sequence[str], status: str, are: Callable[[pa.Table], pa.Array]
    ) -> dict[str, str]:
        found: dict[str, str] = {}
        wanted = pa.array(hashes, pa.string())
        for table in self._tables:
            same = pc.and_(pc.is_in(table["sha256"], wanted), pc.equal(table["status"], status))
            here = table.filter(pc.and_(same, are(table)))
            found |= dict(zip(*(here[n].to_pylist() for n in ("sha256", "video")), strict=True))
        return found

    def keys(self, key: Callable[[str], int]) -> Iterator[tuple[pa.Table, NDArray[np.uint64]]]:
        """Yield the videos in tables, and `key` of the name of each; it is always the same one."""
        for i, table in enumerate(self._tables):
            if i not in self._keys:
                names = table["video"].to_pylist()
                self._keys[i] = np.fromiter(map(key, names), np.uint64, count=len(names))
            yield table, self._keys[i]


def _among(table: pa.Table, names: pa.ChunkedArray) -> pa.Table:
    """Return the rows of videos that are among `names`; both are sorted by name."""
    if not len(table) or not len(names):
        return table.slice(0, 0)
    one, other = table["video"], names
    if one[-1].as_py() < other[0].as_py() or other[-1].as_py() < one[0].as_py():
        return table.slice(0, 0)
    return table.filter(pc.is_in(one, other.combine_chunks()))


@dataclass(frozen=True)
class PlanCounts:
    """How many there are by status; `found` is their sum."""

    videos: dict[str, int]
    """found, planned, too_short, duplicate, failed; removed, if any was."""
    clips: dict[str, int]
    """found, planned, duplicate; removed, if any was."""
    spans: dict[str, int]
    """found, and how many have no clip for which reason; empty where the corpus lists none."""
    shots: dict[str, int]
    """found, and how many videos have none for which reason; empty where none were looked for."""


class Plan:
    """A plan, from a store or in the making. Parts are only ever added."""

    def __init__(self, parts: Sequence[AnyPart]) -> None:
        self._parts = tuple(part.packed() for part in parts)
        self._groups: dict[tuple[Any, ...], tuple[pa.Table, int]] = {}

    @classmethod
    def of(cls, part: AnyPart) -> Plan:
        return cls([part])

    def extended(self, part: AnyPart) -> Plan:
        """Return the plan with one more part."""
        plan = Plan([*self._parts, part])
        if "known" in vars(self):
            plan.known = _known(plan._parts[-1:], self.known)
        return plan

    @property
    def spec(self) -> PlanSpec:
        return self._parts[0].spec

    @property
    def parts(self) -> int:
        return len(self._parts)

    @cached_property
    def clips(self) -> pa.Table:
        """One row a clip, part after part. All of it: some 250 MB a million clips."""
        return concat_parts([part.clips for part in self._parts])

    @cached_property
    def videos(self) -> pa.Table:
        """One row a video: of one that failed and was planned again, what came of it last."""
        return self._last_of_each(concat_parts([part.videos for part in self._parts]))

    def video_columns(self, *names: str) -> pa.Table:
        """Return some columns of `videos`, for plans whose table is too large to be kept."""
        columns = list(dict.fromkeys(["video", *names]))
        tables = [table for part in self._parts for table in part.tables("videos", columns)]
        table = concat_parts(tables) if tables else VIDEO_SCHEMA.empty_table()
        return with_columns(self._last_of_each(table), names)

    def _last_of_each(self, videos: pa.Table) -> pa.Table:
        if self.parts == 1:
            return videos
        codes = videos["video"].combine_chunks().dictionary_encode()
        if len(codes.dictionary) == len(codes):
            return videos
        _, from_the_end = np.unique(codes.indices.to_numpy()[::-1], return_index=True)
        return videos.take(np.sort(len(codes) - 1 - from_the_end))

    def failed_videos(self) -> pa.Table:
        """Return the columns video and reason of the videos that failed."""
        table = self.video_columns("video", "reason", "status")
        return table.filter(pc.equal(table["status"], "failed")).select(["video", "reason"])

    @property
    def clip_schema(self) -> pa.Schema:
        """Names and types of the columns of `clips`. Reads no row."""
        return concat_parts([part.clip_schema.empty_table() for part in self._parts]).schema

    def clip_columns(self, names: Iterable[str]) -> pa.Table:
        """Return some columns of `clips`, all of which there are."""
        there, names = self.clip_schema, list(names)
        # With one that all parts have: a table without columns has no rows either.
        wanted = pa.schema([there.field(name) for name in dict.fromkeys([*names, "row"])])
        tables = [*self.clip_tables(*wanted.names), wanted.empty_table()]
        return concat_parts(tables).select(names)

    def clip_tables(self, *names: str, videos: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield some columns of `clips`, or all, piece by piece: those in which one of `videos`,
        which are sorted, may be."""
        for part in self._parts:
            if videos is None:
                yield from part.tables("part", names or None)
                continue
            for number in part.groups_with("part", videos):
                yield part.group("part", number, names or None)

    @cached_property
    def owns_row(self) -> NDArray[np.bool_]:
        """Whether each clip has a row of its own; others have that of a video with the same bytes.

        Those of a part stand first in its table.
        """
        parts = [np.arange(part.clip_count) < _own_rows(part) for part in self._parts]
        return np.concatenate(parts)

    @cached_property
    def removed(self) -> Mapping[tuple[str, int], frozenset[int]]:
        """The rows of clips that were taken out for good, by bucket and number of their shard."""
        found: dict[tuple[str, int], set[int]] = {}
        for _, table in self._removed_clips():
            for bucket, shard, row in zip(*(table[n].to_pylist() for n in PLACE[:3]), strict=True):
                found.setdefault((bucket, shard), set()).add(row)
        return {key: frozenset(rows) for key, rows in found.items()}

    def _removed_clips(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield where clips stand that were taken out, and how many of them own their row."""
        for part in self._parts:
            for number in part.groups_with("part", [REMOVED], "status"):
                table, begin = part.group("part", number, PLACE), part.group_begin(number)
                gone = np.asarray(pc.equal(table["status"], REMOVED))
                own = int(gone[: max(0, _own_rows(part) - begin)].sum())
                if gone.any():
                    yield own, table.filter(pa.array(gone))

    def places(self, clips: pa.Table) -> NDArray[np.int64]:
        """Return a number for each clip that is equal for clips of the same row."""
        names = pa.array([bucket.name for bucket in self.spec.buckets])
        bucket = pc.index_in(clips["bucket"], names).to_numpy().astype(np.int64)
        shard, row = (clips[name].to_numpy().astype(np.int64) for name in ("shard", "row"))
        return np.asarray((bucket * MAX_SHARDS + shard) * MAX_SHARD_ROWS + row, np.int64)

    def shards(self) -> list[PlannedShard]:
        """Return every shard, by bucket and number. Reads no table: O(shards)."""
        size = self.spec.shard_rows
        found = []
        for bucket in self.spec.buckets:
            for _, shards in self._ranges[bucket.name]:
                found += [
                    PlannedShard(bucket.name, shards.first + i, min(size, shards.rows - i * size))
                    for i in range(-(-shards.rows // size))
                ]
        return found

    def shard_clips(
        self, bucket: str, shard: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Return the clips of one shard by row, or columns of them. A piece of some 100 shards is
        read at once, and kept while there is room."""
        part, span = self._find(bucket, shard)
        at, end, found = span.begin, span.begin + span.rows, list[pa.Table]()
        while at < end:
            number, first = part.group_at("part", at)
            table = self._group(part, "part", number, columns)
            found.append(table.slice(at - first, end - at))
            at += found[-1].num_rows
        return found[0] if len(found) == 1 else pa.concat_tables(found)

    def _group(
        self, part: StoredPart, kind: Kind, number: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Return a row group; what was read first is forgotten first."""
        key = part.number, kind, number, None if columns is None else tuple(columns)
        if (kept := self._groups.get(key)) is not None:
            return kept[0]
        table = part.group(kind, number, columns)
        # Threads may do this at once, and at worst do it twice.
        groups = {**self._groups, key: (table, table.nbytes)}
        size = sum(kept for _, kept in groups.values())
        for old in list(groups)[:-1]:
            if size <= KEPT_BYTES:
                break
            size -= groups.pop(old)[1]
        self._groups = groups
        return table

    def _find(self, bucket: str, shard: int) -> tuple[StoredPart, ShardSpan]:
        """Return the part that has a shard, and where."""
        parts = self._ranges[bucket]
        at = bisect.bisect_right(parts, shard, key=lambda found: found[1].first) - 1
        if at >= 0 and (span := span_of(parts[at][0], bucket, shard)).rows:
            return parts[at][0], span
        raise StoreError(f"the plan has no shard {shard} of bucket {bucket}.")

    def next_shard(self, bucket: str) -> int:
        """Return the first number that no shard of the bucket has yet."""
        used = [s.first + -(-s.rows // self.spec.shard_rows) for _, s in self._ranges[bucket]]
        return max(used, default=0)

    @cached_property
    def _ranges(self) -> Mapping[str, list[tuple[StoredPart, ShardRange]]]:
        found = defaultdict[str, list[tuple[StoredPart, ShardRange]]](list)
        for part in self._parts:
            for bucket, shards in part.shards.items():
                found[bucket].append((part, shards))
        return found

    @cached_property
    def known(self) -> KnownVideos:
        return _known(self._parts, KnownVideos([]))

    def with_copies(self, videos: Sequence[str]) -> set[str]:
        """Return these videos and all that have, or had, the same bytes as one of them."""
        names = ["video", "sha256"]
        every = concat_parts([t for part in self._parts for t in part.tables("videos", names)])
        named = pc.is_in(every["video"], pa.array(videos, pa.string()))
        sums = every.filter(named)["sha256"].drop_null().combine_chunks()
        same = every.filter(pc.or_(named, pc.is_in(every["sha256"], sums)))
        return set(same["video"].to_pylist())

    def own_clips(self, videos: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the planned clips of these videos, or columns of them; those of one stand
        together, by start.

        Of one that was planned again with other bytes, those of its last part.
        """
        wanted, found, sums = sorted(videos), list[pa.Table](), dict[str, str | None]()
        read = None if columns is None else list(dict.fromkeys(["video", "status", *columns]))
        for part in reversed(self._parts):
            names, here = set(wanted), list[pa.Table]()
            for number in part.groups_with("videos", wanted):
                table = part.group("videos", number, ["video", "sha256"])
                pairs = zip(*(table[n].to_pylist() for n in ("video", "sha256")), strict=True)
                of = {name: sha256 for name, sha256 in pairs if name in names}
                names -= {n for n, sha256 in of.items() if sums.setdefault(n, sha256) != sha256}
            for number in part.groups_with("part", wanted):
                table = part.group("part", number, read)
                planned = pc.equal(table["status"], "planned")
                is_named = pc.is_in(table["video"], pa.array(names, pa.string()))
                here.append(table.filter(pc.and_(planned, is_named)))
            found = here + found
        if not found:
            found = [CLIP_SCHEMA.empty_table()]
        table = concat_parts(found)
        return table if columns is None else table.select(columns)

    def video(self, name: str, shard: tuple[str, int] | None = None) -> dict[str, Any]:
        """Return a video's row; raise StoreError if the plan has none.

        With the bucket and number of a shard: as it was when that shard was planned. A video that
        was replaced is planned again under its name.
        """
        for part in reversed(self._parts) if shard is None else [self._find(*shard)[0]]:
            for number in part.groups_with("videos", [name]):
                table = self._group(part, "videos", number)
                names = table["video"]
                row = bisect.bisect_left(range(len(names)), name, key=lambda i: names[i].as_py())
                if row < len(names) and names[row].as_py() == name:
                    found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
                    return found
        raise StoreError(f"the plan has no video {name!r}.")

    def shots(self, name: str) -> tuple[TimeSpan, ...] | None:
        """Return the shots of a video; None if they are not known."""
        row = self.video(name)
        if row.get("shot_ends_s") is None:
            return None
        return tuple(map(TimeSpan, row["shot_starts_s"], row["shot_ends_s"]))

    def source(self, name: str, corpus_root: str) -> VideoSource:
        """Return where a video is, its corpus being at `corpus_root` now."""
        row = self.video(name)
        return VideoSource(join_url(corpus_root, row["url"]), row["offset"], row["length"])

    def counts(self) -> PlanCounts:
        found = sum(part.clip_count for part in self._parts)
        planned = sum(shards.rows for part in self._parts for shards in part.shards.values())
        videos, spans = self.video_columns("status", *VIDEO_SPAN_SCHEMA.names), Counter[str]()
        if listed := pc.sum(videos["spans"]).as_py():
            spans["found"] = listed
            for pair in pc.value_counts(videos["spans_without_clips"]).to_pylist():
                said = parse_json(pair["values"] or "{}")
                for reason, number in convert(said, dict[str, int], where="spans").items():
                    spans[reason] += number * pair["counts"]
        clips = {"found": found, "planned": planned, "duplicate": found - planned}
        for own, table in self._removed_clips():
            clips["planned"] -= own
            clips["duplicate"] -= len(table) - own
            clips[REMOVED] = clips.get(REMOVED, 0) + len(table)
        videos_by_status = _count(videos["status"], VIDEO_STATUS)
        return PlanCounts(videos_by_status, clips, dict(spans), self._shot_counts())

    def _shot_counts(self) -> dict[str, int]:
        if not self.spec.shots:
            return {}
        table = self.video_columns("shot_ends_s", "shots_problem")
        found = {"found": pc.sum(pc.list_value_length(table["shot_ends_s"])).as_py() or 0}
        for pair in pc.value_counts(table["shots_problem"].drop_null()).to_pylist():
            found[pair["values"]] = pair["counts"]
        return found


def _known(parts: Sequence[StoredPart], known: KnownVideos) -> KnownVideos:
    for part in parts:
        for table in part.tables("videos", ["video", *Known._fields]):
            known = known.plus(table)
    return known


def _count(column: pa.ChunkedArray, values: Sequence[str]) -> dict[str, int]:
    found = {pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()}
    shown = [value for value in values if value != REMOVED or value in found]
    return {"found": len(column), **{value: found.get(value, 0) for value in shown}}


def _own_rows(part: StoredPart) -> int:
    return sum(shards.rows for shards in part.shards.values())


def read_plan(files: Files) -> Plan | None:
    """Return the plan of the store at `files`, or None if it has none yet.

    Raise StoreError if a part is missing or damaged.
    """
    parts = read_parts(files)
    return Plan(parts) if parts else None


def require_plan(files: Files) -> Plan:
    """Return the plan of a store; raise StoreError if it has none."""
    plan = read_plan(files)
    if plan is None:
        raise StoreError(f"{files.url} has no plan. Restore its plan folder from a copy.")
    return plan
