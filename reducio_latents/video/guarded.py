"""Clips of videos, read in worker processes: a video that crashes, hangs or bloats its decoder
costs that video and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from reducio_latents.core.clips import ClipSpec, clip_starts
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video import VideoBackend, get_backend
from reducio_latents.video.pixels import fit_frame
from reducio_latents.video.processes import Channel, Event, ProcessPool

Pixels = NDArray[np.uint8]

PRELOAD = ("reducio_latents.video.guarded", "reducio_latents.video.pyav")
MEMORY_BYTES = 4 << 30
"""Resident memory of one worker, at most."""
HASHED_BYTES = 1 << 24
"""How much of a file is read at a time to hash it; after each, the worker says it is alive."""


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Clips of one video, all of one size."""

    video: str
    """What to call it in messages."""
    source: VideoSource
    bucket: Bucket
    clip: ClipSpec
    """Its rate; and its policy says where clips start, if `starts_s` does not."""
    starts_s: tuple[float, ...] | None = None
    resize: str = "bicubic"
    backend: str = "pyav"
    sha256: str | None = None
    """What the bytes of the video must hash to; None: anything."""


class Read(NamedTuple):
    """What became of a request: any number of clips, then an end."""

    request: int
    start_s: float
    frames: Pixels | None
    """uint8 RGB (T, H, W, 3); None at the end."""
    problem: str | None = None
    """At the end: why there are not all of its clips."""


class GuardedReader:
    """Reads requests in worker processes, several at a time, each one's clips in order.

    A worker that crashes gets a second try, as it may have been killed for what others did to the
    machine; one that is silent for `timeout_s` does not. Close it, or use `with`.
    """

    def __init__(self, largest: Bucket, *, workers: int = 1, timeout_s: float = 120.0) -> None:
        """No clip is larger than `largest`. Raises ConfigError for no worker or no time."""
        if workers < 1 or timeout_s <= 0:
            raise ConfigError(
                f"videos are read by {workers} processes that have {timeout_s:g} s each; give at "
                "least 1 process, and more than 0 s."
            )
        self._pool = ProcessPool(
            target=read_request,
            workers=workers,
            timeout_s=timeout_s,
            memory_bytes=MEMORY_BYTES,
            slots=2,
            slot_bytes=_clip_bytes(largest),
            preload=PRELOAD,
        )
        self._numbers = count()
        self._requests: dict[int, ClipRequest] = {}
        self._crashed: set[int] = set()
        self._given: dict[int, int] = {}
        """Clips of a request that were given, so that a second try does not repeat them."""

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def submit(self, request: ClipRequest) -> int:
        """Queue a request; return the number by which `poll` speaks of it: 0, 1, 2, ..."""
        number = next(self._numbers)
        self._requests[number] = request
        self._given[number] = 0
        self._pool.submit(number, request)
        return number

    def poll(self, wait_s: float = 0.5) -> list[Read]:
        """Return what has been read, waiting up to `wait_s` for something."""
        return [read for event in self._pool.poll(wait_s) for read in self._take(event)]

    def read(self, request: ClipRequest) -> list[Pixels]:
        """Read one request, alone; raise VideoError where not all of it can be had."""
        self.submit(request)
        clips = []
        while True:
            for read in self.poll():
                if read.frames is not None:
                    clips.append(read.frames)
                elif read.problem is not None:
                    raise VideoError(read.problem)
                else:
                    return clips

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> GuardedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, event: Event) -> list[Read]:
        number = event.task
        if event.kind == "item" and event.slot is not None:
            index, start_s = event.value
            size = _clip_bytes(self._requests[number].bucket)
            shape = _clip_shape(self._requests[number].bucket)
            frames = np.frombuffer(event.slot.memory, np.uint8, count=size).reshape(shape).copy()
            self._pool.release(event.slot)
            if index < self._given[number]:
                return []
            self._given[number] = index + 1
            return [Read(number, start_s, frames)]
        if number not in self._requests:  # its problem was told already
            return []
        if event.kind == "item":
            return [] if event.value is None else [self._end(number, event.value)]
        request = self._requests[number]
        if event.kind == "lost" and "crashed" in event.value and number not in self._crashed:
            self._crashed.add(number)
            self._pool.submit(number, request, first=True)
            return []
        why = f"{request.video}: {event.value}" if event.kind == "lost" else None
        return [self._end(number, why)]

    def _end(self, number: int, problem: str | None) -> Read:
        del self._requests[number], self._given[number]
        self._crashed.discard(number)
        return Read(number, 0.0, None, problem)


def read_request(request: ClipRequest, channel: Channel) -> None:
    """Send the clips of a request, or at the first that fails why, as text: a worker's target."""
    torch.set_num_threads(1)  # there may be as many workers as cores
    backend = get_backend(request.backend)
    try:
        if request.sha256 is not None:
            _require_same(request, channel)
        starts = _starts(request, backend)
        clips = backend.read_clips(
            request.source,
            starts,
            frames=request.bucket.frames,
            rate_fps=request.clip.rate_fps,
            transform=partial(fit_frame, bucket=request.bucket, mode=request.resize),
        )
        for number, clip in enumerate(clips):
            if isinstance(clip, VideoError):
                raise clip
            slot, memory = channel.acquire()
            clip.copy_into(memory)
            channel.emit((number, clip.start_s), slot)
    except VideoError as err:
        channel.emit(str(err))


def _starts(request: ClipRequest, backend: VideoBackend) -> tuple[float, ...]:
    if request.starts_s is not None:
        return request.starts_s
    starts = clip_starts(backend.probe(request.source).duration_s, request.clip, request.video)
    if not starts:
        raise VideoError(f"it is shorter than a clip of {request.clip.span_s:g} s")
    return tuple(starts)


def _require_same(request: ClipRequest, channel: Channel) -> None:
    digest, source = hashlib.sha256(), request.source
    try:
        with open_source(source) as file:
            while data := file.read(HASHED_BYTES):
                digest.update(data)
                channel.emit(None)
    except OSError as err:  # a VideoError is one
        gone = isinstance(err.__cause__, FileNotFoundError)
        why = "there is no such file" if gone else str(err).rstrip(".")
        raise VideoError(f"{request.video} is no longer at {source.url}: {why}") from err
    if digest.hexdigest() != request.sha256:
        raise VideoError(f"{request.video} has changed since it was encoded (its hash differs)")


def _clip_shape(bucket: Bucket) -> tuple[int, int, int, int]:
    return (bucket.frames, bucket.height, bucket.width, 3)


def _clip_bytes(bucket: Bucket) -> int:
    return math.prod(_clip_shape(bucket))
