"""The default backend on everything that makes reading exact frames hard."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from reducio_latents.core.clips import ClipSpec, clip_starts
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames
from reducio_latents.video.pyav import PyAVBackend
from tests.videos import (
    X264_B_FRAMES,
    X264_OPEN_GOP,
    Recipe,
    barcode,
    constant_rate,
    read_number,
    shown_at,
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
