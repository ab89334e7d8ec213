"""Ray core actors that take shards as they are free: for clusters whose nodes come and go.

The driver lists, probes and plans; an actor decodes and encodes in one place, so that no pixel and
no latent goes through Ray; commits are the only state. An actor that dies is replaced by a fresh
one (`max_restarts=0`: Ray's own restarts would fail what was waiting for it), and its shards are
taken again. The journal of attempts ends what would otherwise go on for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from reducio_latents.encode.attempts import CAREFUL_ATTEMPTS, PLAIN_ATTEMPTS
from reducio_latents.encode.batches import needs_of
from reducio_latents.encode.columns import CAPTIONS, CONTENT
from reducio_latents.encode.engines.local import moved_sources
from reducio_latents.encode.finish import Ledger, Todo, announce, conclude, share_report
from reducio_latents.encode.job import Job, Moved, RunRequest, describe_store, join, plan_job
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.registry import build_columns
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.shards import ShardDone, encode_shards
from reducio_latents.encode.stop import StoppedError
from reducio_latents.errors import ConfigError, LatentsError
from reducio_latents.files import open_files
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.writer import read_meta_if_any

log = logging.getLogger(__name__)

SHARDS_AHEAD = 2
"""Shards that an actor has at once: the next one is decoded while the first is encoded."""
MOST_ATTEMPTS = 2 * (PLAIN_ATTEMPTS + 2 * CAREFUL_ATTEMPTS)
"""Actors that one shard may cost. Reached only if something other than a video ends them."""
START_FAILURES = 3
"""Actors in a row that may fail to start before the run is given up."""


class ShardActor:
    """Encodes shards on one node: what Ray runs. Methods are called from several threads."""

    def __init__(self, store: str, options: EncodeOptions, root: str, moved: Moved) -> None:
        self._job = join(RunRequest("", store, options), root, moved)
        self._streams: dict[tuple[str, ...], _Stream] = {}
        self._lock = threading.Lock()

    def ready(self) -> bool:
        """Return once the encoders are loaded."""
        return True

    def encode(self, key: tuple[str, int], names: tuple[str, ...]) -> ShardDone:
        """Encode some columns of one shard and return when they are committed."""
        shard = ShardKey(*key)
        if self._job.journal.suspects([shard]):
            with self._lock:  # alone: whatever else it did would be blamed too
                self._end_streams()
                (done,) = encode_shards(self._job, names, [shard], careful=True)
                return done
        with self._lock:
            stream = self._streams.get(names)
            if stream is None:
                self._end_streams()
                stream = self._streams[names] = _Stream(self._job, names)
            waiting = stream.put(shard)
        return waiting.result()

    def _end_streams(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


class _Stream:
    """Shards that lack the same columns, encoded one after another with read-ahead between them."""

    def __init__(self, job: Job, names: tuple[str, ...]) -> None:
        self._job, self._names = job, names
        self._given: queue.Queue[ShardKey | None] = queue.Queue()
        self._results: dict[ShardKey, Future[ShardDone]] = {}
        encoders = [encoder for encoder in job.encoders if encoder.name in names]
        # What is made of stored images and captions is cheap to start, and wants whole lists.
        self._singly = needs_of(encoders) <= {CAPTIONS, CONTENT}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, key: ShardKey) -> Future[ShardDone]:
        result = self._results[key] = Future()
        self._given.put(key)
        return result

    def close(self) -> None:
        """Finish what was put in, and end."""
        self._given.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            for done in self._encoded():
                self._results.pop(done.key).set_result(done)
        except BaseException as err:
            for result in self._results.values():
                result.set_exception(err)

    def _encoded(self) -> Iterator[ShardDone]:
        if not self._singly:
            yield from encode_shards(self._job, self._names, self._feed())
            return
        while (key := self._given.get()) is not None:
            yield from encode_shards(self._job, self._names, [key])

    def _feed(self) -> Iterator[ShardKey | None]:
        """Yield shards as they are put in; None, which is asked again, while there is none."""
        while True:
            try:
                key = self._given.get_nowait()
            except queue.Empty:
                yield None
                continue
            if key is None:
                return
            yield key


@dataclass
class _Worker:
    """An actor, and what it has in hand."""

    actor: Any
    starting: Any
    """Reference to the end of its start; None once it is ready."""
    tasks: dict[Any, ShardKey] = field(default_factory=dict)


class Fleet:
    """The actors of one run."""

    def __init__(self, request: RunRequest, job: Job, todo: Todo) -> None:
        import ray

        self._ray = ray
        self._request, self._job, self._todo = request, job, todo
        self._waiting = deque(todo)
        self._attempts: dict[ShardKey, int] = {}
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._moved = ray.put(moved_sources(job))

    def run(self) -> Iterator[ShardDone]:
        """Yield every shard as it is committed, until all are or a stop is asked for."""
        try:
            while (self._waiting and not self._job.stop.requested) or self._busy():
                if not self._job.stop.requested:
                    self._grow()
                    self._deal()
                references = [r for worker in self._workers for r in _references(worker)]
                ended, _ = self._ray.wait(references, num_returns=1, timeout=1.0)
                for reference in ended:
                    done = self._take(reference)
                    if done is not None:
                        yield done
        finally:
            for worker in self._workers:
                self._ray.kill(worker.actor)

    def _busy(self) -> bool:
        return any(worker.tasks for worker in self._workers)

    def _grow(self) -> None:
        """Start actors for the GPUs that there are now, as far as there is work for them."""
        asked = self._request.options.gpus
        gpus = gpus_there(self._request.options)
        wanted = asked if isinstance(asked, int) else max(1, gpus)
        idle = sum(not worker.tasks for worker in self._workers)
        options = actor_options(self._request.options, gpus)
        while len(self._workers) < wanted and idle < len(self._waiting):
            self._workers.append(self._start(options))
            idle += 1

    def _start(self, options: EncodeOptions) -> _Worker:
        actor = (
            self._ray.remote(ShardActor)
            .options(
                num_cpus=1,
                num_gpus=gpus_for(options),
                max_restarts=0,
                max_concurrency=SHARDS_AHEAD + 1,
            )
            .remote(self._request.store, options, self._job.root, self._moved)
        )
        return _Worker(actor, actor.ready.remote())

    def _deal(self) -> None:
        for worker in self._workers:
            while self._waiting and worker.starting is None and len(worker.tasks) < SHARDS_AHEAD:
                key = self._waiting.popleft()
                self._attempts[key] = self._attempts.get(key, 0) + 1
                if self._attempts[key] > MOST_ATTEMPTS:
                    raise LatentsError(
                        f"shard {key} has cost {MOST_ATTEMPTS} actors, and no single video is to "
                        "blame. Look at the logs of Ray's workers (memory of the nodes?); run the "
                        "same command again when that is mended: what is committed stays."
                    )
                worker.tasks[worker.actor.encode.remote(tuple(key), self._todo[key])] = key

    def _take(self, reference: Any) -> ShardDone | None:
        """Take what has ended: an actor's start, or a shard. A dead actor gives its shards back."""
        worker = next((w for w in self._workers if reference in _references(w)), None)
        if worker is None:  # of an actor that was found dead a moment ago
            return None
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as err:
            cause = _cause(err)
            if isinstance(cause, LatentsError):
                raise cause from None
            self._bury(worker, reference, cause)
            return None
        except self._ray.exceptions.RayError as err:
            self._bury(worker, reference, err)
            return None
        if reference is worker.starting:
            worker.starting, self._failed_starts = None, 0
            return None
        del worker.tasks[reference]
        done: ShardDone = found
        return done

    def _bury(self, worker: _Worker, reference: Any, why: Exception) -> None:
        if reference is worker.starting:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                raise LatentsError(
                    f"{START_FAILURES} actors in a row could not start: {why}. Check that every "
                    "node has this package, the weights and the store under the same names."
                ) from why
        log.warning("an actor has ended, and its %d shards wait again: %s", len(worker.tasks), why)
        self._waiting.extendleft(reversed(worker.tasks.values()))
        self._workers.remove(worker)
        self._ray.kill(worker.actor)  # one that raised may hold a GPU that faults


