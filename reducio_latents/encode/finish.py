"""After the last shard: index, statistics, counts, errors and the report of the run.

All that is stored is made from plan and commits: whoever does it, and how often, it is the same.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.corpus.fate import A_PICTURE
from reducio_latents.encode.engines.orders import RUNS_FOLDER as RUNS
from reducio_latents.encode.job import Job
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.quality import require_floor
from reducio_latents.encode.report import EncodeReport, Tally, count_kinds
from reducio_latents.encode.shards import ShardDone
from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.index import Index, IndexEntry, require_same_clips, write_index
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import Plan, ShardSums
from reducio_latents.store.reports import ClipError, Reports
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.writer import StoreWriter
from reducio_latents.version import __version__

Todo = Mapping[ShardKey, tuple[str, ...]]
"""Unfinished shards, and the columns that each lacks."""
ALL = "all"


@dataclass
class Outcome:
    """All commits of a store, folded."""

    entries: dict[tuple[str, ShardKey], IndexEntry]
    statistics: dict[str, dict[str, dict[str, list[float]]]]
    reports: Reports
    """What failed, and how well clips decode."""

    @property
    def errors(self) -> list[ClipError]:
        return self.reports.errors


def gather(writer: StoreWriter) -> Outcome:
    """Read every commit once, in order, so that the sums do not depend on who wrote when.

    Columns that another process has added meanwhile are gathered with the rest.
    """
    writer.take_in_columns()
    entries: dict[tuple[str, ShardKey], IndexEntry] = {}
    merged: dict[tuple[str, str], dict[str, ChannelStatistics]] = {}
    reports = Reports()
    for commit in _commits(writer):
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
    for name, data in outcome.reports.files(plan).items():
        writer.files.write(name, data)
    writer.meta = StoreMeta.update(
        writer.files,
        lambda stored: replace(
            stored or writer.meta,
            counts={name: asdict(tally) for name, tally in counts.items()},
            statistics=outcome.statistics,
            versions=versions(),
        ),
    )


def versions() -> dict[str, str]:
    """Return the versions of all that the stored numbers depend on."""
    found = {"reducio_latents": __version__, "python": platform.python_version()}
    for name in (
        "torch",
        "numpy",
        "pyarrow",
        "av",
        "decord",
        "pillow",
        "diffusers",
        "transformers",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commits(writer: StoreWriter) -> Iterator[Commit]:
    sums = ShardSums(writer.files)
    for column, key in list_commits(writer.files):
        if column in writer.meta.columns:
            commit = Commit.read(writer.files, key, column)
            require_same_clips(writer.files, commit, sums)
            yield commit


@dataclass
class Ledger:
    """What this process has committed so far."""

    begun: float = field(default_factory=time.perf_counter)
    done: set[ShardKey] = field(default_factory=set)
    encoded: int = 0
    failed: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def book(self, done: ShardDone) -> None:
        self.done.add(done.key)
        self.failed += len(done.failed)
        self.encoded += done.rows - len(done.failed)
        for stage, seconds in done.timings.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


def announce(job: Job, todo: Todo, progress: Progress, share: Iterable[ShardKey] = ()) -> None:
    """Tell the progress how many clips the run is about; with `share`, that part of them."""
    rows = job.shards()
    about = set(share) or set(rows)
    total = sum(n for key, n in rows.items() if key in about)
    progress.planned(total, sum(n for key, n in rows.items() if key in about and key not in todo))


def conclude(job: Job, todo: Todo, ledger: Ledger) -> EncodeReport:
    """Write the index, statistics, counts and errors of the store; report on the whole run.

    A function of plan and commits: whoever does it, and how often, it writes the same.
    """
    job.take_in_plan()
    left = job.missing()
    job.journal.sweep(left)
    for path in list(job.writer.files.list(RUNS)):
        job.writer.files.delete(path)
    job.writer.sweep()
    outcome = gather(job.writer)
    finish(job.writer, job.planned.plan, stored_counts(job.planned.plan, outcome, left), outcome)
    fresh = {key for key in todo if key not in left}
    report = make_report(job, fresh, outcome, left)
    psnr = [clip.psnr for _, clip in outcome.reports.quality]
    mean = sum(psnr) / len(psnr) if psnr else None
    if mean is not None:
        require_floor(mean, len(psnr), job.options.min_psnr)  # a run of few clips was not stopped
    return replace(
        report, seconds=time.perf_counter() - ledger.begun, stages=ledger.stages, psnr=mean
    )


def share_report(job: Job, todo: Todo, ledger: Ledger, share: str = "") -> EncodeReport:
    """Report on the shards that a run, or one rank of it, had to do, finished or not."""
    rows = job.shards()
    found = sum(rows[key] for key in todo)
    left = [key for key in todo if key not in ledger.done]
    return EncodeReport(
        videos=Tally(),
        clips=Tally(found, ledger.encoded, sum(rows[key] for key in left), ledger.failed),
        skipped={"clips of shards that are left": sum(rows[key] for key in left)} if left else {},
        seconds=time.perf_counter() - ledger.begun,
        stages=ledger.stages,
        shards_left=len(left),
        max_failed=job.options.max_failed,
        signal=job.stop.signal,
        share=share,
    )


def stored_counts(plan: Plan, outcome: Outcome, left: Iterable[ShardKey] = ()) -> dict[str, Tally]:
    """Return the tallies of the store as it is.

    `skipped` is what needed no encoding, and what is in the shards that are `left`.
    """
    table = plan.video_columns("video", "status")
    status = table["status"]
    bad_videos = pa.array(sorted({error.video for error in outcome.errors}), pa.string())
    is_bad = pc.or_(pc.equal(status, "failed"), pc.is_in(table["video"], bad_videos))
    failed = pc.sum(is_bad).as_py() or 0
    counts = plan.counts()
    skipped = counts.videos["too_short"] + counts.videos["duplicate"]
    clips, duplicates = counts.clips["found"], counts.clips["duplicate"]
    bad = len(outcome.errors)
    videos_left, clips_left = _of_shards(plan, outcome, left)
    skipped, duplicates = skipped + len(videos_left), duplicates + clips_left
    return {
        "videos": Tally(len(status), len(status) - failed - skipped, skipped, failed),
        "clips": Tally(clips, clips - duplicates - bad, duplicates, bad),
    }


def make_report(
    job: Job, fresh: set[ShardKey], outcome: Outcome, left: Iterable[ShardKey] = ()
) -> EncodeReport:
    """Tally this run: `encoded` now, `skipped` for being stored before, too short, double or left.

    `fresh` are the shards that it has made, `left` those that are still to be made.
    """
    plan, left = job.planned.plan, list(left)
    stored = stored_counts(plan, outcome, left)
    videos_left, clips_left = _of_shards(plan, outcome, left)
    fresh_videos, new_clips = _of_shards(plan, outcome, fresh)
    new_videos = len(fresh_videos - videos_left)
    clips, videos = stored["clips"], stored["videos"]
    reasons: list[tuple[str, ...]] = [(e.reason, e.video, e.clip_id) for e in outcome.errors]
    reasons += [(v["reason"], v["video"]) for v in plan.failed_videos().to_pylist()]
    counts = plan.counts().videos
    starts = pc.starts_with(plan.video_columns("reason")["reason"], A_PICTURE)
    pictures = pc.sum(starts).as_py() or 0
    skipped = {
        "clips of shards that are left": clips_left,
        "clips stored before": clips.encoded - new_clips,
        "clips of duplicate videos": clips.skipped - clips_left,
        "videos with clips that are left": len(videos_left),
        _why_no_pictures(job.options): pictures,
        "videos without one whole clip": counts["too_short"] - pictures,
        "duplicate videos": counts["duplicate"],
    }
    spans = plan.counts().spans
    skipped |= {f"spans: {why}": number for why, number in spans.items() if why != "found"}
    return EncodeReport(
        videos=replace(
            videos, encoded=new_videos, skipped=videos.found - new_videos - videos.failed
        ),
        clips=replace(clips, encoded=new_clips, skipped=clips.found - new_clips - clips.failed),
        skipped={reason: number for reason, number in skipped.items() if number},
        failed=count_kinds(reasons),
        statistics=outcome.statistics,
        shards_left=len(left),
        max_failed=job.options.max_failed,
    )


def _why_no_pictures(options: EncodeOptions) -> str:
    if options.takes_pictures:
        return "pictures, as no bucket has one frame (--buckets ...,1xHxW)"
    return f"pictures, as {options.model} takes no single frames"


def _of_shards(plan: Plan, outcome: Outcome, keys: Iterable[ShardKey]) -> tuple[set[str], int]:
    """Return the videos of some shards, and how many clips; but for what has failed."""
    bad = {error.clip_id for error in outcome.errors}
    videos, clips = set[str](), 0
    for key in sorted(set(keys)):
        table = plan.shard_clips(*key, ["clip_id", "video"])
        videos.update(table["video"].unique().to_pylist())
        clips += sum(clip not in bad for clip in table["clip_id"].to_pylist())
    return videos - {error.video for error in outcome.errors}, clips
