"""From planned shards to batches of pixels: decode workers, read-ahead, and what went wrong.

A shard is cut into batches of consecutive rows, so which clips are encoded together is a function
of the plan alone. Workers run ahead of the encoder, over the end of a shard into the next ones, as
far as the memory for waiting batches allows.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import CONTENT, FRAMES, ClipBatch
from reducio_latents.encode.decoding import PRELOAD, DecodedClip, DecodeTask, decode_clips
from reducio_latents.errors import ConfigError
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import Failure, ShardKey
from reducio_latents.video.pixels import fit_clip
from reducio_latents.video.processes import Event, ProcessPool, Slot, Target

IDLE_S = 0.02
"""How often to ask for the next shard while none is known."""
SLOTS = 2
"""Clips that a worker may have handed over before it waits: one is read, the next one written."""
SHARED_MEMORY = Path("/dev/shm")
ATTEMPTS = 3
"""Workers that one video may cost in one shard before the rest of its clips are given up."""


class PlannedClip(NamedTuple):
    """One row of the plan."""

    row: int
    clip_id: str
    video: str
    start_s: float
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ShardWork:
    """One shard to be made."""

    key: ShardKey
    clips: tuple[PlannedClip, ...]
    """Every row of the shard, in order."""

    @property
    def bucket(self) -> Bucket:
        return Bucket.parse(self.key.bucket)


class ReadyBatch(NamedTuple):
    """The next rows of a shard, settled: each one is in `batch` or has failed."""

    work: ShardWork
    clips: Sequence[PlannedClip]
    """All of these rows."""
    batch: ClipBatch | None
    """None if every clip of these rows failed."""
    failed: tuple[Failure, ...]
    last: bool
    """Whether the shard ends here."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How videos become batches."""

    buckets: tuple[Bucket, ...]
    """Every size that a clip may have."""
    backend: str = "pyav"
    rate_fps: float = 16.0
    resize: str = "bicubic"
    image_codec: str | None = None
    """Codec of `ClipBatch.content_files`; None if no column wants them."""
    batch_size: int = 8
    workers: int = 2
    whole_px: int = 0
    """Frames of at most so many pixels come from the workers as they are decoded, to be fitted to
    their bucket by `fit`; 0: workers fit all of them."""
    timeout_s: float = 120.0
    """A decoder that brings no clip for so long has hung."""
    memory_bytes: int = 4 << 30
    """Resident memory of one decode worker, at most."""
    read_ahead_bytes: int = 1 << 30
    """Pixels waiting for the encoder, at most, beside the workers' own."""

    @property
    def slot_bytes(self) -> int:
        """Size of a worker's slot: the largest clip as it is handed over."""
        return max(
            _clip_bytes(bucket, max(self.whole_px, bucket.height * bucket.width))
            for bucket in self.buckets
        )


Fit = Callable[[Tensor, Bucket, str], Tensor]
"""As `pixels.fit_clip`."""
Locate = Callable[[str], tuple[VideoSource, int] | None]
"""Video -> where it lies and its size in bytes when it was planned; None if it is gone."""


def read_captions(shards: Iterable[ShardWork], batch_size: int) -> Iterator[ReadyBatch]:
    """Yield batches that hold captions only; no video is opened."""
    for work in shards:
        for clips, last in cut_shard(work, batch_size):
            yield ReadyBatch(work, clips, clip_batch(work, clips), (), last)


Ready = queue.Queue[ReadyBatch | BaseException | Literal["end"] | None]


@dataclass
class _Pending:
    """A batch whose clips are being decoded."""

    work: ShardWork
    clips: Sequence[PlannedClip]
    last: bool
    unsettled: int
    frames: Tensor | None = None
    contents: dict[int, bytes] = field(default_factory=dict)
    times: dict[int, tuple[float, ...]] = field(default_factory=dict)
    failed: dict[int, Failure] = field(default_factory=dict)
    """By position in the batch."""

    def finish(self, needs: frozenset[str]) -> ReadyBatch:
        kept = [i for i in range(len(self.clips)) if i not in self.failed]
        failed = tuple(self.failed[i] for i in sorted(self.failed))
        if not kept:
            return ReadyBatch(self.work, self.clips, None, failed, self.last)
        assert self.frames is not None
        frames = self.frames if not failed else self.frames[kept]
        batch = clip_batch(self.work, [self.clips[i] for i in kept])
        centre = (frames.shape[1] - 1) // 2
        files = tuple(self.contents[i] for i in kept) if self.contents else None
        batch = replace(
            batch,
            frames_BTHWC=frames if FRAMES in needs else None,
            times_s=tuple(self.times[i] for i in kept),
            content_BHWC=frames[:, centre] if CONTENT in needs else None,
            content_files=files,
        )
        return ReadyBatch(self.work, self.clips, batch, failed, self.last)


