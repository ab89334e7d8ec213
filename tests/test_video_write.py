"""What is written can be played, looks like what was given, and appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reducio_latents.errors import VideoError
from reducio_latents.video import ClipFrames, VideoSource, get_backend
from reducio_latents.video.write import write_mp4


def gradient(
    frames: int, height: int, width: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    grey = (4 * t + y + x) % 256
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_written_clip_reads_back_nearly_the_same(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = gradient(16, *size)
    write_mp4(tmp_path / "clip.mp4", frames, 16.0)
    source = VideoSource(str(tmp_path / "clip.mp4"))
    info = get_backend("pyav").probe(source)
    assert (info.frames, info.pix_fmt) == (16, "yuv420p")
    assert info.rate_fps == pytest.approx(16.0)
    clip = next(iter(get_backend("pyav").read_clips(source, [0.0], frames=16, rate_fps=16.0)))
    assert isinstance(clip, ClipFrames)
    read = np.stack(clip.frames)[:, : size[0], : size[1]]
    assert np.abs(read.astype(int) - frames).mean() < 6


def test_a_clip_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoError, match=r"folder\.mp4 cannot be written"):
        write_mp4(tmp_path / "folder.mp4", gradient(2, 16, 16), 16.0)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.mp4"]


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="float32"):
        write_mp4(tmp_path / "a.mp4", gradient(2, 16, 16).astype(np.float32), 16.0)
    with pytest.raises(VideoError, match="no frames"):
        write_mp4(tmp_path / "a.mp4", gradient(0, 16, 16), 16.0)
