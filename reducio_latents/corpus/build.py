"""From videos and what probing said of them to a part of a plan. Pure: no file is touched."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.collecting import no_collecting
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.cells import Column
from reducio_latents.corpus.fate import Decided, Fate, decide
from reducio_latents.corpus.place import Placed, Rows, place
from reducio_latents.corpus.probe import PROBED, ProbeRecord
from reducio_latents.corpus.rows import said_of_spans, taken
from reducio_latents.errors import CorpusError
from reducio_latents.store.plan.parts import ROW_GROUP, PlanPart
from reducio_latents.store.plan.plan import Plan
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import (
    CLIP_SCHEMA,
    CLIP_STATUS,
    REMOVED,
    SPAN_SCHEMA,
    VIDEO_SCHEMA,
    VIDEO_SHOT_SCHEMA,
    VIDEO_SPAN_SCHEMA,
    carried_names,
)

if TYPE_CHECKING:
    from reducio_latents.corpus.shots import VideoShots

log = logging.getLogger(__name__)

ID_DIGITS = 16
TIME_DIGITS = 9


def plan_part(
    videos: Iterable[CorpusVideo],
    records: Mapping[str, ProbeRecord],
    spec: PlanSpec,
    previous: Plan | None = None,
    *,
    retry_failed: bool = False,
    replaced: Collection[str] = (),
) -> PlanPart:
    """Plan the videos that `previous` does not have; their order does not matter.

    `records` holds what probing said, by name; for videos of `previous` they are optional, and only
    used to see whether the bytes changed. With `retry_failed`, videos that failed before are
    planned again, unless they fail for the same reason; those in `replaced`, if their bytes are
    others now: under the same name, with clip ids of their own. Rows of `previous` never move: new
    ones go to new shards. Raise StoreError if `previous` was made with another spec, CorpusError
    for two videos of one name.
    """
    listing = sorted(videos, key=lambda video: video.video)
    for one, other in pairwise(listing):
        if one.video == other.video:
            raise CorpusError(f"{one.video} is listed twice. Remove one.")
    if previous is not None:
        previous.spec.require_same(spec)
    part = plan_some(listing, records, spec, previous, retry_failed=retry_failed, replaced=replaced)
    left = () if previous is None else gone([names_of(listing)], previous)
    return replace(part, gone=left)


@no_collecting()
def plan_some(
    listing: Sequence[CorpusVideo],
    records: Mapping[str, ProbeRecord],
    spec: PlanSpec,
    previous: Plan | None,
    *,
    retry_failed: bool,
    replaced: Collection[str],
    added: Mapping[str, Collection[int]] | None = None,
) -> PlanPart:
    """Plan as `plan_part` some videos of a listing, in order of name.

    `added` says which spans of videos that are planned already are to be planned too. Their clips
    have ids of their own.
    """
    added = added or {}
    names = [video.video for video in listing]
    known = {} if previous is None else previous.known.named(names)
    replaced = known.keys() & set(replaced)
    fresh = [
        video
        for video in listing
        if (old := known.get(video.video)) is None
        or (video.video in replaced and _has_changed(old.sha256, records.get(video.video)))
        or (retry_failed and old.status == "failed" and video.video not in replaced)
        or (video.video in added and video.video not in replaced)
    ]
    decided = decide(fresh, records, spec, previous)
    number = 0 if previous is None else previous.parts
    cuts = decided.cuts
    spans_of = [added.get(video.video) for video in fresh]
    pairs = zip(cuts.video.tolist(), cuts.span.tolist(), strict=True)
    is_new = [(its := spans_of[video]) is None or span in its for video, span in pairs]
    with_new = set(cuts.video[is_new].tolist())

    def is_to_be(i: int, name: str, fate: Fate) -> bool:
        if (old := known.get(name)) is None or name in replaced:
            return True
        if spans_of[i] is not None:
            return i in with_new
        return (old.status, old.reason) != (fate.status, fate.reason)

    pairs_of = enumerate(zip(fresh, decided.fates, strict=True))
    kept = [i for i, (video, fate) in pairs_of if is_to_be(i, video.video, fate)]
    planned = decided.take(kept, np.array(is_new, bool))
    own_ids = {name: str(number) for name in added}
    own_ids |= {name: records[name].sha256 for name in replaced}
    ids = [
        f"{name}\0{own_ids[name]}" if name in own_ids else name
        for name in (video.video for video in planned.videos)
    ]
    _require_unique_ids(ids, previous)
    placed = place(planned, spec, previous)
    return PlanPart(
        number=number,
        spec=spec,
        videos=_video_table(planned, records, placed.rows, spec, _clips_of(previous, added)),
        clips=_clip_table(planned, placed, spec, ids),
        shards=placed.shards,
        changed=tuple(
            name for name in known if _has_changed(known[name].sha256, records.get(name))
        ),
    )


def not_planned(
    listed: Iterable[CorpusVideo],
    plan: Plan | None,
    *,
    retry: bool = False,
    replaced: Collection[str] = (),
) -> list[CorpusVideo]:
    """Return the videos that the plan does not have, and those in `replaced`; with `retry`, also
    those that failed."""
    listed = list(listed)
    if plan is None:
        return listed
    failed = plan.known.with_status("failed").to_pylist() if retry else []
    again, known = {*replaced, *failed}, plan.known.names.combine_chunks()
    is_known = pc.is_in(pa.array([video.video for video in listed], pa.string()), known)
    return [
        video
        for video, old in zip(listed, is_known.to_pylist(), strict=True)
        if not old or video.video in again
    ]


def gone(listed: Iterable[pa.Array], plan: Plan) -> tuple[str, ...]:
    """Return the videos of the plan that are not listed any more."""
    left = plan.known.names
    for names in listed:
        left = left.filter(pc.invert(pc.is_in(left, names)))
    removed = plan.known.with_status(REMOVED).combine_chunks()
    return tuple(left.filter(pc.invert(pc.is_in(left, removed))).to_pylist())


def names_of(videos: Iterable[CorpusVideo]) -> pa.Array:
    return pa.array([video.video for video in videos], pa.string())


def _has_changed(sha256: str | None, record: ProbeRecord | None) -> bool:
    return bool(sha256 and record is not None and record.sha256 and record.sha256 != sha256)


def _clip_table(planned: Decided, placed: Placed, spec: PlanSpec, ids: Sequence[str]) -> pa.Table:
    names = pa.array([video.video for video in planned.videos], pa.string())
    said = said_of_spans(planned.videos)
    rows = placed.rows
    status = np.zeros(len(rows.video), np.int64)
    status[placed.own :] = 1
    columns = {
        "clip_id": _clip_ids(ids, rows),
        "video": taken(names, rows.video, ROW_GROUP),
        "start_s": pa.array(rows.start_s),
        "bucket": taken(pa.array([b.name for b in spec.buckets]), rows.bucket, ROW_GROUP),
        "shard": pa.array(rows.shard.astype(np.int32)),
        "row": pa.array(rows.row.astype(np.int32)),
        "status": taken(pa.array(CLIP_STATUS), status, ROW_GROUP),
        "captions": taken(said.captions, said.rows[rows.entry], ROW_GROUP),
    }
    schema = CLIP_SCHEMA
    if any(video.spans for video in planned.videos):
        schema = pa.schema([*CLIP_SCHEMA, *SPAN_SCHEMA])
        for name, times in zip(SPAN_SCHEMA.names, rows.span.T, strict=True):
            columns[name] = pa.array(times, from_pandas=True)
    for key, name in carried_names(said.columns).items():
        column = said.columns[key]
        columns[name] = taken(column, said.rows[rows.entry], ROW_GROUP)
        schema = schema.append(pa.field(name, column.type))
    return pa.table(columns, schema=schema)


def clip_prefix(video: str) -> str:
    """Return what the ids of a video's clips begin with."""
    return hashlib.sha256(video.encode()).hexdigest()[:ID_DIGITS]


