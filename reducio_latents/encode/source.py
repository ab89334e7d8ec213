"""From planned shards to batches of pixels, and what went wrong.

A shard is cut into batches of consecutive rows, so which clips are encoded together is a function
of the plan alone. The reader runs ahead of the encoder, over the end of a shard into the next ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch

from reducio_latents.core.clips import centre_frame
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import CONTENT, FRAMES, ClipBatch
from reducio_latents.store.commit import WAS_REMOVED, Failure, ShardKey
from reducio_latents.video.reading import Clip, ClipFailed, ClipRead, ClipReader, ClipRequest


class PlannedClip(NamedTuple):
    """One row of the plan."""

    row: int
    clip_id: str
    video: str
    start_s: float
    captions: tuple[str, ...]
    removed: bool = False
    """Whether it was taken out for good: nothing of it is made again."""

    def failure(self, reason: str) -> Failure:
        return Failure(row=self.row, clip_id=self.clip_id, video=self.video, reason=reason)


@dataclass(frozen=True)
class ShardWork:
    """One shard to be made."""

    key: ShardKey
    clips: tuple[PlannedClip, ...]
    """Every row of the shard, in order."""

    @property
    def bucket(self) -> Bucket:
        return Bucket.parse(self.key.bucket)


class ReadyBatch(NamedTuple):
    """The next rows of a shard, settled: each one is in `batch` or has failed."""

    work: ShardWork
    clips: Sequence[PlannedClip]
    """All of these rows."""
    batch: ClipBatch | None
    """None if every clip of these rows failed."""
    failed: tuple[Failure, ...]
    last: bool
    """Whether the shard ends here."""


MakeRequest = Callable[["ShardWork", str], ClipRequest]
"""Shard and video -> how the video's clips are read, without their starts."""


def read_captions(shards: Iterable[ShardWork], batch_size: int) -> Iterator[ReadyBatch]:
    """Yield batches that hold captions only; no video is opened."""
    for work in shards:
        for clips, last in cut_shard(work, batch_size):
            kept, gone = part_removed(clips)
            yield ReadyBatch(work, clips, clip_batch(work, kept) if kept else None, gone, last)


def part_removed(
    clips: Sequence[PlannedClip],
) -> tuple[Sequence[PlannedClip], tuple[Failure, ...]]:
    """Return the clips that are to be made, and what is said of those that were removed."""
    gone = tuple(clip.failure(WAS_REMOVED) for clip in clips if clip.removed)
    return [clip for clip in clips if not clip.removed], gone


def decode_batches(
    reader: ClipReader,
    shards: Iterable[ShardWork | None],
    request: MakeRequest,
    batch_size: int,
    needs: frozenset[str],
) -> Iterator[ReadyBatch | None]:
    """Yield the batches of `shards`, in order, decoded ahead.

    A None among the shards means that the next one is not known yet; a None among the batches, that
    all of those that are known have been given.
    """
    cut: deque[tuple[ShardWork, Sequence[PlannedClip], bool]] = deque()

    def requests() -> Iterator[ClipRequest | None]:
        for work in shards:
            if work is None:
                yield None
                continue
            cut.extend((work, *batch) for batch in cut_shard(work, batch_size))
            for (video, gone), clips in groupby(work.clips, key=lambda c: (c.video, c.removed)):
                starts_s = tuple(clip.start_s for clip in clips)
                asked = replace(request(work, video), starts_s=starts_s)
                yield replace(asked, problem=WAS_REMOVED) if gone else asked

    clips: list[Clip] = []
    for clip in reader.read(requests()):
        if clip is None:
            yield None
            continue
        clips.append(clip)
        if len(clips) == len(cut[0][1]):
            yield _ready_batch(*cut.popleft(), clips, needs)
            clips.clear()


def _ready_batch(
    work: ShardWork,
    planned: Sequence[PlannedClip],
    last: bool,
    clips: Sequence[Clip],
    needs: frozenset[str],
) -> ReadyBatch:
    pairs = list(zip(planned, clips, strict=True))
    failed = tuple(p.failure(c.reason) for p, c in pairs if isinstance(c, ClipFailed))
    good = [(p, c) for p, c in pairs if isinstance(c, ClipRead)]
    if not good:
        return ReadyBatch(work, planned, None, failed, last)
    frames = torch.stack([clip.frames for _, clip in good])
    files = tuple(clip.content for _, clip in good if clip.content is not None)
    centre = centre_frame(work.bucket.frames)
    batch = replace(
        clip_batch(work, [p for p, _ in good]),
        frames_BTHWC=frames if FRAMES in needs else None,
        times_s=tuple(clip.times_s for _, clip in good),
        content_BHWC=frames[:, centre] if CONTENT in needs else None,
        content_files=files or None,
    )
    return ReadyBatch(work, planned, batch, failed, last)


def cut_shard(work: ShardWork, batch_size: int) -> Iterator[tuple[Sequence[PlannedClip], bool]]:
    """Yield the clips of each batch of a shard, and whether it is the last one."""
    for start in range(0, len(work.clips), batch_size):
        stop = start + batch_size
        yield work.clips[start:stop], stop >= len(work.clips)


def clip_batch(work: ShardWork, clips: Sequence[PlannedClip]) -> ClipBatch:
    """Return a batch that holds what the plan knows of `clips`, and no pixels."""
    return ClipBatch(
        key=work.key,
        bucket=work.bucket,
        rows=tuple(clip.row for clip in clips),
        clip_ids=tuple(clip.clip_id for clip in clips),
        captions=tuple(clip.captions for clip in clips),
    )
