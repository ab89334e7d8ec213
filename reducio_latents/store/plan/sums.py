"""What ties commits to the plan: a hash over the ids of each shard's clips."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

import numpy as np
import pyarrow as pa

from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.store.commit import clips_sha256
from reducio_latents.store.plan.bounded import BoundedParquet
from reducio_latents.store.plan.parts import (
    DAMAGED,
    ShardSpan,
    StoredPart,
    part_path,
    read_parts,
    shard_spans,
    span_of,
)


class ShardSums:
    """The `clips_sha256` of a plan's shards, of the column of ids alone.

    A row group is read when one of its shards is asked for, and only the sums are kept: O(shards).
    That the part as a whole is as it was written is not proven: a commit's sum proves its ids.
    Threads that ask at once may read twice; no lock could be held across a fork.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._sums: dict[tuple[str, int], str] = {}
        self._remote: dict[str, BoundedParquet] = {}
        self._parts: list[tuple[StoredPart, list[ShardSpan]]] | None = None

    def of(self, bucket: str, shard: int) -> str | None:
        """Return the sum of one shard; None if there is no plan, or no such shard in it."""
        if self._parts is None:
            self._parts = [(part, list(shard_spans(part))) for part in read_parts(self._files)]
        if (bucket, shard) not in self._sums:
            for part, spans in self._parts:
                if (span := span_of(part, bucket, shard)).rows:
                    self._add(part, spans, span)
        return self._sums.get((bucket, shard))

    def _add(self, part: StoredPart, spans: list[ShardSpan], wanted: ShardSpan) -> None:
        """Add the sums of a shard and of those that lie in the same row groups."""
        path = part_path("part", part.number)
        try:
            begin, ids = self._ids(path, wanted.begin, wanted.rows)
        except StoreError:
            raise
        except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as err:
            where = f"{self._files.url}/{path}"
            raise StoreError(f"{where} is no part of a plan ({err}). {DAMAGED}.") from err
        first = bisect_left(spans, begin, key=attrgetter("begin"))
        for name, number, start, rows in spans[first:]:
            if start + rows > begin + len(ids):
                break
            here = ids[start - begin : start - begin + rows]
            self._sums[name, number] = clips_sha256(here)

    def _ids(self, path: str, start: int, rows: int) -> tuple[int, list[str]]:
        """Return the ids of the row groups that hold these rows, and the first one's row."""
        local = self._files.local_path(path)
        if local is None and path not in self._remote:
            self._remote[path] = BoundedParquet(self._files.read(path))
        table = self._remote[path] if local is None else BoundedParquet(local)
        first = int(np.searchsorted(table.begins, start, "right")) - 1
        last = int(np.searchsorted(table.begins, start + rows, "left"))
        groups = (table.group(number, ["clip_id"]) for number in range(first, last))
        ids = [name for group in groups for name in group["clip_id"].to_pylist()]
        return int(table.begins[first]), ids
