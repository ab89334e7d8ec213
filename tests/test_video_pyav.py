"""The default backend on everything that makes reading exact frames hard."""

from __future__ import annotations

import gc
import multiprocessing
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.starts import clip_starts
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames
from reducio_latents.video.assemble import ClipAssembly
from reducio_latents.video.file import VideoFile
from reducio_latents.video.playback import Playback
from reducio_latents.video.pyav import PyAVBackend
from tests.videos import (
    X264_B_FRAMES,
    X264_OPEN_GOP,
    Recipe,
    barcode,
    constant_rate,
    read_number,
    shown_at,
    write_frames,
    write_sound,
    write_video,
)

MS = Fraction(1, 1000)
FRAME = Fraction(1, 30)
VPX = {"deadline": "good", "cpu-used": "4", "b": "1M", "lag-in-frames": "16", "g": "25"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20:open-gop=1:bframes=3"}
FORMATS = {
    "mp4-b-frames.mp4": Recipe(options=X264_B_FRAMES),
    "mp4-fragmented.mp4": Recipe(muxer={"movflags": "frag_keyframe+empty_moov"}),
    "open-gop.mp4": Recipe(options=X264_OPEN_GOP),
    "open-gop.ts": Recipe(options=X264_OPEN_GOP),
    "one-key.ts": Recipe(options=X264_B_FRAMES | {"g": "250"}),
    "intra-refresh.mp4": Recipe(
        options={"preset": "veryfast", "x264-params": "intra-refresh=1:keyint=30:bframes=0"}
    ),
    "hevc-open-gop.mp4": Recipe(codec="libx265", options=X265),
    "h264.mkv": Recipe(options=X264_OPEN_GOP, time_base=MS),
    "h264.flv": Recipe(options=X264_B_FRAMES, time_base=MS),
    "vp8.webm": Recipe(codec="libvpx", options=VPX | {"b": "200k", "g": "60"}, time_base=MS),
    "vp9.webm": Recipe(codec="libvpx-vp9", options=VPX, time_base=MS),
    "av1.mp4": Recipe(codec="libsvtav1", options={"preset": "12", "g": "30"}),
    "mpeg4-b-frames.avi": Recipe(
        codec="mpeg4", options={"b": "4M", "bf": "2", "g": "15"}, time_base=FRAME
    ),
    "mpeg2-b-frames.mpg": Recipe(
        codec="mpeg2video", options={"b": "4M", "bf": "2", "g": "12"}, time_base=FRAME
    ),
    "mpeg2.ts": Recipe(codec="mpeg2video", options={"b": "4M", "bf": "2"}, time_base=FRAME),
    "wmv.wmv": Recipe(codec="wmv2", options={"b": "4M"}, time_base=MS),
    "mjpeg.mov": Recipe(codec="mjpeg", pix_fmt="yuvj420p", options={"q:v": "3"}),
    "ffv1.mkv": Recipe(codec="ffv1", options={}, time_base=MS),
    "ten-bit.mp4": Recipe(pix_fmt="yuv420p10le"),
    "four-two-two.mp4": Recipe(pix_fmt="yuv422p"),
    "interlaced.ts": Recipe(
        options={"preset": "ultrafast", "flags": "+ildct+ilme", "x264-params": "tff=1"}
    ),
}


def read(path: Path, starts_s: Sequence[float]) -> list[ClipFrames | VideoError]:
    source = VideoSource(str(path))
    return list(PyAVBackend().read_clips(source, starts_s, frames=16, rate_fps=16.0))


def numbers(clip: ClipFrames | VideoError) -> list[int]:
    assert isinstance(clip, ClipFrames), clip
    return [read_number(frame) for frame in clip.frames]


def expected(times_s: Sequence[float], start_s: float) -> list[int]:
    return [shown_at(times_s, start_s + i / 16) for i in range(16)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_exact_frames_from_any_start(tmp_path: Path, name: str) -> None:
    times = constant_rate(180, 30)
    path = write_video(tmp_path / name, times, FORMATS[name])
    if FORMATS[name].time_base == MS:
        times = [round(time, 3) for time in times]
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert info.frames == 180
    assert info.duration_s == pytest.approx(6.0, abs=2e-3)
    starts = [0.0, 0.7, 1.9, 3.33, 4.96]
    for start, clip in zip(starts, read(path, starts), strict=True):
        assert numbers(clip) == expected(times, start), start
        [alone] = read(path, [start])
        assert numbers(alone) == expected(times, start), start
    assert all(isinstance(c, ClipFrames) for c in read(path, clip_starts(5.999, ClipSpec())))


@pytest.mark.parametrize("options", [Recipe().options, X264_B_FRAMES])
def test_what_an_edit_list_hides_is_not_shown(tmp_path: Path, options: dict[str, str]) -> None:
    recipe = Recipe(options=options, first_s=-0.25, muxer={"avoid_negative_ts": "disabled"})
    times = constant_rate(100, 30)
    path = write_video(tmp_path / "edited.mp4", times, recipe)
    hidden = 8  # frames before 0.25 s
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert info.frames == 100 - hidden
    assert info.duration_s == pytest.approx(92 / 30, abs=2e-3)
    for start in (0.0, 1.1, 2.1):
        [clip] = read(path, [start])
        assert numbers(clip) == [n + hidden for n in expected(times, start)]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda p: p[::-1, ::-1].swapaxes(0, 1)),
    ],
)
def test_mirrored_pictures_are_mirrored(tmp_path: Path, matrix, turn) -> None:  # type: ignore[no-untyped-def]
    path = write_video(tmp_path / "mirrored.mp4", constant_rate(30, 30), Recipe(matrix=matrix))
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert info.mirrored
    [clip] = read(path, [0.0])
    assert isinstance(clip, ClipFrames)
    shown = turn(barcode(15))
    assert clip.frames[8].shape == shown.shape == (info.height, info.width, 3)
    assert np.abs(clip.frames[8].astype(int) - shown).mean() < 8


