"""From a listed corpus to the plan that covers it: what is new is probed and planned."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter

import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.clips import ClipSpec, TimeSpan, parse_policy
from reducio_latents.core.text import printable
from reducio_latents.corpus.build import gone, not_planned, plan_some
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.fate import MAX_DURATION_S, Sizes
from reducio_latents.corpus.probe import OnProbe, OnRecord, ProbeRecord, Probing, probe_videos
from reducio_latents.corpus.shots import ShotTable
from reducio_latents.errors import StoreError
from reducio_latents.store.plan import (
    REMOVED,
    SPAN_SCHEMA,
    Plan,
    PlanPart,
    PlanSpec,
    StoredPart,
)
from reducio_latents.store.row_kinds import CAPTION_SEPARATOR as SEPARATOR

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
    gone: int
    """Videos of the plan that the corpus does not list any more."""


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
) -> NewPlan:
    """Probe and plan what `previous` does not have, and those of `replaced` with other bytes now.

    `listed` is in order of name. A part of `PART_CLIPS` is handed to `keep` when it is planned, and
    the next one begun. With `retry_failed` also what failed before is planned. `records` holds what
    an earlier try has probed and not planned, and takes in what this one does; `on_record` is told
    of the latter. Raise StoreError for a plan of another spec, and what `keep` raises.
    """
    if previous is not None:
        previous.spec.require_same(spec)
        if probing.shots.table is not None:
            _require_same_shots(listed, previous, probing.shots.table)
    new = not_planned(listed, previous, retry=retry_failed, replaced=replaced)
    records = {} if records is None else records
    plan, parts, stamps, changed = previous, list[StoredPart](), dict[str, str](), list[str]()
    with closing(_probed(new, spec, probing, on_probe, records, on_record)) as probed:
        for some in _in_parts(probed, records, spec.clip):
            part = plan_some(
                some, records, spec, plan, retry_failed=retry_failed, replaced=replaced
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
        return NewPlan(plan, parts, stamps, {}, 0)
    left = gone([video.video for video in listed], previous)
    return NewPlan(plan, parts, stamps, changed_captions(listed, previous), len(left))


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


def changed_captions(listed: Sequence[CorpusVideo], plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return clip id -> captions, where the corpus has others now than the plan has.

    A clip has those of the span that it lies in; of one whose span is not listed any more, or that
    lies in several with different captions, the plan's stay.
    """
    whole = [video for video in listed if not video.spans]
    names = pa.array([video.video for video in whole], pa.string())
    texts = pa.array([SEPARATOR.join(video.captions) for video in whole], pa.large_string())
    by_span = _captions_by_span([video for video in listed if video.spans], plan)
    found: dict[str, tuple[str, ...]] = {}
    for clips in plan.clip_tables("clip_id", "video", "status", "captions", *SPAN_SCHEMA.names):
        clips = clips.filter(pc.not_equal(clips["status"], REMOVED))
        ends = pc.min_max(clips["video"]).as_py()  # only the names between are looked through
        low = bisect_left(whole, ends["min"] or "", key=attrgetter("video"))
        high = bisect_right(whole, ends["max"] or "", key=attrgetter("video"))
        at = pc.index_in(clips["video"], names.slice(low, high - low)).combine_chunks()
        now = texts.slice(low, high - low).take(at)
        if by_span and SPAN_SCHEMA.names[0] in clips.schema.names:
            columns = (clips[n].to_pylist() for n in ("video", *SPAN_SCHEMA.names))
            said = [
                _caption_of(by_span.get(name, ()), *span)
                for name, *span in zip(*columns, strict=True)
            ]
            now = pc.coalesce(now, pa.array(said, pa.large_string()))
        was = pc.binary_join(clips["captions"].combine_chunks(), SEPARATOR).cast(pa.large_string())
        other = pc.fill_null(pc.not_equal(now, was), False)
        for clip_id, text in zip(
            clips["clip_id"].filter(other).to_pylist(), now.filter(other).to_pylist(), strict=True
        ):
            found[clip_id] = tuple(text.split(SEPARATOR)) if text else ()
    return found


SpanText = tuple[float, float, str]
"""Start and end of a listed span, in seconds, and its captions."""


def _captions_by_span(videos: Sequence[CorpusVideo], plan: Plan) -> dict[str, list[SpanText]]:
    """Return the spans of each video. A video's only span has all of its clips."""
    if not videos:
        return {}
    about = plan.video_columns("video", "duration_s", "rate_fps")
    columns = (about[name].to_pylist() for name in about.schema.names)
    known = {name: rest for name, *rest in zip(*columns, strict=True)}
    found: dict[str, list[SpanText]] = {}
    for video in videos:
        length, rate = known.get(video.video, (None, None))
        if length is None or rate is None:
            continue
        for span in video.spans:
            within = span.within(length, rate)
            text = SEPARATOR.join(span.captions)
            if len(video.spans) == 1:
                found[video.video] = [(-math.inf, math.inf, text)]
            elif not isinstance(within, str):
                found.setdefault(video.video, []).append((*within, text))
    return found


def _caption_of(
    spans: Sequence[SpanText], start_s: float | None, end_s: float | None
) -> str | None:
    """Return the captions of the span that is a part of a video, or that it lies in; None if no
    span, or several with others, can be meant."""
    if start_s is None or end_s is None:
        return None
    exact = {text for begin, end, text in spans if (begin, end) == (start_s, end_s)}
    around = exact or {text for begin, end, text in spans if begin <= start_s and end_s <= end}
    return around.pop() if len(around) == 1 else None
