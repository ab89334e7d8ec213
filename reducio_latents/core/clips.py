"""Which frames of a video make up its clips: pure functions of its duration. Times in seconds.

A clip of T frames at r frames a second shows the frames at start_s + i/r, i = 0..T-1. It is a clip
only if each of these moments lies inside the video; nothing is padded or repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from reducio_latents.errors import ConfigError

TIME_TOLERANCE_S = 1e-3
"""Presentation times are rounded to a container's time base, often 1 ms; differences below this
are rounding, not another frame."""


def centre_frame(frames: int) -> int:
    """Return the index of the content image among the frames of a clip.

    >>> centre_frame(16)
    7
    """
    return (frames - 1) // 2


POLICIES = ("all", "stride", "centre", "uniform", "random")
"""all: one after another from the start. stride:S: one every S seconds, overlapping where S is
shorter than a clip. centre: the one in the middle. uniform:N: N spread evenly from the first to
the last possible start. random:N: N different starts, seeded."""
_NEEDS_ARGUMENT = {"stride", "uniform", "random"}


@lru_cache(maxsize=64)
def parse_policy(text: str) -> tuple[str, float]:
    """Split `name` or `name:number`; raise ConfigError for anything else."""
    name, colon, number = text.partition(":")
    if name not in POLICIES or bool(colon) != (name in _NEEDS_ARGUMENT):
        raise ConfigError(
            f"clip.policy is {text!r}; "
            "choose one of all, stride:SECONDS, centre, uniform:N, random:N."
        )
    if not colon:
        return name, 0.0
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    whole = name == "stride" or value == int(value) if math.isfinite(value) else False
    if not (whole and value > 0):
        wanted = "seconds above 0" if name == "stride" else "a whole number above 0"
        raise ConfigError(f"clip.policy is {text!r}; {name} takes {wanted}, as {name}:2.")
    return name, value


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Which frames of a video make up its clips."""

    frames: int = 16
    """Frames per clip, T."""
    rate_fps: float = 16.0
    """Frames per second of video time; a clip's i-th frame is the one shown at start_s + i/rate."""
    policy: str = "all"
    """Where clips start: `all`, `stride:SECONDS`, `centre`, `uniform:N` or `random:N`."""
    seed: int = 0
    """Seed of the `random:N` policy; each video draws its own starts from (seed, its path)."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"clip.frames must be >= 1, got {self.frames}.")
        if not 0 < self.rate_fps <= 1000:
            raise ConfigError(f"clip.rate_fps must be in (0, 1000], got {self.rate_fps}.")
        parse_policy(self.policy)

    @property
    def span_s(self) -> float:
        """Seconds from the first frame of a clip to the first frame after it."""
        return self.frames / self.rate_fps


class TimeSpan(NamedTuple):
    """A part [start_s, end_s) of a video: no clip has a frame outside the one it lies in."""

    start_s: float
    end_s: float
