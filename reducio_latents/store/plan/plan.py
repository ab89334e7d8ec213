"""All parts of a plan as one: its tables, its shards, what is not in it yet."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.config import convert
from reducio_latents.core.parsing import parse_json
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.files.source import VideoSource, join_url
from reducio_latents.store.plan.parts import AnyPart, ShardRange, ShardSpan, read_parts, span_of
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import CLIP_STATUS, VIDEO_STATUS, concat_parts


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


@dataclass(frozen=True)
class PlanCounts:
    """How many there are by status; `found` is their sum."""

    videos: dict[str, int]
    """found, planned, too_short, duplicate, failed."""
    clips: dict[str, int]
    """found, planned, duplicate."""
    spans: dict[str, int]
    """found, and how many have no clip for which reason; empty where the corpus lists none."""


class Plan:
    """A plan, from a store or in the making. Parts are only ever added."""

    def __init__(self, parts: Sequence[AnyPart]) -> None:
        self._parts = tuple(parts)

    @classmethod
    def of(cls, part: AnyPart) -> Plan:
        return cls([part])

    def extended(self, part: AnyPart) -> Plan:
        """Return the plan with one more part."""
        return Plan([*self._parts, part])

    @property
    def spec(self) -> PlanSpec:
        return self._parts[0].spec

    @property
    def parts(self) -> int:
        return len(self._parts)

    @cached_property
    def clips(self) -> pa.Table:
        """One row a clip, part after part."""
        return concat_parts([part.clips for part in self._parts])

    @cached_property
    def videos(self) -> pa.Table:
        """One row a video: of one that failed and was planned again, what came of it last."""
        table = concat_parts([part.videos for part in self._parts])
        if self.parts == 1:
            return table
        codes = table["video"].combine_chunks().dictionary_encode().indices.to_numpy()
        _, from_the_end = np.unique(codes[::-1], return_index=True)
        return table.take(np.sort(len(codes) - 1 - from_the_end))

    def shards(self) -> list[PlannedShard]:
        """Return every shard, by bucket and number. Reads no table: O(shards)."""
        size = self.spec.shard_rows
        found = []
        for bucket in self.spec.buckets:
            for _, shards in self._ranges(bucket.name):
                found += [
                    PlannedShard(bucket.name, shards.first + i, min(size, shards.rows - i * size))
                    for i in range(-(-shards.rows // size))
                ]
        return found

    def shard_clips(self, bucket: str, shard: int) -> pa.Table:
        """Return the clips of one shard by row, without copying them."""
        part, span = self._find(bucket, shard)
        table: pa.Table = part.clips
        return table.slice(span.begin, span.rows)

    def _find(self, bucket: str, shard: int) -> tuple[AnyPart, ShardSpan]:
        """Return the part that has a shard, and where."""
        for part in self._parts:
            if (span := span_of(part, bucket, shard)).rows:
                return part, span
        raise StoreError(f"the plan has no shard {shard} of bucket {bucket}.")

    def next_shard(self, bucket: str) -> int:
        """Return the first number that no shard of the bucket has yet."""
        used = [s.first + -(-s.rows // self.spec.shard_rows) for _, s in self._ranges(bucket)]
        return max(used, default=0)

    def _ranges(self, bucket: str) -> list[tuple[AnyPart, ShardRange]]:
        return [(part, part.shards[bucket]) for part in self._parts if bucket in part.shards]

    @cached_property
    def known(self) -> dict[str, Known]:
        names = [n for n in ("video", *Known._fields) if n in self.videos.schema.names]
        columns = (self.videos[name].to_pylist() for name in names)
        return {name: Known(*rest) for name, *rest in zip(*columns, strict=True)}

    def own_clips(self, videos: Sequence[str]) -> pa.Table:
        """Return the planned clips of these videos; those of one stand together, by start.

        Of a video that was planned again those of its last part.
        """
        wanted, found = pa.array(videos, pa.string()), list[pa.Table]()
        for part in reversed(self._parts):
            of_these = pc.is_in(part.clips["video"], wanted)
            planned = pc.equal(part.clips["status"], "planned")
            found.insert(0, part.clips.filter(pc.and_(planned, of_these)))
            here = pc.is_in(wanted, part.videos["video"].combine_chunks())
            wanted = wanted.filter(pc.invert(here))
        return concat_parts(found)

    def video(self, name: str, shard: tuple[str, int] | None = None) -> dict[str, Any]:
        """Return a video's row; raise StoreError if the plan has none.

        With the bucket and number of a shard: as it was when that shard was planned. A video that
        was replaced is planned again under its name.
        """
        for part in reversed(self._parts) if shard is None else [self._find(*shard)[0]]:
            names = part.videos["video"]
            row = bisect.bisect_left(range(len(names)), name, key=lambda i: names[i].as_py())
            if row < len(names) and names[row].as_py() == name:
                found: dict[str, Any] = part.videos.slice(row, 1).to_pylist()[0]
                return found
        raise StoreError(f"the plan has no video {name!r}.")

    def source(self, name: str, corpus_root: str) -> VideoSource:
        """Return where a video is, its corpus being at `corpus_root` now."""
        row = self.video(name)
        return VideoSource(join_url(corpus_root, row["url"]), row["offset"], row["length"])

    def counts(self) -> PlanCounts:
        spans = Counter[str]()
        if "spans" in self.videos.schema.names:
            spans["found"] = pc.sum(self.videos["spans"]).as_py() or 0
            for pair in pc.value_counts(self.videos["spans_without_clips"]).to_pylist():
                said = parse_json(pair["values"] or "{}")
                for reason, number in convert(said, dict[str, int], where="spans").items():
                    spans[reason] += number * pair["counts"]
        return PlanCounts(
            _count(self.videos["status"], VIDEO_STATUS),
            _count(self.clips["status"], CLIP_STATUS),
            dict(spans),
        )


def _count(column: pa.ChunkedArray, values: Sequence[str]) -> dict[str, int]:
    found = {pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()}
    return {"found": len(column), **{value: found.get(value, 0) for value in values}}


def read_plan(files: Files) -> Plan | None:
    """Return the plan of the store at `files`, or None if it has none yet.

    Raise StoreError if a part is missing or damaged.
    """
    parts = read_parts(files)
    return Plan(parts) if parts else None
