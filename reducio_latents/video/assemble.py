"""Clips put together from frames that come in the order they are shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video.protocol import ClipFrames, Frame, Transform


@dataclass
class _Clip:
    start_s: float
    frames: list[Frame] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    size: tuple[int, ...] | None = None
    error: str | None = None


class ClipAssembly:
    """Hands each shown frame to the clips that want it, and gives back the clips that are whole.

    Clips may overlap; a frame is made a picture once, and only if some clip wants it.
    """

    def __init__(
        self,
        source: VideoSource,
        starts_s: Sequence[float],
        *,
        frames: int,
        rate_fps: float,
        transform: Transform | None,
    ) -> None:
        _require_ascending(starts_s)
        self._source = source
        self._length = frames
        self._transform = transform
        self._clips = [_Clip(start) for start in starts_s]
        self._moments = sorted(
            (start + i / rate_fps, number)
            for number, start in enumerate(starts_s)
            for i in range(frames)
        )
        self._next = 0
        self._given = 0
        self.has_trouble = False
        """Whether a frame that some clip wants could not be had, or not relied on."""

    @property
    def next_s(self) -> float | None:
        """The earliest moment whose frame is not known yet; None if there is none."""
        return self._moments[self._next][0] if self._next < len(self._moments) else None

    def wants(self, from_s: float, before_s: float) -> bool:
        """Whether some clip shows a moment from `from_s` to before `before_s`."""
        first = bisect_left(self._moments, (from_s, -1))
        return first < len(self._moments) and self._moments[first][0] < before_s

    def show(
        self,
        picture: Callable[[], Any],
        at_s: float,
        before_s: float,
        *,
        trouble: str | None = None,
    ) -> Iterator[ClipFrames | VideoError]:
        """Use a frame, which appears at `at_s`, for all moments before `before_s`.

        Yields the clips that are whole then. A clip that wants the frame fails if there is
        `trouble` or `picture` raises VideoError.
        """
        made: Any = None
        size: tuple[int, ...] = ()
        while self._next < len(self._moments) and self._moments[self._next][0] < before_s:
            clip = self._clips[self._moments[self._next][1]]
            self._next += 1
            if clip.error is None and made is None and trouble is None:
                try:
                    whole = picture()
                except VideoError as err:
                    trouble = str(err)
                else:
                    size = whole.shape
                    made = whole if self._transform is None else self._transform(whole)
            self._add(clip, made, size, at_s, trouble)
            yield from self._finished()

    def fail_rest(self, reason: str) -> Iterator[VideoError]:
        """Yield an error for every clip that is not whole yet."""
        for clip in self._clips[self._given :]:
            yield self._error(clip.start_s, clip.error or reason)
        self._next, self._given = len(self._moments), len(self._clips)

    def _add(
        self,
        clip: _Clip,
        made: Frame | None,
        size: tuple[int, ...],
        at_s: float,
        trouble: str | None,
    ) -> None:
        clip.times_s.append(at_s)
        if clip.error is not None:
            return
        clip.size = clip.size or size
        if trouble is not None or made is None:
            clip.error = trouble
        elif clip.size != size:
            clip.error = (
                f"the picture changes from {clip.size[1]}x{clip.size[0]} to {size[1]}x{size[0]}"
            )
        else:
            clip.frames.append(made)
        if clip.error is not None:
            self.has_trouble = True
            clip.frames.clear()

    def _finished(self) -> Iterator[ClipFrames | VideoError]:
        while self._given < len(self._clips):
            clip = self._clips[self._given]
            if len(clip.times_s) < self._length:
                return
            self._given += 1
            if clip.error is not None:
                yield self._error(clip.start_s, clip.error)
            else:
                yield ClipFrames(clip.start_s, clip.frames, tuple(clip.times_s))
            clip.frames = []

    def _error(self, start_s: float, reason: str) -> VideoError:
        return VideoError(f"{self._source}: clip at {start_s:.3f} s: {reason}.")


def _require_ascending(starts_s: Sequence[float]) -> None:
    if starts_s and not starts_s[0] >= 0:
        raise ConfigError(f"a clip starts at {starts_s[0]} s, but a video starts at 0 s.")
    for earlier, later in pairwise(starts_s):
        if not later >= earlier:
            raise ConfigError(f"clip starts must ascend, but {later} s comes after {earlier} s.")
