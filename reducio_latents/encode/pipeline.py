"""Batches in, committed shards out. The GPU's side of a run; `source` is the decoders' side.

source -> [ batch: every column's encoder ] -> rows of the shard -> background writer -> commits
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from reducio_latents.encode.columns import CAPTIONS, ColumnEncoder
from reducio_latents.encode.source import ReadyBatch, ShardWork, clip_batch
from reducio_latents.store.commit import Failure, ShardKey
from reducio_latents.store.writer import ColumnRows, Row, StoreWriter

WRITES_AHEAD = 2
"""Shards whose writing may lag behind the encoder before the encoder waits for it."""


@dataclass
class Stages:
    """Seconds that the encoding thread spent in each stage; together they are its whole time."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class ShardDone:
    """One shard as it has been committed."""

    key: ShardKey
    rows: int
    failed: tuple[Failure, ...]
    """One for each row that at least one column lacks."""
    timings: dict[str, float]


@dataclass
class _Shard:
    """A shard on its way: rows by column, filled batch by batch."""

    work: ShardWork
    rows: dict[str, list[Row]]
    failed: dict[str, dict[int, Failure]]
    stages: Stages = field(default_factory=Stages)

    @classmethod
    def begin(cls, work: ShardWork, names: Sequence[str]) -> _Shard:
        count = len(work.clips)
        return cls(work, {n: [None] * count for n in names}, {n: {} for n in names})


def encode_shards(
    batches: Iterable[ReadyBatch],
    encoders: Sequence[ColumnEncoder],
    writer: StoreWriter,
    on_batch: Callable[[ReadyBatch], None] = lambda _: None,
) -> Iterator[ShardDone]:
    """Encode and commit every shard of `batches`, in order, and yield it when it is durable.

    A row that a column cannot give (its clip failed, or its encoder gave NaN or infinity) stays
    empty in that column, with its reason in the commit.
    """
    shard: _Shard | None = None
    waiting: list[Future[ShardDone]] = []
    source = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as background:
        try:
            while True:
                start = time.perf_counter()
                ready = next(source, None)
                if ready is None:
                    break
                if shard is None:
                    shard = _Shard.begin(ready.work, [e.name for e in encoders])
                shard.stages.add("wait for decode", time.perf_counter() - start)
                _encode_batch(shard, ready, encoders)
                on_batch(ready)
                if ready.last:
                    with shard.stages.time("wait for write"):
                        wait(waiting[: len(waiting) - WRITES_AHEAD + 1])
                    while waiting and waiting[0].done():
                        yield waiting.pop(0).result()
                    waiting.append(background.submit(_write, shard, encoders, writer))
                    shard = None
            for future in waiting:
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()
            close = getattr(source, "close", None)
            if close is not None:
                close()


def _encode_batch(shard: _Shard, ready: ReadyBatch, encoders: Sequence[ColumnEncoder]) -> None:
    for encoder in encoders:
        batch = ready.batch
        if encoder.needs <= {CAPTIONS}:
            batch = clip_batch(ready.work, ready.clips)  # captions do not fail with their video
        else:
            shard.failed[encoder.name] |= {failure.row: failure for failure in ready.failed}
        if batch is not None:
            with shard.stages.time(f"encode {encoder.name}"):
                rows = encoder.encode(batch)
            for number, row in zip(batch.rows, rows, strict=True):
                _take_row(shard, encoder.name, number, row)


def _take_row(shard: _Shard, column: str, number: int, row: Row) -> None:
    if isinstance(row, np.ndarray) and not np.isfinite(row).all():
        clip = shard.work.clips[number]
        reason = f"{column}: the encoder gave NaN or a value beyond {row.dtype}."
        shard.failed[column][number] = Failure(
            row=number, clip_id=clip.clip_id, video=clip.video, reason=reason
        )
    else:
        shard.rows[column][number] = row


def _write(shard: _Shard, encoders: Sequence[ColumnEncoder], writer: StoreWriter) -> ShardDone:
    columns = {}
    with shard.stages.time("statistics"):
        for encoder in encoders:
            failed = shard.failed[encoder.name]
            rows = shard.rows[encoder.name]
            columns[encoder.name] = ColumnRows(
                rows=rows,
                statistics=encoder.statistics([row for row in rows if row is not None]),
                failed=[failed[row] for row in sorted(failed)],
            )
    start = time.perf_counter()
    clip_ids = [clip.clip_id for clip in shard.work.clips]
    details = [{"video": clip.video, "start_s": clip.start_s} for clip in shard.work.clips]
    writer.write_shard(shard.work.key, clip_ids, columns, shard.stages.seconds, details=details)
    shard.stages.add("write", time.perf_counter() - start)
    every = {row: failure for found in shard.failed.values() for row, failure in found.items()}
    return ShardDone(
        shard.work.key,
        len(clip_ids),
        tuple(every[row] for row in sorted(every)),
        shard.stages.seconds,
    )
