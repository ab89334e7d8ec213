"""Before the first frame: list the corpus, probe what is new, plan it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import list_corpus
from reducio_latents.corpus.build import not_planned, plan_part
from reducio_latents.corpus.probe import OnProbe, Probing, probe_videos
from reducio_latents.encode.decoding import PRELOAD
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.source import PlannedClip, ShardWork
from reducio_latents.files import Files
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.plan import Plan, PlanSpec, read_plan, write_part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A corpus, and the plan that covers it."""

    find: Callable[[str], VideoSource | None]
    """Where a video of the plan lies now; None if the corpus lists it no more."""
    plan: Plan

    @cached_property
    def _bytes(self) -> dict[str, int]:
        table = self.plan.videos
        names, sizes = table["video"].to_pylist(), table["bytes"].to_pylist()
        return dict(zip(names, sizes, strict=True))

    def locate(self, video: str) -> tuple[VideoSource, int] | None:
        """Return where a video lies now, and its size when it was planned; None if it is gone."""
        found = self.find(video)
        return None if found is None else (found, self._bytes[video])

    def work(self, key: ShardKey) -> ShardWork:
        """Return the clips of one shard."""
        table = self.plan.shard_clips(key.bucket, key.shard)
        columns = (table[name].to_pylist() for name in ("row", "clip_id", "video", "start_s"))
        captions = (tuple(found or ()) for found in table["captions"].to_pylist())
        clips = tuple(PlannedClip(*row) for row in zip(*columns, captions, strict=True))
        return ShardWork(key, clips)


def make_plan(
    corpus: str | Path,
    files: Files,
    options: EncodeOptions,
    buckets: Sequence[Bucket],
    on_probe: OnProbe = lambda _, __: None,
    *,
    write: bool = True,
) -> Planned:
    """List `corpus` and plan what the store at `files` does not have in its plan yet.

    With `write` the new part is stored.
    """
    listed = list_corpus(
        corpus,
        path_column=options.path_column,
        caption_column=options.caption_column,
        root=options.root,
    )
    spec = PlanSpec(
        clip=options.clip,
        buckets=tuple(buckets),
        shard_rows=options.shard_rows,
        duplicates=options.duplicates,
    )
    previous = read_plan(files)
    new = not_planned(listed, previous, retry=options.retry_failed)
    probing = Probing(
        backend=options.video_backend,
        workers=options.workers,
        timeout_s=options.clip_timeout_s,
        memory_bytes=options.worker_memory_mb << 20,
        preload=PRELOAD,
    )
    probed = probe_videos([video.source for video in new], probing, on_probe)
    records = dict(zip((video.video for video in new), probed, strict=True))
    part = plan_part(listed, records, spec, previous, retry_failed=options.retry_failed)
    if part.changed:
        log.warning(
            "%d videos have changed since they were planned, %s first: what is stored of them "
            "stays. Give changed videos new names to encode them.",
            len(part.changed),
            part.changed[0],
        )
    plan = previous or Plan.of(part)
    if previous is not None and part.videos.num_rows:
        plan = previous.extended(part)
    if write and part.videos.num_rows:
        write_part(files, part.number, part)
    return Planned({video.video: video.source for video in listed}.get, plan)
