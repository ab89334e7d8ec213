"""Make a small corpus of drawn motion: python tools/sample_corpus.py FOLDER

Ten videos of a few seconds, with captions beside them. Most are sound; one has a variable rate, one
is stored rotated, one is too short for a clip, one is a copy of another, and one is cut in the
middle, as videos of a real corpus are.
"""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Scene = Callable[[float, int, int], Frame]
"""Draws the picture at a time in seconds, of a height and width: uint8 (H, W, 3)."""


def _grid(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = np.mgrid[0:height, 0:width]
    return rows / height, columns / height


def _colours(*channels: NDArray[np.float64]) -> Frame:
    return (np.clip(np.stack(channels, axis=-1), 0, 1) * 255).astype(np.uint8)


def plasma(time: float, height: int, width: int) -> Frame:
    y, x = _grid(height, width)
    waves = [np.sin(9 * x + 2 * time), np.sin(7 * y - 3 * time), np.sin(5 * (x + y) + time)]
    value = sum(waves[1:], waves[0]) / 3
    return _colours(0.5 + 0.5 * np.sin(3 * value), 0.5 + 0.4 * value, 0.5 + 0.5 * np.cos(4 * value))


def balls(time: float, height: int, width: int) -> Frame:
    y, x = _grid(height, width)
    picture = np.stack([0.15 + 0.3 * y, 0.2 + 0.1 * x, 0.35 - 0.1 * y], axis=-1)
    colours = [(0.9, 0.3, 0.2), (0.2, 0.8, 0.4), (0.95, 0.85, 0.3)]
    for number, colour in enumerate(colours):
        speed = 0.5 + 0.2 * number
        bounce = abs(np.sin(speed * 2.5 * time + number))
        across = abs((speed * time + 0.4 * number) % 2 - 1) * width / height
        inside = (y - 0.9 + 0.7 * bounce) ** 2 + (x - across) ** 2 < (0.08 + 0.02 * number) ** 2
        picture[inside] = colour
    return _colours(*np.moveaxis(picture, -1, 0))


def bricks(time: float, height: int, width: int) -> Frame:
    y, x = _grid(height, width)
    x = x + 0.25 * time
    row = np.floor(y * 10)
    column = np.floor(x * 5 + 0.5 * (row % 2))
    mortar = (np.abs(y * 10 % 1 - 0.5) > 0.45) | (
        np.abs((x * 5 + 0.5 * (row % 2)) % 1 - 0.5) > 0.47
    )
    shade = 0.5 + 0.3 * np.sin(12.9898 * row + 78.233 * column)
    red, green, blue = 0.5 + 0.4 * shade, 0.25 + 0.2 * shade, 0.2 + 0.1 * shade
    return _colours(*(np.where(mortar, 0.8, channel) for channel in (red, green, blue)))


def wheel(time: float, height: int, width: int) -> Frame:
    y, x = _grid(height, width)
    dy, dx = y - 0.5, x - 0.5 * width / height
    angle, radius = np.arctan2(dy, dx) - 1.7 * time, np.hypot(dy, dx)
    spokes = (np.sin(8 * angle) > 0) & (radius < 0.42) & (radius > 0.08)
    rim = np.abs(radius - 0.42) < 0.02
    ground = 0.75 - 0.4 * y
    return _colours(
        np.where(spokes, 0.9, np.where(rim, 0.1, ground)),
        np.where(spokes, 0.6, np.where(rim, 0.1, ground)),
        np.where(spokes, 0.2, np.where(rim, 0.15, ground + 0.1)),
    )


def write_video(
    path: Path, scene: Scene, times_s: list[float], size: tuple[int, int], seconds: float
) -> None:
    """Write the pictures of `scene` shown at `times_s`, the last one until `seconds`."""
    height, width = size
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"crf": "18", "preset": "fast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        base = Fraction(1, 12000)
        stream.codec_context.time_base = base
        for time, until in zip(times_s, [*times_s[1:], seconds], strict=True):
            frame = av.VideoFrame.from_ndarray(scene(time, height, width), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            frame.duration = round((until - time) / base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def regular(seconds: float, rate_fps: float) -> list[float]:
    return [i / rate_fps for i in range(round(seconds * rate_fps))]


def irregular(seconds: float, rate_fps: float) -> list[float]:
    """Frame times as a telephone's camera makes them: drops and jitter."""
    rng = np.random.RandomState(0)
    times = [t for t in regular(seconds, rate_fps) if rng.rand() > 0.25 or t == 0]
    return [t if i == 0 else t + rng.uniform(0, 0.4) / rate_fps for i, t in enumerate(times)]


def rotate_when_shown(path: Path) -> None:
    """Have players turn an MP4 by 90 degrees: set the matrix of its track header.

    ISO/IEC 14496-12, 8.3.2: nine 32-bit fixed-point numbers, 40 bytes into the box's content.
    """
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    one, unit = 1 << 16, 1 << 30
    struct.pack_into(">9i", data, start, 0, one, 0, -one, 0, 0, 240 * one, 0, unit)
    path.write_bytes(data)


def make_corpus(folder: Path) -> None:
    """Write the ten videos and their captions into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sound: dict[str, tuple[Scene, list[float], tuple[int, int], float, str]] = {
        "plasma_30fps": (plasma, regular(3, 30), (240, 320), 3, "waves of colour drift"),
        "balls_24fps": (balls, regular(2.5, 24), (240, 426), 2.5, "three balls bounce"),
        "bricks_60fps": (bricks, regular(2, 60), (360, 640), 2, "a camera pans along a brick wall"),
        "wheel_25fps": (wheel, regular(2, 25), (240, 240), 2, "a wheel turns ⚙️"),
        "balls_tall": (balls, regular(2, 30), (426, 240), 2, "three balls bounce in a tall frame"),
        "plasma_variable_rate": (plasma, irregular(3, 30), (240, 320), 3, "waves, unevenly timed"),
        "wheel_rotated": (wheel, regular(2, 30), (320, 240), 2, "a wheel, filmed sideways"),
        "bricks_too_short": (bricks, regular(0.5, 30), (240, 320), 0.5, "half a second of wall"),
    }
    for name, (scene, times, size, seconds, caption) in sound.items():
        write_video(folder / f"{name}.mp4", scene, times, size, seconds)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    rotate_when_shown(folder / "wheel_rotated.mp4")
    shutil.copy(folder / "wheel_25fps.mp4", folder / "wheel_again.mp4")
    whole = (folder / "plasma_30fps.mp4").read_bytes()
    (folder / "plasma_cut_off.mp4").write_bytes(whole[: len(whole) // 2])


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    make_corpus(Path(sys.argv[1]))
