"""What a video backend does, and the values it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource

Frame = NDArray[np.uint8]
"""One picture as it is shown: uint8 RGB (H, W, 3), C-contiguous."""
Transform = Callable[[Any], Any]
"""Makes something of a Frame; or of `planes.Planes`, where a backend was told to give these."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video is, as a viewer sees it."""

    codec: str
    """FFmpeg's name of the coding: h264, hevc, av1, vp9, ..."""
    pix_fmt: str
    """FFmpeg's name of the stored pixel format."""
    width: int
    """As shown: after sample aspect ratio (which scales the width) and rotation."""
    height: int
    rotation: int
    """Degrees clockwise by which the stored picture is turned to be shown: 0, 90, 180 or 270."""
    mirrored: bool
    """Whether it is flipped left to right before it is turned."""
    rate_fps: float
    """True mean rate: shown frames / duration."""
    duration_s: float
    """From the first shown frame to the end of the last."""
    frames: int
    """Shown frames; what edit lists and decoders hide is not counted."""
    note: str = ""
    """What a user should know: footage that the file promises and does not have, ..."""


class ClipFrames(NamedTuple):
    """One clip, decoded."""

    start_s: float
    frames: list[Frame]
    """T frames; what a `transform` made of them, if one was given. A frame that is shown at two
    moments is the same array twice."""
    times_s: tuple[float, ...]
    """When each of `frames` appears, in seconds from the first shown frame of the video."""

    def copy_into(self, memory: memoryview) -> NDArray[np.uint8]:
        """Copy the frames, all of one size, to where `memory` begins; return them there.

        They are uint8 (T, H, W, 3).
        """
        shape = (len(self.frames), *self.frames[0].shape)
        pixels = np.frombuffer(memory, np.uint8, count=math.prod(shape)).reshape(shape)
        for target, frame in zip(pixels, self.frames, strict=True):
            target[...] = frame
        return pixels


class VideoBackend(Protocol):
    """A way to read videos. Holds settings only: nothing stays open between calls."""

    @property
    def name(self) -> str: ...

    def probe(self, source: VideoSource, *, alive: Callable[[], None] = lambda: None) -> VideoInfo:
        """Describe a video without decoding more than its first frame, where that suffices.

        `alive` is called as its packets are read. Raises VideoError if it cannot be read or its
        first frame cannot be decoded.
        """

    def read_clips(
        self,
        source: VideoSource,
        starts_s: Sequence[float],
        *,
        frames: int,
        rate_fps: float,
        transform: Transform | None = None,
    ) -> Iterator[ClipFrames | VideoError]:
        """Yield one clip for each of `starts_s`, which ascend, in one pass over the video.

        Frame i of a clip is the one shown at start + i / rate_fps: the last that appears then or
        earlier, give or take the rounding of the container's times. `transform` is applied to each
        frame that is needed, once, as soon as it is decoded. A clip that cannot be had exactly
        (past the end, damaged data) yields a VideoError that says why; the next gets its chance.
        Raises ConfigError if `starts_s` do not ascend from 0 or above.
        """