def _clip_ids(videos: Sequence[str], rows: Rows) -> pa.ChunkedArray:
    """Return `<hash of the video>_<start in ms>` of each clip: safe in file names, no dot.

    Where several clips of a video begin together, the later ones have hashes of their own.

    Written digit by digit into one buffer, as a million small strings take longest of all.
    """
    prefix, again = _prefixes(rows)
    names = chain(videos, (f"{videos[video]}\0{time}" for video, time in again))
    prefixes = "".join(map(clip_prefix, names)).encode()
    by_video = np.frombuffer(prefixes, np.uint8).reshape(-1, ID_DIGITS)
    powers = 10 ** np.arange(TIME_DIGITS - 1, -1, -1)
    chunks = []
    for begin in range(0, len(rows.video), ROW_GROUP):
        part = slice(begin, begin + ROW_GROUP)
        start_ms = _start_ms(rows.start_s[part])
        width = ID_DIGITS + 1 + TIME_DIGITS
        text = np.full((len(start_ms), width), ord("_"), np.uint8)
        text[:, :ID_DIGITS] = by_video[prefix[part]]
        text[:, ID_DIGITS + 1 :] = start_ms[:, None] // powers % 10 + ord("0")
        offsets = np.arange(len(start_ms) + 1, dtype=np.int32) * width
        buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(text.tobytes())]
        chunks.append(pa.Array.from_buffers(pa.string(), len(start_ms), buffers))
    return pa.chunked_array(chunks, pa.string())


