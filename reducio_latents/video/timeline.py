"""When the frames of a file are shown, as its packets tell."""

from __future__ import annotations

from typing import Any

from reducio_latents.core.clips import TIME_TOLERANCE_S


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
        self.untimed = 0
        """Packets that are shown but have no time."""
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
            self.untimed += 1
            return None
        duration: int = packet.duration or 0
        self.short += 0 < duration <= self._field_ticks
        if self.first is None or tick < self.first:
            self.first = tick
        if self.last is None or tick > self.last:
            self._before, self.last, self._declared = self.last, tick, duration
        elif tick != self.last and (self._before is None or tick > self._before):
            self._before = tick
        return tick

    def end(self, header_end: int | None, usual_ticks: int) -> int:
        """Return when the last frame ceases to be shown.

        Packets of MPEG-TS have no duration, those of FLV a wrong one, and in MP4 it is the time to
        the next packet in *decoding* order. So the file's header decides if what it says is
        plausible, which it is not in a truncated file; else the packet does, else the frame before.
        """
        assert self.last is not None
        before = self.last - self._before if self._before is not None else 0
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
