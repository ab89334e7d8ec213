"""One open video file: its picture stream, how its pictures are shown, what its packets say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from types import TracebackType
from typing import Any, NamedTuple, Self

import av
from av.sidedata.sidedata import SideDataContainer, Type

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video.diagnose import why_unreadable
from reducio_latents.video.orientation import Orientation
from reducio_latents.video.timeline import PacketClock, rounding_s

READ_ERRORS = (av.FFmpegError, OSError, EOFError, ValueError, MemoryError)
"""What reading and decoding damaged or unreachable data raises."""
UNDECODABLE = "none of its pictures can be decoded; it is damaged or encrypted"

# Self-contained files only: a playlist could make FFmpeg open other files or addresses.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,rm,"
    "dv,nut,ivf,obu,h264,hevc,vvc,av1,m4v,h263,mjpeg,yuv4mpegpipe,gif,apng,swf,wtv,gxf,vc1,webp,"
    "webp_pipe,jpeg_pipe,png_pipe,bmp_pipe,tiff_pipe"
)
_SQUARE = Fraction(1, 400)
"""A sample aspect ratio this close to 1 is the rounding of a size, not a shape."""
_WIDEST = 8
_OPEN_OPTIONS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


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


class VideoFile:
    """A file and its video stream. A context manager; raises VideoError if there is none."""

    def __init__(self, source: VideoSource, *, threads: int = 1) -> None:
        self._source = source
        self._threads = threads
        self._stack = ExitStack()
        self.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def open(self) -> None:
        """Open the file at its start, afresh if it was open."""
        self._stack.close()
        with ExitStack() as stack:
            self._open(stack)
            self._choose_stream()
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> None:
        try:
            file = stack.enter_context(open_source(self._source))
            # Faster than through Python; with `file:` because a name may hold colons.
            plain = self._source.is_plain_file
            self._container = stack.enter_context(
                av.open(
                    f"file:{self._source.url}" if plain else file,
                    container_options={"format_whitelist": FORMATS},
                    **_OPEN_OPTIONS,
                )
            )
        except VideoError:
            raise
        except READ_ERRORS as err:
            raise self.error(self._why(err)) from err

    def _choose_stream(self) -> None:
        found = self._container.streams.best("video")
        if found is None or found.disposition & av.stream.Disposition.attached_pic:
            others = {stream.type for stream in self._container.streams}
            only = "a still cover picture" if found else "audio" if "audio" in others else "data"
            raise self.error(f"it has no video stream, only {only}")
        if found.codec_context is None:
            raise self.error("this FFmpeg has no decoder for its video stream")
        for other in self._container.streams:
            if other is not found:
                other.discard = av.stream.Discard.all
        self.stream = found
        self.format = self._container.format.name.split(",")[0]
        # AVI stores no presentation times; a packet's place in the file is its time.
        self.by_dts = self.format == "avi"
        context = found.codec_context
        if self._threads > 1 and not self.by_dts:
            context.thread_type = "AUTO"
            context.thread_count = self._threads
        else:
            context.thread_count = 1
        self.codec = str(context.codec.canonical_name)
        # MPEG-4 may say in a packet that nothing changed, and its decoder then gives no frame.
        self.one_frame_a_packet = not self.by_dts and self.codec != "mpeg4"
        self.tick_s = float(found.time_base)
        rate = found.average_rate or found.guessed_rate
        self.usual_ticks = max(1, round(1 / (float(rate) * self.tick_s))) if rate else 1

    def new_clock(self) -> PacketClock:
        return PacketClock(self.codec, by_dts=self.by_dts, field_ticks=0.75 * self.usual_ticks)

    def error(self, reason: str) -> VideoError:
        return VideoError(f"{self._source}: {reason}.")

    def _why(self, err: BaseException) -> str:
        if not isinstance(err, av.FFmpegError):
            return f"it cannot be read: {err}"
        with open_source(self._source) as file:
            return why_unreadable(file)

    # How a picture is shown.

    def shown_size(self, frame: Any) -> tuple[int, int]:
        """Return (width, height) of a frame as it is shown."""
        return self.orientation(frame).size(self.scaled_width(frame), frame.height)

    def scaled_width(self, frame: Any) -> int:
        """Return the width that makes the samples of a stored frame square; its height is kept."""
        ratio = Fraction(self.stream.sample_aspect_ratio or 0)
        if ratio <= 0 or abs(ratio - 1) < _SQUARE:
            return int(frame.width)
        if not 1 / _WIDEST <= ratio <= _WIDEST:
            raise VideoError(f"its sample aspect ratio, {ratio}, makes no sense")
        return int(frame.width * ratio + Fraction(1, 2))

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

    # When a picture is shown.

    @property
    def rounding_s(self) -> float:
        return rounding_s(self.tick_s)

    @property
    def header_end(self) -> int | None:
        """When the stream ends, in ticks, if its header is to be believed."""
        start, duration = self.stream.start_time, self.stream.duration
        return start + duration if start is not None and duration else None

    def packets(self) -> Iterator[Any]:
        """Yield the packets of the stream from here on, and an empty one at the end."""
        try:
            yield from self._container.demux(self.stream)
        except IndexError:
            # At the end of the file PyAV trips over streams that appeared only in its course.
            return

    def seek(self, tick: int) -> None:
        """Go to a key frame that is stored at or before the time `tick`, if all goes well."""
        self._container.seek(tick, stream=self.stream)

    def scan(self, alive: Callable[[], None] = lambda: None) -> Scan:
        """Read every packet, telling `alive`, and decode the first frame only.

        Raises VideoError if no frame can be decoded.
        """
        clock, first, ticks = self.new_clock(), None, list[int]()
        keys, discarded, leading, damaged = [], 0, 0, False
        try:
            for packet in self.packets():
                alive()
                discarded += packet.is_discard
                tick = clock.add(packet)
                if tick is not None:
                    if packet.is_keyframe:
                        keys.append(len(ticks))
                    ticks.append(tick)
                if first is None:
                    leading = len(ticks)
                    try:
                        frames = packet.decode()
                    except READ_ERRORS:  # what follows refers to it, up to the next key frame
                        damaged = True
                        continue
                    first = next((f for f in frames if f.key_frame or not damaged), None)
        except READ_ERRORS as err:
            if first is None:
                raise self.error(self._why(err)) from err
        if first is None:
            raise self.error(UNDECODABLE)
        start = clock.first if self.by_dts else first.pts
        if clock.untimed or clock.last is None or start is None or start > clock.last:
            return Scan(first, False, 0, 0.0, [], [], discarded)
        fields = clock.short // 2 if first.interlaced_frame else 0
        before = sum(tick < start for tick in ticks[:leading])
        end = clock.end(self.header_end, self.usual_ticks)
        return Scan(
            first,
            is_complete=True,
            frames=len(ticks) - fields - before,
            duration_s=(end - start) * self.tick_s,
            times_s=[(tick - start) * self.tick_s for tick in ticks],
            keys=keys,
            discarded=discarded,
        )