def _prefixes(rows: Rows) -> tuple[Column, list[tuple[int, int]]]:
    """Return for each clip whose prefix it has: its video's, or one of those that follow.

    These are of (video, 1 for the second time) where several clips of a video begin in the same
    millisecond, as those of overlapping spans may.
    """
    moment = rows.video * 10**TIME_DIGITS + _start_ms(rows.start_s)
    order = np.argsort(moment, kind="stable")
    fresh = np.flatnonzero(np.diff(moment[order], prepend=-1))
    time = np.arange(len(order)) - np.repeat(fresh, np.diff(fresh, append=len(order)))
    repeated = order[time > 0]
    prefix = rows.video.copy()
    pairs = np.stack([rows.video[repeated], time[time > 0]], axis=1)
    again, which = np.unique(pairs, axis=0, return_inverse=True)
    videos = int(rows.video.max(initial=-1)) + 1
    prefix[repeated] = videos + which.reshape(-1)
    return prefix, [(int(video), int(number)) for video, number in again]


def _start_ms(start_s: Column) -> Column:
    return np.floor(start_s * 1000 + 0.5).astype(np.int64)


def _require_unique_ids(ids: Sequence[str], previous: Plan | None) -> None:
    """Refuse two videos whose clips would have the same ids; their names would have to be 1 of
    2**64 pairs."""
    owners: dict[int, str] = {}
    for name in ids:
        owner = owners.setdefault(_key(name), name)
        if owner != name:
            raise CorpusError(f"{owner} and {name} would get the same clip ids. Rename one.")
    keys = np.fromiter(owners, np.uint64, count=len(owners))
    for videos, earlier in [] if previous is None else previous.known.keys(_key):
        for i in np.flatnonzero(np.isin(earlier, keys)).tolist():
            owner, name = videos["video"][i].as_py(), owners[int(earlier[i])]
            if owner != name:
                raise CorpusError(f"{owner} and {name} would get the same clip ids. Rename one.")


def _key(video: str) -> int:
    return int(clip_prefix(video), 16)


def _clips_of(plan: Plan | None, videos: Collection[str]) -> dict[str, int]:
    """Return how many clips videos have already."""
    if plan is None or not videos:
        return {}
    table = plan.video_columns("video", "clips")
    table = table.filter(pc.is_in(table["video"], pa.array(list(videos), pa.string())))
    return dict(zip(*(table[name].to_pylist() for name in ("video", "clips")), strict=True))


def _video_table(
    planned: Decided,
    records: Mapping[str, ProbeRecord],
    rows: Rows,
    spec: PlanSpec,
    before: Mapping[str, int],
) -> pa.Table:
    clips = np.bincount(rows.video, minlength=len(planned.videos))
    first = np.searchsorted(planned.cuts.video, np.arange(len(planned.videos)))
    schema = VIDEO_SCHEMA
    if any(video.spans for video in planned.videos):
        schema = pa.schema([*VIDEO_SCHEMA, *VIDEO_SPAN_SCHEMA])
    if spec.shots:
        schema = pa.schema([*schema, *VIDEO_SHOT_SCHEMA])
    rows_of: list[dict[str, object]] = []
    for video, fate, count, cut in zip(
        planned.videos, planned.fates, clips.tolist(), first.tolist(), strict=True
    ):
        record = records.get(video.video)
        row: dict[str, object] = {
            "video": video.video,
            "url": video.address,
            "offset": video.source.offset,
            "length": video.source.length,
            "clips": count + before.get(video.video, 0),
            "bucket": spec.buckets[planned.cuts.bucket[cut]].name if count else None,
            "status": fate.status,
            "reason": fate.reason,
            "duplicate_of": fate.duplicate_of,
            "spans": len(video.spans) or None,
            "spans_without_clips": json.dumps(fate.without_clips, sort_keys=True)
            if fate.without_clips
            else None,
        }
        if record is not None and record.sha256:
            row |= {"bytes": record.bytes, "sha256": record.sha256}
        if record is not None and fate.status != "failed":
            row |= {name: getattr(record, name) for name in PROBED}
            row |= {} if record.shots is None else _shot_cells(record.shots)
        rows_of.append(row)
    columns = {name: [row.get(name) for row in rows_of] for name in schema.names}
    return pa.table(columns, schema=schema)


def _shot_cells(shots: VideoShots) -> dict[str, object]:
    known = shots.problem is None
    return {
        "shots_by": shots.by,
        "shot_starts_s": [span.start_s for span in shots.spans] if known else None,
        "shot_ends_s": [span.end_s for span in shots.spans] if known else None,
        "shots_problem": shots.problem,
    }
