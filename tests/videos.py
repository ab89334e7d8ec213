"""Tiny videos whose frames say which they are, made with PyAV.

A frame is 5 rows by 8 columns of cells. The 16 cells of the first two rows are the bits of the
frame's number, lowest first: bright is 1. The rest is a gradient, so that turning it shows.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
WIDTH, HEIGHT = 96, 80


def barcode(number: int, width: int = WIDTH, height: int = HEIGHT) -> Picture:
    """Return uint8 RGB (H, W, 3) that says `number`."""
    cells = np.linspace(60, 190, 40).reshape(5, 8)
    for bit in range(16):
        cells[bit // 8, bit % 8] = 235 if number >> bit & 1 else 16
    rows = np.arange(height) * 5 // height
    columns = np.arange(width) * 8 // width
    grey = cells[rows][:, columns].astype(np.uint8)
    return np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=-1))


def read_number(picture: Picture) -> int:
    """Return the number that `barcode` painted."""
    height, width = picture.shape[:2]
    number = 0
    for bit in range(16):
        row, column = divmod(bit, 8)
        top, left = height * (row + 0.3) / 5, width * (column + 0.3) / 8
        cell = picture[int(top) : int(top + height * 0.08) + 1]
        cell = cell[:, int(left) : int(left + width * 0.05) + 1]
        number |= int(cell.mean() > 126) << bit
    return number


def shown_at(times_s: Sequence[float], moment_s: float) -> int:
    """Return the number of the frame that is shown: the last that appears then or earlier."""
    return bisect.bisect_right(times_s, moment_s + 2e-6) - 1


def constant_rate(frames: int, rate: float) -> list[float]:
    return [i / rate for i in range(frames)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a test video is made."""

    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(
        default_factory=lambda: {"preset": "ultrafast", "tune": "fastdecode", "crf": "18"}
    )
    muxer: dict[str, str] = field(default_factory=dict)
    time_base: Fraction = Fraction(1, 90000)
    size: tuple[int, int] = (WIDTH, HEIGHT)
    """(width, height)."""
    matrix: tuple[int, int, int, int] | None = None
    """a, b, c, d of the display matrix."""
    sample_aspect: Fraction | None = None
    first_s: float = 0.0
    """Presentation time of the first frame."""
    tags: tuple[int, int, int, int] | None = None
    """range, matrix, primaries, transfer (H.273)."""
    alpha: bool = False
    """Whether to say that a WebM is transparent."""


X264_B_FRAMES = {"preset": "veryfast", "crf": "18", "bf": "3", "g": "30", "b_strategy": "0"}
X264_OPEN_GOP = X264_B_FRAMES | {"x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0"}


def write_video(path: Path, times_s: Sequence[float], recipe: Recipe | None = None) -> Path:
    """Write a video whose i-th frame says i and appears at times_s[i] (rounded to a tick)."""
    width, height = (recipe or Recipe()).size
    return write_frames(
        path, [barcode(i, width, height) for i in range(len(times_s))], times_s, recipe
    )


def write_frames(
    path: Path,
    frames: Sequence[Any],
    times_s: Sequence[float],
    recipe: Recipe | None = None,
) -> Path:
    """Write pictures (RGB arrays or frames of PyAV) as a video."""
    made = recipe or Recipe()
    with av.open(str(path), "w", options=made.muxer) as file:
        stream = file.add_stream(made.codec, rate=_rate(times_s), options=dict(made.options))
        stream.width, stream.height = made.size
        stream.pix_fmt = made.pix_fmt
        stream.time_base = stream.codec_context.time_base = made.time_base
        if made.alpha:
            stream.metadata["alpha_mode"] = "1"
        if made.sample_aspect is not None:
            stream.codec_context.sample_aspect_ratio = made.sample_aspect
        if made.matrix is not None:
            a, b, c, d = (65536 * value for value in made.matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if made.tags is not None:
            context = stream.codec_context
            context.color_range, context.colorspace = made.tags[:2]
            context.color_primaries, context.color_trc = made.tags[2:]
        for picture, time_s in zip(frames, times_s, strict=True):
            frame = picture
            if isinstance(picture, np.ndarray):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format=made.pix_fmt)
            frame.time_base = made.time_base
            frame.pts = round(Fraction(time_s + made.first_s) / made.time_base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def _rate(times_s: Sequence[float]) -> Fraction:
    """Return the usual rate, from which an encoder takes how long the last frame is shown."""
    gaps = sorted(np.diff(times_s)) or [1 / 30]
    return Fraction(float(1 / gaps[len(gaps) // 2])).limit_denominator(1001)


def write_sound(path: Path) -> Path:
    """Write half a second of silence, and no picture."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path
