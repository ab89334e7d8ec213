"""What a corpus says now that its plan does not: other captions, and spans that it did not list."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.starts import positions, possible_in
from reducio_latents.corpus.cells import Column
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.fate import within
from reducio_latents.corpus.rows import said_of_spans
from reducio_latents.store.plan import REMOVED, SPAN_SCHEMA, Plan
from reducio_latents.store.row_kinds import CAPTION_SEPARATOR as SEPARATOR

VIDEOS_AT_ONCE = 1 << 14
"""Videos that are looked at at once."""


class Changes(NamedTuple):
    """What is other than it was planned."""

    captions: dict[str, tuple[str, ...]]
    """Clip id -> captions, where the corpus has others now."""
    spans: dict[str, frozenset[int]]
    """Video -> which of its spans no clip lies in, though they have room for one."""
    lost: int
    """Clips whose span is not listed any more."""


def changes_of(listed: Sequence[CorpusVideo], plan: Plan) -> Changes:
    """Hold a listing, in order of name, against a plan.

    A clip has the captions of its span, or else of the one that it lies in, and of a video with one
    span the captions of that. Those of a clip whose span is not listed any more stay, as do those
    of one that lies in several with different captions.
    """
    about = plan.video_columns("video", "status", "duration_s", "rate_fps")
    names = pa.array([video.video for video in listed], pa.string())
    about = about.take(pc.index_in(names, about["video"].combine_chunks()))
    known = names.filter(pc.is_valid(about["video"])).to_pylist()
    lasts, rates = (np.nan_to_num(about[n].to_numpy()) for n in ("duration_s", "rate_fps"))
    counts = np.array([max(1, len(video.spans)) for video in listed], np.int64)
    begins = np.cumsum(counts) - counts
    seen = np.zeros(counts.sum(), bool)
    found, lost = dict[str, tuple[str, ...]](), 0
    columns = ("clip_id", "video", "status", "captions", *SPAN_SCHEMA.names)
    for clips in plan.clip_tables(*columns, videos=known):
        ends = pc.min_max(clips["video"]).as_py()  # only the names between are looked through
        low = bisect_left(listed, ends["min"] or "", key=attrgetter("video"))
        high = bisect_right(listed, ends["max"] or "", key=attrgetter("video"))
        at = pc.index_in(clips["video"], names.slice(low, high - low))
        clips, at = clips.filter(pc.is_valid(at)), at.drop_null().to_numpy().astype(np.int64)
        if not len(at):
            continue
        here = slice(low, high)
        first, count = begins[here] - begins[low], counts[here]
        times, why, _ = within(listed[here], lasts[here], rates[here], count)
        times[why > 0] = np.nan
        bounds = (
            [None] * len(clips) if n not in clips.schema.names else clips[n].to_numpy()
            for n in SPAN_SCHEMA.names
        )
        spans = np.stack([np.asarray(bound, np.float64) for bound in bounds], 1)
        entry = _found_in(times, np.repeat(np.arange(high - low), count), spans, at)
        seen[begins[low] + entry[entry >= 0]] = True
        alone = count[at] == 1
        if plan.spec.shots:  # of which clips lie in parts
            seen[begins[low] + first[at[alone]]] = True
        entry[alone] = first[at[alone]]
        said = said_of_spans(listed[here])
        for i in np.flatnonzero(entry < 0).tolist():
            own = slice(first[at[i]], first[at[i]] + count[at[i]])
            inside = (times[own, 0] <= spans[i, 0]) & (spans[i, 1] <= times[own, 1])
            around = own.start + np.flatnonzero(inside)
            texts = {tuple(said.captions[row].as_py()) for row in said.rows[around].tolist()}
            entry[i] = around[0] if len(texts) == 1 else -1
            lost += not len(around)
            if plan.spec.shots:
                seen[begins[low] + around] = True
        known = entry >= 0
        clips = clips.filter(known)
        now = pc.binary_join(said.captions.take(said.rows[entry[known]]), SEPARATOR)
        other = pc.not_equal(now, pc.binary_join(clips["captions"], SEPARATOR))
        other = pc.and_(other, pc.not_equal(clips["status"], REMOVED))
        changed = zip(clips["clip_id"].filter(other), now.filter(other), strict=True)
        for clip_id, text in changed:
            found[clip_id.as_py()] = tuple(text.as_py().split(SEPARATOR)) if text.as_py() else ()
    shortest = min(bucket.frames for bucket in plan.spec.buckets)
    is_planned = pc.is_in(about["status"], pa.array(["planned", "too_short", "duplicate"]))
    there = np.flatnonzero(is_planned).tolist()
    new = dict[str, frozenset[int]]()
    for some in (there[i : i + VIDEOS_AT_ONCE] for i in range(0, len(there), VIDEOS_AT_ONCE)):
        videos = [listed[i] for i in some]
        times, why, _ = within(videos, lasts[some], rates[some], counts[some])
        room = possible_in(times[:, 1] - times[:, 0], shortest, plan.spec.clip.rate_fps) > 0
        entry = np.repeat(begins[some], counts[some]) + positions(counts[some])
        fresh = np.flatnonzero(room & (why == 0) & ~seen[entry])
        number, of = positions(counts[some])[fresh], np.repeat(some, counts[some])[fresh]
        for i in np.unique(of).tolist():
            if listed[i].spans:
                new[listed[i].video] = frozenset(number[of == i].tolist())
    return Changes(found, new, lost)


def _found_in(times: Column, owner: Column, spans: Column, at: Column) -> Column:
    """Return which of the `times` of videos each of `spans` is, of the video that `at` says; -1 if
    it is none. Found by hash."""

    def hashed(video: Column, span: Column) -> Column:
        bits = np.ascontiguousarray(span + 0.0).view(np.uint64)
        found = video.astype(np.uint64)
        for part in bits.T:
            found = (found ^ part ^ (part >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        return np.asarray(found)

    hashes = hashed(owner, times)
    order = np.argsort(hashes)
    place = np.searchsorted(hashes[order], hashed(at, spans))
    entry = order[np.minimum(place, len(order) - 1)]
    same = (owner[entry] == at) & (times[entry] == spans).all(1)
    return np.where(same, entry, -1)
