"""One process does all of it."""

from __future__ import annotations

from reducio_latents.encode.finish import Ledger, Todo, announce, conclude, share_report
from reducio_latents.encode.job import Job
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.shards import encode_shards, rounds
from reducio_latents.encode.stop import StoppedError


def run_job(job: Job, progress: Progress, ledger: Ledger | None = None) -> EncodeReport:
    """Encode what the job's store lacks, finish the store, and say what became of all."""
    ledger = ledger or Ledger()
    todo = job.todo()
    announce(job, todo, progress)
    encode_todo(job, todo, progress, ledger)
    if job.stop.requested:
        return share_report(job, todo, ledger)
    return conclude(job, todo, ledger)


def encode_todo(job: Job, todo: Todo, progress: Progress, ledger: Ledger) -> None:
    """Encode shards and book each as it is committed, until all are, or the rest is given up."""
    try:
        for names, keys, careful in rounds(job, todo):
            for done in encode_shards(job, names, keys, progress, careful=careful):
                ledger.book(done)
    except StoppedError:
        return
