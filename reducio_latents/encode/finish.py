"""After the last shard: index, statistics, counts and errors, all made from plan and commits."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa
import pyarrow.parquet as pq

from reducio_latents.encode.quality import QUALITY, quality_parquet
from reducio_latents.encode.report import Tally
from reducio_latents.store.commit import ClipQuality, Commit, ShardKey, list_commits
from reducio_latents.store.index import Index, IndexEntry, write_index
from reducio_latents.store.plan import Plan
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.writer import StoreWriter
from reducio_latents.version import __version__

ERRORS = "errors.parquet"
ERRORS_SCHEMA = pa.schema(
    [
        pa.field("video", pa.string(), nullable=False),
        pa.field("clip_id", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""A row is a failed video (clip_id null, stage `probe`) or clip (stage: the column it lacks)."""
ALL = "all"


@dataclass(frozen=True)
class ClipError:
    """One failed clip."""

    video: str
    clip_id: str
    column: str
    reason: str


@dataclass
class Outcome:
    """All commits of a store, folded."""

    entries: dict[tuple[str, ShardKey], IndexEntry]
    statistics: dict[str, dict[str, dict[str, list[float]]]]
    errors: list[ClipError]
    """The first column that lacks a clip speaks for it."""
    quality: list[tuple[ShardKey, ClipQuality]]
    """Of the clips that were decoded while they were encoded."""


def gather(writer: StoreWriter) -> Outcome:
    """Read every commit once, in order, so that the sums do not depend on who wrote when.

    Columns that another process has added meanwhile are gathered with the rest.
    """
    writer.take_in_columns()
    entries: dict[tuple[str, ShardKey], IndexEntry] = {}
    merged: dict[tuple[str, str], dict[str, ChannelStatistics]] = {}
    errors: dict[str, ClipError] = {}
    quality: list[tuple[ShardKey, ClipQuality]] = []
    for commit in _commits(writer):
        entries[commit.column, commit.key] = IndexEntry.of(commit)
        quality += [(commit.key, clip) for clip in commit.quality]
        for bucket in (commit.bucket, ALL):
            sums = merged.setdefault((commit.column, bucket), {})
            for name, part in commit.statistics.items():
                sums[name] = sums[name].merge(part) if name in sums else part
        for failure in commit.failed:
            error = ClipError(failure.video, failure.clip_id, commit.column, failure.reason)
            errors.setdefault(failure.clip_id, error)
    statistics = {
        f"{column}/{bucket}": {name: _summary(part) for name, part in sorted(sums.items())}
        for (column, bucket), sums in sorted(merged.items())
        if sums
    }
    ordered = sorted(errors.values(), key=lambda e: (e.video, e.clip_id))
    return Outcome(entries, statistics, ordered, quality)


def finish(writer: StoreWriter, plan: Plan, counts: Mapping[str, Tally], outcome: Outcome) -> None:
    """Write index, errors and the store's description."""
    write_index(writer.files, Index(outcome.entries))
    writer.files.write(ERRORS, _errors_parquet(plan, outcome.errors))
    if outcome.quality:
        writer.files.write(QUALITY, quality_parquet(outcome.quality))
    writer.meta = replace(
        writer.meta,
        counts={name: asdict(tally) for name, tally in counts.items()},
        statistics=outcome.statistics,
        versions=versions(),
    )
    writer.meta.write(writer.files)


def versions() -> dict[str, str]:
    """Return the versions of all that the stored numbers depend on."""
    found = {"reducio_latents": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "av", "decord", "pillow", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commits(writer: StoreWriter) -> Iterator[Commit]:
    for column, key in list_commits(writer.files):
        if column in writer.meta.columns:
            yield Commit.read(writer.files, key, column)


def _summary(part: ChannelStatistics) -> dict[str, list[float]]:
    return {"mean": list(part.mean), "std": list(part.std), "count": [float(part.count)]}


def _errors_parquet(plan: Plan, errors: list[ClipError]) -> bytes:
    videos = plan.videos.select(["video", "status", "reason"]).to_pylist()
    rows = [
        {"video": row["video"], "clip_id": None, "stage": "probe", "reason": row["reason"]}
        for row in videos
        if row["status"] == "failed"
    ]
    rows += [
        {"video": e.video, "clip_id": e.clip_id, "stage": e.column, "reason": e.reason}
        for e in errors
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, ERRORS_SCHEMA), sink)
    return bytes(sink.getvalue().to_pybytes())
