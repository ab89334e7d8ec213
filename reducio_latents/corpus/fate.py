"""What becomes of each video: planned, too short, a duplicate, or failed; and where clips start."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reducio_latents.core.clips import TimeSpan
from reducio_latents.core.geometry import cover_and_centre, nearest_bucket
from reducio_latents.core.starts import positions, starts_in_spans
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.cells import Column
from reducio_latents.corpus.entry import BEYOND, REVERSED
from reducio_latents.corpus.rows import NO_END, entries_of_videos
from reducio_latents.errors import CorpusError
from reducio_latents.store.plan.plan import Plan
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import REMOVED
from reducio_latents.video import is_still_name, may_move

if TYPE_CHECKING:
    from reducio_latents.corpus.probe import ProbeRecord
    from reducio_latents.corpus.shots import VideoShots

CUT_TOLERANCE_S = 0.5
"""Cutting at key frames or whole frames makes a clip that much longer or shorter."""
MAX_DURATION_S = 999_999.0
"""Eleven days. A file that claims to last longer has a damaged header; and a clip's id has room for
nine digits of milliseconds."""

A_PICTURE = "a picture: one frame"
"""How the reason begins why a picture has no clip."""
MAX_FITTED_PX = 1 << 27
"""Pixels of a frame that was resized to cover its bucket, before it is cropped."""


BETWEEN = "a span lies between two shots"


class Cuts(NamedTuple):
    """The clips of spans, or of pieces of them, as columns: those of a video stand together, by
    span. Of a duplicate they are as they are of its original."""

    video: Column
    """Index into the videos."""
    span: Column
    """Index into the video's spans; 0 in a video without."""
    start_s: Column
    end_s: Column
    """Where in the video it is."""
    bucket: Column
    """Index into the spec's buckets."""
    clips: Column
    """How many; one at least."""

    def take(self, where: Column) -> Cuts:
        return Cuts(*[column[where] for column in self])


@dataclass(slots=True)
class Fate:
    """What becomes of one video."""

    status: str
    reason: str | None = None
    duplicate_of: str | None = None
    without_clips: Mapping[str, int] = field(default_factory=dict)
    """Why spans have no clips -> how many, if the corpus lists spans."""


class Sizes:
    """The buckets of a plan, and which of them a video, or a part of one, is cut for."""

    def __init__(self, spec: PlanSpec) -> None:
        self._rate_fps, self._buckets = spec.clip.rate_fps, spec.buckets
        self._index = {bucket: i for i, bucket in enumerate(spec.buckets)}
        lengths = sorted({bucket.frames for bucket in spec.buckets}, reverse=True)
        self._by_length = {n: [b for b in spec.buckets if b.frames == n] for n in lengths}
        self.bucket = lru_cache(maxsize=4096)(self._bucket)
        self._specs = [replace(spec.clip, frames=frames) for frames in lengths]
        """Of the lengths of clips, the longest first."""
        self.why_unfit = lru_cache(maxsize=4096)(self._why_unfit)

    def _bucket(self, frames: int, height: int, width: int) -> int:
        """Return the index of the bucket for clips of so many frames, of a picture of this size."""
        return self._index[nearest_bucket(height, width, self._by_length[frames])]

    def not_taken(self, video: CorpusVideo, record: ProbeRecord | None) -> str | None:
        """Return why a picture is passed over, if it is: there is no bucket for one frame.

        Where the name tells, that is known without a record.
        """
        if 1 in self._by_length or video.problem or not is_still_name(video.video):
            return None
        if may_move(video.video) if record is None else record.error is None and record.frames > 1:
            return None
        bucket = next(iter(self._index))
        return (
            f"{A_PICTURE}, and clips have {min(self._by_length)} frames or more. For a model that "
            f"takes pictures (Reducio does not) add a bucket, as 1x{bucket.height}x{bucket.width}"
        )

    def _why_unfit(self, height: int, width: int) -> str | None:
        """Return why a picture of this size is too long and thin for its bucket, if it is."""
        for frames in self._by_length:
            bucket = self._buckets[self.bucket(frames, height, width)]
            fit = cover_and_centre(height, width, bucket)
            if fit.height * fit.width > MAX_FITTED_PX:
                return f"{width}x{height} pixels are too long and thin for {bucket}"
        return None

    def cut(self, spans: Column, video: Callable[[int], str]) -> tuple[Column, Column, Column]:
        """Return of each span which length its clips have, and how many; and all starts, in order.

        They are the longest ones that there is room for. `spans` are starts and ends, (N, 2).
        """
        length, clips = np.zeros(len(spans), np.int64), np.zeros(len(spans), np.int64)
        starts, of = list[Column](), list[Column]()
        left = np.arange(len(spans))
        for number, clip in enumerate(self._specs):
            start_s, end_s = spans[left].T
            counts, found = starts_in_spans(
                end_s - start_s, start_s, clip, partial(_at, video, left)
            )
            length[left], clips[left] = number, counts
            starts.append(found)
            of.append(np.repeat(left, counts))
            left = left[counts == 0]
        order = np.argsort(np.concatenate(of), kind="stable")
        return length, clips, np.concatenate(starts)[order]

    def buckets(self, height: int, width: int) -> list[int]:
        """Return the index of the bucket for clips of each length, of a picture of this size."""
        return [self.bucket(frames, height, width) for frames in self._by_length]

    @property
    def too_short(self) -> str:
        """Why nothing is cut from what is shorter than the shortest clip."""
        return f"shorter than a clip of {min(self._by_length)} frames at {self._rate_fps:g} fps"


