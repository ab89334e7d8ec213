"""From shards that are missing to shards that are committed: read, encode, write, commit.

A batch is launched before the one ahead of it is waited for, so that a GPU always has its next
work, also over the end of a shard; whole shards are written in the background.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np

from reducio_latents.encode.attempts import Attempts
from reducio_latents.encode.batches import Feed, read_batches, read_carefully
from reducio_latents.encode.columns import CAPTIONS, ClipBatch, ColumnEncoder, RowFailed
from reducio_latents.encode.job import Job
from reducio_latents.encode.quality import QualityCheck
from reducio_latents.encode.source import ReadyBatch, ShardWork, clip_batch, part_removed
from reducio_latents.encode.stop import StoppedError
from reducio_latents.errors import LatentsError
from reducio_latents.store.commit import ClipQuality, Failure, ShardKey
from reducio_latents.store.row_kinds import BytesRows, row_kind
from reducio_latents.store.row_statistics import row_statistics
from reducio_latents.store.writer import ColumnRows, Row

LAUNCHES_AHEAD = 1
"""Batches that are launched before the first of them is waited for."""
WRITES_AHEAD = 2
"""Shards whose writing may lag behind the encoder before the encoder waits for it."""
WAIT = "wait for decode"
"""A stage of the encoding thread: no batch is ready."""
BUSY = "gpu busy"
"""Not a stage of the encoding thread, but the GPU's own seconds, by its clock."""


@dataclass(frozen=True)
class ShardDone:
    """One shard as it has been committed."""

    key: ShardKey
    rows: int
    """But for those of clips that were removed."""
    failed: tuple[Failure, ...]
    """One for each row that at least one column lacks."""
    timings: dict[str, float]


def rounds(
    job: Job, todo: Mapping[ShardKey, tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], list[ShardKey], bool]]:
    """Yield columns, the shards that lack just these, and whether those are to be made carefully.

    Shards that have ended several attempts before come last, each by itself.
    """
    suspects = job.journal.suspects(todo)
    # Usually all of them lack the same columns; a run that was killed between two commits of one
    # shard leaves one that lacks fewer.
    for names in dict.fromkeys(todo.values()):
        yield names, [key for key in todo if todo[key] == names and key not in suspects], False
    for key in suspects:
        if not job.stop.requested:
            yield todo[key], [key], True


