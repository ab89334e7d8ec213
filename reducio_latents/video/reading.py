"""The one reader of clips: requests in, clips out in the order of the requests, decoded ahead.

Worker processes decode; a thread feeds them and copies clips out of their shared memory. A worker
that crashes, hangs or eats memory is replaced, and costs the clip that it was at:

- the first crash at a clip is nobody's fault: a worker may be killed for what others do to the
  machine. A hang, too much memory, a second crash at the same clip: the clip has failed;
- the rest of its video is tried afresh, by at most `WORKER_ATTEMPTS` workers that failed like this.
"""

from __future__ import annotations

import gc
import math
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from reducio_latents.core.clips import ClipSpec, centre_frame
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.images import encode_image
from reducio_latents.core.starts import clip_starts
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import VideoBackend, backend_for
from reducio_latents.video.identity import Expected, require_unchanged
from reducio_latents.video.pixels import fit_frame
from reducio_latents.video.planes import PlaneLayout, Planes, fit_planes, fit_whole
from reducio_latents.video.processes import Channel, Event, ProcessPool, Slot, Target
from reducio_latents.video.protocol import ClipFrames, Frame

WORKER_ATTEMPTS = 3
"""Workers that one request may cost before the rest of its clips are given up."""
SLOTS = 2
"""Clips that a worker may have handed over before it waits: one is read, the next one written."""
IDLE_S = 0.01
"""How often to look again for a request, or for memory, if there is none."""
MOST_REQUESTS = 1024
"""Requests on their way at once."""
SHARED_MEMORY = Path("/dev/shm")

FrameFit = Callable[[Frame, Bucket, str], Frame]
"""As `pixels.fit_frame`; travels to the workers."""
ClipFit = Callable[[Tensor, Bucket, str, PlaneLayout | None], Tensor]
"""As `fit_whole`."""


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Clips of one video, all of one size, read in one pass."""

    video: str
    """What to call it in messages."""
    source: VideoSource
    bucket: Bucket
    clip: ClipSpec = field(default_factory=ClipSpec)
    """Its rate; and its policy says where clips start, if `starts_s` does not."""
    starts_s: tuple[float, ...] | None = None
    resize: str = "bicubic"
    backend: str = "pyav"
    deinterlace: bool = True
    fit: FrameFit = fit_frame
    exact_colours: bool = False
    """Whether ordinary 8-bit YUV is fitted by `fit_planes`, not made RGB first and then fitted."""
    image_codec: str | None = None
    """How to encode the content image; None if it is not wanted."""
    expected: Expected | None = None
    """What the video must still be; None: anything."""
    problem: str | None = None
    """Why it is known already that it cannot be read: no worker sees it."""
    tag: Any = None
    """The caller's own, small; it comes back with the clips."""
    whole_px: int = 0
    """Set by the reader; see there."""


class ClipRead(NamedTuple):
    """A clip as it was asked for."""

    request: ClipRequest
    start_s: float
    last: bool
    """Whether its request ends here."""
    frames: Tensor
    """uint8 (T, H, W, 3)."""
    times_s: tuple[float, ...]
    """When each frame appears in its video, in seconds from the first shown one."""
    content: bytes | None
    """The content image, encoded."""


class ClipFailed(NamedTuple):
    """A clip that cannot be had. A request whose starts are not known fails as one clip."""

    request: ClipRequest
    last: bool
    reason: str


Clip = ClipRead | ClipFailed
Substitute = Callable[[ClipRequest, str], ClipRequest | None]
"""Asked, in the reader's thread, when a clip of a request has failed and why: returns what to read
in place of it and of the clips after it, or None to have the failure told."""


@dataclass(eq=False)
class _Settled:
    """What became of a clip; without a `clip` it still lies in its slot."""

    job: _Job
    last: bool
    clip: Clip | None = None
    decoded: Decoded | None = None
    slot: Slot | None = None


@dataclass(eq=False)
class _Job:
    """A request on its way."""

    request: ClipRequest
    clips: deque[_Settled] = field(default_factory=deque)
    """In order, those that were handed on left out."""
    settled: int = 0
    """How many there were so far."""
    suspect: int = -1
    """The clip at which a worker has crashed."""
    attempts: int = 1

    @property
    def count(self) -> int:
        return 1 if self.request.starts_s is None else len(self.request.starts_s)

    @property
    def is_over(self) -> bool:
        return self.settled >= self.count