def test_a_picture_turned_by_an_odd_angle_is_refused(tmp_path: Path) -> None:
    slanted = Recipe(matrix=(1, 1, -1, 1))
    path = write_video(tmp_path / "slanted.mp4", constant_rate(30, 30), slanted)
    [error] = read(path, [0.0])
    assert "no multiple of 90 degrees" in str(error)
    with pytest.raises(VideoError, match="no multiple of 90 degrees"):
        PyAVBackend().probe(VideoSource(str(path)))


def test_a_file_cut_short_gives_the_clips_that_are_left(tmp_path: Path) -> None:
    times = constant_rate(240, 30)
    recipe = Recipe(options=X264_B_FRAMES, muxer={"movflags": "faststart"})
    whole = write_video(tmp_path / "whole.mp4", times, recipe).read_bytes()
    for share in (0.6, 0.75, 0.95):
        path = tmp_path / "cut.mp4"
        path.write_bytes(whole[: int(len(whole) * share)])
        info = PyAVBackend().probe(VideoSource(str(path)))
        assert 1 < info.duration_s < 8
        clips = read(path, starts := clip_starts(info.duration_s, ClipSpec()))
        for start, clip in list(zip(starts, clips, strict=True))[:-1]:
            assert numbers(clip) == expected(times, start)
        if isinstance(clips[-1], ClipFrames):  # else the cut left a hole in it
            assert numbers(clips[-1]) == expected(times, starts[-1])
    path.write_bytes(write_video(tmp_path / "end.mp4", times).read_bytes()[:3000])
    with pytest.raises(VideoError, match="without its index"):
        PyAVBackend().probe(VideoSource(str(path)))


def _spoil(path: Path, first: int, last: int) -> None:
    """Overwrite the data of packets [first, last)."""
    with av.open(str(path)) as file:
        places = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in places[first:last]:
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)