def encode_shards(
    job: Job, names: Sequence[str], keys: Feed, *, careful: bool = False
) -> Iterator[ShardDone]:
    """Encode some columns of the shards that `keys` gives, and yield each when it is durable.

    A row that a column cannot give (its clip failed, or its encoder gave NaN or infinity) stays
    empty in that column, with its reason in the commit. When a stop is asked for, the shard in hand
    is the last one. Carefully: each batch is written down in the journal before it begins. Raise
    QualityError if the floor of the job's options is not reached.
    """
    begun: dict[ShardKey, Attempts] = {}
    encoder = _ShardEncoder(job, names, ahead=0 if careful else LAUNCHES_AHEAD)
    read = read_carefully if careful else read_batches
    batches = read(job, _take_up(job, keys, begun), encoder.columns, begun)
    writing: deque[Future[ShardDone]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as background:
        try:
            for shard in encoder.encode(batches):
                if shard is not None:
                    with shard.stages.time("wait for write"):
                        wait(list(writing)[: len(writing) - WRITES_AHEAD + 1])
                    writing.append(background.submit(encoder.write, shard))
                while writing and (shard is None or writing[0].done()):
                    yield _settled(job, begun, writing.popleft())
            while writing:
                yield _settled(job, begun, writing.popleft())
        except (LatentsError, StoppedError, KeyboardInterrupt, GeneratorExit):
            _hand_back(job, begun)
            raise
        finally:
            for future in writing:
                future.cancel()
    _hand_back(job, begun)  # what a request to stop has left


def _take_up(job: Job, keys: Feed, begun: dict[ShardKey, Attempts]) -> Iterator[ShardKey | None]:
    """Hand the shards on, counting an attempt at each, until a stop is asked for."""
    for key in keys:
        if job.stop.requested:
            return
        if key is not None:
            begun[key] = job.journal.take_up(key)
        yield key


def _settled(job: Job, begun: dict[ShardKey, Attempts], written: Future[ShardDone]) -> ShardDone:
    done = written.result()
    job.journal.settle(done.key)
    del begun[done.key]
    return done


def _hand_back(job: Job, begun: dict[ShardKey, Attempts]) -> None:
    while begun:
        job.journal.hand_back(begun.popitem()[0])


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

    def take(self, column: str, number: int, row: Row | RowFailed, kind: BytesRows) -> None:
        if isinstance(row, np.ndarray) and not kind.is_finite(row):
            row = RowFailed(f"the encoder gave NaN or a value beyond {row.dtype}.")
        if isinstance(row, RowFailed):
            reason = f"{column}: {row.reason}"
            self.failed[column][number] = self.work.clips[number].failure(reason)
        else:
            self.rows[column][number] = row


@dataclass(frozen=True)
class _Launched:
    """A batch that the encoders are working on."""

    shard: _Shard
    ready: ReadyBatch
    rows: Sequence[tuple[ColumnEncoder, ClipBatch, Callable[[], Sequence[Row | RowFailed]]]]


class _ShardEncoder:
    """Some columns of a job: from batches to whole shards, and from those to commits."""

    def __init__(self, job: Job, names: Sequence[str], ahead: int) -> None:
        self._job, self._ahead = job, ahead
        self.columns = [encoder for encoder in job.encoders if encoder.name in names]
        columns = job.writer.meta.columns
        self._kinds = {e.name: row_kind(columns[e.name]) for e in self.columns}
        self._check = QualityCheck.of(job.options, self.columns, job.progress.checked)

    def encode(self, batches: Iterable[ReadyBatch | None]) -> Iterator[_Shard | None]:
        """Yield each shard when all of its rows are there.

        A None among the batches says that no other is known yet: what is begun is then ended, and
        None is yielded.
        """
        launched: deque[_Launched] = deque()
        shard: _Shard | None = None
        with closing(iter(batches)) as source:  # type: ignore[type-var]
            while shard is not None or not self._job.stop.requested:
                start = time.perf_counter()
                try:
                    ready = next(source)
                except StopIteration:
                    break
                if ready is None:
                    while launched:
                        yield from self._settle(launched.popleft())
                    yield None
                    continue
                shard = shard or _Shard.begin(ready.work, [e.name for e in self.columns])
                self._spend(shard, WAIT, time.perf_counter() - start)
                launched.append(_Launched(shard, ready, rows := []))
                for encoder, batch in self._inputs(shard, ready):
                    with shard.stages.time(f"encode {encoder.name}"):
                        rows.append((encoder, batch, encoder.launch(batch)))
                shard = None if ready.last else shard
                while len(launched) > self._ahead:
                    yield from self._settle(launched.popleft())
            while launched:
                yield from self._settle(launched.popleft())

    def write(self, shard: _Shard) -> ShardDone:
        """Write a shard's rows and commit them."""
        columns, metas = {}, self._job.writer.meta.columns
        with shard.stages.time("statistics"):
            for encoder in self.columns:
                failed, rows = shard.failed[encoder.name], shard.rows[encoder.name]
                columns[encoder.name] = ColumnRows(
                    rows=rows,
                    statistics=row_statistics(metas[encoder.name], rows),
                    failed=[failed[row] for row in sorted(failed)],
                    quality=shard.quality if encoder.name == QualityCheck.column else (),
                )
        start = time.perf_counter()
        clips, stages = shard.work.clips, shard.stages
        self._job.writer.write_shard(
            shard.work.key,
            [clip.clip_id for clip in clips],
            columns,
            stages.seconds,
            details=[{"video": clip.video, "start_s": clip.start_s} for clip in clips],
        )
        stages.add("write", time.perf_counter() - start)
        every = {row: failure for found in shard.failed.values() for row, failure in found.items()}
        failures = tuple(every[row] for row in sorted(every) if not clips[row].removed)
        return ShardDone(shard.work.key, len(part_removed(clips)[0]), failures, stages.seconds)

    def _inputs(
        self, shard: _Shard, ready: ReadyBatch
    ) -> Iterator[tuple[ColumnEncoder, ClipBatch]]:
        """Yield each encoder, with what it is to encode of a batch."""
        for encoder in self.columns:
            if encoder.needs <= {CAPTIONS}:  # captions do not fail with their video
                kept, gone = part_removed(ready.clips)
                shard.failed[encoder.name] |= {failure.row: failure for failure in gone}
                if kept:
                    yield encoder, clip_batch(ready.work, kept)
                continue
            shard.failed[encoder.name] |= {failure.row: failure for failure in ready.failed}
            if ready.batch is not None:
                yield encoder, ready.batch

    def _settle(self, launched: _Launched) -> Iterator[_Shard]:
        """Take the rows of a batch; yield its shard if that was the last one."""
        shard, ready = launched.shard, launched.ready
        for encoder, batch, wait_for_rows in launched.rows:
            with shard.stages.time(f"encode {encoder.name}"):
                rows = wait_for_rows()
            for number, row in zip(batch.rows, rows, strict=True):
                shard.take(encoder.name, number, row, self._kinds[encoder.name])
            busy_s = encoder.take_busy_s()
            if busy_s is not None:
                self._spend(shard, BUSY, busy_s)
            if self._check is not None and encoder.name == self._check.column:
                with shard.stages.time("check"):
                    shard.quality += self._check.measure(batch, rows)
        kept, gone = part_removed(ready.clips)
        failed = len(ready.failed) - len(gone)
        self._job.progress.encoded(len(kept) - failed, failed)
        if ready.last:
            yield shard

    def _spend(self, shard: _Shard, stage: str, seconds: float) -> None:
        shard.stages.add(stage, seconds)
        self._job.progress.spent(stage, seconds)
