"""What the encoders of some columns read of the shards that a job makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.attempts import Attempts
from reducio_latents.encode.columns import CAPTIONS, CONTENT, ColumnEncoder
from reducio_latents.encode.gpu import DeviceFit
from reducio_latents.encode.job import Job
from reducio_latents.encode.source import (
    PlannedClip,
    ReadyBatch,
    ShardWork,
    cut_shard,
    decode_batches,
    read_captions,
)
from reducio_latents.encode.stored import StoredContent
from reducio_latents.store.commit import ShardKey
from reducio_latents.video.planes import fit_whole
from reducio_latents.video.reading import ClipReader, ClipRequest

WHOLE_PX = 1920 * 1088
"""Larger frames than 1080p are resized by the workers always, so that a slot of shared memory, of
which a worker has two, takes 100 MB at most for clips of 16 frames."""
MOST_BEGUN = 5
"""Shards on their way at once: two are written, one is encoded, the next ones are read."""
Feed = Iterable[ShardKey | None]
"""Shards to be made; None where the next one is not known yet."""


def needs_of(encoders: Sequence[ColumnEncoder]) -> frozenset[str]:
    """Return all that these encoders need of a batch."""
    return frozenset[str]().union(*(encoder.needs for encoder in encoders))


def read_batches(
    job: Job,
    keys: Feed,
    encoders: Sequence[ColumnEncoder],
    begun: Mapping[ShardKey, Attempts],
) -> Iterator[ReadyBatch | None]:
    """Yield the batches that `encoders` need of these shards, read ahead over their ends.

    What can be made exactly of the store's own content images is; a video is opened for the rest.
    `begun` are the shards that were taken from `keys` and are not committed.
    """
    needs, batch_size = needs_of(encoders), job.batch_size
    works = (None if key is None else job.planned.work(key) for key in keys)
    known = (work for work in works if work is not None)
    images = StoredContent(job.writer.files)
    if needs <= {CAPTIONS}:
        yield from read_captions(known, batch_size)
    elif not images.can_serve(needs):
        yield from _decoded(job, _not_far_ahead(works, begun), needs)
    else:
        others: list[ShardWork] = []

        def served() -> Iterator[ShardWork]:
            for work in known:
                if images.has(work.key):
                    yield work
                else:
                    others.append(work)

        yield from images.batches(served(), batch_size)
        if others:
            yield from _decoded(job, others, needs)


def _not_far_ahead(
    works: Iterator[ShardWork | None], begun: Mapping[ShardKey, Attempts]
) -> Iterator[ShardWork | None]:
    """Leave small shards to other ranks, if a slow encoder lets the reader get far ahead of it."""
    while True:
        while len(begun) >= MOST_BEGUN:
            yield None
        try:
            yield next(works)
        except StopIteration:
            return


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
            deinterlace=options.deinterlaces,
            exact_colours=options.exact_colours,
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
        fit=DeviceFit(options.torch_device) if whole_px else fit_whole,
    ) as reader:
        yield from decode_batches(reader, works, request, job.batch_size, needs)


def read_carefully(
    job: Job,
    keys: Feed,
    encoders: Sequence[ColumnEncoder],
    attempts: Mapping[ShardKey, Attempts],
) -> Iterator[ReadyBatch]:
    """Yield the batches of shards, nothing being read ahead of what the journal says."""
    for key in keys:
        assert key is not None
        work = job.planned.work(key)
        for clips, last in cut_shard(work, job.batch_size):
            videos = tuple(dict.fromkeys(clip.video for clip in clips))
            parts = [list(clips)]
            if attempts[key].must_part(videos):
                parts = [list(part) for _, part in groupby(clips, key=lambda clip: clip.video)]
            for i, part in enumerate(parts):
                ready = _read_part(job, work, part, attempts[key], encoders)
                yield ready._replace(last=last and i == len(parts) - 1)


def _read_part(
    job: Job,
    work: ShardWork,
    clips: Sequence[PlannedClip],
    attempts: Attempts,
    encoders: Sequence[ColumnEncoder],
) -> ReadyBatch:
    """Read some clips of a shard, but for those of videos that are set aside."""
    good = tuple(clip for clip in clips if clip.video not in attempts.quarantined)
    bad = [clip for clip in clips if clip.video in attempts.quarantined]
    failed = [clip.failure(attempts.reason(clip.video)) for clip in bad]
    ready = None
    if good:
        job.journal.work_on(work.key, attempts, tuple(dict.fromkeys(c.video for c in good)))
        needs, part = needs_of(encoders), ShardWork(work.key, good)
        captions = needs <= {CAPTIONS}
        (ready,) = read_captions([part], len(good)) if captions else _decoded(job, [part], needs)
        assert ready is not None
        failed += ready.failed
    settled = tuple(sorted(failed, key=lambda failure: failure.row))
    return ReadyBatch(work, clips, ready.batch if ready else None, settled, False)
