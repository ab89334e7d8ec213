"""What is written can be played, looks like what was given, and appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import ClipFrames, get_backend
from reducio_latents.video.write import write_image, write_mp4, write_webp


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


def test_an_animated_picture_has_every_frame_and_lasts_as_long_as_the_clip(tmp_path: Path) -> None:
    frames = gradient(16, 33, 47)
    write_webp(tmp_path / "clip.webp", frames, 15.0)
    with Image.open(tmp_path / "clip.webp") as picture:
        assert (picture.n_frames, picture.info["loop"]) == (16, 0)  # type: ignore[attr-defined]
        lasting = 0
        for number, frame in enumerate(frames):
            picture.seek(number)
            assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - frame).mean() < 6
            lasting += picture.info["duration"]
    assert lasting == round(16 / 15 * 1000)
    with pytest.raises(VideoError, match="no frames"):
        write_webp(tmp_path / "clip.webp", frames[:0], 15.0)


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


def test_colours_of_a_large_clip_come_back(tmp_path: Path) -> None:
    """From 720 lines up an untagged file would be taken for another matrix."""
    colours = np.array([[200, 60, 40], [40, 180, 70], [60, 70, 210], [128, 128, 128]], np.uint8)
    picture = np.repeat(np.repeat(colours.reshape(2, 2, 3), 360, axis=0), 640, axis=1)
    write_mp4(tmp_path / "large.mp4", np.stack([picture] * 2), 16.0)
    source = VideoSource(str(tmp_path / "large.mp4"))
    [clip] = get_backend("pyav").read_clips(source, [0.0], frames=2, rate_fps=16.0)
    assert isinstance(clip, ClipFrames)
    difference = np.abs(clip.frames[0].astype(int) - picture)
    assert difference[100:200, 100:500].max() <= 4
    assert difference.mean() < 2


def test_an_image_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    picture = gradient(1, 24, 40)[0]
    write_image(tmp_path / "new" / "sheet.png", picture)
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        np.testing.assert_array_equal(np.array(image), picture)
    with pytest.raises(VideoError, match=r"sheet\.nothing cannot be written"):
        write_image(tmp_path / "sheet.nothing", picture)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