class Decided(NamedTuple):
    """What becomes of some videos."""

    videos: Sequence[CorpusVideo]
    fates: Sequence[Fate]
    cuts: Cuts
    starts: Column
    """Of the clips of all cuts, in seconds of their videos, in order."""

    def take(self, videos: Sequence[int], cuts: Column | None = None) -> Decided:
        """Return it of some videos, in order; without the clips of `cuts` that are False."""
        number = np.full(len(self.videos), -1)
        number[videos] = np.arange(len(videos))
        kept = number[self.cuts.video] >= 0
        kept = kept if cuts is None else kept & cuts
        of_videos = self.cuts.take(kept)
        return Decided(
            [self.videos[i] for i in videos],
            [self.fates[i] for i in videos],
            of_videos._replace(video=number[of_videos.video]),
            self.starts[np.repeat(kept, self.cuts.clips)],
        )


def decide(
    videos: Sequence[CorpusVideo],
    records: Mapping[str, ProbeRecord],
    spec: PlanSpec,
    previous: Plan | None,
) -> Decided:
    """Return each video's fate; of several with the same bytes the first one, by name, is kept."""
    hashes = {record.sha256 for v in videos if (record := records.get(v.video)) and record.sha256}
    # A part that is stored does not say which spans it had: only whole videos refer to it.
    originals: dict[tuple[str, bool, bytes], str] = {}
    removed: dict[str, str] = {}
    if previous is not None:
        for sha256, name in previous.known.planned_with(sorted(hashes)).items():
            shots = (previous.shots(name) or ()) if spec.shots else ()
            originals[sha256, False, np.array(shots, np.float64).tobytes()] = name
        removed = previous.known.removed_with(sorted(hashes))
    sizes = Sizes(spec)
    unusable = [_why_none(video, records.get(video.video), sizes, removed) for video in videos]
    of = np.array([i for i, fate in enumerate(unusable) if fate is None], np.int64)
    good = [videos[i] for i in of.tolist()]
    known = [records[video.video] for video in good]
    counts = np.array([max(1, len(video.spans)) for video in good], np.int64)
    owner, number = np.repeat(np.arange(len(good)), counts), positions(counts)
    lasts, rates = (
        np.array([getattr(record, name) for record in known], np.float64)
        for name in ("duration_s", "rate_fps")
    )
    times, why, reasons = within(good, lasts, rates, counts)
    reasons += [BETWEEN, sizes.too_short]
    piece = np.flatnonzero(why == 0)
    if any(record.shots and record.shots.spans for record in known):
        parts = [
            part
            for i in piece.tolist()
            for part in _pieces(i, TimeSpan(*times[i].tolist()), known[owner[i]].shots)
        ]
        why[piece] = len(reasons) - 1
        piece = np.array([i for i, _ in parts], np.int64)
        times = np.array([part for _, part in parts], np.float64).reshape(-1, 2)
        why[piece] = 0
    else:
        times = times[piece]
    bounds = np.searchsorted(owner[piece], np.arange(len(good) + 1)).tolist()
    names = [video.video for video in good]
    for i, (video, record) in enumerate(zip(good, known, strict=True)):
        if spec.duplicates == "refer" and record.sha256:
            whole = not video.spans and (record.shots is None or record.shots.problem is not None)
            spans = b"" if whole else times[bounds[i] : bounds[i + 1]].tobytes()
            key = record.sha256, bool(video.spans), spans
            names[i] = originals.setdefault(key, video.video)
    length, clips, starts = sizes.cut(times, lambda i: names[owner[piece[i]]])
    cut = clips > 0
    why[piece] = len(reasons)
    why[piece[cut]] = 0
    without = dict[int, Counter[str]]()
    for i in np.flatnonzero(why).tolist():
        if good[video := int(owner[i])].spans:
            without.setdefault(video, Counter())[reasons[why[i] - 1]] += 1
    fates = [fate or Fate("planned") for fate in unusable]
    has_cuts = np.bincount(owner[piece[cut]], minlength=len(good)).tolist()
    for i, (at, video) in enumerate(zip(of.tolist(), good, strict=True)):
        fate = fates[at] = Fate("planned", without_clips=without.get(i, {}))
        if not has_cuts[i]:
            why_none = f"none of its spans has a clip: {'; '.join(sorted(fate.without_clips))}"
            reason = why_none if video.spans else sizes.too_short
            if not video.spans and bounds[i + 1] - bounds[i] > 1:
                reason = f"each of its shots is {sizes.too_short}"
            fate.status, fate.reason = "too_short", reason
        elif names[i] != video.video:
            fate.status, fate.duplicate_of = "duplicate", names[i]
            fate.reason = f"has the same bytes as {names[i]}"
    piece, (start_s, end_s) = piece[cut], times[cut].T
    buckets = np.array([sizes.buckets(record.height, record.width) for record in known], np.int64)
    bucket = buckets[owner[piece], length[cut]] if len(good) else piece
    cuts = Cuts(of[owner[piece]], number[piece], start_s, end_s, bucket, clips[cut])
    return Decided(videos, fates, cuts, starts)


