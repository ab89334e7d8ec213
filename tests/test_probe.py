"""A record for every file: true of a healthy one, a reason for any other."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.starts import clip_starts
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.probe import (
    ProbeRecord,
    Probing,
    probe_video,
    probe_videos,
)
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames, get_backend
from tests.videos import X264_B_FRAMES, Recipe, constant_rate, write_sound, write_video


def probe(path: Path) -> ProbeRecord:
    return probe_video(VideoSource(str(path)), get_backend("pyav"))


def test_a_record_says_what_a_viewer_sees(tmp_path: Path) -> None:
    recipe = Recipe(options=X264_B_FRAMES, matrix=(0, 1, -1, 0), sample_aspect=Fraction(4, 3))
    path = write_video(tmp_path / "phone.mp4", constant_rate(50, 25), recipe)
    data = path.read_bytes()
    record = probe(path)
    assert record == ProbeRecord(
        codec="h264",
        width=80,
        height=128,
        rotation=90,
        rate_fps=record.rate_fps,
        duration_s=record.duration_s,
        frames=50,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    assert record.rate_fps == pytest.approx(25.0)
    assert record.duration_s == pytest.approx(2.0)
    assert record.error is None


def test_the_rate_is_the_true_mean_of_a_variable_one(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 1.0, 1.9, 1.95, 2.0]
    record = probe(write_video(tmp_path / "variable.mp4", times))
    assert record.frames == 7
    assert record.duration_s == pytest.approx(2.0, abs=0.2)
    assert record.rate_fps == pytest.approx(7 / record.duration_s)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(options=X264_B_FRAMES), Recipe(first_s=3.0)])
@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv", "a.flv"])
def test_the_last_clip_that_the_duration_allows_can_be_read(
    tmp_path: Path, name: str, recipe: Recipe
) -> None:
    path = write_video(tmp_path / name, constant_rate(49, 24), recipe)
    starts = clip_starts(probe(path).duration_s, ClipSpec(policy="stride:0.0625"))
    assert 16 <= len(starts) <= 18
    [clip] = get_backend("pyav").read_clips(
        VideoSource(str(path)), starts[-1:], frames=16, rate_fps=16.0
    )
    assert isinstance(clip, ClipFrames), clip


def test_a_video_that_cannot_be_used_has_a_reason_and_still_its_hash(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", constant_rate(60, 30)).read_bytes()
    cases = {
        "empty.mp4": (b"", "empty"),
        "page.mp4": (b"<html>404</html>", "web page"),
        "cut.mp4": (whole[: len(whole) // 2], "without its index"),
        "sound.mp4": (write_sound(tmp_path / "s.mp4").read_bytes(), "only audio"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        record = probe(tmp_path / name)
        assert record.error is not None
        assert reason in record.error
        assert str(tmp_path / name) in record.error
        assert (record.bytes, record.frames, record.duration_s) == (len(data), 0, 0.0)
        assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_that_is_not_there_has_a_reason(tmp_path: Path) -> None:
    record = probe(tmp_path / "absent.mp4")
    assert "no such file" in str(record.error)
    assert record.sha256 == ""
    assert "it is a folder, not a file" in str(probe(tmp_path).error)


def test_packets_that_demux_but_decode_to_nothing_are_found_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "noise.mp4", constant_rate(30, 30))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[start:end] = bytes(i * 37 % 256 for i in range(end - start))
    path.write_bytes(data)
    assert "none of its pictures can be decoded" in str(probe(path).error)


def test_what_a_user_should_know_of_a_video_is_told_by_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe(codec="mjpeg", pix_fmt="yuvj420p", options={}, time_base=Fraction(1, 25))
    path = write_video(tmp_path / "bare.mjpeg", constant_rate(50, 25), recipe)
    video = CorpusVideo(video="bare.mjpeg", source=VideoSource(str(path)))
    (record,) = probe_videos([video], Probing(backend="pyav", workers=1, timeout_s=60))
    assert (record.frames, record.rate_fps) == (50, 25.0)
    assert "bare.mjpeg: its frames have no times: they are taken as 25 a second." in caplog.text
