"""The shared collection of real, odd, broken and numbered videos, where it is at hand.

Looked for in REDUCIO_SHARED or in `shared` beside the repository; the properties are those that
generated videos test in the other modules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.starts import clip_starts
from reducio_latents.corpus.probe import probe_video
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames, VideoBackend, get_backend
from tests.fake_torchcodec import torchcodec_or_fake
from tests.videos import read_number, shown_at

BESIDE = Path(__file__).resolve().parents[2] / "shared"
VIDEOS = Path(os.environ.get("REDUCIO_SHARED", BESIDE)) / "videos"
pytestmark = pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos here")

REFUSED: dict[str, set[str]] = {"pyav": set()}
REFUSED["decord"] = {"av1.mp4", "h264.ts", "h264_10bit.mp4", "hflip.mp4", "mpeg2_bf.mpg"}
REFUSED["torchcodec"] = REFUSED["decord"] - {"av1.mp4"} | {"mpeg4_nobf.avi", "mjpeg.avi"}
CLIPS = {"openh264__LS_SVA_D.264": 68, "openh264__BA_MW_D.264": 4, "lpms__skip_1.ts": 5}
"""The first two have no times, in the third packets have those of others."""
CUT_SHORT = {"bad_trunc50_faststart_g250.mp4", "bad_trunc95_faststart.mp4", "bad_trunc50.webm"}


@cache
def truth() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VIDEOS / "barcode" / "truth.json").read_text())
    return found


def starts_of(times_s: list[float]) -> Iterator[float]:
    """Yield the starts of a clip at the beginning, in the middle and at the end."""
    last = times_s[-1]
    if last > 1.0:
        yield from (0.0, round(last / 2, 3), round(last - 0.94, 3))


@pytest.mark.parametrize("name", ["pyav", "decord", "torchcodec"])
def test_every_numbered_frame_is_the_right_one(name: str) -> None:
    with torchcodec_or_fake():
        pytest.importorskip({"pyav": "av"}.get(name, name))
        backend = get_backend(name)
    exact, refused = 0, set()
    starts = slice(3) if name == "pyav" else slice(1, 2)  # the other opens a file anew for each
    for file, facts in truth().items():
        source = VideoSource(str(VIDEOS / "barcode" / file))
        for start in [*starts_of(facts["times"])][starts]:
            [clip] = backend.read_clips(source, [start], frames=16, rate_fps=16.0)
            if isinstance(clip, VideoError):
                assert "use --video-backend pyav" in str(clip), clip
                refused.add(file)
                continue
            assert _numbers(backend, source, clip) == [
                shown_at(facts["times"], start + i / 16) for i in range(16)
            ], (file, start)
            exact += 1
    assert refused == REFUSED[name]
    assert exact == len(range(3)[starts]) * (31 - len(refused))


def _numbers(backend: VideoBackend, source: VideoSource, clip: ClipFrames) -> list[int]:
    """Read the numbers, which were painted before the pictures were turned."""
    info = backend.probe(source)
    stored = [np.rot90(frame, info.rotation // 90) for frame in clip.frames]
    return [read_number(f[:, ::-1] if info.mirrored else f) for f in stored]


@pytest.mark.parametrize("folder", ["odd", "broken"])
def test_every_strange_file_gives_its_clips_or_a_reason(folder: str) -> None:
    backend = get_backend("pyav")
    for path in sorted((VIDEOS / folder).iterdir()):
        source = VideoSource(str(path))
        record = probe_video(source, backend)
        if record.error is not None:
            assert record.error.startswith(f"{path}: ")
            continue
        starts = clip_starts(record.duration_s, ClipSpec())
        clips = list(
            backend.read_clips(
                source, starts, frames=16, rate_fps=16.0, transform=lambda frame: frame[::8, ::8]
            )
        )
        assert len(clips) == len(starts) == CLIPS.get(path.name, len(starts))
        failed = [clip for clip in clips if isinstance(clip, VideoError)]
        whole = folder == "odd"
        if whole or path.name in CUT_SHORT - {"bad_trunc95_faststart.mp4"}:
            assert not failed
        for clip in failed:
            assert "clip at " in str(clip)


def test_packets_and_decoding_agree_on_length_and_frames() -> None:
    backend = get_backend("pyav")
    for path in sorted(path for path in (VIDEOS / "real").iterdir()):
        if path.stat().st_size > 120_000:
            continue
        source = VideoSource(str(path))
        info = backend.probe(source)
        decoded = backend._decode_through(  # type: ignore[attr-defined]
            source, info, lambda: None
        )
        frames, end_s = decoded.frames, decoded.duration_s
        if path.name in ("decord__corrupted.mp4", "media__sample_with_invalid_nalu.mp4"):
            assert frames < info.frames
        else:
            assert frames == info.frames, path.name
        assert end_s == pytest.approx(info.duration_s, abs=1e-6), path.name
