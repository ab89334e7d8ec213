"""What packets say of when frames are shown, on packets made up for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.video.orientation import Orientation
from reducio_latents.video.timeline import (
    DecodedFrame,
    FrameOrder,
    PacketClock,
    Timed,
    frame_ticks,
    is_hidden,
    rounding_s,
)


@dataclass
class Packet:
    pts: int | None
    duration: int | None = 0
    dts: int | None = None
    size: int = 100
    is_discard: bool = False
    is_corrupt: bool = False


def clock(packets: list[Packet], *, by_dts: bool = False) -> PacketClock:
    made = PacketClock("h264", by_dts=by_dts)
    for packet in packets:
        made.add(packet)
    return made


def test_the_last_frame_is_shown_as_long_as_its_packet_says() -> None:
    assert clock([Packet(0, 30), Packet(60, 30), Packet(30, 30)]).end(None, 1) == 90
    assert clock([Packet(0, 30), Packet(30, 20)]).end(None, 1) == 50


def test_a_packet_that_does_not_say_lasts_as_long_as_the_one_before() -> None:
    assert clock([Packet(0), Packet(60), Packet(20)]).end(None, 7) == 100
    assert clock([Packet(0)]).end(None, 7) == 7
    # FLV says 1 ms of every frame.
    assert clock([Packet(0, 1), Packet(33, 1), Packet(67, 1)]).end(None, 7) == 101


def test_the_header_decides_where_it_can_be_true() -> None:
    # In MP4 a duration is the time to the packet decoded next, not to the frame shown next.
    packets = [Packet(0, 30), Packet(90, 1), Packet(30, 1), Packet(60, 88)]
    assert clock(packets).end(120, 7) == 120
    assert clock(packets).end(5000, 7) == 91  # a file cut short
    assert clock(packets).end(80, 7) == 91


def test_what_is_never_shown_is_left_out() -> None:
    packets = [
        Packet(-30, 30, is_discard=True),
        Packet(0, 30),
        Packet(30, 30),
        Packet(60, 30, is_corrupt=True),
        Packet(90, 30, size=0),
    ]
    made = clock(packets)
    assert (made.first, made.last, made.end(None, 7)) == (0, 30, 60)
    assert made.doubtful == 0


def test_packets_without_a_time_are_counted() -> None:
    assert clock([Packet(0, 30), Packet(None, 30)]).doubtful == 1
    assert clock([Packet(None, 1, dts=4), Packet(None, 1, dts=5)], by_dts=True).doubtful == 0


def test_times_are_rounded_to_half_a_tick_but_never_to_half_a_frame() -> None:
    assert rounding_s(1 / 1000) == pytest.approx(0.5e-3, abs=2e-6)
    assert rounding_s(1 / 90000) < 1e-5
    assert rounding_s(1 / 30) < 1e-5


@pytest.mark.parametrize(
    ("codec", "data", "hidden"),
    [
        ("vp8", bytes([0b0001_0000, 0, 0]), False),
        ("vp8", bytes([0b0000_0001, 0, 0]), True),
        # VP9: marker 10, profile 2 bits, show_existing, frame_type, show_frame, error_resilient
        ("vp9", bytes([0b1000_0110, 0, 0]), False),
        ("vp9", bytes([0b1000_0100, 0, 0]), True),
        ("vp9", bytes([0b1000_1000, 0, 0]), False),  # shows a picture decoded before
        ("vp9", bytes([0b1011_0001, 0b0000_0000, 0]), False),  # profile 3: one bit later
        ("vp9", bytes([0b1011_0010, 0b0000_0000, 0]), True),
        ("vp9", bytes([0b1000_0100, 0, 0b1100_0001]), False),  # a superframe ends with one shown
        ("h264", bytes([0, 0, 0]), False),
    ],
)
def test_pictures_that_only_serve_as_reference_are_known(
    codec: str, data: bytes, hidden: bool
) -> None:
    assert is_hidden(codec, data) == hidden


def test_the_eight_orientations_are_a_flip_and_a_turn() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    found = set()
    for transpose in (False, True):
        for flip_rows in (False, True):
            for flip_columns in (False, True):
                way = Orientation(transpose, flip_rows, flip_columns)
                flipped = picture[:, ::-1] if way.mirrored else picture
                turned = np.rot90(flipped, -way.rotation // 90)
                np.testing.assert_array_equal(way.apply(picture), turned)
                assert way.apply(picture).flags.c_contiguous
                assert way.size(4, 2) == (turned.shape[1], turned.shape[0])
                found.add((way.rotation, way.mirrored))
    assert len(found) == 8
    for degrees in (0, 90, 180, 270):
        assert Orientation.from_degrees(degrees).rotation == degrees
        assert not Orientation.from_degrees(degrees).mirrored


def timed(ticks: list[int | None], usual: int = 10) -> list[int | str]:
    """Return the times that frames get, each in place of its own; `-` where it is left out."""
    order, found = FrameOrder(usual), dict[int, int | str]()
    out = [one for i, tick in enumerate(ticks) for one in order.add(DecodedFrame(i, tick, False))]
    for one in [*out, *order.end()]:
        if isinstance(one, Timed):
            found[one.frame] = one.tick
    return [found.get(i, "-") for i in range(len(ticks))]


@given(
    place=st.integers(2, 17),
    wrong=st.one_of(st.none(), st.integers(-5000, 5000)),
    tick=st.integers(4, 90000),
)
def test_one_wrong_time_among_even_ones_is_put_right(
    place: int, wrong: int | None, tick: int
) -> None:
    good: list[int | None] = [i * tick for i in range(20)]
    if wrong is None or not (place - 1) * tick < wrong < (place + 1) * tick:
        assert timed([*good[:place], wrong, *good[place + 1 :]], tick) == good


def test_times_that_a_reordering_decoder_mixed_up_are_put_right() -> None:
    mixed = [0, 10, 20, 30, None, 50, 60, 110, 70, 90, 100, 80, 120]
    assert timed(mixed) == list(range(0, 130, 10))
    assert timed([900, 10, 20, 30]) == [0, 10, 20, 30]


def test_a_frame_whose_time_nothing_tells_is_left_out_and_no_other() -> None:
    uneven: list[int | None] = [0, 7, 31, 40, 77, 55, 95, 105, 115, 125]  # which of 77 and 55?
    found = timed(uneven)
    assert found == [0, 7, 31, 40, "-", "-", 95, 105, 115, 125]
    assert timed([0, 7, 31, 40, 77, 90, 95]) == [0, 7, 31, 40, 77, 90, 95]
    assert timed([0, 10, 20, 30, *range(-80, 30, 10)]) == [0, 10, 20, 30] + ["-"] * 11
    assert timed([None] * 30) == list(range(0, 300, 10))


def test_a_frame_at_the_usual_distance_waits_for_no_other() -> None:
    order = FrameOrder(10)
    assert not order.add(DecodedFrame("a", 5, True))
    assert len(order.add(DecodedFrame("b", 15, False))) == 2
    assert order.add(DecodedFrame("c", 25, False)) == [Timed("c", 25, False)]
    assert not order.is_broken


def test_a_bare_frame_lasts_as_long_as_others_unless_it_repeats_a_field() -> None:
    assert [frame_ticks(told, 40) for told in (0, 1, 40, 48, 60, 80)] == [40, 40, 40, 40, 60, 40]
