"""A run's shards: each is booked as it is made, the store is finished, and a report is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pyarrow.compute as pc

from reducio_latents.corpus.fate import A_PICTURE
from reducio_latents.encode.engines.orders import RUNS_FOLDER as RUNS
from reducio_latents.encode.job import Job
from reducio_latents.encode.quality import require_floor
from reducio_latents.encode.report import EncodeReport, count_kinds
from reducio_latents.encode.shards import ShardDone, encode_shards, rounds
from reducio_latents.encode.stop import StoppedError
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.plan import REMOVED
from reducio_latents.store.whole import (
    Outcome,
    Tally,
    finish,
    gather,
    of_shards,
    stored_counts,
)

Todo = Mapping[ShardKey, tuple[str, ...]]
"""Unfinished shards, and the columns that each lacks."""


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


def announce(job: Job, todo: Todo, ranks: int = 1) -> None:
    """Tell the progress how many clips the run is about; the share of one of several `ranks`, which
    may come to do more or less."""
    rows = job.shards()
    left = sum(rows[key] for key in todo)
    stored = sum(rows.values()) - left
    if ranks == 1:
        job.progress.planned(stored + left, stored)
    else:
        job.progress.planned(-(-left // ranks), 0)


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


def make_report(
    job: Job, fresh: set[ShardKey], outcome: Outcome, left: Iterable[ShardKey] = ()
) -> EncodeReport:
    """Tally this run: `encoded` now, `skipped` for being stored before, too short, double or left.

    `fresh` are the shards that it has made, `left` those that are still to be made.
    """
    plan, left = job.planned.plan, list(left)
    stored = stored_counts(plan, outcome, left)
    videos_left, clips_left = of_shards(plan, outcome, left)
    fresh_videos, new_clips = of_shards(plan, outcome, fresh)
    new_videos = len(fresh_videos - videos_left)
    clips, videos = stored["clips"], stored["videos"]
    errors = outcome.reports.errors
    reasons: list[tuple[str, ...]] = [(e.reason, e.video, e.clip_id) for e in errors]
    reasons += [(v["reason"], v["video"]) for v in plan.failed_videos().to_pylist()]
    counts = plan.counts()
    starts = pc.starts_with(plan.video_columns("reason")["reason"], A_PICTURE)
    pictures = pc.sum(starts).as_py() or 0
    options, why_none = job.options, "no bucket has one frame (--buckets ...,1xHxW)"
    if not options.takes_pictures:
        why_none = f"{options.model} takes no single frames"
    skipped = {
        "clips of shards that are left": clips_left,
        "clips stored before": clips.encoded - new_clips,
        "clips of duplicate videos": counts.clips["duplicate"],
        "clips that were removed": counts.clips.get(REMOVED, 0),
        "videos with clips that are left": len(videos_left),
        f"pictures, as {why_none}": pictures,
        "videos without one whole clip": counts.videos["too_short"] - pictures,
        "duplicate videos": counts.videos["duplicate"],
        "videos that were removed": counts.videos.get(REMOVED, 0),
    }
    skipped |= {f"spans: {why}": n for why, n in counts.spans.items() if why != "found"}
    return EncodeReport(
        videos=replace(
            videos, encoded=new_videos, skipped=videos.found - new_videos - videos.failed
        ),
        clips=replace(clips, encoded=new_clips, skipped=clips.found - new_clips - clips.failed),
        skipped={reason: number for reason, number in skipped.items() if number},
        failed=count_kinds(reasons),
        captions_changed=len(job.planned.captions),
        captions_updated=job.options.update_captions,
        videos_gone=job.planned.gone,
        statistics=outcome.statistics,
        shards_left=len(left),
        max_failed=job.options.max_failed,
    )


def run_job(job: Job, ledger: Ledger | None = None) -> EncodeReport:
    """Encode what the job's store lacks, finish the store, and say what became of all."""
    ledger = ledger or Ledger()
    todo = job.todo()
    announce(job, todo)
    encode_todo(job, todo, ledger)
    if job.stop.requested:
        return share_report(job, todo, ledger)
    return conclude(job, todo, ledger)


def encode_todo(
    job: Job, todo: Todo, ledger: Ledger, takes: Callable[[ShardKey], bool] = lambda _: True
) -> None:
    """Encode the shards that this process takes, and book each as it is committed, until all are,
    or the rest is given up. A shard is asked about when it is about to be read."""
    try:
        for names, keys, careful in rounds(job, todo):
            taken: Iterable[ShardKey] = filter(takes, keys)
            if careful and not (taken := list(taken)):
                continue
            for done in encode_shards(job, names, taken, careful=careful):
                ledger.book(done)
    except StoppedError:
        return