@dataclass
class _Running:
    """A decode task, and which batch and position each of its clips belongs to."""

    task: DecodeTask
    places: list[tuple[_Pending, int]]
    attempts: int = 1
    is_suspect: bool = False
    """Whether a worker has crashed at its first clip before."""
    settled: int = 0


class DecodedBatches:
    """Iterate over the batches of `shards`, in order, decoded ahead by worker processes.

    A None among the shards means that the next one is not known yet; a None among the batches, that
    all of those that are known have been given.
    """

    def __init__(
        self,
        shards: Iterable[ShardWork | None],
        locate: Locate,
        options: DecodeOptions,
        needs: frozenset[str],
        target: Target = decode_clips,
        fit: Fit = fit_clip,
    ) -> None:
        self._shards = iter(shards)
        self._locate = locate
        self._options = options
        self._needs = needs
        self._target = target
        self._fit = fit
        self._order: deque[_Pending] = deque()
        self._running: dict[int, _Running] = {}
        self._deferred: list[tuple[_Running, DecodedClip, Slot]] = []
        self._tasks = 0
        self._buffered_bytes = 0
        self._is_unknown = False
        """Whether the next shard was not known when it was last asked for."""

    def __iter__(self) -> Iterator[ReadyBatch | None]:
        # A thread moves clips from the workers' slots into batches while the caller encodes.
        ready: Ready = queue.Queue(maxsize=2)
        stop = threading.Event()
        thread = threading.Thread(target=self._collect, args=(ready, stop), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) != "end":
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():
                try:
                    ready.get_nowait()
                except queue.Empty:
                    thread.join(0.05)

    def _collect(self, ready: Ready, stop: threading.Event) -> None:
        try:
            with self._pool() as pool:
                while not stop.is_set() and (self._feed(pool) or self._order):
                    while self._order and self._order[0].unsettled == 0:
                        pending = self._order.popleft()
                        if pending.frames is not None:
                            self._buffered_bytes -= pending.frames.numel()
                        ready.put(pending.finish(self._needs))
                    self._place_deferred(pool)
                    settled = bool(self._order) and self._order[0].unsettled == 0
                    if self._is_unknown and not self._order:
                        ready.put(None)
                    if pool.idle and not settled:
                        time.sleep(IDLE_S)
                    for event in pool.poll(0.0 if settled else 0.2):
                        self._take(pool, event)
            ready.put("end")
        except BaseException as err:
            ready.put(err)

    def _pool(self) -> ProcessPool:
        options = self._options
        _require_shared_memory(SLOTS * options.workers * options.slot_bytes, options)
        return ProcessPool(
            target=self._target,
            workers=options.workers,
            timeout_s=options.timeout_s,
            memory_bytes=options.memory_bytes,
            slots=SLOTS,
            slot_bytes=options.slot_bytes,
            preload=PRELOAD,
        )

    def _feed(self, pool: ProcessPool) -> bool:
        """Queue work so that no worker waits for it; return whether any is left."""
        while pool.waiting < self._options.workers:
            try:
                work = next(self._shards)
            except StopIteration:
                return False
            self._is_unknown = work is None
            if work is None:
                return True
            places: list[tuple[_Pending, int]] = []
            for clips, last in cut_shard(work, self._options.batch_size):
                pending = _Pending(work, clips, last, unsettled=len(clips))
                self._order.append(pending)
                places += [(pending, i) for i in range(len(clips))]
            for video, group in groupby(places, key=lambda p: p[0].clips[p[1]].video):
                self._submit_video(pool, work, video, list(group))
        return True

    def _submit_video(
        self,
        pool: ProcessPool,
        work: ShardWork,
        video: str,
        places: list[tuple[_Pending, int]],
    ) -> None:
        found = self._locate(video)
        if found is None:
            for place in places:
                self._fail(place, f"{video} is no longer in the corpus.")
            return
        source, size = found
        task = DecodeTask(
            video=video,
            source=source,
            bytes=size,
            bucket=work.bucket,
            starts_s=tuple(pending.clips[i].start_s for pending, i in places),
            rate_fps=self._options.rate_fps,
            resize=self._options.resize,
            backend=self._options.backend,
            image_codec=self._options.image_codec,
            whole_px=self._options.whole_px,
        )
        self._submit(pool, _Running(task, places), first=False)

    def _submit(self, pool: ProcessPool, running: _Running, *, first: bool) -> None:
        self._running[self._tasks] = running
        pool.submit(self._tasks, running.task, first=first)
        self._tasks += 1

    def _take(self, pool: ProcessPool, event: Event) -> None:
        running = self._running[event.task]
        if event.kind == "item":
            clip: DecodedClip = event.value
            running.settled = clip.clip + 1
            if clip.error is not None:
                self._fail(running.places[clip.clip], clip.error)
            elif event.slot is not None and not self._place(pool, running, clip, event.slot):
                self._deferred.append((running, clip, event.slot))
            return
        del self._running[event.task]
        left = running.places[running.settled :]
        if event.kind == "lost" and left:
            self._give_up_or_retry(pool, running, left, str(event.value))

    def _give_up_or_retry(
        self,
        pool: ProcessPool,
        running: _Running,
        left: list[tuple[_Pending, int]],
        why: str,
    ) -> None:
        """Blame the clip that was being decoded, and try the rest of its video afresh.

        Not for the first crash: a worker may be killed for what others do to the machine.
        """
        task = running.task
        if "crashed" in why and not (running.is_suspect and running.settled == 0):
            rest = replace(task, starts_s=task.starts_s[running.settled :])
            self._submit(pool, _Running(rest, left, running.attempts, is_suspect=True), first=True)
            return
        gone = len(left) if running.attempts >= ATTEMPTS else 1
        for place in left[:gone]:
            self._fail(place, f"{task.video}: {why}.")
        if left[gone:]:
            rest = replace(task, starts_s=task.starts_s[running.settled + gone :])
            again = _Running(rest, left[gone:], running.attempts + 1)
            self._submit(pool, again, first=True)

    def _place_deferred(self, pool: ProcessPool) -> None:
        waiting, self._deferred = self._deferred, []
        for running, clip, slot in waiting:
            if not self._place(pool, running, clip, slot):
                self._deferred.append((running, clip, slot))

    def _place(self, pool: ProcessPool, running: _Running, clip: DecodedClip, slot: Slot) -> bool:
        """Copy a clip into its batch and free its slot, unless memory is short.

        The batch that the encoder needs next always gets its memory, so the flow cannot stall.
        """
        pending, position = running.places[clip.clip]
        bucket = pending.work.bucket
        if pending.frames is None:
            wanted = _clip_bytes(bucket, bucket.height * bucket.width) * len(pending.clips)
            short = self._buffered_bytes + wanted > self._options.read_ahead_bytes
            if short and pending is not self._order[0]:
                return False
            self._buffered_bytes += wanted
            shape = (len(pending.clips), bucket.frames, bucket.height, bucket.width, 3)
            pending.frames = torch.zeros(shape, dtype=torch.uint8)
        self._take_pixels(clip, slot, bucket, into=pending.frames[position])
        pool.release(slot)
        pending.times[position] = clip.times_s
        if clip.content is not None:
            pending.contents[position] = clip.content
        pending.unsettled -= 1
        return True

    def _take_pixels(self, clip: DecodedClip, slot: Slot, bucket: Bucket, into: Tensor) -> None:
        # Nothing of the slot's memory may outlive this call: `release` gives it back.
        height, width = clip.size or (bucket.height, bucket.width)
        count = bucket.frames * height * width * 3
        pixels = torch.frombuffer(slot.memory, dtype=torch.uint8, count=count)
        frames = pixels.view(bucket.frames, height, width, 3)
        into.copy_(frames if clip.size is None else self._fit(frames, bucket, self._options.resize))

    def _fail(self, place: tuple[_Pending, int], reason: str) -> None:
        pending, position = place
        clip = pending.clips[position]
        pending.failed[position] = Failure(
            row=clip.row, clip_id=clip.clip_id, video=clip.video, reason=reason
        )
        pending.unsettled -= 1