@dataclass
class ClipReader:
    """Reads clips in worker processes. Use `with`, or close it."""

    buckets: Iterable[Bucket]
    """Every size that a clip may have."""
    workers: int = 1
    timeout_s: float = 120.0
    """A decoder that brings no clip for this long has hung."""
    memory_bytes: int = 4 << 30
    """Resident memory of one worker, at most."""
    read_ahead_bytes: int = 1 << 30
    """Pixels that wait for the caller, at most, beside the workers' own and one clip."""
    whole_px: int = 0
    """Frames of at most so many pixels come from the workers as they are decoded, to be fitted to
    their bucket by `fit`; 0: workers fit all of them. The bits are the same."""
    fit: ClipFit = fit_whole
    substitute: Substitute = lambda _, __: None
    target: Target = field(default_factory=lambda: read_request)

    def __post_init__(self) -> None:
        if self.workers < 1 or self.timeout_s <= 0:
            raise ConfigError(
                f"videos are read by {self.workers} processes that have {self.timeout_s:g} s each; "
                "give at least 1 process, and more than 0 s."
            )
        slot_bytes = max(
            3 * bucket.frames * max(self.whole_px, bucket.height * bucket.width)
            for bucket in self.buckets
        )
        self._require_shared_memory(SLOTS * self.workers * slot_bytes)
        self._active: _Reading | None = None
        self._pool = ProcessPool(
            target=self.target,
            workers=self.workers,
            timeout_s=self.timeout_s,
            memory_bytes=self.memory_bytes,
            slots=SLOTS,
            slot_bytes=slot_bytes,
        )

    def read(self, requests: Iterable[ClipRequest | None]) -> Iterator[Clip | None]:
        """Yield every clip of the requests, in their order.

        A None among the requests means that the next one is not known yet; a None among the clips,
        that all of those that are known have been given. One such iteration goes on at a time; one
        that is left early ends what the workers were doing.
        """
        reading = _Reading(self, self._pool, iter(requests))
        self._active = reading
        reading.thread.start()
        try:
            while not isinstance(found := reading.ready.get(), _End):
                if isinstance(found, BaseException):
                    raise found
                if isinstance(found, ClipRead):
                    reading.taken_bytes += found.frames.numel()
                yield found
            self._active = None
        finally:
            if self._active is reading:
                self.close()

    def close(self) -> None:
        """End what is being read, and the workers."""
        if self._active is not None:
            self._active.stop.set()
            self._active.thread.join()
            self._active = None
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_shared_memory(self, wanted: int) -> None:
        """Raise ConfigError if the slots do not fit: touching one then kills a worker (SIGBUS)."""
        if not SHARED_MEMORY.is_dir():
            return
        free = shutil.disk_usage(SHARED_MEMORY).free
        if wanted > free:
            raise ConfigError(
                f"{self.workers} decode workers hand frames over in {wanted >> 20} MiB of shared "
                f"memory, but {SHARED_MEMORY} has {free >> 20} MiB left. Give it more (docker run "
                f"--shm-size 8g), or use fewer --workers."
            )


