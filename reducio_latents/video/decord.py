"""The second backend: decord. It refuses what it cannot read exactly, and says so.

It decodes from the start, and seeks only where every group of pictures is closed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import decord
import numpy as np

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video.indexed import LARGEST_DISAGREEMENT_S, Facts, IndexedBackend
from reducio_latents.video.protocol import Frame

_WORTH_SEEKING_S = 1.0
_ANY_FAULT = 1e-9
"""Share of frames that decord may replace by others before it raises."""


class DecordBackend(IndexedBackend):
    """Reads ordinary 8-bit H.264, HEVC, VP9 and older codings in MP4, MKV, WebM, AVI and FLV."""

    name = "decord"
    containers = ("mov", "matroska", "avi", "flv", "asf")
    lacks = ("av1", "vvc")
    seeks = ("h264", "vp8", "vp9", "mpeg4", "mjpeg", "ffv1")

    @contextmanager
    def pictures(self, source: VideoSource, facts: Facts) -> Iterator[Callable[[int], Frame]]:
        """See `IndexedBackend.pictures`."""
        try:
            reader = _open(source, self.threads)
            count = len(reader)
            claimed = reader.get_frame_timestamp(list(range(count)))[:, 0]
        except (decord.DECORDError, RuntimeError, AssertionError, IndexError) as err:
            raise self.refusal(source, f"open this file ({_short(err)})") from err
        times = np.array(facts.times_s)
        if count != len(times) or _disagreement_s(claimed, times) > LARGEST_DISAGREEMENT_S:
            raise self.refusal(source, "tell when the frames of this file are shown")
        yield _Pictures(reader, facts).get


class _Pictures:
    """One open decord reader; gives frames by ascending index."""

    def __init__(self, reader: Any, facts: Facts) -> None:
        self._reader, self._facts = reader, facts
        self._next = 0

    def get(self, index: int) -> Frame:
        """Return frame `index`; raise VideoError if it cannot be decoded."""
        try:
            self._advance(index)
            picture: Frame = self._reader.next().asnumpy()
        except (decord.DECORDError, RuntimeError, StopIteration) as err:
            raise VideoError(f"decord fails ({_short(err)})") from err
        self._next = index + 1
        return picture

    def _advance(self, index: int) -> None:
        """Let the next frame that the reader gives be `index`."""
        keys, times = self._facts.keys, self._facts.times_s
        place = bisect_right(keys, index) - 1
        if place >= 0 and times[keys[place]] - times[self._next] > _WORTH_SEEKING_S:
            self._reader.seek_accurate(index)
        elif keys and index > self._next:
            self._reader.skip_frames(index - self._next)
        else:  # in open groups of pictures skip_frames loses count
            for _ in range(index - self._next):
                self._reader.next()


def _open(source: VideoSource, threads: int) -> Any:
    options = {"ctx": decord.cpu(0), "num_threads": threads, "fault_tol": _ANY_FAULT}
    if source.is_plain_file:
        return decord.VideoReader(source.url, **options)
    with open_source(source) as file:  # read into memory as a whole
        return decord.VideoReader(file, **options)


def _disagreement_s(claimed: Any, times: Any) -> float:
    difference = claimed.astype(np.float64) - claimed[0] - times + times[0]
    return float(np.abs(difference).max()) if np.isfinite(difference).all() else float("inf")


def _short(err: BaseException) -> str:
    """decord's messages begin with the time and the place in its source, and may hold a trace."""
    first = str(err).partition("\n")[0].strip() or type(err).__name__
    return re.sub(r"^((\[.*?\]|\S+\.cc:\d+:)\s*)+", "", first).rstrip(".")[:120]
