"""Tiny corpora of tiny videos, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

SIZE = (48, 64)
"""Height and width of every video."""


def write_video(path: Path, seconds: float, *, rate_fps: int = 24, seed: int = 0) -> Path:
    """Write a video of smooth noise that drifts; equal arguments give equal bytes."""
    rng = np.random.RandomState(seed)
    small = rng.randint(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = np.kron(small, np.ones((8, 8, 1), np.uint8))
    height, width = SIZE
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate_fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.bit_rate = 400_000
        for number in range(round(seconds * rate_fps)):
            top, left = number % 24, (2 * number) % 32
            frame = np.ascontiguousarray(picture[top : top + height, left : left + width])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def write_corpus(folder: Path) -> Path:
    """Write six videos: 2 + 1 + 1 good clips, a copy, one too short, one that is no video."""
    write_video(folder / "a.mp4", 2.1, seed=1)
    (folder / "a.txt").write_text("tab\there, emoji 🎬", encoding="utf-8")
    write_video(folder / "b.mp4", 1.1, seed=2)
    write_video(folder / "deep" / "c.mp4", 1.2, rate_fps=30, seed=3)
    (folder / "copy_of_b.mp4").write_bytes((folder / "b.mp4").read_bytes())
    write_video(folder / "short.mp4", 0.4, seed=4)
    (folder / "text.mp4").write_text("<html>not a video</html>")
    return folder
