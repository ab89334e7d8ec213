"""What a plan amounts to, for a person: videos, clips, hours, buckets, bytes, reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow.compute as pc

from reducio_latents.store.plan.plan import Plan, PlanCounts


@dataclass(frozen=True)
class BucketSummary:
    """The clips of one bucket that have rows of their own."""

    bucket: str
    clips: int
    shards: int
    bytes: int | None
    """What their rows will take in the store; None if it was not said what one takes."""


@dataclass(frozen=True)
class PlanSummary:
    """What there is, and what encoding it comes to."""

    counts: PlanCounts
    video_hours: float
    """Of the videos that could be read."""
    clip_hours: float
    """Of the clips with rows of their own, overlaps counted twice."""
    buckets: tuple[BucketSummary, ...]
    """In the order of the spec, empty ones too."""
    bytes: int | None
    captions_changed: int = field(default=0, kw_only=True)
    """Clips of which the corpus has other captions now."""
    videos_gone: int = field(default=0, kw_only=True)
    """Videos that the corpus does not list any more."""
    reasons: dict[str, int]
    """Why videos have no clips of their own -> how many; the most frequent first."""


def summarise(plan: Plan, bytes_per_clip: Mapping[str, int] | None = None) -> PlanSummary:
    """Return the summary of a plan; `bytes_per_clip` gives bucket -> bytes of all columns."""
    counts = plan.counts()
    clips: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    for shard in plan.shards():
        clips[shard.bucket] += shard.rows
        shards[shard.bucket] += 1
    names = [bucket.name for bucket in plan.spec.buckets]
    sizes: dict[str, int | None] = dict.fromkeys(names)
    if bytes_per_clip is not None:
        sizes |= {name: clips[name] * bytes_per_clip[name] for name in names}
    buckets = tuple(BucketSummary(n, clips[n], shards[n], sizes[n]) for n in names)
    frames = sum(clips[bucket.name] * bucket.frames for bucket in plan.spec.buckets)
    return PlanSummary(
        counts=counts,
        video_hours=(pc.sum(plan.video_columns("duration_s")["duration_s"]).as_py() or 0.0) / 3600,
        clip_hours=frames / plan.spec.clip.rate_fps / 3600,
        buckets=buckets,
        bytes=sum(b.bytes or 0 for b in buckets) if bytes_per_clip is not None else None,
        reasons=_count_reasons(plan),
    )


def _count_reasons(plan: Plan) -> dict[str, int]:
    table = plan.video_columns("status", "reason")
    table = table.group_by(["status", "reason"]).aggregate([([], "count_all")])
    counter: Counter[str] = Counter()
    for row in table.to_pylist():
        if row["reason"] is not None:
            same = row["status"] == "duplicate"
            reason = "has the same bytes as another video" if same else row["reason"]
            counter[reason] += row["count_all"]
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
