"""How far a store is: done, failed and left, by column and bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reducio_latents.store.commit import ShardKey
from reducio_latents.store.index import READERS
from reducio_latents.store.store import Store


@dataclass(frozen=True)
class ColumnProgress:
    """One column in one bucket."""

    column: str
    bucket: str
    shards: int
    shards_done: int
    clips_done: int
    failed: int
    removed: int
    clips_left: int
    bytes: int
    """Of the column's files. In tars, which columns share, each one counts the whole tar."""


def progress_of(store: Store) -> list[ColumnProgress]:
    """Return the progress of every column in every bucket that the plan uses."""
    planned: dict[str, dict[ShardKey, int]] = {}
    for shard in store.plan.shards():
        planned.setdefault(shard.bucket, {})[ShardKey(shard.bucket, shard.shard)] = shard.rows
    entries = store.index.entries
    found = []
    for column in store.columns:
        for bucket, shards in sorted(planned.items()):
            done = [entries[column, key] for key in shards if (column, key) in entries]
            empty = sum(len(entry.failed) for entry in done)
            commits = (store.commit(entry.key, column) for entry in done if entry.failed)
            removed = sum(len(commit.removed) for commit in commits)
            rows = sum(entry.rows for entry in done)
            found.append(
                ColumnProgress(
                    column=column,
                    bucket=bucket,
                    shards=len(shards),
                    shards_done=len(done),
                    clips_done=rows - empty,
                    failed=empty - removed,
                    removed=removed,
                    clips_left=sum(shards.values()) - rows,
                    bytes=sum(entry.file_bytes for entry in done),
                )
            )
    return found


def stage_seconds(store: Store) -> dict[str, float]:
    """Return what the encoding of all committed shards took, by stage, as their commits say.

    Columns that were made together were timed together: their seconds count once.
    """
    with ThreadPoolExecutor(READERS) as pool:
        commits = pool.map(lambda item: store.commit(item[1], item[0]), store.index.entries)
        timed = {(commit.key, tuple(commit.timings.items())) for commit in commits}
    total: dict[str, float] = {}
    for _, timings in sorted(timed):
        for stage, seconds in timings:
            total[stage] = total.get(stage, 0.0) + seconds
    return total
