"""What becomes of each video: planned, too short, a duplicate, or failed; and where clips start."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from reducio_latents.core.clips import TimeSpan, clip_starts
from reducio_latents.core.geometry import cover_and_centre, nearest_bucket
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.entry import CorpusSpan
from reducio_latents.corpus.rows import bare_spans
from reducio_latents.errors import CorpusError
from reducio_latents.store.plan.plan import Plan
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import REMOVED
from reducio_latents.video import is_still_name, may_move

if TYPE_CHECKING:
    from reducio_latents.corpus.probe import ProbeRecord

CUT_TOLERANCE_S = 0.5
"""Cutting at key frames or whole frames makes a clip that much longer or shorter."""
MAX_DURATION_S = 999_999.0
"""Eleven days. A file that claims to last longer has a damaged header; and a clip's id has room for
nine digits of milliseconds."""

A_PICTURE = "a picture: one frame"
"""How the reason begins why a picture has no clip."""
MAX_FITTED_PX = 1 << 27
"""Pixels of a frame that was resized to cover its bucket, before it is cropped."""


class Cut(NamedTuple):
    """The clips of one span, or of one piece of it."""

    span: int
    """Index into the video's spans; 0 in a video without."""
    within: TimeSpan
    """Where in the video it is."""
    bucket: int
    """Index into the spec's buckets."""
    starts: Sequence[float]
    """Of the clips, in seconds of the video, in order; one at least."""


BETWEEN = "a span lies between two shots"


@dataclass(slots=True)
class Fate:
    """What becomes of one video."""

    status: str
    reason: str | None = None
    cuts: Sequence[Cut] = ()
    """Of a duplicate: as they are of its original."""
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
        self._specs = {frames: replace(spec.clip, frames=frames) for frames in self._by_length}
        self.why_unfit = lru_cache(maxsize=4096)(self._why_unfit)

    def cut(self, span: TimeSpan, video: str) -> tuple[int, Sequence[float]]:
        """Return the frames and the starts of clips: the longest ones that there is room for."""
        length = span.end_s - span.start_s
        for frames, spec in self._specs.items():
            if starts := clip_starts(length, spec, video, span.start_s):
                return frames, starts
        return 0, ()

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

    @property
    def too_short(self) -> str:
        """Why nothing is cut from what is shorter than the shortest clip."""
        return f"shorter than a clip of {min(self._by_length)} frames at {self._rate_fps:g} fps"


Decided = Sequence[tuple[CorpusVideo, Fate]]