def _why_none(
    video: CorpusVideo, record: ProbeRecord | None, sizes: Sizes, removed: Mapping[str, str]
) -> Fate | None:
    """Return what becomes of a video that no clip can be cut from; None if one may."""
    if picture := sizes.not_taken(video, record):
        without = {picture: len(video.spans)} if video.spans else {}
        return Fate("too_short", picture, without_clips=without)
    reason = video.problem or (None if record is None else _why_unusable(video, record))
    if reason is None and record is not None:
        reason = sizes.why_unfit(record.height, record.width)
    if reason is not None:
        return Fate("failed", reason)
    if record is None:
        raise CorpusError(f"{video.video} was listed, but not probed. Probe it first.")
    if record.sha256 in removed:
        reason = f"has the same bytes as {removed[record.sha256]}, which was removed"
        return Fate(REMOVED, reason)
    return None


def within(
    videos: Sequence[CorpusVideo], lasts_s: Column, rates_fps: Column, counts: Column
) -> tuple[Column, Column, list[str]]:
    """Return start and end of each span, in seconds of its video; 0 or which reason, from 1, says
    why it has none; and these. As `CorpusSpan.within` does, for all at once.

    A file may be the very clip that its one span tells of, in times of another video: so it is with
    corpora that are handed on as clips. Such a span lies past the file's end, and is as long as it.
    """
    entries, problems = entries_of_videos(videos)
    owner = np.repeat(np.arange(len(videos)), counts)
    lasts, rate = lasts_s[owner], rates_fps[owner]
    rate = np.where(entries["in_frames"] & (rate > 0), rate, 1.0)
    start_s = entries["from_s"] + entries["start"] * (1 / rate)
    ends = entries["end"] != NO_END
    end_s = np.where(ends, entries["from_s"] + entries["end"] * (1 / rate), lasts)
    why = entries["problem"].astype(np.int64)
    why[(why == 0) & ends & (end_s <= start_s)] = len(problems) + 1
    why[(why == 0) & (start_s >= lasts)] = len(problems) + 2
    same = np.abs(entries["end"] / rate - entries["start"] / rate - lasts) <= CUT_TOLERANCE_S
    past = entries["from_s"] + entries["end"] / rate > lasts + CUT_TOLERANCE_S
    is_cut = ends & same & past & (counts[owner] == 1) & (entries["problem"] == 0)
    whole = is_cut | ~np.array([bool(video.spans) for video in videos], bool)[owner]
    why[whole], start_s[whole], end_s[whole] = 0, 0.0, lasts[whole]
    return np.stack([start_s, np.minimum(end_s, lasts)], 1), why, [*problems, REVERSED, BEYOND]


def _pieces(
    number: int, span: TimeSpan, shots: VideoShots | None
) -> Iterator[tuple[int, TimeSpan]]:
    """Yield what shots, in order, leave of a span; all of it where there are none."""
    if shots is None or not shots.spans:
        yield number, span
        return
    first = bisect_right(shots.spans, span.start_s, key=lambda shot: shot.end_s)
    for shot in islice(shots.spans, first, None):
        if shot.start_s >= span.end_s:
            break
        yield number, TimeSpan(max(span.start_s, shot.start_s), min(span.end_s, shot.end_s))


def _at(name: Callable[[int], str], index: Column, i: int) -> str:
    return name(int(index[i]))


def _why_unusable(video: CorpusVideo, record: ProbeRecord) -> str | None:
    """Return why no clip can be cut from a video, if so; a header may say anything.

    Without the address that an error begins with: the row has it, and it may move.
    """
    if record.error is not None:
        source = video.source
        error = record.error.removeprefix(f"{source}: ").removeprefix(f"{source.url}: ")
        return error.removesuffix(".") or "it cannot be read"
    if record.height < 1 or record.width < 1:
        return f"its pictures have {record.width}x{record.height} pixels"
    if not 0 <= record.duration_s <= MAX_DURATION_S:  # also refuses NaN
        return f"its header says that it lasts {record.duration_s} s"
    return None
