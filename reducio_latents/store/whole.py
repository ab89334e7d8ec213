"""What a store says of itself as a whole: index, reports, statistics, counts.

All of it is made from plan and commits: whoever does it, and how often, it is the same.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.index import Index, IndexEntry, require_same_clips, write_index
from reducio_latents.store.plan import REMOVED, Plan, ShardSums
from reducio_latents.store.reports import QUALITY, Reports
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.writer import StoreWriter
from reducio_latents.version import __version__

ALL = "all"
LIBRARIES = (
    "torch",
    "numpy",
    "pyarrow",
    "av",
    "decord",
    "torchcodec",
    "pillow",
    "diffusers",
    "transformers",
)
"""What the stored numbers depend on."""


@dataclass(frozen=True)
class Tally:
    """Where a number of things went."""

    found: int = 0
    encoded: int = 0
    skipped: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        assert self.found == self.encoded + self.skipped + self.failed, self

    def __str__(self) -> str:
        return (
            f"{self.found} found = {self.encoded} encoded + {self.skipped} skipped + "
            f"{self.failed} failed"
        )


@dataclass
class Outcome:
    """All commits of a store, folded."""

    entries: dict[tuple[str, ShardKey], IndexEntry]
    statistics: dict[str, dict[str, dict[str, list[float]]]]
    reports: Reports
    """What failed, and how well clips decode."""


def gather(writer: StoreWriter) -> Outcome:
    """Read every commit once, in order, so that the sums do not depend on who wrote when.

    Columns that another process has added meanwhile are gathered with the rest.
    """
    writer.take_in_columns()
    entries: dict[tuple[str, ShardKey], IndexEntry] = {}
    merged: dict[tuple[str, str], dict[str, ChannelStatistics]] = {}
    reports = Reports()
    shards = ShardSums(writer.files)
    for column, key in list_commits(writer.files):
        if column not in writer.meta.columns:
            continue
        commit = Commit.read(writer.files, key, column)
        require_same_clips(writer.files, commit, shards)
        entries[commit.column, commit.key] = IndexEntry.of(commit)
        reports.add(commit)
        for bucket in (commit.bucket, ALL):
            sums = merged.setdefault((commit.column, bucket), {})
            for name, part in commit.statistics.items():
                sums[name] = sums[name].merge(part) if name in sums else part
    statistics = {
        f"{column}/{bucket}": {name: part.summary() for name, part in sorted(sums.items())}
        for (column, bucket), sums in sorted(merged.items())
        if sums
    }
    return Outcome(entries, statistics, reports)


def finish(writer: StoreWriter, plan: Plan, counts: Mapping[str, Tally], outcome: Outcome) -> None:
    """Write index, reports and the store's description."""
    write_index(writer.files, Index(outcome.entries))
    reports = outcome.reports.files(plan)
    for name, data in reports.items():
        writer.files.write(name, data)
    if QUALITY not in reports and writer.files.size(QUALITY) is not None:
        writer.files.delete(QUALITY)
    writer.complete(
        plan,
        lambda stored: replace(
            stored or writer.meta,
            counts={name: asdict(tally) for name, tally in counts.items()},
            statistics=outcome.statistics,
            versions=versions(),
        ),
    )


def sum_up(writer: StoreWriter, plan: Plan) -> None:
    """Write the same of a store that no run is at work on; what lacks a column is left."""
    outcome = gather(writer)
    keys = [ShardKey(shard.bucket, shard.shard) for shard in plan.shards()]
    left = [k for k in keys if any((c, k) not in outcome.entries for c in writer.meta.columns)]
    finish(writer, plan, stored_counts(plan, outcome, left), outcome)


def versions() -> dict[str, str]:
    """Return the versions of all that the stored numbers depend on."""
    found = {"reducio_latents": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def stored_counts(plan: Plan, outcome: Outcome, left: Iterable[ShardKey] = ()) -> dict[str, Tally]:
    """Return the tallies of the store as it is.

    `skipped` is what needed no encoding, what was removed, and what is in shards that are `left`.
    """
    table = plan.video_columns("video", "status")
    status = table["status"]
    bad_videos = pa.array(sorted({error.video for error in outcome.reports.errors}), pa.string())
    is_bad = pc.or_(pc.equal(status, "failed"), pc.is_in(table["video"], bad_videos))
    failed = pc.sum(is_bad).as_py() or 0
    counts = plan.counts()
    skipped = sum(counts.videos.get(name, 0) for name in ("too_short", "duplicate", REMOVED))
    clips = counts.clips["found"]
    others = clips - counts.clips["planned"]
    bad = len(outcome.reports.errors)
    videos_left, clips_left = of_shards(plan, outcome, left)
    skipped, others = skipped + len(videos_left), others + clips_left
    return {
        "videos": Tally(len(status), len(status) - failed - skipped, skipped, failed),
        "clips": Tally(clips, clips - others - bad, others, bad),
    }


def of_shards(plan: Plan, outcome: Outcome, keys: Iterable[ShardKey]) -> tuple[set[str], int]:
    """Return the videos of some shards, and how many clips; but for what failed or was removed."""
    bad = {error.clip_id for error in outcome.reports.errors}
    videos, clips = set[str](), 0
    for key in sorted(set(keys)):
        table = plan.shard_clips(*key, ["clip_id", "video", "status"])
        table = table.filter(pc.equal(table["status"], "planned"))
        videos.update(table["video"].unique().to_pylist())
        clips += sum(clip not in bad for clip in table["clip_id"].to_pylist())
    return videos - {error.video for error in outcome.reports.errors}, clips