def run_ray(request: RunRequest) -> EncodeReport:
    """Encode a corpus with actors of a Ray cluster, or of Ray on this machine."""
    try:
        import ray
    except ImportError as err:
        raise ConfigError(
            "the engine ray needs Ray, which is not installed: pip install 'reducio-latents[ray]'."
        ) from err
    ledger = Ledger()
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=request.options.ray_address, log_to_driver=False)
    try:
        job = _plan(request)
        todo = job.todo()
        announce(job, todo)
        with suppress(StoppedError):
            for done in Fleet(request, job, todo).run():
                request.progress.encoded(done.rows - len(done.failed), len(done.failed))
                ledger.book(done)
    finally:
        if started_here:
            ray.shutdown()
    if job.stop.requested:
        return share_report(job, todo, ledger)
    return conclude(job, todo, ledger)


def _plan(request: RunRequest) -> Job:
    """Plan in the driver, which may have no GPU; a node that has one describes the columns."""
    import ray

    stored = read_meta_if_any(open_files(request.store))
    known = {} if stored is None else stored.columns
    gpus = gpus_there(request.options)
    options = actor_options(request.options, gpus)
    if gpus_for(options) > gpus:
        log.warning("the cluster has no GPU: waiting for a node that has one.")
    describe_there = ray.remote(_describe).options(num_cpus=1, num_gpus=gpus_for(options))
    try:
        columns = ray.get(describe_there.remote(options, known))
    except ray.exceptions.RayTaskError as err:
        raise _cause(err) from None
    return plan_job(request, columns)


def _describe(options: EncodeOptions, known: Mapping[str, ColumnMeta]) -> dict[str, ColumnMeta]:
    return describe_store(build_columns(options, known), options, known)


def gpus_there(options: EncodeOptions) -> int:
    """Return how many GPUs the cluster has at this moment for what `device` asks."""
    import ray

    wants_gpu = options.device == "auto" or options.device.startswith("cuda")
    return int(ray.cluster_resources().get("GPU", 0)) if wants_gpu else 0


def actor_options(options: EncodeOptions, gpus: int) -> EncodeOptions:
    """Return the options of an encoding process, in a cluster that has so many GPUs."""
    options = replace(options, engine="local", gpus=1, ray_address=None)
    return replace(options, device="cuda") if gpus and options.device == "auto" else options


def gpus_for(actor: EncodeOptions) -> int:
    """Return the GPUs to ask Ray for, for an actor of these options.

    One that needs a GPU asks for it even if there is none: so an autoscaler brings a node.
    """
    return int(actor.device.startswith("cuda"))


def _cause(err: Any) -> Exception:
    """Return what a task of ours raised, without Ray's wrapping."""
    return err.cause if isinstance(err.cause, Exception) else err


def _references(worker: _Worker) -> list[Any]:
    return [*worker.tasks, *([] if worker.starting is None else [worker.starting])]
