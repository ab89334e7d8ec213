"""The frames of an open video in the order they are shown, each with the time until the next.

Here is what makes reading exact: where damage begins and ends, what may be trusted after a seek,
and how to look for a moment without landing behind it.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from reducio_latents.errors import VideoError
from reducio_latents.video.file import READ_ERRORS, VideoFile
from reducio_latents.video.timeline import DecodedFrame, Disorder, FrameOrder, Timed, frame_ticks

_TIMED_FORMATS = {"mov", "matroska", "avi", "mpegts", "flv", "asf"}
"""Containers whose packets carry their own times, so that these survive a seek. MPEG program
streams and raw streams have few or none, and what FFmpeg makes up differs after a seek."""
_SEEK_MARGINS_S = (0.25, 2.0, 16.0)
"""How long before the wanted moment to look for a key frame, try after try."""
_WORTH_SEEKING_S = 1.0
_WORTH_SEEKING_BLINDLY_S = 4.0
_MOST_AHEAD = 32
"""Packets that are read before one is decoded, to learn when the frame after it is shown."""
_DISORDER = "presentation times are missing or go backwards"


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
    neighbours: tuple[Any, Any] | None = None
    """The frames before and after it, if it is to be deinterlaced with them."""


class _Packet(NamedTuple):
    packet: Any
    tick: int | None
    """When it is shown, if it is."""
    disposable: bool


class _Damage(NamedTuple):
    reason: str
    tick: int | None


class Playback:
    """Plays an open file, forwards, from the start or from near a moment.

    With `wants`, which tells whether a moment from one to before another is wanted, frames are left
    out that are not, where no other frame refers to them: they are not decoded.
    """

    def __init__(
        self,
        file: VideoFile,
        *,
        deinterlace: bool = True,
        wants: Callable[[float, float], bool] | None = None,
    ) -> None:
        self._file = file
        self._deinterlace = deinterlace
        self._wants = wants
        self.skipped = 0
        """Frames that were left out as nobody wants them."""
        self._disposable: set[int] = set()
        """Times of frames that no other one refers to: their damage is their own."""
        self._seekable = file.format in _TIMED_FORMATS
        self.left_out = 0
        """Frames that were decoded and not shown, as nothing tells when."""
        self._origin: int | None = None
        self._clock = file.new_clock()
        self._order = FrameOrder(file.usual_ticks, file.longest_wait)
        self._expected: list[int] = []
        """When the frames are shown whose packets went into the decoder."""
        self._untimed_ticks = file.usual_ticks
        """How long the last frame of a stream without times is shown."""

    def play(self) -> Iterator[Shown]:
        """Decode from the start."""
        if self._origin is not None:
            self._file.open()
        return self._with_neighbours(self._shown(key_first=False), sought=False)

    def approach(self, wanted_s: float) -> Iterator[Shown]:
        """Decode from a key frame at or before the moment `wanted_s`.

        A seek may land late (MPEG-TS, AVI, open groups of pictures); then it is tried further back,
        and at last from the start.
        """
        for margin_s in _SEEK_MARGINS_S:
            if margin_s >= wanted_s:
                break
            try:
                self._file.seek(self._to_tick(wanted_s - margin_s))
            except READ_ERRORS:
                break
            frames = self._with_neighbours(self._shown(key_first=True), sought=True)
            first = next(frames, None)
            if first is not None and first.at_s <= wanted_s:
                return chain([first], frames)
        self._seekable = False  # trying again would decode everything again
        return self.play()

    def is_worth_seeking(self, now_s: float, wanted_s: float) -> bool:
        """Return whether a seek to `wanted_s` spares more decoding than it costs."""
        if not self._seekable or wanted_s - now_s < _WORTH_SEEKING_S:
            return False
        index = self._file.stream.index_entries
        target = self._to_tick(wanted_s - _SEEK_MARGINS_S[0])
        if len(index) == 0 or index[-1].timestamp < target:
            return wanted_s - now_s > _WORTH_SEEKING_BLINDLY_S
        found = index.search_timestamp(target, backward=True)
        return bool(found >= 0 and index[found].timestamp > self._to_tick(now_s))

    def _shown(self, *, key_first: bool) -> Iterator[Shown]:
        """Yield the frames from here on. After a seek the first is a key frame: what a decoder
        gives before one was made without the pictures it refers to.
        """
        held: Timed | None = None
        trouble: str | None = None  # while the held frame is shown
        damage: str | None = None  # from the next frame on
        heals_after = 0
        for item in self._ordered():
            if isinstance(item, Disorder):
                self.left_out += item.frames
                if held is not None:
                    trouble = trouble or self._at(_DISORDER, held.tick)
                continue
            if isinstance(item, _Damage):
                key_first = True  # if nothing was shown yet, nothing will be missed
                if held is not None:
                    trouble = damage = trouble or item.reason
                    heals_after = max(heals_after, item.tick or held.tick)
                continue
            frame, tick, is_key = item
            if held is None:
                if key_first and (frame.is_corrupt or not is_key):
                    continue
                heals_after = tick
                self._origin = tick if self._origin is None else self._origin
                self._missing(tick, tick, frame)
            else:
                missing, spreads = self._missing(held.tick, tick, frame)
                trouble = trouble or missing
                if spreads:
                    damage = trouble
                yield self._interval(held, tick, trouble)
                if is_key and tick > heals_after:
                    damage = None
            held, trouble = item, damage
            if frame.is_corrupt:
                trouble = self._at("the picture is damaged", tick)
                if tick not in self._disposable:
                    damage, heals_after = trouble, tick
        if held is not None:
            end = self._end(held.tick)
            trouble = trouble or self._missing(held.tick, end, held.frame)[0]
            yield self._interval(held, end, trouble, is_last=True)

    def _with_neighbours(self, frames: Iterator[Shown], *, sought: bool) -> Iterator[Shown]:
        """Give each interlaced frame those that it is made whole with; their troubles are its own.

        After a seek the first frame has none before it, and cannot be made as it is otherwise.
        """
        before: Shown | None = None
        now: Shown | None = None
        for after in chain(frames, [None]):
            if now is not None and self._mixes(now) and not (sought and before is None):
                around = [one for one in (now, before, after) if one is not None]
                trouble = next((one.trouble for one in around if one.trouble is not None), None)
                neighbours = (before and before.frame, after and after.frame)
                yield now._replace(trouble=trouble, neighbours=neighbours)
            if after is not None and not self._mixes(after):
                yield after
            before, now = now, after

    def _mixes(self, shown: Shown) -> bool:
        return self._deinterlace and bool(shown.frame.interlaced_frame)

    def _interval(
        self, held: Timed, until: int, trouble: str | None, *, is_last: bool = False
    ) -> Shown:
        until_s = self._seconds(until)
        before_s = until_s if is_last else until_s - self._file.rounding_s
        return Shown(held.frame, self._seconds(held.tick), until_s, before_s, trouble)

    def _ordered(self) -> Iterator[Timed | _Damage | Disorder]:
        """Yield what `_decoded` does, with times that can be relied on."""
        self._order = FrameOrder(self._file.usual_ticks, self._file.longest_wait)
        for item in self._decoded():
            if isinstance(item, _Damage):
                yield from self._order.end()
                yield item
            else:
                yield from self._order.add(item)
        yield from self._order.end()

    def _decoded(self) -> Iterator[DecodedFrame | _Damage]:
        """Yield frames as they come out of the decoder, with the times they have; and damage."""
        self._expected.clear()
        self._disposable.clear()
        self._clock = self._file.new_clock()
        packets, last = self._packets(), None
        while True:
            try:
                packet, tick, disposable = next(packets, _Packet(None, None, False))
            except VideoError:
                raise
            except READ_ERRORS as err:
                yield _Damage(f"the file cannot be read any further ({_short(err)})", None)
                packet, tick, disposable = None, None, False
            if tick is not None and self._file.one_frame_a_packet:
                heapq.heappush(self._expected, tick)
            elif packet is not None and packet.is_corrupt and not packet.is_discard:
                yield self._damage("the file is damaged or cut short", packet)
            try:
                frames = self._file.decode(packet)
            except READ_ERRORS as err:
                if not disposable:  # else a frame is missing, and that is all
                    yield self._damage(f"the decoder gives up ({_short(err)})", packet)
                frames = []
            for frame in frames:
                last = tick = self._tick(frame, last)
                if tick in self._expected:  # else others have told that it is missing
                    self._expected.remove(tick)
                    heapq.heapify(self._expected)
                yield DecodedFrame(frame, tick, self._file.is_key(frame))
            if packet is None or not packet.size:  # the decoder is drained
                return

    def _packets(self) -> Iterator[_Packet]:
        """Yield the packets that are to be decoded.

        Which frame comes after one that may be skipped is known once a packet is to be decoded no
        earlier than that: none that follows is shown before it is decoded.
        """
        ahead, shown, packets = deque[_Packet](), list[int](), self._file.packets()
        decoded_to, failure = -math.inf, None
        while True:
            try:
                packet = next(packets, None)
            except READ_ERRORS as err:
                packet, failure = None, err
            if packet is not None:
                tick = self._clock.add(packet)
                disposable = tick is not None and self._file.is_disposable(packet)
                if tick is not None:
                    if packet.dts is None or not decoded_to <= packet.dts <= tick:
                        self._wants = None
                    else:
                        decoded_to = packet.dts
                    insort(shown, tick)
                    del shown[: -4 * _MOST_AHEAD]
                    if disposable:
                        self._disposable.add(tick)
                ahead.append(_Packet(packet, tick, disposable))
            over = packet is None or not packet.size
            while ahead:
                first, after = ahead[0], None
                if first.disposable and self._wants is not None and self._origin is not None:
                    assert first.tick is not None
                    place = bisect_right(shown, first.tick)
                    known = place < len(shown) and shown[place] <= decoded_to
                    if not known and not over and len(ahead) <= _MOST_AHEAD:
                        break
                    after = shown[place] if known else None
                ahead.popleft()
                if after is None or self._is_wanted(first.tick or 0, after):
                    yield first
                else:
                    self.skipped += 1
            if failure is not None:
                raise failure
            if over:
                return

    def _is_wanted(self, tick: int, after: int) -> bool:
        """Whether a moment is wanted from the `Shown.before_s` of the frame before to its own."""
        from_s, before_s = (self._seconds(t) - self._file.rounding_s for t in (tick, after))
        return self._wants is None or self._wants(from_s, before_s)

    def _damage(self, reason: str, packet: Any) -> _Damage:
        tick: int | None = None
        if packet is not None:
            tick = packet.dts if self._file.by_dts else packet.pts
        return _Damage(self._at(reason, tick), tick)

    def _tick(self, frame: Any, last: int | None) -> int | None:
        """Return the time that a frame came with, or that follows from the one before it."""
        file = self._file
        if file.is_untimed:
            after = self._untimed_ticks
            self._untimed_ticks = frame_ticks(frame.duration or 0, file.usual_ticks)
            return 0 if last is None else last + after
        tick: int | None = frame.dts if file.by_dts else frame.pts
        if tick is None and file.by_dts and last is not None:
            tick = last + file.usual_ticks  # the decoder held it back to the end
        return tick

    def _missing(self, start: int, stop: int, frame: Any) -> tuple[str | None, bool]:
        """Say so if a packet between two frames brought none, and whether others refer to it.

        Of a pair of fields one does not.
        """
        found, spreads = None, False
        while self._expected and self._expected[0] < stop:
            tick = heapq.heappop(self._expected)
            if tick > start and not frame.interlaced_frame:
                found = found or self._at("a frame is missing", tick)
                spreads |= tick not in self._disposable
        return found, spreads

    def _end(self, last: int) -> int:
        """Return when the frame at `last`, after which the file ends, ceases to be shown."""
        if self._file.is_untimed:
            return last + self._untimed_ticks
        if self._clock.last is None or self._order.is_broken:
            return last + self._order.gap
        end = self._clock.end(self._file.header_end, self._file.usual_ticks)
        return last + end - self._clock.last if self._file.by_dts else max(end, last + 1)

    def _seconds(self, tick: int) -> float:
        return (tick - (self._origin or 0)) * self._file.tick_s

    def _to_tick(self, seconds: float) -> int:
        return (self._origin or 0) + int(seconds / self._file.tick_s)

    def _at(self, reason: str, tick: int | None) -> str:
        return reason if tick is None else f"{reason} at {self._seconds(tick):.3f} s"


def _short(err: BaseException) -> str:
    return str(getattr(err, "strerror", None) or err).strip().rstrip(".").lower()
