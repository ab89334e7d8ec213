"""Processes that deal the shards out among themselves by rank: on one machine or many.

Rank 0 lists, probes and plans; the others wait for its order. Each encodes its share, and then what
slower ones have not begun; rank 0 finishes the store. A rank that dies stops no other: the shards
that it had begun stay undone, and the same command does them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess

from reducio_latents.core.text import print_logs_safely
from reducio_latents.corpus import corpus_root
from reducio_latents.encode.engines.orders import Order, RunFiles
from reducio_latents.encode.engines.ranks import Rank, rank_of
from reducio_latents.encode.finish import (
    Ledger,
    Todo,
    announce,
    conclude,
    encode_todo,
    share_report,
)
from reducio_latents.encode.job import Job, RunRequest, join, prepare
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.prepare import list_by
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.stop import Stop, stop_on_signals
from reducio_latents.errors import ConfigError
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource, join_url
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.turns import at_work
from reducio_latents.store.writer import read_meta_if_any
from reducio_latents.video.processes import end_with

log = logging.getLogger(__name__)


def local_engine(options: EncodeOptions) -> Callable[[RunRequest], EncodeReport] | None:
    """Return what runs the rank that the environment names, or the ranks that the options ask for;
    None if this process is to do all by itself."""
    rank = rank_of()
    if rank is not None:
        return lambda request: run_rank(request, rank)
    count = local_gpus(options)
    return (lambda request: run_ranks(request, count)) if count > 1 else None


def local_gpus(options: EncodeOptions) -> int:
    """Return how many processes `gpus` asks for; raise ConfigError for more than there are."""
    if options.gpus == 1:
        return 1
    import torch

    there = torch.cuda.device_count() if options.device in ("auto", "cuda") else 0
    if options.gpus == "all":
        return max(1, there)
    if options.gpus > there:
        raise ConfigError(
            f"gpus is {options.gpus}, but device {options.device!r} has {there} here. Use --gpus "
            "all for those it has."
        )
    return options.gpus


def run_ranks(request: RunRequest, count: int) -> EncodeReport:
    """Run as rank 0 of `count`, the others being processes that this one starts."""
    # Twice as many workers as there are cores for: those of a rank whose GPU is behind wait for it,
    # and leave their cores to those of the others.
    workers = min(request.options.workers, -(-2 * request.options.workers // count))
    options = replace(request.options, gpus=1, workers=workers)
    name = uuid.uuid4().hex[:12]
    theirs = RunRequest(request.corpus, request.store, options)
    context = multiprocessing.get_context("spawn")
    others = [
        # No daemons: they have decode workers of their own.
        context.Process(
            target=_be_rank,
            args=(theirs, Rank(number, count, number, name), os.getpid()),
        )
        for number in range(1, count)
    ]
    for process in others:
        process.start()
    try:
        with _handing_on(request.stop, others):
            mine = replace(request, options=options)
            return run_rank(mine, Rank(0, count, 0, name), others)
    finally:
        for process in others:
            process.join(options.rank_timeout_s if request.stop.requested else 10)
            process.kill()


def run_rank(
    request: RunRequest, rank: Rank, others: Sequence[BaseProcess] | None = None
) -> EncodeReport:
    """Do one rank's part of a run."""
    options = replace(request.options, device=rank.device(request.options.device))
    _use_device(options.device)
    request = replace(request, options=options)
    files = open_files(request.store)
    run = RunFiles(files, rank, options.rank_timeout_s)
    if rank.leads:
        read_meta_if_any(files)  # refuses a place that is taken by something else
        run.clear()
    with at_work(files, f"encoding, {rank}", rank.run):
        if rank.leads:
            return _lead(request, rank, run, others or ())
        return _follow(request, rank, run)


def _lead(
    request: RunRequest, rank: Rank, run: RunFiles, others: Sequence[BaseProcess]
) -> EncodeReport:
    ledger = Ledger()
    with run.alive():
        job = prepare(replace(request, run=rank.run))
        todo = job.todo()
        run.announce(Order.of(job.root, todo, moved_sources(job)))
        announce(job, todo, rank.of)
        mine = _encode(job, todo, rank, run, ledger)
        run.wait_for_ranks(job.stop, [p.is_alive for p in others])
    if job.stop.requested:
        return replace(share_report(job, mine, ledger), shards_left=len(job.missing()))
    return conclude(job, todo, ledger)


def _follow(request: RunRequest, rank: Rank, run: RunFiles) -> EncodeReport:
    ledger = Ledger()
    with run.alive():
        order = run.wait_for_order(request.stop)
        if order is None:
            return EncodeReport(signal=request.stop.signal, share=str(rank))
        root, moved = order.root, order.moved()
        if order.signed:
            options = request.options
            root = corpus_root(request.corpus, options.root)
            moved |= {
                video.video: video.source for video in list_by(request.corpus, options).videos
            }
        job = join(request, root, moved)
        todo, left = order.todo(), job.missing()  # a task that was requeued has done some already
        announce(job, todo, rank.of)
        there = {key: left[key] for key in todo if key in left}
        mine = _encode(job, there, rank, run, ledger)
    report = share_report(job, mine, ledger, str(rank))
    if job.stop.requested:
        return report
    if not run.hear_of_lead(job.stop):  # the store is finished in its place if nothing is missing
        if left := job.missing():
            return replace(report, shards_left=len(left))
        conclude(job, todo, ledger)
        return report
    if run.leave() and not job.missing():
        conclude(job, todo, ledger)  # rank 0 has gone before this one was done
    return report


def _encode(job: Job, todo: Todo, rank: Rank, run: RunFiles, ledger: Ledger) -> Todo:
    """Encode what this rank takes of the shards, and return what it took."""
    taken: dict[ShardKey, tuple[str, ...]] = {}

    def takes(key: ShardKey) -> bool:
        if is_mine := run.take(key):
            taken[key] = todo[key]
        return is_mine

    encode_todo(job, {key: todo[key] for key in rank.in_turn(list(todo))}, ledger, takes)
    return taken


def moved_sources(job: Job) -> dict[str, VideoSource | None]:
    """Return the videos of the plan that are not where the plan has them, or gone."""
    table = job.planned.plan.video_columns("video", "url", "offset", "length")
    moved = {}
    for batch in table.to_batches():
        columns = (column.to_pylist() for column in batch.columns)
        for video, url, offset, length in zip(*columns, strict=True):
            found = job.planned.find(video)
            if found != VideoSource(join_url(job.root, url), offset, length):
                moved[video] = found
    return moved


def _be_rank(request: RunRequest, rank: Rank, main_pid: int) -> None:
    """Run one rank that `run_ranks` has started, and end with its exit code."""
    end_with(main_pid)
    print_logs_safely()
    with stop_on_signals() as stop:
        report = run_rank(replace(request, stop=stop), rank)
    sys.exit(report.exit_code)


@contextmanager
def _handing_on(stop: Stop, others: Sequence[BaseProcess]) -> Iterator[None]:
    """Ask the other ranks to stop when this one is asked."""

    def hand_on(number: int) -> None:
        for process in others:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    stop.on_request.append(hand_on)
    try:
        yield
    finally:
        stop.on_request.remove(hand_on)


def _use_device(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        from reducio_latents.core.devices import usable_device

        torch.cuda.set_device(usable_device(device))
