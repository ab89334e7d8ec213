"""One open video file: its picture stream, how its pictures are shown, what its packets say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple, Self

import av
from av.sidedata.sidedata import SideDataContainer, Type

from reducio_latents.core.clips import TIME_TOLERANCE_S
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video.diagnose import ENCRYPTED, is_encrypted, why_unreadable
from reducio_latents.video.interlace import h264_has_fields, may_be_interlaced
from reducio_latents.video.orientation import Orientation
from reducio_latents.video.timeline import PacketClock, is_disposable, rounding_s

READ_ERRORS = (av.FFmpegError, OSError, EOFError, ValueError, MemoryError)
"""What reading and decoding damaged or unreachable data raises."""
UNDECODABLE = "none of its pictures can be decoded; it is damaged or encrypted"
_UNTIMED_FORMATS = ("h264", "hevc", "vvc", "obu", "av1", "m4v", "mpegvideo", "h263", "mjpeg", "vc1")
"""Bare pictures, one after another, at a rate that they tell or that is taken to be 25 a second:
the times that FFmpeg makes up for them differ from that at the start, and after a seek."""
_LONGEST_WAIT_S = {"mpegts": 0.7, "mpeg": 0.7}
"""From a frame's time to the next, by ISO 13818-1. Other containers tell how long frames last."""
_WORTH_SAYING_S, _WORTH_SAYING = 0.5, 0.05
"""Seconds, and the share of frames, from which on a loss is told before a clip is read."""
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders leave out the transparency that WebM keeps beside a picture."""

# Self-contained files only: a playlist could make FFmpeg open other files or addresses.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,rm,"
    "dv,nut,ivf,obu,h264,hevc,vvc,av1,m4v,h263,mjpeg,yuv4mpegpipe,gif,apng,swf,wtv,gxf,vc1,webp,"
    "webp_pipe,jpeg_pipe,png_pipe,bmp_pipe,tiff_pipe"
)
_RAW = re.compile(
    r"_(\d{2,5})x(\d{2,5})_(\d{1,3}(?:\.\d+)?)(?:fps)?(?=[_.])[^/]*\.yuv$", re.IGNORECASE
)
"""What names of raw 4:2:0 videos say: width, height, frames a second; and `10bit`, if it is so."""
_SQUARE = Fraction(1, 400)
"""A sample aspect ratio this close to 1 is the rounding of a size, not a shape."""
_WIDEST = 8
_OPEN_OPTIONS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class Scan(NamedTuple):
    """What the packets of a video say, and its first frame."""

    first: Any
    is_complete: bool
    """Whether every packet has a time that can be; if not, only decoding tells what follows."""
    frames: int
    duration_s: float
    times_s: list[float]
    """When the shown packets are shown, from the first frame, in the order of the file."""
    keys: list[int]
    """Which of them are key frames."""
    discarded: int
    """Packets that an edit list keeps from being shown."""
    note: str = ""
    """See `VideoInfo.note`."""


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
                    **self._raw_format(),
                    **_OPEN_OPTIONS,
                )
            )
        except VideoError:
            raise
        except READ_ERRORS as err:
            raise self.error(self._why(err)) from err

    def _raw_format(self) -> dict[str, Any]:
        """Return how the container is opened: as its bytes tell, or its name, if it is raw."""
        if not self._source.url.lower().endswith(".yuv"):
            return {"container_options": {"format_whitelist": FORMATS}}
        told = _RAW.search(self._source.url)
        if told is None:
            raise self.error(
                "a .yuv file does not say its size; have its name say it: NAME_1920x1080_30.yuv"
            )
        width, height, rate = told.groups()
        pixels = "yuv420p10le" if "10bit" in self._source.url.lower() else "yuv420p"
        size = {"video_size": f"{width}x{height}", "framerate": rate, "pixel_format": pixels}
        return {"format": "rawvideo", "container_options": size}

    def _choose_stream(self) -> None:
        found = self._container.streams.best("video")
        if found is None or found.disposition & av.stream.Disposition.attached_pic:
            others = {stream.type for stream in self._container.streams}
            only = "a still cover picture" if found else "audio" if "audio" in others else "data"
            raise self.error(f"it has no video stream, only {only}")
        if found.codec_context is None:
            with open_source(self._source) as file:
                encrypted = ENCRYPTED if is_encrypted(file) else ""
            raise self.error(encrypted or "this FFmpeg has no decoder for its video stream")
        if "enc_key_id" in found.metadata:  # Matroska
            raise self.error(ENCRYPTED)
        for other in self._container.streams:
            if other is not found:
                other.discard = av.stream.Discard.all
        self.stream = found
        self.format = self._container.format.name.split(",")[0]
        # AVI stores no presentation times; a packet's place in the file is its time.
        self.by_dts = self.format == "avi"
        context = self._context = self._decoder()
        self.has_alpha, self._key = context is not found.codec_context, None
        if self._threads > 1 and not self.by_dts:
            context.thread_type = "AUTO"
            context.thread_count = self._threads
        else:
            context.thread_count = 1
        self.codec = str(context.codec.canonical_name)
        self.is_untimed = self.format in _UNTIMED_FORMATS
        # MPEG-4 may say in a packet that nothing changed, and its decoder then gives no frame.
        self.one_frame_a_packet = not (self.by_dts or self.is_untimed or self.codec == "mpeg4")
        self._length_bytes = self._unit_length_bytes() if self.one_frame_a_packet else 0
        self.tick_s = float(found.time_base)
        average = None if self.is_untimed else found.average_rate
        rate = average or found.guessed_rate
        self.usual_ticks = max(1, round(1 / (float(rate) * self.tick_s))) if rate else 1
        self.longest_wait = _LONGEST_WAIT_S.get(self.format, math.inf) / self.tick_s
        guessed = self.is_untimed and not context.framerate
        self.note = f"its frames have no times: they are taken as {rate} a second" * guessed

    def _decoder(self) -> Any:
        """Return what decodes the stream."""
        context = self.stream.codec_context
        alpha = {name.lower(): value for name, value in self.stream.metadata.items()}
        name = _ALPHA_DECODERS.get(context.codec.canonical_name)
        if name is None or alpha.get("alpha_mode") != "1":
            return context
        return av.CodecContext.create(name, "r")

    def _unit_length_bytes(self) -> int:
        """Return by how many bytes an H.264 packet tells how long its units are; 0 if it does not,
        or if pictures may be fields."""
        header = self.stream.codec_context.extradata or b""
        try:
            if self.codec != "h264" or header[0] != 1 or h264_has_fields(header):
                return 0
            return (header[4] & 3) + 1
        except (IndexError, ValueError):
            return 0

    def is_disposable(self, packet: Any) -> bool:
        """Whether it is known that no other picture refers to that of a packet."""
        return self._length_bytes > 0 and is_disposable(memoryview(packet), self._length_bytes)

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

    def may_be_interlaced(self, first: Any) -> bool:
        """Return whether any frame may be interlaced; `first` is the first one."""
        return may_be_interlaced(self.codec, self.stream.codec_context.extradata or b"", first)

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
        """Yield the packets of the stream from here on, and an empty one at the end.

        Raises VideoError at the first one that is encrypted.
        """
        try:
            for packet in self._container.demux(self.stream):
                if packet.has_sidedata("encryption_info"):  # Common Encryption, ISO 23001-7
                    raise self.error(ENCRYPTED)
                yield packet
        except IndexError:
            # At the end of the file PyAV trips over streams that appeared only in its course.
            return

    def seek(self, tick: int) -> None:
        """Go to a key frame that is stored at or before the time `tick`, if all goes well."""
        self._container.seek(tick, stream=self.stream)
        if self.has_alpha:
            self._context.flush_buffers()

    def decode(self, packet: Any) -> list[Any]:
        """Return the frames that come out when a packet goes in; at the end, None goes in."""
        if packet is not None and packet.is_keyframe:
            self._key = packet.pts
        return list(self._context.decode(packet))

    def is_key(self, frame: Any) -> bool:
        """Whether a frame that has just come out needs no other one; libvpx does not say it."""
        return bool(frame.key_frame) or (self.has_alpha and frame.pts == self._key)

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
                        frames = self.decode(packet)
                    except READ_ERRORS:  # what follows refers to it, up to the next key frame
                        damaged = True
                        continue
                    first = next((f for f in frames if self.is_key(f) or not damaged), None)
        except VideoError:
            raise
        except READ_ERRORS as err:
            if first is None:
                raise self.error(self._why(err)) from err
        if first is None:
            raise self.error(UNDECODABLE)
        start = clock.first if self.by_dts else first.pts
        doubtful = self.is_untimed or clock.doubtful or clock.last_wait > self.longest_wait
        if doubtful or clock.last is None or start is None or start > clock.last:
            return Scan(first, False, 0, 0.0, [], [], discarded)
        fields = clock.short // 2 if first.interlaced_frame else 0
        before = sum(tick < start for tick in ticks[:leading])
        end = clock.end(self.header_end, self.usual_ticks)
        times_s, end_s = [(t - start) * self.tick_s for t in ticks], (end - start) * self.tick_s
        return Scan(
            first,
            is_complete=True,
            frames=len(ticks) - fields - before,
            duration_s=end_s,
            times_s=times_s,
            keys=keys,
            discarded=discarded,
            note="" if discarded else self._note(times_s, end_s),
        )

    def _note(self, times_s: Sequence[float], end_s: float) -> str:
        """Say what of the footage is lost: what the header promises beyond the packets, and frames
        that appear and are gone."""
        promised = self.stream.duration
        promised_s = promised * self.tick_s if promised else (self._container.duration or 0) / 1e6
        has_sound = any(stream.type == "audio" for stream in self._container.streams)
        if (promised or not has_sound) and promised_s - end_s >= _WORTH_SAYING_S:
            return f"it promises {promised_s:.3f} s, but its frames end at {end_s:.3f} s"
        gone = sum(later - at < TIME_TOLERANCE_S for at, later in pairwise(sorted(times_s)))
        if gone < _WORTH_SAYING * len(times_s):
            return ""
        return f"{gone} of its {len(times_s)} frames are shown for less than 1 ms, and lost"