@pytest.mark.parametrize("threads", [1, 2])
def test_damage_costs_the_clips_it_touches_and_no_others(tmp_path: Path, threads: int) -> None:
    times = constant_rate(240, 30)
    options = X264_B_FRAMES | {"x264-params": "keyint=30:min-keyint=30:scenecut=0:open-gop=0"}
    path = write_video(tmp_path / "damaged.mp4", times, Recipe(options=options))
    _spoil(path, 100, 103)  # 3.33 s; the next key frame is at 4 s
    starts = clip_starts(8.0, ClipSpec())
    source = VideoSource(str(path))
    backend = PyAVBackend(threads=threads)
    clips = list(backend.read_clips(source, starts, frames=16, rate_fps=16.0))
    for start, clip in zip(starts, clips, strict=True):
        if start == 3.0:
            assert isinstance(clip, VideoError)
            assert "clip at 3.000 s: the decoder gives up" in str(clip)
        else:
            assert numbers(clip) == expected(times, start)


def test_a_frame_that_a_decoder_drops_in_silence_is_missed(tmp_path: Path) -> None:
    times = constant_rate(90, 30)
    path = write_video(tmp_path / "hole.mp4", times, FORMATS["av1.mp4"])
    with av.open(str(path)) as file:
        packets = [(p.pts, p.pos, p.size) for p in file.demux(video=0) if p.size]
    pts, position, size = next(p for p in packets if p[0] > 120000 and 6 < p[2] < 120)
    data = bytearray(path.read_bytes())
    # A temporal delimiter and padding: legal AV1 without a picture.
    padding = b"\x12\x00\x7a" + bytes([size - 4]) + bytes(size - 5) + b"\x80"
    data[position : position + size] = padding
    path.write_bytes(data)
    before, hit = read(path, [0.0, pts / 90000 - 0.5])
    assert numbers(before) == expected(times, 0.0)
    assert f"a frame is missing at {pts / 90000:.3f} s" in str(hit)


def test_a_change_of_size_is_an_error_of_the_clips_that_see_it(tmp_path: Path) -> None:
    small = write_video(tmp_path / "a.ts", constant_rate(60, 30), Recipe(first_s=1.0))
    large = write_video(
        tmp_path / "b.ts", constant_rate(60, 30), Recipe(first_s=3.0, size=(192, 160))
    )
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    before, across, after = read(both, [0.5, 1.5, 2.5])
    assert numbers(before) == expected(constant_rate(60, 30), 0.5)
    assert "the picture changes from 96x80 to 192x160" in str(across)
    assert isinstance(after, ClipFrames)
    assert after.frames[0].shape == (160, 192, 3)


def test_times_that_go_backwards_end_what_can_be_trusted(tmp_path: Path) -> None:
    one = write_video(tmp_path / "a.ts", constant_rate(60, 30), Recipe(first_s=5.0))
    twice = tmp_path / "twice.ts"
    twice.write_bytes(one.read_bytes() * 2)
    good, bad = read(twice, [0.0, 1.5])
    assert numbers(good) == expected(constant_rate(60, 30), 0.0)
    assert isinstance(bad, VideoError)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.ts", constant_rate(60, 30))
    for name, text in {
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": "ffconcat version 1.0\nfile secret.ts\n",
    }.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(VideoError, match="text or web page"):
            PyAVBackend().probe(VideoSource(str(path)))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "sound.mp4")
    with pytest.raises(VideoError, match="no video stream, only audio"):
        PyAVBackend().probe(VideoSource(str(path)))


def test_a_single_picture_is_a_video_too_short_for_a_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", [0.0])
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert info.frames == 1
    assert clip_starts(info.duration_s, ClipSpec()) == []
    [clip] = list(PyAVBackend().read_clips(VideoSource(str(path)), [0.0], frames=1, rate_fps=16.0))
    assert numbers(clip) == [0]


