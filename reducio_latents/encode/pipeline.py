"""Batches in, committed shards out. The GPU's side of a run; `source` is the decoders' side.

source -> [ batch: every column's encoder ] -> rows of the shard -> background writer -> commits

A batch is launched before the one ahead of it is waited for, so that a GPU always has its next
work, also over the end of a shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from reducio_latents.encode.columns import CAPTIONS, ClipBatch, ColumnEncoder, launch
from reducio_latents.encode.quality import QualityCheck
from reducio_latents.encode.source import ReadyBatch, ShardWork, clip_batch
from reducio_latents.encode.stop import Stop
from reducio_latents.store.commit import ClipQuality, Failure, ShardKey
from reducio_latents.store.writer import ColumnRows, Row, StoreWriter

WRITES_AHEAD = 2
"""Shards whose writing may lag behind the encoder before the encoder waits for it."""
WAIT = "wait for decode"
"""A stage of the encoding thread: no batch is ready."""
BUSY = "gpu busy"
"""Not a stage of the encoding thread, but the GPU's own seconds, by its clock."""


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
    quality: list[ClipQuality] = field(default_factory=list)
    stages: Stages = field(default_factory=Stages)

    @classmethod
    def begin(cls, work: ShardWork, names: Sequence[str]) -> _Shard:
        count = len(work.clips)
        return cls(work, {n: [None] * count for n in names}, {n: {} for n in names})


@dataclass(frozen=True)
class _Launched:
    """A batch that the encoders are working on."""

    shard: _Shard
    ready: ReadyBatch
    rows: Sequence[tuple[ColumnEncoder, ClipBatch, Callable[[], Sequence[Row]]]]


@dataclass
class ShardEncoder:
    """Encodes shards with some columns' encoders and commits them to one store."""

    encoders: Sequence[ColumnEncoder]
    writer: StoreWriter
    on_batch: Callable[[ReadyBatch], None] = lambda _: None
    on_time: Callable[[str, float], None] = lambda _, __: None
    """Told the seconds of `WAIT` and `BUSY` as they pass."""
    check: QualityCheck | None = None
    """Decodes some clips of the column motion on the spot."""
    stop: Stop = field(default_factory=Stop)
    ahead: int = 1
    """Batches that are launched before the first of them is waited for."""

    def run(self, batches: Iterable[ReadyBatch | None]) -> Iterator[ShardDone]:
        """Encode and commit every shard of `batches`, in order, and yield it when it is durable.

        A None among the batches says that no other is known yet: all that is begun is then ended.

        A row that a column cannot give (its clip failed, or its encoder gave NaN or infinity) stays
        empty in that column, with its reason in the commit. When a stop is asked for, the shard in
        hand is the last one. Raise QualityError if the check's floor is not reached.
        """
        writing: list[Future[ShardDone]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="writer") as background:
            try:
                for shard in self._encoded(batches):
                    if shard is None:
                        while writing:
                            yield writing.pop(0).result()
                        continue
                    with shard.stages.time("wait for write"):
                        wait(writing[: len(writing) - WRITES_AHEAD + 1])
                    while writing and writing[0].done():
                        yield writing.pop(0).result()
                    writing.append(background.submit(self._write, shard))
                while writing:
                    yield writing.pop(0).result()
            finally:
                for future in writing:
                    future.cancel()

    def _encoded(self, batches: Iterable[ReadyBatch | None]) -> Iterator[_Shard | None]:
        """Yield each shard when all of its rows are there; None where none is on its way."""
        launched: list[_Launched] = []
        shard: _Shard | None = None
        source = iter(batches)
        try:
            while True:
                start = time.perf_counter()
                if shard is None and self.stop.requested:
                    break
                try:
                    ready = next(source)
                except StopIteration:
                    break
                if ready is None:
                    while launched:
                        yield from self._settle(launched.pop(0))
                    yield None
                    continue
                if shard is None:
                    shard = _Shard.begin(ready.work, [e.name for e in self.encoders])
                waited_s = time.perf_counter() - start
                shard.stages.add(WAIT, waited_s)
                self.on_time(WAIT, waited_s)
                launched.append(self._launch(shard, ready))
                if ready.last:
                    shard = None
                while len(launched) > self.ahead:
                    yield from self._settle(launched.pop(0))
            while launched:
                yield from self._settle(launched.pop(0))
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def _launch(self, shard: _Shard, ready: ReadyBatch) -> _Launched:
        rows = []
        for encoder in self.encoders:
            batch = ready.batch
            if encoder.needs <= {CAPTIONS}:
                batch = clip_batch(ready.work, ready.clips)  # captions do not fail with their video
            else:
                shard.failed[encoder.name] |= {failure.row: failure for failure in ready.failed}
            if batch is not None:
                with shard.stages.time(f"encode {encoder.name}"):
                    rows.append((encoder, batch, launch(encoder, batch)))
        return _Launched(shard, ready, rows)

    def _settle(self, launched: _Launched) -> Iterator[_Shard]:
        """Take the rows of a batch; yield its shard if that was the last one."""
        shard = launched.shard
        for encoder, batch, wait_for_rows in launched.rows:
            with shard.stages.time(f"encode {encoder.name}"):
                rows = wait_for_rows()
            for number, row in zip(batch.rows, rows, strict=True):
                _take_row(shard, encoder.name, number, row)
            take_busy_s = getattr(encoder, "take_busy_s", None)
            busy_s = None if take_busy_s is None else take_busy_s()
            if busy_s is not None:
                shard.stages.add(BUSY, busy_s)
                self.on_time(BUSY, busy_s)
            if self.check is not None and encoder.name == self.check.column:
                with shard.stages.time("check"):
                    shard.quality += self.check.measure(batch, rows)
        self.on_batch(launched.ready)
        if launched.ready.last:
            yield shard

    def _write(self, shard: _Shard) -> ShardDone:
        columns = {}
        with shard.stages.time("statistics"):
            for encoder in self.encoders:
                failed = shard.failed[encoder.name]
                rows = shard.rows[encoder.name]
                checked = self.check is not None and encoder.name == self.check.column
                columns[encoder.name] = ColumnRows(
                    rows=rows,
                    statistics=encoder.statistics([row for row in rows if row is not None]),
                    failed=[failed[row] for row in sorted(failed)],
                    quality=shard.quality if checked else (),
                )
        start = time.perf_counter()
        clips = shard.work.clips
        clip_ids = [clip.clip_id for clip in clips]
        details = [{"video": clip.video, "start_s": clip.start_s} for clip in clips]
        self.writer.write_shard(
            shard.work.key, clip_ids, columns, shard.stages.seconds, details=details
        )
        shard.stages.add("write", time.perf_counter() - start)
        every = {row: failure for found in shard.failed.values() for row, failure in found.items()}
        return ShardDone(
            shard.work.key,
            len(clip_ids),
            tuple(every[row] for row in sorted(every)),
            shard.stages.seconds,
        )


def _take_row(shard: _Shard, column: str, number: int, row: Row) -> None:
    if isinstance(row, np.ndarray) and not np.isfinite(row).all():
        clip = shard.work.clips[number]
        reason = f"{column}: the encoder gave NaN or a value beyond {row.dtype}."
        shard.failed[column][number] = Failure(
            row=number, clip_id=clip.clip_id, video=clip.video, reason=reason
        )
    else:
        shard.rows[column][number] = row
