"""decord reads the ordinary exactly, and names what it cannot read."""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import ContentImageColumn
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.registry import describe_column
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import BACKENDS, ClipFrames, get_backend
from tests.fake_torchcodec import torchcodec_or_fake
from tests.videos import (
    X264_B_FRAMES,
    Recipe,
    constant_rate,
    write_frames,
    write_video,
)

pytest.importorskip("decord")
TIMES = constant_rate(40, 30)
REFUSED = {
    "decode av1": ("a.mp4", Recipe(codec="libsvtav1", options={"preset": "12"})),
    "find exact frames in mpegts": ("a.ts", Recipe()),
    "find exact frames in mpeg ": (
        "a.mpg",
        Recipe(codec="mpeg2video", options={"b": "4M"}, time_base=Fraction(1, 30)),
    ),
    "mirror pictures": ("a.mp4", Recipe(matrix=(-1, 0, 0, 1))),
    "follow the edit list": (
        "a.mp4",
        Recipe(first_s=-0.2, muxer={"avoid_negative_ts": "disabled"}),
    ),
    "convert yuv420p10le": ("a.mp4", Recipe(pix_fmt="yuv420p10le")),
    "convert HDR": ("a.mp4", Recipe(pix_fmt="yuv420p10le", tags=(1, 9, 9, 16))),
    "tell when the frames": (
        "a.avi",
        Recipe(codec="mpeg4", options={"b": "4M", "bf": "2"}, time_base=Fraction(1, 30)),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_decord_cannot_read_exactly_is_refused_with_a_way_out(
    tmp_path: Path, what: str
) -> None:
    name, recipe = REFUSED[what]
    source = VideoSource(str(write_video(tmp_path / name, TIMES, recipe)))
    decord = get_backend("decord")
    with pytest.raises(VideoError, match=f"decord cannot {what}.*use --video-backend pyav"):
        decord.probe(source)
    [refusal] = decord.read_clips(source, [0.0], frames=16, rate_fps=16.0)
    assert isinstance(refusal, VideoError)
    assert f"decord cannot {what}" in str(refusal)
    [clip] = get_backend("pyav").read_clips(source, [0.0], frames=16, rate_fps=16.0)
    assert isinstance(clip, ClipFrames)


def test_all_backends_give_the_same_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)
    frames = list(blocks.repeat(8, axis=1).repeat(8, axis=2))
    path = write_frames(
        tmp_path / "a.mp4", frames, constant_rate(20, 15), Recipe(options=X264_B_FRAMES)
    )
    source = VideoSource(str(path))
    one, *others = _each_backend(source, 0.1, frames=16)
    for other in others:
        assert one.times_s == other.times_s
        assert np.abs(np.stack(one.frames).astype(int) - np.stack(other.frames)).mean() < 0.1


def test_an_untagged_large_picture_has_the_same_colours_in_all(tmp_path: Path) -> None:
    picture = np.zeros((720, 1280, 3), np.uint8)
    picture[:, :640], picture[:, 640:] = (180, 70, 60), (60, 90, 190)
    path = write_frames(tmp_path / "a.mp4", [picture] * 2, [0.0, 0.5], Recipe(size=(1280, 720)))
    source = VideoSource(str(path))
    one, *others = _each_backend(source, 0.0, frames=1)
    for other in others:
        assert np.abs(one.frames[0].astype(int) - other.frames[0]).mean() < 2


def _each_backend(source: VideoSource, start_s: float, *, frames: int) -> list[ClipFrames]:
    with torchcodec_or_fake():
        found = [
            next(iter(get_backend(name).read_clips(source, [start_s], frames=frames, rate_fps=16)))
            for name in BACKENDS
        ]
    clips = [clip for clip in found if isinstance(clip, ClipFrames)]
    assert len(clips) == 3, found
    return clips


@pytest.mark.parametrize(
    ("backend", "library", "extra"),
    [
        ("pyav", "av", "encode"),
        ("decord", "decord", "encode"),
        ("torchcodec", "torchcodec.decoders", "torchcodec"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, backend: str, library: str, extra: str
) -> None:
    for module in [name for name in sys.modules if name.startswith("reducio_latents.video.")]:
        if module.rpartition(".")[2] not in ("protocol", "source"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'reducio-latents\[{extra}\]'"):
        get_backend(backend)


def test_a_frame_of_another_moment_is_never_taken(tmp_path: Path) -> None:
    """torchcodec's decoder tells when its frames are shown; it is believed over its numbers."""
    source = VideoSource(str(write_video(tmp_path / "a.mp4", TIMES, Recipe())))
    with torchcodec_or_fake(), pytest.MonkeyPatch.context() as patch:
        backend = get_backend("torchcodec")
        decoder = sys.modules["torchcodec.decoders"].VideoDecoder
        right = decoder.get_frame_at
        patch.setattr(decoder, "get_frame_at", lambda self, i: right(self, i + (i > 3)))
        [clip] = backend.read_clips(source, [0.0], frames=16, rate_fps=16.0)
        assert isinstance(clip, VideoError)
        assert "torchcodec gives a frame 0.033 s off: use --video-backend pyav" in str(clip)
        patch.setattr(decoder, "__len__", lambda _: 3)
        with pytest.raises(VideoError, match="torchcodec cannot tell when the frames"):
            backend.probe(source)


def test_pictures_of_a_gpu_have_a_fingerprint_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EncodeOptions(video_backend="torchcodec")
    image, buckets = ContentImageColumn("png", "bicubic"), [Bucket(16, 64, 64)]
    prints = []
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        prints.append(describe_column(image, options, buckets, measure=False).fingerprint)
    assert prints[0] != prints[1]
    assert (
        prints[0]
        == describe_column(
            image, replace(options, video_backend="pyav", colours="swscale"), buckets, measure=False
        ).fingerprint
    )


def test_a_backend_that_does_not_exist_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ConfigError, match="choose one of pyav, decord"):
        get_backend("opencv")
    with pytest.raises(ConfigError, match="threads"):
        get_backend("pyav", threads=0)
