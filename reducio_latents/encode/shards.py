"""From shards that are missing to shards that are committed: as usual, or carefully."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.attempts import Attempts
from reducio_latents.encode.columns import CAPTIONS, CONTENT, ColumnEncoder, MotionColumn
from reducio_latents.encode.gpu import DeviceFit
from reducio_latents.encode.job import Job
from reducio_latents.encode.pipeline import ShardDone, ShardEncoder
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.quality import QualityCheck
from reducio_latents.encode.registry import plain
from reducio_latents.encode.source import (
    PlannedClip,
    ReadyBatch,
    ShardWork,
    cut_shard,
    decode_batches,
    read_captions,
)
from reducio_latents.encode.stop import StoppedError
from reducio_latents.encode.stored import StoredContent
from reducio_latents.errors import LatentsError
from reducio_latents.store.commit import Failure, ShardKey
from reducio_latents.video.pixels import fit_clip
from reducio_latents.video.reading import ClipReader, ClipRequest

WHOLE_PX = 1920 * 1088
"""Larger frames than 1080p are resized by the workers always, so that a slot of shared memory, of
which a worker has two, takes 100 MB at most for clips of 16 frames."""
Feed = Iterable[ShardKey | None]
"""Shards to be made; None where the next one is not known yet."""


def encode_missing(
    job: Job, todo: Mapping[ShardKey, tuple[str, ...]], progress: Progress
) -> Iterator[ShardDone]:
    """Encode the given columns of the given shards and yield each shard when it is stored.

    Shards that have ended several attempts before come last, and are made carefully.
    """
    suspects = job.journal.suspects(todo)
    # Usually all of them lack the same columns; a run that was killed between two commits of one
    # shard leaves one that lacks fewer.
    for names in dict.fromkeys(todo.values()):
        keys = [key for key in todo if todo[key] == names and key not in suspects]
        yield from encode_columns(job, names, keys, progress)
    for key in suspects:
        if not job.stop.requested:
            yield from encode_carefully(job, todo[key], key, progress)


def encode_columns(
    job: Job, names: Sequence[str], keys: Feed, progress: Progress
) -> Iterator[ShardDone]:
    """Encode some columns of the shards that `keys` gives, reading ahead over their ends."""
    encoder = _shard_encoder(job, names, progress)
    begun: set[ShardKey] = set()
    try:
        for done in encoder.run(_read_batches(job, _take_up(job, keys, begun), encoder.encoders)):
            job.journal.settle(done.key)
            begun.discard(done.key)
            yield done
    except (LatentsError, StoppedError, KeyboardInterrupt, GeneratorExit):
        _hand_back(job, begun)
        raise
    _hand_back(job, begun)  # what a request to stop has left


def encode_carefully(
    job: Job, names: Sequence[str], key: ShardKey, progress: Progress
) -> Iterator[ShardDone]:
    """Encode some columns of one shard, each batch written down in the journal before it begins."""
    encoder = _shard_encoder(job, names, progress, ahead=0)
    attempts = job.journal.take_up(key)
    try:
        for done in encoder.run(_careful_batches(job, key, attempts, encoder.encoders)):
            job.journal.settle(key)
            yield done
    except (LatentsError, StoppedError, KeyboardInterrupt, GeneratorExit):
        job.journal.hand_back(key)
        raise


def _shard_encoder(
    job: Job, names: Sequence[str], progress: Progress, ahead: int = 1
) -> ShardEncoder:
    def tell(ready: ReadyBatch) -> None:
        progress.encoded(len(ready.clips) - len(ready.failed), len(ready.failed))

    encoders = [encoder for encoder in job.encoders if encoder.name in names]
    check = None
    if job.options.check_every and QualityCheck.column in names:
        motion = next(plain(e) for e in encoders if e.name == QualityCheck.column)
        assert isinstance(motion, MotionColumn)
        check = QualityCheck(
            motion.autoencoder,
            job.options.check_every,
            job.options.shard_rows,
            job.options.min_psnr,
            progress.checked,
        )
    return ShardEncoder(encoders, job.writer, tell, progress.spent, check, job.stop, ahead)


def _take_up(job: Job, keys: Feed, begun: set[ShardKey]) -> Iterator[ShardKey | None]:
    """Hand the shards on, counting an attempt at each, until a stop is asked for."""
    for key in keys:
        if job.stop.requested:
            return
        if key is not None:
            begun.add(key)
            job.journal.take_up(key)
        yield key


def _hand_back(job: Job, begun: set[ShardKey]) -> None:
    for key in begun:
        job.journal.hand_back(key)


def _read_batches(
    job: Job, keys: Feed, encoders: Sequence[ColumnEncoder]
) -> Iterable[ReadyBatch | None]:
    """Return the batches that `encoders` need of these shards.

    What can be made exactly of the store's own content images is; a video is opened for the rest.
    """
    batch_size = job.options.clips_per_batch
    needs = needs_of(encoders)
    if needs <= {CAPTIONS}:
        return read_captions(_works(job, keys), batch_size)
    images = StoredContent(job.writer.files)
    if not images.can_serve(needs):
        return _decode(job, keys, needs)
    known = [key for key in keys if key is not None]
    stored = [key for key in known if images.has(key)]
    others = [key for key in known if not images.has(key)]
    return _one_after_another(
        images.batches(_works(job, stored), batch_size),
        _decode(job, others, needs) if others else (),
    )


def needs_of(encoders: Sequence[ColumnEncoder]) -> frozenset[str]:
    """Return all that these encoders need of a batch."""
    return frozenset[str]().union(*(encoder.needs for encoder in encoders))


def _works(job: Job, keys: Feed) -> Iterator[ShardWork]:
    return (job.planned.work(key) for key in keys if key is not None)


def _one_after_another(*parts: Iterable[ReadyBatch | None]) -> Iterator[ReadyBatch | None]:
    for part in parts:
        yield from part  # which also closes the part that is under way


def _decode(job: Job, keys: Feed, needs: frozenset[str]) -> Iterator[ReadyBatch | None]:
    works = (None if key is None else job.planned.work(key) for key in keys)
    return _decoded(job, works, needs)


def _decoded(
    job: Job, works: Iterable[ShardWork | None], needs: frozenset[str]
) -> Iterator[ReadyBatch | None]:
    options = job.options
    whole_px = min(WHOLE_PX, job.largest_px) if options.resizes_on_device else 0
    wants_files = CONTENT in needs and options.image_codec != "raw"

    def request(work: ShardWork, video: str) -> ClipRequest:
        return ClipRequest(
            video=video,
            bucket=work.bucket,
            clip=options.clip,
            resize=options.resize,
            backend=options.video_backend,
            image_codec=options.image_codec if wants_files else None,
            **job.planned.locate(work.key, video),
        )

    with ClipReader(
        [Bucket.parse(name) for name in job.writer.meta.buckets],
        workers=options.workers,
        timeout_s=options.clip_timeout_s,
        memory_bytes=options.worker_memory_mb << 20,
        read_ahead_bytes=options.read_ahead_mb << 20,
        whole_px=whole_px,
        fit=DeviceFit(options.torch_device) if whole_px else fit_clip,
    ) as reader:
        yield from decode_batches(reader, works, request, options.clips_per_batch, needs)


def _careful_batches(
    job: Job, key: ShardKey, attempts: Attempts, encoders: Sequence[ColumnEncoder]
) -> Iterator[ReadyBatch]:
    """Yield the batches of one shard, nothing being read ahead of what the journal says."""
    work = job.planned.work(key)
    for clips, last in cut_shard(work, job.options.clips_per_batch):
        videos = tuple(dict.fromkeys(clip.video for clip in clips))
        parts = [list(clips)]
        if attempts.must_part(videos):
            parts = [list(part) for _, part in groupby(clips, key=lambda clip: clip.video)]
        for i, part in enumerate(parts):
            end = last and i == len(parts) - 1
            yield _careful_batch(job, work, part, attempts, encoders)._replace(last=end)


def _careful_batch(
    job: Job,
    work: ShardWork,
    clips: Sequence[PlannedClip],
    attempts: Attempts,
    encoders: Sequence[ColumnEncoder],
) -> ReadyBatch:
    good = tuple(clip for clip in clips if clip.video not in attempts.quarantined)
    failed = [
        Failure(row=c.row, clip_id=c.clip_id, video=c.video, reason=attempts.reason(c.video))
        for c in clips
        if c.video in attempts.quarantined
    ]
    ready = None
    if good:
        job.journal.work_on(work.key, attempts, tuple(dict.fromkeys(c.video for c in good)))
        needs = needs_of(encoders)
        part = ShardWork(work.key, good)
        if needs <= {CAPTIONS}:
            (ready,) = read_captions([part], len(good))
        else:
            (ready,) = _decoded(job, [part], needs)
            assert ready is not None
        failed += ready.failed
    settled = tuple(sorted(failed, key=lambda failure: failure.row))
    return ReadyBatch(work, clips, ready.batch if ready else None, settled, False)
