"""Where a decode worker's CPU time goes, and how many clips a CPU second brings.

    python tools/bench_decode.py                              # 720p and 1080p, made by this script
    python tools/bench_decode.py --against ../before a.mp4    # also as another checkout reads them

Each way to read has a process of its own; they read a video one after the other, again and again.
Of each the median is told, and the ratios of passes side by side. CPU seconds, as other processes
may be at work. `x, decode only` is what the ratio would be if all but the decoder cost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.environ.get("BENCH_DECODE_CHECKOUT", str(ROOT)))

SIZES = {"720p": (1280, 720, 2_500_000), "1080p": (1920, 1080, 5_000_000)}
"""Width, height, bits a second: about what video sites serve."""
STAGES = ("open", "demux", "decode", "colour", "resize", "content image", "hand-over", "other")


def make_video(path: Path, width: int, height: int, bits: int, seconds: int) -> str:
    """Write a pan over soft shapes with two things that move, under grain; return its encoder."""
    import av
    from PIL import Image

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    rng = np.random.default_rng(0)
    scene = np.zeros((height + 240, width + 360, 3), np.float32)
    for cell, strength in ((160, 90), (40, 45), (10, 20), (3, 8)):
        small = rng.integers(0, 256, (height // cell + 100, width // cell + 100, 3), np.uint8)
        size = (scene.shape[1], scene.shape[0])
        scene += (
            np.asarray(Image.fromarray(small).resize(size, 3), np.float32) / 255 - 0.5
        ) * strength
    scene += 120
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = bits
        for i in range(30 * seconds):
            top, left = (i * 2) % 240, (i * 3) % 360
            picture = scene[top : top + height, left : left + width].copy()
            for step, row in ((9, 100), (-5, height - 300)):
                column = (i * step) % (width - 220)
                picture[row : row + 200, column : column + 200] = scene[:200, :200] + 40
            picture += rng.normal(0, 1.5, (height, width, 1)).astype(np.float32)
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return codec


class Stages:
    """CPU seconds by stage; time in a stage inside another one counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = ["other"]
        self._since = 0.0

    def start(self) -> None:
        self.seconds.clear()
        self._since = time.thread_time()

    def enter(self, stage: str) -> None:
        self._count()
        self._stack.append(stage)

    def leave(self) -> None:
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        now = time.thread_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            self.enter(stage)
            try:
                return function(*args, **settings)
            finally:
                self.leave()

        return call

    def timed_steps(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def steps(*args: Any) -> Iterator[Any]:
            found = function(*args)
            while (one := self.timed(stage, next)(found, None)) is not None:
                yield one

        return steps


class SameProcess:
    """A worker's channel whose other end copies clips out of the slot, as the reader does."""

    def __init__(self) -> None:
        self.clips = 0
        self._memory = bytearray(3 * 16 * 256 * 256)

    def acquire(self) -> tuple[int, memoryview]:
        return 0, memoryview(self._memory)

    def emit(self, value: Any, slot: int | None = None) -> None:
        if slot is not None:
            self.clips += 1
            np.frombuffer(self._memory, np.uint8, count=3 * 16 * 256 * 256).copy()

    def alive(self) -> None:
        pass


def read(path: str, stages: Stages | None, settings: dict[str, Any]) -> int:
    """Read all clips of a video as a worker does; return how many."""
    from reducio_latents.core.geometry import Bucket
    from reducio_latents.files.source import VideoSource
    from reducio_latents.video import pixels
    from reducio_latents.video.reading import ClipRequest, read_request

    if stages is not None:
        settings = {**settings, "fit": stages.timed("resize", pixels.fit_frame)}
    request = ClipRequest(
        video="a.mp4",
        source=VideoSource(path),
        bucket=Bucket(16, 256, 256),
        starts_s=tuple(float(second) for second in range(_seconds(path))),
        image_codec="webp",
        **settings,
    )
    channel = SameProcess()
    read_request(request, channel)  # type: ignore[arg-type]
    return channel.clips


def _count(counts: list[int], path: str, settings: dict[str, Any]) -> None:
    counts.append(read(path, None, settings))


@cache
def _seconds(path: str) -> int:
    import av

    with av.open(path) as file:
        return max(1, int((file.duration or 0) / 1e6))


def watch(stages: Stages) -> None:
    """Have the parts of a worker count as stages."""
    from reducio_latents.video import colour, file, protocol, pyav, reading

    file.VideoFile.open = stages.timed("open", file.VideoFile.open)  # type: ignore[method-assign]
    file.VideoFile.packets = stages.timed_steps("demux", file.VideoFile.packets)  # type: ignore[method-assign]
    file.VideoFile.decode = stages.timed("decode", file.VideoFile.decode)  # type: ignore[method-assign]
    converter = colour.RgbConverter
    converter.convert = stages.timed("colour", converter.convert)  # type: ignore[method-assign]
    frames = protocol.ClipFrames
    frames.copy_into = stages.timed("hand-over", frames.copy_into)  # type: ignore[method-assign]
    for module, name, stage in (
        (pyav, "planes_of", "colour"),
        (reading, "fit_planes", "resize"),
        (reading, "encode_image", "content image"),
    ):
        if hasattr(module, name):
            setattr(module, name, stages.timed(stage, getattr(module, name)))


def measure(way: str) -> None:
    """Read each video whose path comes in; print CPU milliseconds a clip, by stage unless `way` is
    `threads`."""
    import dataclasses

    import torch

    from reducio_latents.video.reading import ClipRequest

    torch.set_num_threads(1)
    can = {f.name for f in dataclasses.fields(ClipRequest)}
    settings = {"exact_colours": way != "swscale"} if "exact_colours" in can else {}
    stages = Stages()
    if way != "threads":
        watch(stages)
    for path in map(str.strip, sys.stdin):
        start = time.process_time()
        if way == "threads":
            counts: list[int] = []
            job = partial(_count, counts, path, settings)
            both = [threading.Thread(target=job) for _ in range(2)]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
            clips = sum(counts)
        else:
            stages.start()
            clips = read(path, stages, settings)
            stages.enter("other")
            stages.leave()
        total = time.process_time() - start
        by_stage = {stage: 1e3 * s / clips for stage, s in stages.seconds.items()}
        print(json.dumps({"total": 1e3 * total / clips, **by_stage}), flush=True)


class Reader:
    """A process that reads videos by the code of a checkout, when it is asked to."""

    def __init__(self, way: str, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--way", way],
            env={**os.environ, "BENCH_DECODE_CHECKOUT": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, path: str) -> dict[str, float]:
        """Return what `measure` prints of one more pass over a video."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="*", help="instead of those that are made")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=8, help="of the videos that are made")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way)
        return
    with tempfile.TemporaryDirectory() as folder:
        videos: list[str] = options.videos
        if not videos:
            for name, (width, height, bits) in SIZES.items():
                path = Path(folder) / f"{name}.mp4"
                codec = make_video(path, width, height, bits, options.seconds)
                rate = path.stat().st_size * 8 / options.seconds / 1e6
                print(f"{name}: {width}x{height}, 30 fps, {codec}, {rate:.1f} Mbit/s")
                videos.append(str(path))
        compare(videos, options)


def compare(videos: list[str], options: argparse.Namespace) -> None:
    ways = {"now": ("now", ROOT)}
    if options.against:
        ways = {"before": ("now", options.against), **ways}
    else:
        ways |= {"now, 2 threads": ("threads", ROOT), "swscale": ("swscale", ROOT)}
    readers = {name: Reader(*way) for name, way in ways.items()}
    first = next(iter(ways))
    for path in videos:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(options.repeats + 1):
            for name, reader in readers.items():
                found = reader.read(path)
                if number:  # else tables, caches, the file itself
                    runs[name].append(found)
        print(f"\n{Path(path).name}: CPU ms a clip of 16 frames at 16 fps to 256 px; medians")
        print(f"{'':16}" + "".join(f"{stage:>14}" for stage in ("total", *STAGES)), end="")
        print(f"{'x ' + first:>14}{'range':>14}{'x, decode only':>16}")
        for name, passes in runs.items():
            of_stage = [
                statistics.median(one.get(stage, 0.0) for one in passes)
                for stage in ("total", *STAGES)
            ]
            pairs = list(zip(runs[first], passes, strict=True))
            ratios = [a["total"] / b["total"] for a, b in pairs]
            limits = [a["total"] / b["decode"] for a, b in pairs if "decode" in b]
            print(f"{name:16}" + "".join(f"{value:14.1f}" for value in of_stage), end="")
            print(f"{statistics.median(ratios):14.2f}{min(ratios):8.2f}-{max(ratios):.2f}", end="")
            print(f"{statistics.median(limits):15.2f}" if limits else "")
    for reader in readers.values():
        reader.close()


if __name__ == "__main__":
    main()
