"""One open video: its frames in the order they are shown, each with the time until the next.

Knows what makes reading exact: which frames an edit list hides, where damage begins and ends, what
may be trusted after a seek, and how to look for a moment without landing behind it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from types import TracebackType
from typing import Any, NamedTuple, Self

import av
from av.sidedata.sidedata import SideDataContainer, Type

from reducio_latents.errors import VideoError
from reducio_latents.video.diagnose import why_unreadable
from reducio_latents.video.orientation import Orientation
from reducio_latents.video.source import VideoSource, open_source
from reducio_latents.video.timeline import PacketClock, rounding_s

READ_ERRORS = (av.FFmpegError, OSError, EOFError, ValueError, MemoryError)
"""What reading and decoding damaged or unreachable data raises."""

# Self-contained files only: a playlist could make FFmpeg open other files or addresses.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,rm,"
    "dv,nut,ivf,obu,h264,hevc,vvc,av1,m4v,h263,mjpeg,yuv4mpegpipe,gif,apng,swf,wtv,gxf,vc1,webp,"
    "webp_pipe,jpeg_pipe,png_pipe,bmp_pipe,tiff_pipe"
)
_TIMED_FORMATS = {"mov", "matroska", "avi", "mpegts", "flv", "asf"}
"""Containers whose packets carry their own times, so that these survive a seek. MPEG program
streams and raw streams have few or none, and what FFmpeg makes up differs after a seek."""
_SEEK_MARGINS_S = (0.25, 2.0, 16.0)
"""How long before the wanted moment to look for a key frame, try after try."""
_WORTH_SEEKING_S = 1.0
_WORTH_SEEKING_BLINDLY_S = 4.0
_SQUARE = Fraction(1, 400)
"""A sample aspect ratio this close to 1 is the rounding of a size, not a shape."""
_OPEN_OPTIONS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


UNDECODABLE = "none of its pictures can be decoded; it is damaged or encrypted"


class Shown(NamedTuple):
    """A frame and how long it is shown, in seconds from the first shown frame."""

    frame: Any
    at_s: float
    until_s: float
    """When the next one appears; for the last, when the video ends."""
    before_s: float
    """It is the frame of moments before this: a frame that appears within the rounding of times
    after a moment is the one meant."""
    trouble: str | None
    """Why this cannot be relied on: the frame is damaged, or others are missing after it."""


class Scan(NamedTuple):
    """What the packets of a video say, and its first frame."""

    first: Any
    is_complete: bool
    """Whether every packet has a time; if not, only decoding tells what follows."""
    frames: int
    duration_s: float
    times_s: list[float]
    """When the shown packets are shown, from the first frame, in the order of the file."""
    keys: list[int]
    """Which of them are key frames."""
    discarded: int
    """Packets that an edit list keeps from being shown."""


class _Decoded(NamedTuple):
    frame: Any
    tick: int


class _Damage(NamedTuple):
    reason: str
    tick: int | None


class OpenVideo:
    """The video stream of an open file. A context manager; raises VideoError if there is none."""

    def __init__(self, source: VideoSource, *, threads: int = 1) -> None:
        self._source = source
        self._threads = threads
        self._stack = ExitStack()
        self._origin: int | None = None
        self._expected: list[int] = []
        self._open()
        self._seekable = self.format in _TIMED_FORMATS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open(self) -> None:
        self._stack.close()
        try:
            file = self._stack.enter_context(open_source(self._source))
            # Faster than through Python; with `file:` because a name may hold colons.
            plain = self._source.is_plain_file
            self._container = self._stack.enter_context(
                av.open(
                    f"file:{self._source.url}" if plain else file,
                    container_options={"format_whitelist": FORMATS},
                    **_OPEN_OPTIONS,
                )
            )
        except READ_ERRORS as err:
            if isinstance(err, VideoError):
                raise
            raise self.error(self._why(err)) from err
        self._choose_stream()

    def _choose_stream(self) -> None:
        found = self._container.streams.best("video")
        if found is None or found.disposition & av.stream.Disposition.attached_pic:
            others = {stream.type for stream in self._container.streams}
            has = "a still cover picture" if found else "audio" if "audio" in others else "nothing"
            raise self.error(f"it has no video stream, only {has}")
        if found.codec_context is None:
            raise self.error("this FFmpeg has no decoder for its video stream")
        for other in self._container.streams:
            if other is not found:
                other.discard = av.stream.Discard.all
        self.stream = found
        self.format = self._container.format.name.split(",")[0]
        # AVI stores no presentation times; a packet's place in the file is its time.
        self._by_dts = self.format == "avi"
        context = found.codec_context
        if self._threads > 1 and not self._by_dts:
            context.thread_type = "AUTO"
            context.thread_count = self._threads
        else:
            context.thread_count = 1
        self.codec = str(context.codec.canonical_name)
        # MPEG-4 may say in a packet that nothing changed, and its decoder then gives no frame.
        self._one_frame_a_packet = not self._by_dts and self.codec != "mpeg4"
        self._tick_s = float(found.time_base)
        rate = found.average_rate or found.guessed_rate
        self._usual_ticks = max(1, round(1 / (float(rate) * self._tick_s))) if rate else 1
        self._clock = self._new_clock()

    def _new_clock(self) -> PacketClock:
        return PacketClock(self.codec, by_dts=self._by_dts, field_ticks=0.75 * self._usual_ticks)

    def error(self, reason: str) -> VideoError:
        return VideoError(f"{self._source}: {reason}.")

    def _why(self, err: BaseException) -> str:
        if not isinstance(err, av.FFmpegError):
            return f"it cannot be read: {err}"
        with open_source(self._source) as file:
            return why_unreadable(file)

    # How it is shown.

    def shown_size(self, frame: Any) -> tuple[int, int]:
        """Return (width, height) of a frame as it is shown."""
        return self.orientation(frame).size(self.scaled_width(frame), frame.height)

    def scaled_width(self, frame: Any) -> int:
        """Return the width that makes the samples of a stored frame square; its height is kept."""
        ratio = self.stream.sample_aspect_ratio
        if not ratio or ratio < 0 or abs(ratio - 1) < _SQUARE:
            return int(frame.width)
        return max(1, int(frame.width * Fraction(ratio) + Fraction(1, 2)))

    def orientation(self, frame: Any) -> Orientation:
        """Return how a frame is turned; raise VideoError for an odd angle."""
        try:
            # Not frame.side_data: it would keep the frame alive until cycles are collected.
            side_data: Any = SideDataContainer
            matrix = side_data(frame).get(Type.DISPLAYMATRIX)
        except ValueError:
            # Side data of a kind newer than PyAV hides the matrix; its angle can still be had.
            return Orientation.from_degrees(-round(frame.rotation / 90) * 90)
        return Orientation() if matrix is None else Orientation.from_matrix(bytes(matrix))

    # Packets, without decoding.

    def scan(self) -> Scan:
        """Read every packet, and decode the first frame only.

        Raises VideoError if no frame can be decoded.
        """
        clock, first, ticks = self._new_clock(), None, list[int]()
        keys, discarded, leading = [], 0, 0
        try:
            for packet in self._container.demux(self.stream):
                discarded += packet.is_discard
                tick = clock.add(packet)
                if tick is not None:
                    if packet.is_keyframe:
                        keys.append(len(ticks))
                    ticks.append(tick)
                if first is None:
                    leading = len(ticks)
                    try:
                        first = next(iter(packet.decode()), None)
                    except READ_ERRORS:  # there may be a whole picture after the damaged one
                        continue
        except READ_ERRORS as err:
            if first is None:
                raise self.error(self._why(err)) from err
        if first is None:
            raise self.error(UNDECODABLE)
        if clock.untimed or clock.first is None or (first.pts is None and not self._by_dts):
            return Scan(first, False, 0, 0.0, [], [], discarded)
        start = clock.first if self._by_dts else max(clock.first, first.pts)
        fields = clock.short // 2 if first.interlaced_frame else 0
        before = sum(tick < start for tick in ticks[:leading])
        end = clock.end(self._header_end(), self._usual_ticks)
        return Scan(
            first,
            is_complete=True,
            frames=len(ticks) - fields - before,
            duration_s=(end - start) * self._tick_s,
            times_s=[(tick - start) * self._tick_s for tick in ticks],
            keys=keys,
            discarded=discarded,
        )

    # Frames.

    def play(self) -> Iterator[Shown]:
        """Decode from the start."""
        if self._origin is not None:
            self._open()
        return self._shown(key_first=False)

    def approach(self, wanted_s: float) -> Iterator[Shown]:
        """Decode from a key frame at or before the moment `wanted_s`.

        A seek may land late (MPEG-TS, AVI, open groups of pictures); then it is tried further back,
        and at last from the start.
        """
        for margin_s in _SEEK_MARGINS_S:
            if margin_s >= wanted_s:
                break
            try:
                self._container.seek(self._to_tick(wanted_s - margin_s), stream=self.stream)
            except READ_ERRORS:
                break
            self._clock = self._new_clock()
            frames = self._shown(key_first=True)
            first = next(frames, None)
            if first is not None and first.at_s <= wanted_s:
                return chain([first], frames)
        self._seekable = False  # trying again would decode everything again
        return self.play()

    def is_worth_seeking(self, now_s: float, wanted_s: float) -> bool:
        """Return whether a seek to `wanted_s` spares more decoding than it costs."""
        if not self._seekable or wanted_s - now_s < _WORTH_SEEKING_S:
            return False
        index = self.stream.index_entries
        target = self._to_tick(wanted_s - _SEEK_MARGINS_S[0])
        if len(index) == 0 or index[-1].timestamp < target:
            return wanted_s - now_s > _WORTH_SEEKING_BLINDLY_S
        found = index.search_timestamp(target, backward=True)
        return bool(found >= 0 and index[found].timestamp > self._to_tick(now_s))

    def _shown(self, *, key_first: bool) -> Iterator[Shown]:
        """Yield the frames from here on. After a seek the first is a key frame: what a decoder
        gives before one was made without the pictures it refers to.
        """
        held: _Decoded | None = None
        trouble: str | None = None  # while the held frame is shown
        damage: str | None = None  # from the next frame on
        heals_after = 0
        for item in self._decoded():
            if isinstance(item, _Damage):
                if held is not None:  # else nothing was shown yet that could be missed
                    trouble = trouble or item.reason
                    damage, heals_after = trouble, max(heals_after, item.tick or held.tick)
                continue
            frame, tick = item
            if held is None:
                if key_first and (frame.is_corrupt or not frame.key_frame):
                    continue
                heals_after = tick
                self._origin = tick if self._origin is None else self._origin
                self._missing(tick, tick, frame)
            elif tick < held.tick:
                trouble = trouble or self._at("presentation times go backwards", held.tick)
                damage = trouble
                continue
            else:
                missing = self._missing(held.tick, tick, frame)
                if missing:
                    trouble = damage = trouble or missing
                yield self._interval(held, tick, trouble)
                if frame.key_frame and tick > heals_after:
                    damage = None
            if frame.is_corrupt:
                damage, heals_after = self._at("the picture is damaged", tick), tick
            held, trouble = item, damage
        if held is not None:
            end = self._end(held.tick)
            trouble = trouble or self._missing(held.tick, end, held.frame)
            yield self._interval(held, end, trouble, is_last=True)

    def _interval(
        self, held: _Decoded, until: int, trouble: str | None, *, is_last: bool = False
    ) -> Shown:
        until_s = self._seconds(until)
        before_s = until_s if is_last else until_s - self.rounding_s
        return Shown(held.frame, self._seconds(held.tick), until_s, before_s, trouble)

    def _decoded(self) -> Iterator[_Decoded | _Damage]:
        """Yield frames with their times as they come out of the decoder, and what went wrong."""
        self._expected.clear()
        last: int | None = None
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except READ_ERRORS as err:
                yield _Damage(f"the file cannot be read any further ({_short(err)})", None)
                packet = None
            tick = None if packet is None else self._clock.add(packet)
            if tick is not None and self._one_frame_a_packet:
                heapq.heappush(self._expected, tick)
            elif packet is not None and packet.is_corrupt and not packet.is_discard:
                yield _Damage(self._at("the file is damaged or cut short", packet.pts), packet.pts)
            try:
                frames = self.stream.decode(packet)
            except READ_ERRORS as err:
                at = None if packet is None else packet.pts
                yield _Damage(self._at(f"the decoder gives up ({_short(err)})", at), at)
                frames = []
            for frame in frames:
                last = self._tick(frame, last)
                yield _Decoded(frame, last)
            if packet is None or not packet.size:  # the decoder is drained
                return

    def _tick(self, frame: Any, last: int | None) -> int:
        tick: int | None = frame.dts if self._by_dts else frame.pts
        if tick is None and not self._by_dts:
            tick = frame.dts
        if tick is not None:
            return tick
        return 0 if last is None else last + (frame.duration or self._usual_ticks)

    def _missing(self, start: int, stop: int, frame: Any) -> str | None:
        """Say so if a packet between two frames brought none. Of a pair of fields one does not."""
        found = None
        while self._expected and self._expected[0] < stop:
            tick = heapq.heappop(self._expected)
            if tick > start and not frame.interlaced_frame:
                found = found or self._at("a frame is missing", tick)
        return found

    def _end(self, last: int) -> int:
        """Return when the frame at `last`, after which the file ends, ceases to be shown."""
        if self._clock.last is None:
            return last + self._usual_ticks
        end = self._clock.end(self._header_end(), self._usual_ticks)
        return last + end - self._clock.last if self._by_dts else max(end, last + 1)

    def _header_end(self) -> int | None:
        start, duration = self.stream.start_time, self.stream.duration
        return start + duration if start is not None and duration else None

    def _seconds(self, tick: int) -> float:
        return (tick - (self._origin or 0)) * self._tick_s

    def _to_tick(self, seconds: float) -> int:
        return (self._origin or 0) + int(seconds / self._tick_s)

    @property
    def rounding_s(self) -> float:
        return rounding_s(self._tick_s)

    def _at(self, reason: str, tick: int | None) -> str:
        return reason if tick is None else f"{reason} at {self._seconds(tick):.3f} s"


def _short(err: BaseException) -> str:
    return str(getattr(err, "strerror", None) or err).strip().rstrip(".").lower()