def decide(
    videos: Sequence[CorpusVideo],
    records: Mapping[str, ProbeRecord],
    spec: PlanSpec,
    previous: Plan | None,
) -> dict[str, Fate]:
    """Return each video's fate; of several with the same bytes the first one, by name, is kept."""
    hashes = {record.sha256 for v in videos if (record := records.get(v.video)) and record.sha256}
    # A part that is stored does not say which spans it had: only whole videos refer to it.
    originals: dict[tuple[str, bool, tuple[TimeSpan, ...]], str] = {}
    removed: dict[str, str] = {}
    if previous is not None:
        for sha256, name in previous.known.planned_with(sorted(hashes)).items():
            shots = (previous.shots(name) or ()) if spec.shots else ()
            originals[sha256, False, shots] = name
        removed = previous.known.removed_with(sorted(hashes))
    sizes = Sizes(spec)
    fates: dict[str, Fate] = {}
    for video in videos:
        record = records.get(video.video)
        if picture := sizes.not_taken(video, record):
            without = {picture: len(video.spans)} if video.spans else {}
            fates[video.video] = Fate("too_short", picture, without_clips=without)
            continue
        reason = video.problem or (None if record is None else _why_unusable(video, record))
        if reason is None and record is not None:
            reason = sizes.why_unfit(record.height, record.width)
        if reason is not None:
            fates[video.video] = Fate("failed", reason)
            continue
        if record is None:
            raise CorpusError(f"{video.video} was listed, but not probed. Probe it first.")
        if record.sha256 in removed:
            reason = f"has the same bytes as {removed[record.sha256]}, which was removed"
            fates[video.video] = Fate(REMOVED, reason)
            continue
        spans, without_clips = _spans(video, record)
        name = video.video
        if spec.duplicates == "refer" and record.sha256:
            whole = not video.spans and (record.shots is None or record.shots.problem is not None)
            parts = () if whole else tuple(within for _, within in spans)
            name = originals.setdefault((record.sha256, bool(video.spans), parts), name)
        cuts = []
        for number, within in spans:
            frames, starts = sizes.cut(within, name)
            if starts:
                bucket = sizes.bucket(frames, record.height, record.width)
                cuts.append(Cut(number, within, bucket, starts))
        cut_spans = {cut.span for cut in cuts}
        if short := len({number for number, _ in spans} - cut_spans):
            without_clips[sizes.too_short] += short
        without = without_clips if video.spans else {}
        if not cuts:
            reason = _none_of(without) if video.spans else sizes.too_short
            if not video.spans and len(spans) > 1:
                reason = f"each of its shots is {sizes.too_short}"
            fates[video.video] = Fate("too_short", reason, without_clips=without)
        elif name == video.video:
            fates[name] = Fate("planned", None, cuts, without_clips=without)
        else:
            reason = f"has the same bytes as {name}"
            fates[video.video] = Fate("duplicate", reason, cuts, name, without)
    return fates


def _spans(
    video: CorpusVideo, record: ProbeRecord
) -> tuple[list[tuple[int, TimeSpan]], Counter[str]]:
    """Return the video's spans by number, and why some are none; of each span its part of each shot
    that it reaches into."""
    shots = () if record.shots is None else record.shots.spans
    spans, problems = list[tuple[int, TimeSpan]](), Counter[str]()
    if not video.spans:
        return _pieces(0, TimeSpan(0.0, record.duration_s), shots), problems
    whole = TimeSpan(0.0, record.duration_s)
    for number, span in enumerate(bare_spans(video.spans)):
        found = span.within(record.duration_s, record.rate_fps)
        if len(video.spans) == 1 and _is_cut_already(span, record):
            found = whole
        if isinstance(found, str):
            problems[found] += 1
        else:
            pieces = _pieces(number, found, shots)
            spans += pieces
            if not pieces:
                problems[BETWEEN] += 1
    return spans, problems


def _is_cut_already(span: CorpusSpan, record: ProbeRecord) -> bool:
    """Whether a file is the very clip that its one span tells of, in times of another video.

    So it is with corpora that are handed on as clips. Such a span lies past the file's end, and is
    as long as the file.
    """
    if span.problem is not None or span.end is None:
        return False
    rate = record.rate_fps if span.in_frames and record.rate_fps > 0 else 1.0
    start_s, end_s = (span.from_s + time / rate for time in (span.start, span.end))
    same = abs(end_s - start_s - record.duration_s) <= CUT_TOLERANCE_S
    return same and end_s > record.duration_s + CUT_TOLERANCE_S


def _pieces(number: int, span: TimeSpan, shots: Sequence[TimeSpan]) -> list[tuple[int, TimeSpan]]:
    """Return what shots, in order, leave of a span; all of it where there are none."""
    if not shots:
        return [(number, span)]
    first = bisect_right(shots, span.start_s, key=lambda shot: shot.end_s)
    pieces = []
    for shot in islice(shots, first, None):
        if shot.start_s >= span.end_s:
            break
        piece = TimeSpan(max(span.start_s, shot.start_s), min(span.end_s, shot.end_s))
        pieces.append((number, piece))
    return pieces


def _none_of(reasons: Mapping[str, int]) -> str:
    return f"none of its spans has a clip: {'; '.join(sorted(reasons))}"


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
