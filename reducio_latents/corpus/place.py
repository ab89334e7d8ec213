"""Shard and row of every clip: each shard is filled before the next is begun."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reducio_latents.corpus.cells import Column
from reducio_latents.corpus.fate import Decided
from reducio_latents.store.plan.parts import ShardRange
from reducio_latents.store.plan.plan import Plan
from reducio_latents.store.plan.spec import PlanSpec


class Rows(NamedTuple):
    """Clips as columns of equal length. Those of one video and bucket stand together, by start."""

    video: Column
    """Index into the planned videos."""
    entry: Column
    """Index into all spans of the planned videos, one after another; a video without spans is one.
    Clips of an earlier part have -1."""
    span: Column
    """start_s and end_s of the span that the clip lies in, in seconds of the video: (N, 2)."""
    start_s: Column
    bucket: Column
    """Index into the spec's buckets."""
    shard: Column
    row: Column

    def take(self, where: Column) -> Rows:
        return Rows(*[column[where] for column in self])

    def plus(self, other: Rows) -> Rows:
        return Rows(*[np.concatenate(pair) for pair in zip(self, other, strict=True)])


class Placed(NamedTuple):
    """All clips of a part."""

    rows: Rows
    own: int
    """How many, from the first, have rows of their own; the rest refer to those of others."""
    shards: dict[str, ShardRange]


def place(planned: Decided, spec: PlanSpec, previous: Plan | None) -> Placed:
    """Give each clip its shard and row: by bucket, video and start, after the last used shard."""
    cuts = planned.cuts
    has_own = np.array([fate.duplicate_of is None for fate in planned.fates], bool)
    which = np.repeat(np.arange(len(cuts.video)), cuts.clips)
    own = has_own[cuts.video[which]]
    which, start_s = which[own], planned.starts[own]
    order = np.lexsort((start_s, cuts.video[which], cuts.bucket[which]))
    which, start_s = which[order], start_s[order]
    video, bucket = cuts.video[which], cuts.bucket[which]
    entry = first_entries(planned)[video] + cuts.span[which]
    span = np.stack([cuts.start_s[which], cuts.end_s[which]], 1)

    names = [b.name for b in spec.buckets]
    first = [0 if previous is None else previous.next_shard(name) for name in names]
    sizes = np.bincount(bucket, minlength=len(names))
    position = np.arange(len(bucket)) - (np.cumsum(sizes) - sizes)[bucket]
    shard = np.array(first)[bucket] + position // spec.shard_rows
    rows = Rows(video, entry, span, start_s, bucket, shard, position % spec.shard_rows)
    ranges = zip(names, map(ShardRange, first, sizes.tolist()), strict=True)
    shards = {name: shards for name, shards in ranges if shards.rows}
    return Placed(rows.plus(_referring(planned, rows, spec, previous)), len(bucket), shards)


def _referring(planned: Decided, own: Rows, spec: PlanSpec, previous: Plan | None) -> Rows:
    """Return the rows of the duplicates: those of their originals, here or in earlier parts."""
    duplicates = [(i, fate.duplicate_of) for i, fate in enumerate(planned.fates)]
    pairs = [(i, original) for i, original in duplicates if original is not None]
    number = {video.video: i for i, video in enumerate(planned.videos)}
    elsewhere = sorted({original for _, original in pairs} - number.keys())
    number |= {name: len(planned.videos) + i for i, name in enumerate(elsewhere)}
    pool = own
    if previous is not None and elsewhere:
        pool = own.plus(_earlier(previous, elsewhere, number, spec))
    pool = pool.take(np.argsort(pool.video, kind="stable"))
    videos, first, counts = np.unique(pool.video, return_index=True, return_counts=True)
    at = np.searchsorted(videos, [number[original] for _, original in pairs])
    where = [np.arange(first[i], first[i] + counts[i]) for i in at]
    taken = pool.take(np.concatenate([*where, np.zeros(0, np.int64)]))
    entry, first_entry = [np.zeros(0, np.int64)], first_entries(planned)
    cuts = planned.cuts
    of_cuts = first_entry[cuts.video] + cuts.span
    bounds = np.searchsorted(cuts.video, np.arange(len(planned.videos) + 1))
    for (i, original), rows in zip(pairs, where, strict=True):
        if not planned.videos[i].spans:
            entry.append(np.full(len(rows), first_entry[i]))
            continue
        # The same spans in the same order, but perhaps with others between them that have no clip.
        theirs, its = (of_cuts[bounds[j] : bounds[j + 1]] for j in (number[original], i))
        own_entry = dict(zip(theirs.tolist(), its.tolist(), strict=True))
        entry.append(np.array([own_entry[old] for old in pool.entry[rows].tolist()]))
    return taken._replace(
        video=np.repeat([i for i, _ in pairs], counts[at]).astype(np.int64),
        entry=np.concatenate(entry),
    )


def first_entries(planned: Decided) -> Column:
    """Return where each video's spans begin among those of all; a video without spans is one."""
    counts = np.array([max(1, len(video.spans)) for video in planned.videos], np.int64)
    return np.cumsum(counts) - counts


def _earlier(previous: Plan, videos: list[str], number: dict[str, int], spec: PlanSpec) -> Rows:
    clips = previous.own_clips(videos, ["video", "start_s", "bucket", "shard", "row"])
    index = {bucket.name: i for i, bucket in enumerate(spec.buckets)}
    return Rows(
        np.array([number[name] for name in clips["video"].to_pylist()], np.int64),
        np.full(len(clips), -1),
        np.full((len(clips), 2), np.nan),
        clips["start_s"].to_numpy(),
        np.array([index[name] for name in clips["bucket"].to_pylist()], np.int64),
        clips["shard"].to_numpy(),
        clips["row"].to_numpy(),
    )
