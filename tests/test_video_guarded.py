"""A video that hangs, crashes or changed costs its own clips, by name, and nothing else."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import guarded
from reducio_latents.video.guarded import ClipRequest, GuardedReader, Read, read_request
from reducio_latents.video.processes import Channel
from tests.spot_check import SIDE, moving, write_video

BUCKET = Bucket(16, SIDE, SIDE)


def request(path: Path, **settings: object) -> ClipRequest:
    plain = ClipRequest(
        video=path.name, source=VideoSource(str(path)), bucket=BUCKET, clip=ClipSpec()
    )
    return replace(plain, **settings)  # type: ignore[arg-type]


def read_all(reader: GuardedReader, requests: list[ClipRequest]) -> dict[int, list[Read]]:
    """Submit all at once; return what came of each, its end last."""
    found: dict[int, list[Read]] = {reader.submit(each): [] for each in requests}
    while reader.pending:
        for read in reader.poll():
            found[read.request].append(read)
    return found


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
    with GuardedReader(BUCKET) as reader:
        [reads] = read_all(reader, [request(tmp_path / "a.mp4")]).values()
        clips = reader.read(request(tmp_path / "a.mp4", starts_s=(1.0,)))
    *three, end = reads
    assert end == Read(0, 0.0, None, None)
    assert [read.start_s for read in three] == [0, 1, 2]
    for number, read in enumerate(three):
        assert read.frames is not None
        wanted = scene[16 * number :][:16].astype(int)
        assert np.abs(read.frames - wanted).mean() < 1.5
    np.testing.assert_array_equal(clips, [three[1].frames])


def test_a_video_that_hangs_is_given_up_and_the_next_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it for reading waits for a writer for ever
    write_video(tmp_path / "good.mp4", moving(1))
    with GuardedReader(BUCKET, timeout_s=3.0) as reader:
        with pytest.raises(VideoError, match=r"pipe.mp4: the decoder hung: no answer for 3 s"):
            reader.read(request(tmp_path / "pipe.mp4"))
        with pytest.raises(VideoError, match="the decoder hung"):
            reader.read(request(tmp_path / "pipe.mp4", sha256="0" * 64))  # while it is hashed
        assert len(reader.read(request(tmp_path / "good.mp4"))) == 1


def test_a_crash_is_tried_again_and_no_clip_is_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", moving(1, frames=48))
    monkeypatch.setattr(guarded, "read_request", crash_once_after_a_clip)
    with GuardedReader(BUCKET) as reader:
        [reads] = read_all(reader, [request(tmp_path / "a.mp4")]).values()
    assert [read.start_s for read in reads[:-1]] == [0, 1, 2]
    assert reads[-1].problem is None


def test_a_video_that_always_crashes_does_not_take_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.mp4", "bad.mp4", "c.mp4"]
    for name in names:
        write_video(tmp_path / name, moving(1))
    monkeypatch.setattr(guarded, "read_request", crash_always)
    with GuardedReader(BUCKET, workers=2) as reader:
        found = read_all(reader, [request(tmp_path / name) for name in names])
    assert [len(reads) for reads in found.values()] == [2, 1, 2]
    assert found[1][0].problem == "bad.mp4: the decoder crashed (SIGSEGV)"


def test_other_bytes_than_those_that_were_encoded_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(1))
    same = hashlib.sha256(path.read_bytes()).hexdigest()
    with GuardedReader(BUCKET) as reader:
        assert len(reader.read(request(path, sha256=same))) == 1
        with path.open("ab") as file:
            file.write(b"\0")
        with pytest.raises(VideoError, match=r"a.mp4 has changed since it was encoded"):
            reader.read(request(path, sha256=same))
        path.unlink()
        with pytest.raises(VideoError, match=r"a.mp4 is no longer at .*: there is no such file"):
            reader.read(request(path, sha256=same))
        with pytest.raises(VideoError, match="there is no such file"):
            reader.read(request(path))


def test_a_video_without_room_for_a_clip_says_so(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", moving(1, frames=5))
    with GuardedReader(BUCKET) as reader, pytest.raises(VideoError, match="shorter than a clip"):
        reader.read(request(tmp_path / "short.mp4"))


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout_s": 0.0}, {"timeout_s": -1.0}])
def test_no_process_and_no_time_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1 process, and more than 0 s"):
        GuardedReader(BUCKET, **settings)
