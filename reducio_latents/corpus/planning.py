"""From a listed corpus to the plan that covers it: what is new is probed and planned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.clips import ClipSpec, TimeSpan, parse_policy
from reducio_latents.core.text import printable
from reducio_latents.corpus.build import gone, names_of, not_planned, plan_some
from reducio_latents.corpus.changes import Changes, changes_of
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.fate import MAX_DURATION_S, Sizes
from reducio_latents.corpus.probe import (
    PROBED,
    OnProbe,
    OnRecord,
    ProbeRecord,
    Probing,
    probe_videos,
)
from reducio_latents.corpus.shots import ShotTable, VideoShots
from reducio_latents.errors import StoreError
from reducio_latents.store.plan import (
    VIDEO_SHOT_SCHEMA,
    Plan,
    PlanPart,
    PlanSpec,
    StoredPart,
)

log = logging.getLogger(__name__)

PART_CLIPS = 1 << 19
"""Clips after which a part of the plan is closed. Of so many the rows are in memory at once, and
so many are probed anew by a run whose planning was killed."""


@dataclass(frozen=True)
class NewPlan:
    """A plan that covers a corpus."""

    plan: Plan
    parts: Sequence[StoredPart]
    """What is new in it."""
    stamps: Mapping[str, str]
    """What `stamp_of` said of the videos that were probed, before their bytes were hashed."""
    captions: Mapping[str, tuple[str, ...]]
    """Clip id -> captions, where the corpus has others now than the plan."""
    gone: Collection[str]
    """Videos of the plan that the corpus does not list any more."""
    lost: int
    """Clips in spans that it does not list any more."""


def plan_listed(
    listed: Sequence[CorpusVideo],
    spec: PlanSpec,
    previous: Plan | None,
    probing: Probing,
    on_probe: OnProbe = lambda _, __: None,
    *,
    retry_failed: bool = False,
    replaced: Collection[str] = (),
    records: dict[str, ProbeRecord] | None = None,
    keep: Callable[[PlanPart], StoredPart] = PlanPart.packed,
    on_record: OnRecord = lambda _, __: None,
    unread: pa.Array | None = None,
) -> NewPlan:
    """Probe and plan what `previous` does not have, and those of `replaced` with other bytes now.

    `listed` is in order of name. A part of `PART_CLIPS` is handed to `keep` when it is planned, and
    the next one begun. With `retry_failed` also what failed before is planned. `records` holds what
    an earlier try has probed and not planned, and takes in what this one does; `on_record` is told
    of the latter. `unread` are names of further videos, of which nothing has changed. Raise
    StoreError for a plan of another spec, and what `keep` raises.
    """
    if probing.shots.table is not None:
        probing.shots.table.among(listed)
    if previous is not None:
        previous.spec.require_same(spec)
        if probing.shots.table is not None:
            _require_same_shots(listed, previous, probing.shots.table)
    records = {} if records is None else records
    changes = Changes({}, {}, 0) if previous is None else changes_of(listed, previous)
    added = changes.spans
    if previous is not None:
        records |= planned_records(previous, added.keys() - set(replaced))
    new = not_planned(listed, previous, retry=retry_failed, replaced={*replaced, *added})
    plan, parts, stamps, changed = previous, list[StoredPart](), dict[str, str](), list[str]()
    with closing(_probed(new, spec, probing, on_probe, records, on_record)) as probed:
        for some in _in_parts(probed, records, spec.clip):
            part = plan_some(
                some, records, spec, plan, retry_failed=retry_failed, replaced=replaced, added=added
            )
            _warn_of_lost_shots(part)
            changed += part.changed
            if part.videos.num_rows or plan is None:
                parts.append(keep(part))
                plan = Plan.of(parts[-1]) if plan is None else plan.extended(parts[-1])
            del part  # before the next one is made beside it
            found = {v.video: records.pop(v.video).stamp for v in some if v.video in records}
            stamps |= found
    if changed:
        log.warning(
            "%d videos were replaced since they were planned, %s first: they are planned anew. "
            "What is stored of the old ones stays.",
            len(changed),
            changed[0],
        )
    assert plan is not None, "a listing has a video"
    if previous is None:
        return NewPlan(plan, parts, stamps, {}, (), 0)
    if changes.lost:
        log.warning(
            "%d clips lie in spans that the corpus does not list any more. They stay; to take them "
            "out, use `remove`.",
            changes.lost,
        )
    every = [names_of(listed)] if unread is None else [names_of(listed), unread]
    left = gone(every, previous)
    return NewPlan(plan, parts, stamps, changes.captions, left, changes.lost)


def _probed(
    videos: Sequence[CorpusVideo],
    spec: PlanSpec,
    probing: Probing,
    on_probe: OnProbe,
    records: dict[str, ProbeRecord],
    on_record: OnRecord,
) -> Generator[CorpusVideo]:
    """Yield each video once `records` has its record, if it is one that clips are made of."""
    sizes = Sizes(spec)
    unknown = [v for v in videos if v.video not in records and not sizes.not_taken(v, None)]
    if not unknown:
        yield from videos
        return
    with closing(probe_videos(unknown, probing, on_probe)) as fresh:
        waiting = iter(unknown)
        soon = next(waiting, None)
        for video in videos:
            if video is soon:
                records[video.video], soon = next(fresh), next(waiting, None)
                on_record(video.video, records[video.video])
            yield video


def _in_parts(
    videos: Iterator[CorpusVideo], records: Mapping[str, ProbeRecord], clip: ClipSpec
) -> Iterator[list[CorpusVideo]]:
    """Yield the videos of one part after another: it is full by their number and durations."""
    policy, number = parse_policy(clip.policy)
    step_s = {"all": clip.span_s, "stride": number}.get(policy)
    some, clips = list[CorpusVideo](), 0.0
    for video in videos:
        record = records.get(video.video)
        duration_s = 0.0 if record is None else record.duration_s
        lasts_s = duration_s if 0 <= duration_s <= MAX_DURATION_S else 0.0
        spans = max(1, len(video.spans))
        clips += spans + (lasts_s / step_s if step_s else spans * number)
        some.append(video)
        if clips >= PART_CLIPS:
            yield some
            some, clips = [], 0.0
    if some:
        yield some


def planned_records(plan: Plan, videos: Collection[str]) -> dict[str, ProbeRecord]:
    """Return what the plan knows of videos; whether their files are the same is seen when they are
    read."""
    if not videos:
        return {}
    names = ["video", "bytes", "sha256", *PROBED]
    shots = [*VIDEO_SHOT_SCHEMA.names] if plan.spec.shots else []
    table = plan.video_columns(*names, *shots)
    table = table.filter(pc.is_in(table["video"], pa.array(list(videos), pa.string())))
    found = {}
    for row in table.to_pylist():
        by, starts, ends, problem = (row.pop(name, None) for name in VIDEO_SHOT_SCHEMA.names)
        spans = tuple(map(TimeSpan, starts or (), ends or ()))
        told = VideoShots(by, spans, problem) if by is not None else None
        name = row.pop("video")
        found[name] = ProbeRecord(**{k: v for k, v in row.items() if v is not None}, shots=told)
    return found


def _require_same_shots(listed: Sequence[CorpusVideo], plan: Plan, table: ShotTable) -> None:
    """Raise StoreError if a table now tells other shots of a video than it was planned with."""
    columns = ("shot_starts_s", "shot_ends_s", "duration_s", "rate_fps")
    planned = plan.video_columns("video", "status", *columns)
    planned = planned.filter(pc.equal(planned["status"], "planned"))
    rows = {row["video"]: row for row in planned.to_pylist()}
    other = [
        video.video
        for video in listed
        if (row := rows.get(video.video)) is not None
        and table.of(video, row["duration_s"], row["rate_fps"]).spans
        != tuple(map(TimeSpan, row["shot_starts_s"] or (), row["shot_ends_s"] or ()))
    ]
    if other:
        raise StoreError(
            f"the table tells other shots of {len(other)} videos than they were planned with, "
            f"{printable(other[0])} first. Use the same table, or write to a new store."
        )


def _warn_of_lost_shots(part: PlanPart) -> None:
    if "shots_problem" in part.videos.schema.names:
        lost = part.videos.filter(pc.is_valid(part.videos["shots_problem"]))
        if len(lost):
            first = lost.slice(0, 1).to_pylist()[0]
            log.warning(
                "the shots of %d videos are not known, so their clips may run across cuts: %s: %s.",
                len(lost),
                printable(first["video"]),
                printable(first["shots_problem"]),
            )
