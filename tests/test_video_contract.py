"""What every video backend keeps: the right frame at each moment, in one pass, or a reason."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.starts import clip_starts
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames, VideoBackend, get_backend
from tests.fake_torchcodec import torchcodec_or_fake
from tests.videos import (
    X264_B_FRAMES,
    X264_OPEN_GOP,
    Recipe,
    barcode,
    constant_rate,
    read_number,
    shown_at,
    write_video,
)

FRAMES, RATE = 16, 16.0


@pytest.fixture(params=["pyav", "decord", "torchcodec"])
def backend(request: pytest.FixtureRequest) -> Iterator[VideoBackend]:
    with torchcodec_or_fake():
        pytest.importorskip({"pyav": "av"}.get(request.param, request.param))
        yield get_backend(request.param)


def read(
    backend: VideoBackend, path: Path, starts_s: Sequence[float]
) -> list[ClipFrames | VideoError]:
    source = VideoSource(str(path))
    return list(backend.read_clips(source, starts_s, frames=FRAMES, rate_fps=RATE))


def numbers(clip: ClipFrames | VideoError) -> list[int]:
    assert isinstance(clip, ClipFrames), clip
    return [read_number(frame) for frame in clip.frames]


def expected(times_s: Sequence[float], start_s: float) -> list[int]:
    return [shown_at(times_s, start_s + i / RATE) for i in range(FRAMES)]


@settings(max_examples=25)
@given(
    gaps_ticks=st.lists(st.integers(150, 30000), min_size=4, max_size=60),
    place=st.floats(0, 1),
    b_frames=st.booleans(),
)
def test_at_any_spacing_each_frame_is_the_one_shown_at_its_moment(
    backend: VideoBackend, tmp_path: Path, gaps_ticks: list[int], place: float, b_frames: bool
) -> None:
    ticks = [0, *itertools.accumulate([*gaps_ticks, 30000, 30000, 30000, 30000])]
    times = [tick / 90000 for tick in ticks]
    recipe = Recipe(options=X264_B_FRAMES) if b_frames else Recipe()
    path = write_video(tmp_path / "video.mp4", times, recipe)
    start = place * (times[-1] - 15 / RATE - 1e-3)
    moments = [start + i / RATE for i in range(FRAMES)]  # none within the rounding of a tick
    assume(all(not 0 < time - moment < 1e-5 for time in times for moment in moments))
    [clip] = read(backend, path, [start])
    assert numbers(clip) == expected(times, start)
    assert isinstance(clip, ClipFrames)
    shown = [times[n] for n in expected(times, start)]
    assert clip.times_s == pytest.approx(shown, abs=2e-5)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    times = constant_rate(300, 15)
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return write_video(path, times, Recipe(options=X264_B_FRAMES)), times


def test_clips_far_apart_and_clips_that_overlap_come_in_one_pass(
    backend: VideoBackend, long_video: tuple[Path, list[float]]
) -> None:
    path, times = long_video
    starts = [0.0, 0.3, 0.3, 0.9, 7.123, 7.2, 15.0, 18.98]
    clips = read(backend, path, starts)
    assert [clip.start_s for clip in clips if isinstance(clip, ClipFrames)] == starts
    assert [numbers(clip) for clip in clips] == [expected(times, s) for s in starts]


def test_a_clip_is_the_same_alone_and_among_others(backend: VideoBackend, tmp_path: Path) -> None:
    times = constant_rate(120, 30)
    path = write_video(tmp_path / "open.mp4", times, Recipe(options=X264_OPEN_GOP))
    starts = [0.2, 1.31, 2.0, 2.9]
    together = read(backend, path, starts)
    for start, clip in zip(starts, together, strict=True):
        [alone] = read(backend, path, [start])
        assert numbers(alone) == numbers(clip) == expected(times, start)
        for one, other in zip(alone.frames, clip.frames, strict=True):  # type: ignore[union-attr]
            np.testing.assert_array_equal(one, other)


def test_a_transform_runs_once_for_each_frame_that_is_needed(
    backend: VideoBackend, long_video: tuple[Path, list[float]]
) -> None:
    path, times = long_video
    seen: list[int] = []

    def halve(
        frame: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        seen.append(read_number(frame))
        return frame[::2, ::2]

    starts = [1.0, 1.5, 1.6]
    source = VideoSource(str(path))
    clips = list(backend.read_clips(source, starts, frames=FRAMES, rate_fps=RATE, transform=halve))
    wanted = {n for start in starts for n in expected(times, start)}
    assert seen == sorted(wanted)
    assert all(frame.shape == (40, 48, 3) for clip in clips for frame in clip.frames)  # type: ignore[union-attr]


def test_a_frame_shown_twice_is_one_array_and_pixels_are_ready_for_torch(
    backend: VideoBackend, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "slow.mp4", constant_rate(12, 8))
    [clip] = read(backend, path, [0.0])
    assert isinstance(clip, ClipFrames)
    assert clip.frames[0] is clip.frames[1]
    assert clip.frames[1] is not clip.frames[2]
    assert len(clip.frames) == len(clip.times_s) == FRAMES
    for frame in clip.frames:
        assert frame.dtype == np.uint8
        assert frame.shape == (80, 96, 3)
        assert frame.flags.c_contiguous
        assert frame.flags.writeable


def test_a_clip_past_the_end_is_an_error_and_no_padding(
    backend: VideoBackend, tmp_path: Path
) -> None:
    times = constant_rate(45, 30)
    path = write_video(tmp_path / "short.mp4", times)
    first, last, late = read(backend, path, [0.0, 0.5, 0.6])
    assert numbers(first) == expected(times, 0.0)
    assert numbers(last) == expected(times, 0.5)
    assert isinstance(late, VideoError)
    assert str(path) in str(late)
    assert "clip at 0.600 s" in str(late)
    assert "past the end of the video, at 1.500 s" in str(late)


@pytest.mark.parametrize("starts", [[1.0, 0.5], [-0.5], [float("nan")]])
def test_starts_that_do_not_ascend_from_zero_are_a_mistake_of_the_caller(
    backend: VideoBackend, tmp_path: Path, starts: list[float]
) -> None:
    path = write_video(tmp_path / "video.mp4", constant_rate(30, 30))
    with pytest.raises(ConfigError, match="clip start"):
        read(backend, path, starts)


def test_every_clip_that_the_length_allows_can_be_read(
    backend: VideoBackend, tmp_path: Path
) -> None:
    for frames, rate in [(16, 16.0), (31, 30.0), (75, 29.97), (61, 59.94), (24, 12.5)]:
        times = constant_rate(frames, rate)
        path = write_video(tmp_path / "video.mp4", times)
        info = backend.probe(VideoSource(str(path)))
        assert (info.frames, info.width, info.height) == (frames, 96, 80)
        assert info.duration_s == pytest.approx(frames / rate, abs=1e-2)
        assert info.rate_fps == pytest.approx(rate, rel=1e-2)
        starts = clip_starts(info.duration_s, ClipSpec(policy="stride:0.0625"))
        for start, clip in zip(starts, read(backend, path, starts), strict=True):
            assert numbers(clip) == expected(times, start)


def test_a_start_that_is_not_zero_and_sound_before_the_picture_change_nothing(
    backend: VideoBackend, tmp_path: Path
) -> None:
    times = constant_rate(40, 30)
    path = write_video(tmp_path / "late.mp4", times, Recipe(first_s=2.5))
    [clip] = read(backend, path, [0.25])
    assert numbers(clip) == expected(times, 0.25)
    assert backend.probe(VideoSource(str(path))).duration_s == pytest.approx(40 / 30, abs=1e-3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_pictures_are_turned(backend: VideoBackend, tmp_path: Path, degrees: int) -> None:
    matrix = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    path = write_video(tmp_path / "turned.mp4", constant_rate(30, 30), Recipe(matrix=matrix))
    info = backend.probe(VideoSource(str(path)))
    assert (info.rotation, info.mirrored) == (degrees, False)
    [clip] = read(backend, path, [0.0])
    assert isinstance(clip, ClipFrames)
    stored = barcode(shown_at(constant_rate(30, 30), 5 / RATE))
    shown = np.rot90(stored, -degrees // 90)
    assert clip.frames[5].shape == shown.shape == (info.height, info.width, 3)
    assert np.abs(clip.frames[5].astype(int) - shown).mean() < 8


@pytest.mark.parametrize("degrees", [0, 90])
def test_samples_that_are_not_square_widen_the_stored_picture(
    backend: VideoBackend, tmp_path: Path, degrees: int
) -> None:
    recipe = Recipe(sample_aspect=Fraction(4, 3), matrix=(0, 1, -1, 0) if degrees else (1, 0, 0, 1))
    path = write_video(tmp_path / "wide.mp4", constant_rate(30, 30), recipe)
    info = backend.probe(VideoSource(str(path)))
    assert (info.width, info.height) == ((80, 128) if degrees else (128, 80))
    [clip] = read(backend, path, [0.0])
    assert isinstance(clip, ClipFrames)
    assert clip.frames[0].shape == (info.height, info.width, 3)
    upright = [np.rot90(frame, degrees // 90) for frame in clip.frames]
    assert [read_number(f) for f in upright] == expected(constant_rate(30, 30), 0.0)


def test_a_video_inside_another_file_is_read_where_it_lies(
    backend: VideoBackend, tmp_path: Path
) -> None:
    times = constant_rate(60, 30)
    video = write_video(tmp_path / "video.mp4", times).read_bytes()
    outer = tmp_path / "outer.tar"
    outer.write_bytes(b"x" * 1234 + video + b"y" * 999)
    source = VideoSource(str(outer), offset=1234, length=len(video))
    assert backend.probe(source) == backend.probe(VideoSource(str(tmp_path / "video.mp4")))
    [clip] = list(backend.read_clips(source, [0.5], frames=FRAMES, rate_fps=RATE))
    assert numbers(clip) == expected(times, 0.5)


def test_a_video_at_a_url_is_read_like_a_file(backend: VideoBackend, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    times = constant_rate(60, 30)
    path = write_video(tmp_path / "video.mp4", times)
    with fsspec.open("memory://videos/video.mp4", "wb") as file:
        file.write(path.read_bytes())
    source = VideoSource("memory://videos/video.mp4")
    assert backend.probe(source) == backend.probe(VideoSource(str(path)))
    [clip] = backend.read_clips(source, [0.5], frames=FRAMES, rate_fps=RATE)
    assert numbers(clip) == expected(times, 0.5)
    for url in ("memory://videos/absent.mp4", "nonsense://videos/video.mp4"):
        with pytest.raises(VideoError, match=url):
            backend.probe(VideoSource(url))


def test_two_decoder_threads_give_the_same(tmp_path: Path, backend: VideoBackend) -> None:
    times = constant_rate(60, 30)
    path = write_video(tmp_path / "video.mp4", times, Recipe(options=X264_B_FRAMES))
    threaded = get_backend(backend.name, threads=2)
    assert [numbers(clip) for clip in read(threaded, path, [0.0, 0.9])] == [
        expected(times, 0.0),
        expected(times, 0.9),
    ]


def test_nothing_stays_open(backend: VideoBackend, tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", constant_rate(90, 30))

    def is_open() -> bool:
        links = Path("/proc/self/fd")
        return any(os.path.realpath(link) == str(path) for link in links.iterdir())

    clips = backend.read_clips(
        VideoSource(str(path)), [0.0, 1.0, 2.0], frames=FRAMES, rate_fps=RATE
    )
    assert not is_open()  # nothing is opened before the first clip is asked for
    assert numbers(next(clips))
    clips.close()  # type: ignore[attr-defined]
    assert not is_open()
    backend.probe(VideoSource(str(path)))
    assert not is_open()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (bytes(5000), "zero bytes"),
        (b"<!DOCTYPE html><html>not found</html>", "text or web page"),
        (b"just some words, again and again. " * 300, "text or web page"),
        (bytes(range(256)) * 40, "not a video"),
    ],
)
def test_what_is_no_video_is_named_for_what_it_is(
    backend: VideoBackend, tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        backend.probe(VideoSource(str(path)))
    one, two = read(backend, path, [0.0, 1.0])
    assert isinstance(one, VideoError)
    assert isinstance(two, VideoError)
    assert reason in str(two)
    assert "clip at 1.000 s" in str(two)


def test_a_missing_file_and_a_folder_are_errors_of_the_video(
    backend: VideoBackend, tmp_path: Path
) -> None:
    for path in (tmp_path / "absent.mp4", tmp_path):
        [error] = read(backend, path, [0.0])
        assert isinstance(error, VideoError)
        assert str(path) in str(error)


def test_a_name_that_looks_like_an_address_is_still_a_file(
    backend: VideoBackend, tmp_path: Path
) -> None:
    times = constant_rate(30, 30)
    made = write_video(tmp_path / "video.mp4", times)
    for name in ("concat:a|b.mp4", "clip%03d.mp4", "naïve #1?.mp4"):
        [clip] = read(backend, made.rename(tmp_path / name), [0.0])
        assert numbers(clip) == expected(times, 0.0)
        made = tmp_path / name
