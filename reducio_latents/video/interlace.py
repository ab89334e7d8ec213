"""Interlaced pictures made whole: two fields, taken one after the other, become one moment.

A frame that its stream calls interlaced is deinterlaced by FFmpeg's bwdif, the field that comes
first kept and the other one made from its neighbours in space and time. One frame comes out for one
that goes in, at the same time; frames that are not called interlaced keep their bits. The result is
a function of three consecutive frames, so a clip is the same alone and among others.

Where whole pictures are called interlaced (25p in 50i) half of their lines are made anew all the
same, which costs some sharpness where they move: nothing in a stream tells the two apart for sure.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
from av.filter import Graph

_FILTER = "mode=send_frame:parity=auto:deint=all"
_TICK = Fraction(1, 1000)  # its own; nobody asks
_PROFILES_WITH_CHROMA = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}


class Deinterlacer:
    """Makes whole pictures of interlaced frames; keeps its filter from one to the next."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._kind: tuple[int, int, str] | None = None
        self._fed: list[Any] = []
        """The last two frames that went in."""

    def convert(self, before: Any, frame: Any, after: Any) -> Any:
        """Return `frame` as one moment. A neighbour that is None, or of another size, is not used.

        Raises what PyAV raises for frames that the filter does not take.
        """
        kind = _kind(frame)
        if self._kind != kind:
            self._graph, self._kind, self._fed = _graph(*kind), kind, []
        needed = [frame if x is None or _kind(x) != kind else x for x in (before, frame, after)]
        for known in (2, 1):
            if len(self._fed) >= known and _are(self._fed[-known:], needed[:known]):
                needed = needed[known:]
                break
        out = None
        for one in needed:
            self._fed = [*self._fed[-1:], one]
            self._graph.push(one)
            out = _pull(self._graph) or out
        return out


def _kind(frame: Any) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _are(some: list[Any], others: list[Any]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))


def _graph(width: int, height: int, layout: str) -> Any:
    graph: Any = Graph()
    graph.threads = 1  # there are as many workers as cores
    source = graph.add_buffer(width=width, height=height, format=layout, time_base=_TICK)
    deinterlace, sink = graph.add("bwdif", _FILTER), graph.add("buffersink")
    source.link_to(deinterlace)
    deinterlace.link_to(sink)
    graph.configure()
    return graph


def _pull(graph: Any) -> Any:
    try:
        return graph.pull()
    except av.BlockingIOError:  # the first frame of all waits for the next
        return None


def may_be_interlaced(codec: str, header: bytes, first: Any) -> bool:
    """Return whether a frame of a video may be interlaced, as its codec's header and first frame
    tell; of MPEG-2 and H.264, which mix such frames with others, the header alone can exclude it.
    """
    if first.interlaced_frame:
        return True
    try:
        if codec == "mpeg2video":
            at = header.index(b"\x00\x00\x01\xb5")  # ISO 13818-2, section 6.2.2.3
            return header[at + 4] >> 4 != 1 or not header[at + 5] & 0x08
        return codec == "h264" and h264_has_fields(header)
    except (IndexError, ValueError):
        return True


class _Bits:
    """Reads the bits of an H.264 parameter set. Raises IndexError at its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data.replace(b"\x00\x00\x03", b"\x00\x00"), 0

    def take(self, count: int) -> int:
        value = 0
        for at in range(self._at, self._at + count):
            value = value << 1 | self._data[at >> 3] >> (7 - at % 8) & 1
        self._at += count
        return value

    def golomb(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros | self.take(zeros)) - 1


def h264_has_fields(header: bytes) -> bool:
    """Return whether pictures may be fields: frame_mbs_only_flag, ISO 14496-10 section 7.3.2.1."""
    start = 8 if header[0] == 1 else header.index(b"\x00\x00\x01\x67") + 3  # avcC, else Annex B
    bits = _Bits(header[start + 1 :])
    profile = bits.take(8)
    bits.take(16)
    bits.golomb()
    if profile in _PROFILES_WITH_CHROMA:
        if bits.golomb() == 3:
            bits.take(1)
        bits.golomb(), bits.golomb()
        bits.take(1)
        if bits.take(1):
            return True  # scaling lists: rare, and long to skip
    bits.golomb()
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1)
        bits.golomb(), bits.golomb()
        for _ in range(bits.golomb()):
            bits.golomb()
    bits.golomb()
    bits.take(1)
    bits.golomb(), bits.golomb()
    return not bits.take(1)
