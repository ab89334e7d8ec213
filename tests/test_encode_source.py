"""Batches come in order, whatever the workers do; memory bounds never stall the flow."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import CONTENT, FRAMES, TIMES
from reducio_latents.encode.source import PlannedClip, ReadyBatch, ShardWork, decode_batches
from reducio_latents.errors import ConfigError
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import ShardKey
from reducio_latents.video.processes import Channel
from reducio_latents.video.reading import WORKER_ATTEMPTS, ClipReader, ClipRequest, Decoded

BUCKET = Bucket(4, 8, 8)
NEEDS = frozenset({FRAMES, TIMES, CONTENT})


def paint_clips(task: ClipRequest, channel: Channel) -> None:
    """Stand in for a decoder: clip k of video v shows v + k; some videos misbehave at a clip."""
    name, _, trouble = task.video.partition("!")
    what, _, at = trouble.partition("@")
    time.sleep(0.002 * (ord(name[0]) % 5))
    assert task.starts_s is not None
    for start_s in task.starts_s:
        if what and start_s == float(at):
            if what == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "hang":
                time.sleep(600)
            elif what == "bug":
                raise RuntimeError("a bug")
            elif what == "error":
                channel.emit(Decoded(error=f"{task.video}: damaged"))
                continue
        slot, memory = channel.acquire()
        np.frombuffer(memory, np.uint8)[:] = _colour(name, start_s)
        channel.emit(Decoded(start_s, "", (start_s,) * 4, b"image"), slot)


def _colour(name: str, start_s: float) -> int:
    return (16 * ord(name[0]) + int(start_s)) % 251


def shards_of(videos: dict[str, int], shard_rows: int) -> list[ShardWork]:
    """Plan `videos` (name -> clips) one after another into shards."""
    every = [(video, float(k)) for video, clips in videos.items() for k in range(clips)]
    works = []
    for shard, start in enumerate(range(0, len(every), shard_rows)):
        rows = every[start : start + shard_rows]
        clips = tuple(
            PlannedClip(row, f"{video}_{start_s}", video, start_s, (f"about {video}",))
            for row, (video, start_s) in enumerate(rows)
        )
        works.append(ShardWork(ShardKey(BUCKET.name, shard), clips))
    return works


def read(
    works: list[ShardWork], gone: frozenset[str] = frozenset(), **options: object
) -> list[ReadyBatch]:
    settings: dict[str, object] = {"workers": 2, "timeout_s": 20.0}
    with painting(**{**settings, **options}) as reader:
        ready = list(decode_batches(reader, works, asking(gone), 3, NEEDS))
    assert None not in ready  # every shard was known from the start
    return [item for item in ready if item is not None]


def painting(**options: Any) -> ClipReader:
    return ClipReader([BUCKET], target=paint_clips, **options)


def asking(gone: frozenset[str] = frozenset()) -> Callable[[ShardWork, str], ClipRequest]:
    def request(work: ShardWork, video: str) -> ClipRequest:
        problem = f"{video} is no longer in the corpus." if video in gone else None
        source = VideoSource(video)
        return ClipRequest(video=video, source=source, bucket=work.bucket, problem=problem)

    return request


def check(works: list[ShardWork], ready: list[ReadyBatch]) -> dict[str, str]:
    """Prove that every row is there once, in order, with its own pixels; return the failures."""
    failed: dict[str, str] = {}
    seen = [(item.work.key, clip.row) for item in ready for clip in item.clips]
    assert seen == [(work.key, clip.row) for work in works for clip in work.clips]
    for item in ready:
        settled = {failure.row for failure in item.failed}
        failed |= {failure.clip_id: failure.reason for failure in item.failed}
        kept = [clip for clip in item.clips if clip.row not in settled]
        if item.batch is None:
            assert not kept
            continue
        assert item.batch.rows == tuple(clip.row for clip in kept)
        assert item.batch.frames_BTHWC is not None
        assert item.batch.content_BHWC is not None
        assert item.batch.times_s == tuple((clip.start_s,) * 4 for clip in kept)
        assert item.batch.frames_BTHWC.shape == (len(kept), 4, 8, 8, 3)
        for clip, frames in zip(kept, item.batch.frames_BTHWC, strict=True):
            assert set(frames.flatten().tolist()) == {_colour(clip.video, clip.start_s)}
        assert item.last == (item.clips[-1].row == len(item.work.clips) - 1)
    return failed


@pytest.mark.parametrize("shard_rows", [1, 4, 100])
@pytest.mark.parametrize("read_ahead_bytes", [1, 1 << 30])
def test_batches_are_in_order_for_any_shard_size_and_memory(
    shard_rows: int, read_ahead_bytes: int
) -> None:
    works = shards_of({"a": 7, "b": 1, "c": 12, "d": 2}, shard_rows)
    ready = read(works, read_ahead_bytes=read_ahead_bytes, workers=3)
    assert check(works, ready) == {}


@pytest.mark.parametrize("read_ahead_bytes", [1, 1 << 30])
def test_a_crash_costs_the_clip_that_was_being_decoded(read_ahead_bytes: int) -> None:
    works = shards_of({"a": 3, "b!crash@2": 5, "c": 4}, 5)
    failed = check(works, read(works, read_ahead_bytes=read_ahead_bytes))
    assert list(failed) == ["b!crash@2_2.0"]
    assert "crashed (SIGKILL)" in failed["b!crash@2_2.0"]


def test_a_hang_costs_the_clip_that_was_being_decoded() -> None:
    works = shards_of({"a": 2, "b!hang@0": 2, "c": 2}, 6)
    failed = check(works, read(works, timeout_s=2.0))
    assert list(failed) == ["b!hang@0_0.0"]
    assert "hung: no answer for 2 s" in failed["b!hang@0_0.0"]


def test_a_video_that_kills_every_worker_is_given_up_after_some_attempts() -> None:
    # Each attempt starts at the clip after the one that was blamed, whose time is `crash@` again.
    clips = tuple(PlannedClip(i, f"x{i}", "z!crash@1", 1.0, ()) for i in range(9))
    good = PlannedClip(9, "good", "a", 1.0, ())
    works = [ShardWork(ShardKey(BUCKET.name, 0), (*clips, good))]
    failed = check(works, read(works))
    assert set(failed) == {clip.clip_id for clip in clips}
    assert len(clips) > WORKER_ATTEMPTS


def test_errors_and_bugs_and_missing_videos_are_recorded_by_clip() -> None:
    works = shards_of({"a!error@1": 3, "b!bug@0": 1, "c": 2, "d": 2}, 4)
    failed = check(works, read(works, gone=frozenset({"d"})))
    assert failed == {
        "a!error@1_1.0": "a!error@1: damaged",
        "b!bug@0_0.0": "b!bug@0: RuntimeError: a bug.",
        "d_0.0": "d is no longer in the corpus.",
        "d_1.0": "d is no longer in the corpus.",
    }


def test_workers_that_do_not_fit_in_shared_memory_are_refused_before_one_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    works = shards_of({"a": 1}, 1)
    with pytest.raises(ConfigError, match=r"48 MiB of shared memory.*1 MiB left.*fewer --workers"):
        read(works, whole_px=1 << 20)
    assert check(works, read(works)) == {}


def test_a_consumer_that_stops_early_leaves_no_worker() -> None:
    works = shards_of({"a": 50, "b": 50}, 10)
    with painting(workers=2) as reader:
        next(decode_batches(reader, works, asking(), 3, NEEDS))
    assert not _children()


def _children() -> list[str]:
    """Return the state of every live process whose parent is our fork server."""
    from multiprocessing import forkserver

    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == server and state != "Z":
            found.append(stat.parent.name)
    return found
