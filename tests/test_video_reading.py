"""A video that hangs, crashes or changed costs its own clips, by name, and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError
from reducio_latents.files.source import VideoSource
from reducio_latents.video.identity import Expected, stamp_of
from reducio_latents.video.processes import Channel
from reducio_latents.video.reading import (
    Clip,
    ClipFailed,
    ClipRead,
    ClipReader,
    ClipRequest,
    read_request,
)
from tests.spot_check import SIDE, moving, write_video

BUCKET = Bucket(16, SIDE, SIDE)


def request(path: Path, **settings: object) -> ClipRequest:
    plain = ClipRequest(video=path.name, source=VideoSource(str(path)), bucket=BUCKET)
    return replace(plain, **settings)  # type: ignore[arg-type]


def read_all(reader: ClipReader, requests: Sequence[ClipRequest | None]) -> list[Clip]:
    return [clip for clip in reader.read(requests) if clip is not None]


def reasons(clips: Sequence[Clip]) -> list[str]:
    return [clip.reason if isinstance(clip, ClipFailed) else "" for clip in clips]


def crash_once_after_a_clip(task: ClipRequest, channel: Channel) -> None:
    """Read on, but kill the worker after the first clip unless it was killed before."""
    mark = Path(task.source.url).with_suffix(".mark")
    if not mark.exists():
        mark.touch()
        read_request(replace(task, starts_s=(0.0,)), channel)
        os.kill(os.getpid(), signal.SIGSEGV)
    read_request(task, channel)


def crash_always(task: ClipRequest, channel: Channel) -> None:
    if "bad" in task.video:
        os.kill(os.getpid(), signal.SIGSEGV)
    read_request(task, channel)


def test_clips_come_in_order_and_are_those_of_the_video(tmp_path: Path) -> None:
    scene = moving(1, frames=48)
    write_video(tmp_path / "a.mp4", scene)
    with ClipReader([BUCKET]) as reader:
        clips = read_all(reader, [request(tmp_path / "a.mp4")])
        [again] = read_all(reader, [request(tmp_path / "a.mp4", starts_s=(1.0,))])
    assert [clip.last for clip in clips] == [False, False, True]
    for number, clip in enumerate(clips):
        assert isinstance(clip, ClipRead)
        assert clip.start_s == number
        wanted = scene[16 * number :][:16].astype(int)
        assert np.abs(clip.frames.numpy() - wanted).mean() < 1.5
    assert isinstance(again, ClipRead)
    assert isinstance(clips[1], ClipRead)
    np.testing.assert_array_equal(again.frames, clips[1].frames)


def hang_or_read(task: ClipRequest, channel: Channel) -> None:
    if "hang" in task.video:
        time.sleep(60)
    read_request(task, channel)


def test_a_video_that_hangs_is_given_up_and_the_next_is_read(tmp_path: Path) -> None:
    for name in ("hang.mp4", "good.mp4"):
        write_video(tmp_path / name, moving(1))
    with ClipReader([BUCKET], timeout_s=2.0, target=hang_or_read) as reader:
        bad, good = read_all(reader, [request(tmp_path / n) for n in ("hang.mp4", "good.mp4")])
    assert reasons([bad]) == ["hang.mp4: the decoder hung: no answer for 2 s."]
    assert isinstance(good, ClipRead)


def test_a_crash_is_tried_again_and_no_clip_is_given_twice(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving(1, frames=48))
    starts_s = (0.0, 1.0, 2.0)
    with ClipReader([BUCKET], target=crash_once_after_a_clip) as reader:
        clips = read_all(reader, [request(tmp_path / "a.mp4", starts_s=starts_s)])
    assert tuple(clip.start_s for clip in clips if isinstance(clip, ClipRead)) == starts_s


def test_a_video_that_always_crashes_does_not_take_its_neighbours(tmp_path: Path) -> None:
    names = ["a.mp4", "bad.mp4", "c.mp4"]
    for name in names:
        write_video(tmp_path / name, moving(1))
    with ClipReader([BUCKET], workers=2, target=crash_always) as reader:
        found = read_all(reader, [request(tmp_path / name) for name in names])
    assert reasons(found) == ["", "bad.mp4: the decoder crashed (SIGSEGV).", ""]


def test_another_request_takes_the_place_of_one_that_fails(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, moving(1, frames=32))
    asked = [request(tmp_path / n, starts_s=(0.0, 1.0)) for n in ("a.mp4", "gone.mp4", "a.mp4")]
    told: list[str] = []

    def instead(failed: ClipRequest, why: str) -> ClipRequest:
        told.append(failed.video)
        return request(tmp_path / "b.mp4", starts_s=(0.0,))

    for read_ahead_bytes in (1, 1 << 30):
        told.clear()
        with ClipReader(
            [BUCKET], workers=2, substitute=instead, read_ahead_bytes=read_ahead_bytes
        ) as reader:
            clips = read_all(reader, asked)
        names = [clip.request.video for clip in clips]
        assert names == ["a.mp4", "a.mp4", "b.mp4", "a.mp4", "a.mp4"]
        assert reasons(clips) == [""] * 5
        assert told == ["gone.mp4"]


def test_a_reader_may_be_left_early_and_used_again(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving(1, frames=48))
    with ClipReader([BUCKET], workers=2) as reader:
        for _ in range(2):
            clips = reader.read([request(tmp_path / "a.mp4")] * 9)
            assert isinstance(next(clips), ClipRead)
            clips.close()  # type: ignore[attr-defined]
        assert len(read_all(reader, [request(tmp_path / "a.mp4"), None])) == 3


def test_other_bytes_than_the_expected_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(1))
    data = path.read_bytes()
    same = Expected(len(data), hashlib.sha256(data).hexdigest(), since="encoded")
    with ClipReader([BUCKET]) as reader:

        def why(**settings: Any) -> str:
            return reasons(read_all(reader, [request(path, **settings)]))[0]

        assert why(expected=same) == ""
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # as long, in the same place
        os.utime(path, ns=(0, 0))
        assert why(expected=same) == "a.mp4 has changed since it was encoded: its hash differs."
        path.write_bytes(data + b"\0")
        assert f"it had {len(data)} bytes, now {len(data) + 1}" in why(expected=same)
        shutil.copy(path, tmp_path / "b")
        path.write_bytes(data)
        assert why(expected=same) == ""
        path.unlink()
        assert "a.mp4 is no longer at" in why(expected=same)
        assert "there is no such file" in why(expected=same)
        assert "there is no such file" in why()


def test_a_video_whose_stamp_is_known_is_not_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(1))
    stamp = stamp_of(VideoSource(str(path)))
    unread = Expected(path.stat().st_size, "of other bytes", stamp)
    with ClipReader([BUCKET]) as reader:
        assert reasons(read_all(reader, [request(path, expected=unread)])) == [""]
        path.touch()
        [why] = reasons(read_all(reader, [request(path, expected=unread)]))
    assert "a.mp4 has changed since it was planned" in why


def test_a_video_without_room_for_a_clip_says_so(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", moving(1, frames=5))
    with ClipReader([BUCKET]) as reader:
        [why] = reasons(read_all(reader, [request(tmp_path / "short.mp4")]))
    assert "shorter than a clip" in why


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout_s": 0.0}, {"timeout_s": -1.0}])
def test_no_process_and_no_time_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1 process, and more than 0 s"):
        ClipReader([BUCKET], **settings)