def test_decoded_frames_die_without_the_garbage_collector(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", constant_rate(60, 30))
    gc.collect()
    gc.disable()
    try:
        assert all(isinstance(clip, ClipFrames) for clip in read(path, [0.0, 0.9]))
        alive = [o for o in gc.get_objects() if isinstance(o, av.VideoFrame)]
    finally:
        gc.enable()
    assert not alive


def _numbers_in_child(path: str, queue: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    [clip] = read(Path(path), [0.5])
    queue.put(numbers(clip))


def test_a_child_process_reads_what_its_parent_was_reading(tmp_path: Path) -> None:
    times = constant_rate(60, 30)
    path = write_video(tmp_path / "video.mp4", times)
    clips = PyAVBackend().read_clips(VideoSource(str(path)), [0.0, 0.5], frames=16, rate_fps=16.0)
    assert numbers(next(clips)) == expected(times, 0.0)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.SimpleQueue[list[int]] = context.SimpleQueue()
    child = context.Process(target=_numbers_in_child, args=(str(path), queue))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == expected(times, 0.5)
    assert numbers(next(clips)) == expected(times, 0.5)


def _set_time(path: Path, frame: int, shift_s: float | None) -> None:
    """Change the presentation time of one picture of an MPEG-TS; None: take it away."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(frame + 1):
        at = data.index(b"\x00\x00\x01\xe0", at + 1)
    if shift_s is None:
        data[at + 7] &= 0x3F
    else:
        field = data[at + 9 : at + 14]
        old = (field[0] & 0x0E) << 29 | field[1] << 22 | (field[2] & 0xFE) << 14
        ticks = (old | field[3] << 7 | field[4] >> 1) + round(shift_s * 90000)
        high, middle, low = ticks >> 30 & 7, ticks >> 15 & 0x7FFF, ticks & 0x7FFF
        data[at + 9] = field[0] & 0xF1 | high << 1
        data[at + 10 : at + 14] = (middle << 1 | 1).to_bytes(2, "big") + (low << 1 | 1).to_bytes(
            2, "big"
        )
    path.write_bytes(data)


@pytest.mark.parametrize("frame", [100, 179])
@pytest.mark.parametrize("shift_s", [None, 2.0, -1.0, 1000.0])
def test_one_wrong_time_costs_no_more_than_the_clips_around_it(
    tmp_path: Path, shift_s: float | None, frame: int
) -> None:
    times = constant_rate(180, 30)
    path = write_video(tmp_path / "wrong.ts", times)
    _set_time(path, frame, shift_s)
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert info.duration_s == pytest.approx(6.0, abs=0.05)
    clips = read(path, starts := [0.0, 1.0, 2.9, 4.0, 4.9])
    assert [numbers(clip) for clip in clips] == [expected(times, start) for start in starts]
    if info.frames < 180:
        assert frame == 179
        assert "1 frames more: presentation times" in info.note


def test_a_time_that_nothing_tells_costs_the_clips_around_it(tmp_path: Path) -> None:
    gaps = np.random.default_rng(0).uniform(0.02, 0.06, 160)
    times = [0.0, *np.cumsum(gaps)]
    path = write_video(tmp_path / "uneven.ts", times)
    _set_time(path, 80, -1.0)
    before, at, after = read(path, [0.0, times[80] - 0.5, times[81] + 0.2])
    assert numbers(before) == expected(times, 0.0)
    assert "presentation times are missing or go backwards at" in str(at)
    assert numbers(after) == expected(times, times[81] + 0.2)


@pytest.mark.parametrize("rate", [24, 50])
@pytest.mark.parametrize("name", ["a.264", "a.hevc", "a.m2v", "a.m4v"])
def test_bare_pictures_are_shown_one_after_another_at_their_rate(
    tmp_path: Path, name: str, rate: int
) -> None:
    codec, options = {
        "a.264": ("libx264", X264_B_FRAMES),
        "a.hevc": ("libx265", X265),
        "a.m2v": ("mpeg2video", {"b": "4M", "bf": "2", "g": "12"}),
        "a.m4v": ("mpeg4", {"b": "4M", "bf": "2", "g": "15"}),
    }[name]
    times = constant_rate(120, rate)
    recipe = Recipe(codec=codec, options=options, time_base=Fraction(1, rate))
    path = write_video(tmp_path / name, times, recipe)
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert (info.frames, info.note) == (120, "")
    assert info.duration_s == pytest.approx(120 / rate)
    for start in (0.0, 1.3):
        [clip] = read(path, [start])
        assert numbers(clip) == expected(times, start)


def test_pictures_without_any_rate_are_25_a_second_and_said_to_be(tmp_path: Path) -> None:
    times = constant_rate(120, 25)
    recipe = Recipe(codec="mjpeg", pix_fmt="yuvj420p", options={}, time_base=Fraction(1, 25))
    path = write_video(tmp_path / "a.mjpeg", times, recipe)
    info = PyAVBackend().probe(VideoSource(str(path)))
    assert (info.frames, info.rate_fps) == (120, 25.0)
    assert info.duration_s == pytest.approx(4.8)
    assert "taken as 25 a second" in info.note
    [clip] = read(path, [3.7])
    assert numbers(clip) == expected(times, 3.7)


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    recipe = Recipe(options=X264_B_FRAMES, muxer={"movflags": "faststart"})
    path = write_video(tmp_path / "cut.mp4", constant_rate(240, 30), recipe)
    assert not PyAVBackend().probe(VideoSource(str(path))).note
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    note = PyAVBackend().probe(VideoSource(str(path))).note
    assert re.fullmatch(r"it promises 8\.000 s, but its frames end at [1-5]\.\d{3} s", note)
    bunched = [*constant_rate(30, 30), *(1 + i / 90000 for i in range(60))]
    path = write_video(tmp_path / "bunched.mp4", bunched)
    note = PyAVBackend().probe(VideoSource(str(path))).note
    assert note == "59 of its 90 frames are shown for less than 1 ms, and lost"


CENC = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "00112233445566778899aabbccddeeff",
}


def test_encrypted_pictures_are_refused_as_such(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", constant_rate(30, 30), Recipe(muxer=CENC))
    parts = Recipe(muxer=CENC | {"movflags": "frag_keyframe+empty_moov"})
    fragments = write_video(tmp_path / "b.mp4", constant_rate(30, 30), parts)
    hevc = Recipe(codec="libx265", options=X265, muxer=CENC)
    write_video(tmp_path / "c.mp4", constant_rate(30, 30), hevc)
    for name, tag, data in (
        ("d.mp4", b"avc1", whole.read_bytes()),  # told by `sinf` alone
        ("e.mp4", b"drmi", whole.read_bytes()),
        ("f.mp4", b"encv", fragments.read_bytes()[:2000]),
    ):
        (tmp_path / name).write_bytes(data.replace(b"encv", tag))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(VideoError, match="it is encrypted; decrypt it first"):
            PyAVBackend().probe(VideoSource(str(path)))
        [error] = read(path, [0.0])
        assert str(error) == f"{path}: clip at 0.000 s: it is encrypted; decrypt it first."


def _element(name: bytes, content: bytes) -> bytes:
    return name + bytes([0x10, *len(content).to_bytes(3, "big")]) + content


def test_encrypted_webm_is_refused_as_such(tmp_path: Path) -> None:
    recipe = Recipe(codec="libvpx", options=VPX, time_base=MS, muxer={"live": "1"})
    path = write_video(tmp_path / "a.webm", constant_rate(10, 30), recipe)
    data = path.read_bytes()
    tracks, clusters = data.rindex(b"\x16\x54\xae\x6b"), data.index(b"\x1f\x43\xb6\x75")
    track = data.index(b"\xae", tracks + 4)
    begin = data.index(b"\xd7\x81\x01", track)  # its first element, TrackNumber
    aes = _element(b"\x47\xe1", b"\5") + _element(b"\x47\xe2", b"k" * 16)
    how = _element(b"\x50\x33", b"\1") + _element(b"\x50\x35", aes)
    entry = data[begin:clusters] + _element(b"\x6d\x80", _element(b"\x62\x40", how))
    new = _element(b"\x16\x54\xae\x6b", _element(b"\xae", entry))
    path.write_bytes(data[:tracks] + new + data[clusters:])
    with pytest.raises(VideoError, match="it is encrypted; decrypt it first"):
        PyAVBackend().probe(VideoSource(str(path)))


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_webm_is_laid_on_black(tmp_path: Path, codec: str) -> None:
    times = constant_rate(120, 30)
    frames = []
    for i in range(len(times)):
        picture = np.full((80, 96, 4), 255, np.uint8)
        picture[..., :3] = barcode(i)
        picture[40:, :, 3] = 0
        frames.append(av.VideoFrame.from_ndarray(picture, "rgba").reformat(format="yuva420p"))
    options = {"deadline": "good", "cpu-used": "4", "b": "1M", "auto-alt-ref": "0", "g": "25"}
    recipe = Recipe(codec=codec, pix_fmt="yuva420p", options=options, time_base=MS, alpha=True)
    path = write_frames(tmp_path / "a.webm", frames, times, recipe)
    for start in (0.0, 2.7):  # sought
        [clip] = read(path, [start])
        assert numbers(clip) == expected([round(time, 3) for time in times], start)
        assert isinstance(clip, ClipFrames)
        assert clip.frames[3][:38].mean() > 40
        assert clip.frames[3][44:].max() < 8


@pytest.mark.parametrize(
    "times",
    [constant_rate(75, 30), constant_rate(130, 60), [i / 30 + (i % 3) * 0.009 for i in range(75)]],
    ids=["30", "60", "uneven"],
)
def test_frames_that_nobody_wants_or_refers_to_are_not_decoded(
    times: list[float], tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", times, Recipe(options=X264_B_FRAMES))
    starts = [0.0, 0.7, 1.125]
    wanted = {shown_at(times, start + i / 16) for start in starts for i in range(16)}
    with VideoFile(VideoSource(str(path))) as video:
        every = {shown.at_s for shown in Playback(video).play()}
    with VideoFile(VideoSource(str(path))) as video:
        clips = ClipAssembly(
            VideoSource(str(path)), starts, frames=16, rate_fps=16.0, transform=None
        )
        playback = Playback(video, wants=clips.wants)
        decoded = {shown.at_s for shown in playback.play()}
    assert playback.skipped == len(every - decoded) >= len(times) / 10
    assert not {shown_at(times, at_s) for at_s in every - decoded} & wanted
    for start, clip in zip(starts, read(path, starts), strict=True):
        assert numbers(clip) == expected(times, start)


def test_damage_to_a_frame_that_no_other_refers_to_is_its_own(tmp_path: Path) -> None:
    times = constant_rate(90, 30)
    path = write_video(tmp_path / "a.mp4", times, Recipe(options=X264_B_FRAMES))
    with VideoFile(VideoSource(str(path))) as video:
        packets = [p for p in video.packets() if p.size and video.is_disposable(p)]
        packet = next(p for p in packets if p.pts * video.tick_s > 1 / 3)
        at_s, position, size = packet.pts * video.tick_s, packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[position + 5 : position + size] = b"\xff" * (size - 5)  # all but length and kind
    path.write_bytes(data)
    # Alone, and beside a clip that shows the damaged frame.
    before, after = at_s - 0.25, at_s + 1 / 30
    [alone] = read(path, [after])
    hit, beside = read(path, [before, after])
    assert isinstance(hit, VideoError)
    assert numbers(alone) == numbers(beside) == expected(times, after)