class _Reading:
    """One iteration over requests; what begins with `_` belongs to its thread."""

    def __init__(
        self, reader: ClipReader, pool: ProcessPool, requests: Iterator[ClipRequest | None]
    ) -> None:
        self.ready: queue.SimpleQueue[Clip | BaseException | _End | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.taken_bytes = 0
        """Bytes of clips that the caller has taken; only it counts them."""
        self._reader, self._pool, self._requests = reader, pool, requests
        self._order: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._in_slots: list[_Settled] = []
        self._tasks = 0
        self._copied_bytes = 0
        """Bytes of clips that were copied out of slots, those that were taken included."""
        self._told_bytes = 0
        """Of these, those that were handed on."""
        self._is_unknown = False
        """Whether the next request was not known when it was last asked for."""

    def _run(self) -> None:
        try:
            while not self.stop.is_set() and (self._feed() or self._order):
                self._in_slots = [found for found in self._in_slots if not self._copy(found)]
                self._tell()
                if self._is_unknown and not self._order:
                    self.ready.put(None)
                if self._pool.idle and (self._order or self._is_unknown):
                    time.sleep(IDLE_S)
                for event in self._pool.poll(IDLE_S if self._in_slots else 0.2):
                    self._take(event)
            self.ready.put(_End())
        except BaseException as err:
            self.ready.put(err)

    def _feed(self) -> bool:
        """Queue requests so that no worker waits for one; return whether any may be left."""
        while self._pool.waiting < self._reader.workers and len(self._order) < MOST_REQUESTS:
            try:
                request = next(self._requests)
            except StopIteration:
                return False
            self._is_unknown = request is None
            if request is None:
                return True
            self._order.append(job := _Job(request))
            self._begin(job, first=False)
        return True

    def _tell(self) -> None:
        """Hand on what is settled, in the order of the requests."""
        while self._order:
            job = self._order[0]
            while job.clips and (clip := job.clips[0].clip) is not None:
                job.clips.popleft()
                if isinstance(clip, ClipRead):
                    self._told_bytes += clip.frames.numel()
                self.ready.put(clip)
            if job.clips or not job.is_over:
                return
            self._order.popleft()

    def _begin(self, job: _Job, *, first: bool) -> None:
        """Have the rest of a job's clips read, unless it is known that they cannot be."""
        request = job.request
        if request.problem is not None:
            self._fail(job, request.problem, job.count - job.settled)
            return
        if request.starts_s is not None:
            request = replace(request, starts_s=request.starts_s[job.settled :])
        self._running[self._tasks] = job
        whole_px = self._reader.whole_px
        self._pool.submit(self._tasks, replace(request, whole_px=whole_px), first=first)
        self._tasks += 1

    def _take(self, event: Event) -> None:
        job = self._running.get(event.task)
        if job is None:  # something else is read in its place
            if event.slot is not None:
                self._pool.release(event.slot)
        elif event.kind != "item":
            del self._running[event.task]
            if not job.is_over:
                self._lose(job, str(event.value or "the decoder gave no more clips"))
        elif isinstance(event.value, Starts):
            job.request = replace(job.request, starts_s=event.value.starts_s)
        elif isinstance(event.value, Decoded):
            if event.slot is None:
                self._fail(job, event.value.error)
                return
            found = self._settle(job)
            found.decoded, found.slot = event.value, event.slot
            if not self._copy(found):
                self._in_slots.append(found)

    def _settle(self, job: _Job, clip: Clip | None = None) -> _Settled:
        job.settled += 1
        found = _Settled(job, job.is_over, clip)
        job.clips.append(found)
        return found

    def _fail(self, job: _Job, reason: str, clips: int = 1) -> bool:
        """Settle so many clips as failed; return False if another request has taken their place."""
        for _ in range(clips):
            instead = self._reader.substitute(job.request, reason)
            if instead is not None:
                self._replace(job, instead)
                return False
            found = self._settle(job)
            found.clip = ClipFailed(job.request, found.last, reason)
        return True

    def _replace(self, job: _Job, request: ClipRequest) -> None:
        for found in job.clips:
            if found.slot is not None:
                self._pool.release(found.slot)
        self._in_slots = [found for found in self._in_slots if found.job is not job]
        self._running = {task: other for task, other in self._running.items() if other is not job}
        clips = [found.clip for found in job.clips]
        self._copied_bytes -= sum(c.frames.numel() for c in clips if isinstance(c, ClipRead))
        job.request, job.settled, job.suspect, job.attempts = request, 0, -1, 1
        job.clips.clear()
        self._begin(job, first=True)

    def _lose(self, job: _Job, why: str) -> None:
        """Blame the clip that was being decoded, and try the rest of its video afresh."""
        if "crashed" in why and job.suspect != job.settled:
            job.suspect = job.settled
        else:
            gone = job.count - job.settled if job.attempts >= WORKER_ATTEMPTS else 1
            job.attempts += 1
            if not self._fail(job, f"{job.request.video}: {why}.", gone):
                return
        if not job.is_over:
            self._begin(job, first=True)

    def _copy(self, found: _Settled) -> bool:
        """Copy a clip out of its slot, which is then free; return False if memory is short.

        The clip that the caller waits for is always copied, and so is what keeps the worker waiting
        that reads it: the flow cannot stall.
        """
        decoded, slot, job = found.decoded, found.slot, found.job
        assert decoded is not None
        assert slot is not None
        bucket = job.request.bucket
        frames = torch.empty(bucket.frames, bucket.height, bucket.width, 3, dtype=torch.uint8)
        waiting = self._copied_bytes - self.taken_bytes
        if waiting + frames.numel() > self._reader.read_ahead_bytes:
            head = self._order[0]
            is_next = found is head.clips[0] if head.clips else False
            busy_with = slot.worker.task
            frees_head = busy_with is not None and self._running.get(busy_with) is head is not job
            if not (frees_head or (is_next and self._told_bytes == self.taken_bytes)):
                return False
        self._copy_pixels(decoded, slot, job.request, frames)
        self._pool.release(slot)
        found.slot = None
        found.clip = ClipRead(
            job.request, decoded.start_s, found.last, frames, decoded.times_s, decoded.content
        )
        self._copied_bytes += frames.numel()
        return True

    def _copy_pixels(
        self, decoded: Decoded, slot: Slot, request: ClipRequest, into: Tensor
    ) -> None:
        # Nothing of the slot's memory may outlive this call: `release` gives it back.
        bucket, whole = request.bucket, decoded.whole
        if isinstance(whole, PlaneLayout):
            shape: tuple[int, ...] = (bucket.frames, whole.size)
        else:
            shape = (bucket.frames, *(whole or (bucket.height, bucket.width)), 3)
        pixels = torch.frombuffer(slot.memory, dtype=torch.uint8, count=math.prod(shape))
        frames = pixels.view(shape)
        if whole is not None:
            layout = whole if isinstance(whole, PlaneLayout) else None
            frames = self._reader.fit(frames, bucket, request.resize, layout)
        into.copy_(frames)


class _End:
    """Nothing comes any more."""


# What workers do.


class Starts(NamedTuple):
    """Where the clips of a request start, if it did not say."""

    starts_s: tuple[float, ...]


class Decoded(NamedTuple):
    """The next clip of a request; its pixels, uint8 (T, H, W, 3), lie in the slot it comes with."""

    start_s: float = 0.0
    error: str = ""
    """Why there are no pixels."""
    times_s: tuple[float, ...] = ()
    content: bytes | None = None
    whole: tuple[int, int] | PlaneLayout | None = None
    """What its frames are, where they are still to be fitted to the bucket: planes, or RGB of a
    height and width."""


def read_request(request: ClipRequest, channel: Channel) -> None:
    """Send every clip of a request, in order. Target of a `ProcessPool`."""
    backend = backend_for(
        request.video,
        request.backend,
        deinterlace=request.deinterlace,
        as_planes=request.exact_colours,
    )
    _settle()
    starts, told = request.starts_s, 0
    try:
        if request.expected is not None:
            require_unchanged(request.video, request.source, request.expected, channel.alive)
        if starts is None:
            starts = _starts(request, backend, channel.alive)
            channel.emit(Starts(starts))
        clips = backend.read_clips(
            request.source,
            starts,
            frames=request.bucket.frames,
            rate_fps=request.clip.rate_fps,
            transform=partial(_fit, request),
        )
        for clip in clips:
            if isinstance(clip, VideoError):
                channel.emit(Decoded(error=str(clip)))
            else:
                _send(request, clip, channel)
            told += 1
    except VideoError as err:  # the video as a whole
        for _ in range(told, len(starts or (0.0,))):
            channel.emit(Decoded(error=str(err)))


@cache
def _settle() -> None:
    """Have a worker do nothing beside its work, once all that it needs is imported."""
    torch.set_num_threads(1)  # there are as many workers as cores
    gc.freeze()  # to look through all modules again and again took a twentieth of its time


def _starts(
    request: ClipRequest, backend: VideoBackend, alive: Callable[[], None]
) -> tuple[float, ...]:
    duration_s = backend.probe(request.source, alive=alive).duration_s
    starts = clip_starts(duration_s, request.clip, request.video)
    if not starts:
        raise VideoError(f"it is shorter than a clip of {request.clip.span_s:g} s")
    return tuple(starts)


def _fit(request: ClipRequest, frame: Frame | Planes) -> Frame | Planes:
    """Fit a frame to the bucket, unless the reader's side is to do it."""
    if frame.shape[0] * frame.shape[1] <= request.whole_px:
        return frame
    return _fitted(request, frame)


def _fitted(request: ClipRequest, frame: Frame | Planes) -> Frame:
    if isinstance(frame, Planes):
        return fit_planes(frame, request.bucket, request.resize)
    return request.fit(frame, request.bucket, request.resize)


def _send(request: ClipRequest, clip: ClipFrames, channel: Channel) -> None:
    slot, memory = channel.acquire()
    bucket, mode = request.bucket, request.resize
    frames: list[Any] = clip.frames
    centre: Any = frames[centre_frame(bucket.frames)]
    kinds = {frame.layout if isinstance(frame, Planes) else frame.shape[:2] for frame in frames}
    if len(kinds) > 1:  # the stream changes from one way to store pictures to another
        frames = [_fitted(request, frame) for frame in frames]
        kinds = {(bucket.height, bucket.width)}
    [whole] = kinds
    if isinstance(whole, PlaneLayout):
        pixels = np.frombuffer(memory, np.uint8)
        for number, frame in enumerate(frames):
            frame.copy_into(pixels[number * whole.size : (number + 1) * whole.size])
    else:
        clip._replace(frames=frames).copy_into(memory)
    content = None
    if request.image_codec is not None:
        fits = fit_planes if isinstance(centre, Planes) else fit_frame
        content = encode_image(fits(centre, bucket, mode), request.image_codec)
    fitted = whole == (bucket.height, bucket.width)
    channel.emit(Decoded(clip.start_s, "", clip.times_s, content, None if fitted else whole), slot)