def cut_shard(work: ShardWork, batch_size: int) -> Iterator[tuple[Sequence[PlannedClip], bool]]:
    """Yield the clips of each batch of a shard, and whether it is the last one."""
    for start in range(0, len(work.clips), batch_size):
        stop = start + batch_size
        yield work.clips[start:stop], stop >= len(work.clips)


def clip_batch(work: ShardWork, clips: Sequence[PlannedClip]) -> ClipBatch:
    """Return a batch that holds what the plan knows of `clips`, and no pixels."""
    return ClipBatch(
        key=work.key,
        bucket=work.bucket,
        rows=tuple(clip.row for clip in clips),
        clip_ids=tuple(clip.clip_id for clip in clips),
        captions=tuple(clip.captions for clip in clips),
    )


def _clip_bytes(bucket: Bucket, pixels: int) -> int:
    return bucket.frames * pixels * 3


def _require_shared_memory(wanted: int, options: DecodeOptions) -> None:
    """Raise ConfigError if the slots do not fit: touching one then kills a worker (SIGBUS)."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if wanted > free:
        fewer = " or --resize-on worker" if options.whole_px else ""
        raise ConfigError(
            f"{options.workers} decode workers hand frames over in {wanted >> 20} MiB of shared "
            f"memory, but {SHARED_MEMORY} has {free >> 20} MiB left. Give it more (docker run "
            f"--shm-size 8g), or use fewer --workers{fewer}."
        )
