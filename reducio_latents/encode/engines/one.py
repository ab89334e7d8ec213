"""One process does all of it; and how any run ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from reducio_latents.encode.engines.orders import FOLDER as RUNS
from reducio_latents.encode.finish import finish, gather
from reducio_latents.encode.job import Job, make_report, stored_counts
from reducio_latents.encode.pipeline import ShardDone
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.quality import require_floor
from reducio_latents.encode.report import EncodeReport, Tally
from reducio_latents.encode.shards import encode_missing
from reducio_latents.encode.stop import StoppedError
from reducio_latents.store.commit import ShardKey

Todo = Mapping[ShardKey, tuple[str, ...]]


@dataclass
class Ledger:
    """What has been committed so far, by this process."""

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

    def book_all(self, shards: Iterable[ShardDone]) -> None:
        """Book every shard of a run, until it is over or has been given up."""
        try:
            for done in shards:
                self.book(done)
        except StoppedError:
            return


def run_job(job: Job, progress: Progress, start: float | None = None) -> EncodeReport:
    """Encode what the job's store lacks, finish the store, and say what became of all.

    `start` is when the run began, by `time.perf_counter`.
    """
    ledger = Ledger() if start is None else Ledger(start)
    todo = job.todo()
    announce(job, todo, progress)
    ledger.book_all(encode_missing(job, todo, progress))
    if job.stop.requested:
        return share_report(job, todo, ledger)
    return conclude(job, todo, ledger)


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
