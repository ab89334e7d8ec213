"""One process does all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from reducio_latents.encode.finish import Ledger, Todo, announce, conclude, share_report
from reducio_latents.encode.job import Job
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.shards import encode_shards, rounds
from reducio_latents.encode.stop import StoppedError
from reducio_latents.store.commit import ShardKey


def run_job(job: Job, progress: Progress, ledger: Ledger | None = None) -> EncodeReport:
    """Encode what the job's store lacks, finish the store, and say what became of all."""
    ledger = ledger or Ledger()
    todo = job.todo()
    announce(job, todo, progress)
    encode_todo(job, todo, progress, ledger)
    if job.stop.requested:
        return share_report(job, todo, ledger)
    return conclude(job, todo, ledger)


def encode_todo(
    job: Job,
    todo: Todo,
    progress: Progress,
    ledger: Ledger,
    takes: Callable[[ShardKey], bool] = lambda _: True,
) -> None:
    """Encode the shards that this process takes, and book each as it is committed, until all are,
    or the rest is given up. A shard is asked about when it is about to be read."""
    try:
        for names, keys, careful in rounds(job, todo):
            taken: Iterable[ShardKey] = filter(takes, keys)
            if careful and not (taken := list(taken)):
                continue
            for done in encode_shards(job, names, taken, progress, careful=careful):
                ledger.book(done)
    except StoppedError:
        return
