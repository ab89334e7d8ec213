"""Where the clips of a video start, and those of many spans at once. Times in seconds."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.clips import TIME_TOLERANCE_S, ClipSpec, parse_policy

MAX_STEPS = 1 << 31
"""What a policy's argument is taken for if it is more: no video has so many."""

Whole = NDArray[np.int64]
# A policy maps (numbers of possible starts on the 1/rate grid, one a span; argument; seed of the
# i-th span) to how many starts each span has, and to these, in order, in steps of 1/rate. The
# argument is a number of steps or of clips.
Policy = Callable[[Whole, int, Callable[[int], str]], tuple[Whole, Whole]]


def _stride(possible: Whole, steps: int, _: Callable[[int], str]) -> tuple[Whole, Whole]:
    counts = -(-possible // steps)
    return counts, positions(counts) * steps


def _uniform(possible: Whole, count: int, _: Callable[[int], str]) -> tuple[Whole, Whole]:
    counts = np.minimum(possible, count)
    n, last = np.repeat(counts, counts), np.repeat(possible - 1, counts)
    apart = (2 * positions(counts) * last + n - 1) // np.maximum(1, 2 * (n - 1))
    return counts, np.where(n > 1, apart, last // 2)


def _random(possible: Whole, count: int, seed: Callable[[int], str]) -> tuple[Whole, Whole]:
    chosen = [_drawn(n, count, seed(i)) for i, n in enumerate(possible.tolist())]
    counts = np.array(list(map(len, chosen)), np.int64)
    return counts, np.fromiter(chain.from_iterable(chosen), np.int64, counts.sum())


def _drawn(possible: int, count: int, seed: str) -> list[int]:
    # Floyd's sampling on Random.random(): the one method whose numbers no Python version changes.
    digest = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    chosen: set[int] = set()
    for top in range(max(0, possible - count), possible):
        pick = int(rng.random() * (top + 1))
        chosen.add(top if pick in chosen else pick)
    return sorted(chosen)


def positions(counts: Whole) -> Whole:
    """Return 0, 1, ... of each of several stretches, one after another.

    >>> positions(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


STARTS_BY_POLICY: dict[str, Policy] = {
    "all": _stride,
    "stride": _stride,
    "centre": lambda possible, _, seed: _uniform(possible, 1, seed),
    "uniform": _uniform,
    "random": _random,
}
"""What each of `clips.POLICIES` does."""


def possible_in(lengths_s: NDArray[np.float64], frames: int, rate_fps: float) -> Whole:
    """Return how many starts k/rate, k = 0, 1, ..., leave room for a whole clip in each span.

    1.25 s, frames=16, rate=16: the last frame of a clip from k is shown at (k + 15)/16, which lies
    inside the span for k = 0..4.

    >>> possible_in(np.array([1.25]), 16, 16.0).tolist()
    [5]
    """
    last_step = np.ceil((lengths_s - TIME_TOLERANCE_S) * rate_fps).astype(np.int64) - 1
    return np.maximum(0, last_step - (frames - 1) + 1)


def clip_starts(duration_s: float, spec: ClipSpec, video: str = "") -> list[float]:
    """Return the start of every clip of a whole video, in order, from its first frame.

    `video` names it for the `random` policy, so that its clips depend on nothing else.
    """
    whole = np.array([duration_s]), np.zeros(1)
    found: list[float] = starts_in_spans(*whole, spec, lambda _: video)[1].tolist()
    return found


def starts_in_spans(
    lengths_s: NDArray[np.float64],
    starts_s: NDArray[np.float64],
    spec: ClipSpec,
    video: Callable[[int], str],
) -> tuple[Whole, NDArray[np.float64]]:
    """Return how many clips each of several spans has, and their starts, one span after another.

    The policy works in a span as in a video of its own; starts are from the video's first frame.
    `video` returns the name of the i-th span's video.
    """
    name, number = parse_policy(spec.policy)
    if name == "all":
        number = spec.frames
    elif name == "stride":
        number = max(1, round(number * spec.rate_fps))

    def seed(i: int) -> str:
        start_s = float(starts_s[i])
        return f"{spec.seed}\0{video(i)}" + (f"\0{start_s}" if start_s else "")

    possible = possible_in(lengths_s, spec.frames, spec.rate_fps)
    counts, steps = STARTS_BY_POLICY[name](possible, min(int(number), MAX_STEPS), seed)
    return counts, np.repeat(starts_s, counts) + steps / spec.rate_fps
