"""When the frames of a file are shown, as its packets tell, and as the order of its frames does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from reducio_latents.core.clips import TIME_TOLERANCE_S

MOST_WAITING = 8
"""DecodedFrame frames that are kept at once until it is known which of their times are right."""


def frame_ticks(duration: int, usual: int) -> int:
    """Return how long a frame of a stream without times is shown.

    What FFmpeg makes up for its duration is wrong for the first frames of a stream, and for all of
    them from the 51st on where the stream has no rate; but one and a half frames it only says of a
    frame that repeats a field, as film does in 60 fields a second.
    """
    return duration if 2 * duration == 3 * usual else usual


def rounding_s(tick_s: float) -> float:
    """Return by how much times may be rounded in a container that counts ticks of `tick_s`.

    Half a tick, and a microsecond for our own arithmetic. A tick of more than two tolerances is the
    duration of a frame (AVI, some MP4), and nothing was rounded to it.
    """
    half = tick_s / 2
    return (half if half <= TIME_TOLERANCE_S else 0.0) + 1e-6


class PacketClock:
    """Gathers the presentation times of the packets of one stream, in ticks of its time base.

    Feed it packets in the order of the file. It leaves out what is never shown: packets that an
    edit list discards, pictures that only serve as reference, and packets cut short.
    """

    def __init__(self, codec: str, *, by_dts: bool, field_ticks: float = 0.0) -> None:
        self._codec = codec
        self._by_dts = by_dts
        self._field_ticks = field_ticks
        self.first: int | None = None
        """Earliest time so far."""
        self.last: int | None = None
        """Latest time so far."""
        self._before: int | None = None
        self._declared = 0
        self._last_dts: int | None = None
        self.doubtful = 0
        """Packets that are shown but have no time, or are to be decoded before those stored before
        them."""
        self.short = 0
        """Packets that last no longer than a field."""

    def add(self, packet: Any) -> int | None:
        """Count one packet; return its time if it is going to be shown."""
        if not packet.size or packet.is_discard or packet.is_corrupt:
            return None
        if is_hidden(self._codec, packet):
            return None
        tick: int | None = packet.dts if self._by_dts else packet.pts
        if tick is None:
            self.doubtful += 1
            return None
        dts = packet.dts
        if dts is not None:
            self.doubtful += self._last_dts is not None and dts < self._last_dts
            self._last_dts = dts
        duration: int = packet.duration or 0
        self.short += 0 < duration <= self._field_ticks
        if self.first is None or tick < self.first:
            self.first = tick
        if self.last is None or tick > self.last:
            self._before, self.last, self._declared = self.last, tick, duration
        elif tick != self.last and (self._before is None or tick > self._before):
            self._before = tick
        return tick

    @property
    def last_wait(self) -> int:
        """Ticks from the last frame but one to the last."""
        return 0 if self.last is None or self._before is None else self.last - self._before

    def end(self, header_end: int | None, usual_ticks: int) -> int:
        """Return when the last frame ceases to be shown.

        Packets of MPEG-TS have no duration, those of FLV a wrong one, and in MP4 it is the time to
        the next packet in *decoding* order. So the file's header decides if what it says is
        plausible, which it is not in a truncated file; else the packet does, else the frame before.
        """
        assert self.last is not None
        before = self.last_wait
        longest = max(self._declared, before)
        if header_end is not None and self.last < header_end <= self.last + longest:
            return header_end
        if header_end is None and 2 * self._declared < before:
            return self.last + before
        return self.last + (self._declared or before or usual_ticks)


def is_hidden(codec: str, packet: Any) -> bool:
    """Return whether a VP8 or VP9 packet holds only a picture that is never shown.

    RFC 6386 section 9.1; VP9 bitstream specification section 6.2 and, for superframes, annex B.
    """
    if codec not in ("vp8", "vp9"):
        return False
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] & 0x10
    if data[-1] & 0xE0 == 0xC0:  # a superframe, which ends with a picture that is shown
        return False
    bits = f"{data[0]:08b}{data[1] if len(data) > 1 else 0:08b}"
    profile = int(bits[3] + bits[2], 2)
    at = 5 if profile == 3 else 4  # profile 3 has a reserved bit
    show_existing, show = bits[at] == "1", bits[at + 2] == "1"
    return not (show_existing or show)


def is_disposable(packet: memoryview, length_bytes: int) -> bool:
    """Return whether no other picture refers to that of an H.264 packet: nal_ref_idc is 0.

    Its units, ISO 14496-10 section 7.3.1, follow their lengths, as in MP4. A packet with parameters
    of what follows is not one.
    """
    at, pictures = 0, 0
    while at + length_bytes < len(packet):
        head = packet[at + length_bytes]
        pictures += (kind := head & 0x1F) in (1, 5)
        if kind == 7 or (kind <= 5 and head & 0x60):
            return False
        at += length_bytes + int.from_bytes(packet[at : at + length_bytes], "big")
    return pictures > 0


class DecodedFrame(NamedTuple):
    """A frame as it comes out of a decoder."""

    frame: Any
    tick: int | None
    """When it is shown, if it says so."""
    is_key: bool
    """Whether it needs no other frame."""


class Timed(NamedTuple):
    """A frame with a time that can be relied on."""

    frame: Any
    tick: int
    is_key: bool


class Disorder(NamedTuple):
    """Frames were left out here because their times are not known."""

    frames: int


Ordered = list[Timed | Disorder]


class FrameOrder:
    """Tells from the order of frames which of their times are wrong, and what they are.

    Frames come out of a decoder in the order they are shown. A run of them whose times are missing
    or out of that order is given the times of the usual rate if it fits between two good times by
    it; else it is left out.
    """

    def __init__(self, usual_ticks: int, longest_wait: float = math.inf) -> None:
        self._longest_wait = longest_wait
        self.gap = usual_ticks
        """From the last frame but one to the last."""
        self._last: int | None = None
        self._waiting: list[DecodedFrame] = []
        self.is_broken = False
        """Whether a time was wrong."""

    def add(self, item: DecodedFrame) -> Ordered:
        """Take the next frame; return those whose times are certain now.

        A frame at the usual distance from the one before it is certain at once, another one once
        the next does not come before it.
        """
        self._waiting.append(item)
        ticks = [waiting.tick for waiting in self._waiting]
        count, newest, last = len(ticks), ticks[-1], self._last
        ascends, doubled = self._ascend(ticks), len({last, *ticks}) <= count
        if (doubled or not ascends) and last is not None and self._fits(newest, last, count):
            run = (newest or 0) - last
            return self._release([last + run * i // count for i in range(1, count + 1)])
        if ascends:
            certain = self._release(ticks[:-1])
            return certain + self._release(ticks[-1:] if self._fits(newest, self._last) else [])
        if last is None and count > 2 and self._ascend(ticks[-2:]):  # the first of all
            good, steps = ticks[-2] or 0, range(count - 2, 0, -1)
            return self._release([*(good - i * self.gap for i in steps), *ticks[-2:]])
        if count > 3 and self._ascend(ticks[-3:]) and all(map(self._fits, ticks[-2:], ticks[-3:])):
            return self._drop(count - 3) + self._release(ticks[-3:])
        if count <= MOST_WAITING:
            return []
        return self._guess() if set(ticks) == {None} else self._drop(count - 2)

    def end(self) -> Ordered:
        """Return what is left when no frame follows, or nobody knows which.

        A frame that comes later than `longest_wait` after the others has a wrong time: nothing else
        confirms it.
        """
        ticks = [waiting.tick for waiting in self._waiting]
        wait = (ticks[-1] or 0) - self._last if ticks and self._last is not None else 0
        if self._ascend(ticks) and wait <= self._longest_wait:
            return self._release(ticks)
        return self._guess() if set(ticks) == {None} else self._drop(len(ticks))

    def _ascend(self, ticks: Sequence[int | None]) -> bool:
        start = -math.inf if self._last is None else self._last
        known = [start, *(math.nan if tick is None else tick for tick in ticks)]
        return all(earlier <= later for earlier, later in pairwise(known))

    def _fits(self, tick: int | None, since: int | None, frames: int = 1) -> bool:
        """Whether the usual rate has a frame at `tick`, so many frames after `since`."""
        if tick is None or since is None:
            return False
        return abs(tick - since - frames * self.gap) <= self.gap // 4

    def _release(self, ticks: Sequence[int | None]) -> Ordered:
        """Return the first frames that wait, with these times."""
        found: Ordered = []
        for tick in ticks:
            assert tick is not None
            if self._last is not None and tick > self._last:
                self.gap = tick - self._last
            item, self._last = self._waiting.pop(0), tick
            self.is_broken |= item.tick != tick
            found.append(Timed(item.frame, tick, item.is_key))
        return found

    def _guess(self) -> Ordered:
        """Return the frames that wait, none of which has a time, at the usual rate."""
        start = -self.gap if self._last is None else self._last
        return self._release([start + i * self.gap for i in range(1, len(self._waiting) + 1)])

    def _drop(self, count: int) -> Ordered:
        del self._waiting[:count]
        self.is_broken = True
        return [Disorder(count)]
