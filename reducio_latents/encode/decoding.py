"""What a decode worker does: the clips of one video, fitted to their bucket, in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from reducio_latents.core.geometry import Bucket
from reducio_latents.core.images import encode_image
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import fit_frame
from reducio_latents.video.processes import Channel
from reducio_latents.video.protocol import ClipFrames, Frame

PRELOAD = (
    "reducio_latents.encode.decoding",
    "reducio_latents.corpus.probe",
    "reducio_latents.video.pyav",
)
"""For every pool of a run: they share one fork server, which imports these once."""


@dataclass(frozen=True)
class DecodeTask:
    """The clips of one video in one shard, decoded in one pass."""

    video: str
    source: VideoSource
    bytes: int
    """Size of the video when it was planned; another size means another video."""
    bucket: Bucket
    starts_s: tuple[float, ...]
    rate_fps: float
    resize: str
    backend: str
    image_codec: str | None
    """How to encode the content image; None if it is not wanted."""
    whole_px: int = 0
    """Frames of at most so many pixels are sent as they are, for the encoder's device to fit; 0:
    all are fitted here. The bits are the same."""


class DecodedClip(NamedTuple):
    """One clip's outcome; its pixels, uint8 (T, H, W, 3), lie in the slot it was sent with."""

    clip: int
    """Which of the task's clips."""
    error: str | None
    times_s: tuple[float, ...]
    """When each chosen frame appears."""
    content: bytes | None
    """The content image, encoded."""
    size: tuple[int, int] | None = None
    """Height and width of its frames, where they are still to be fitted to the bucket."""


def decode_clips(task: DecodeTask, channel: Channel) -> None:
    """Send every clip of `task`, in order. Target of a `ProcessPool`."""
    torch.set_num_threads(1)  # there are as many workers as cores
    told = 0
    try:
        _require_unchanged(task)
        clips = get_backend(task.backend).read_clips(
            task.source,
            task.starts_s,
            frames=task.bucket.frames,
            rate_fps=task.rate_fps,
            transform=partial(_fit, task),
        )
        for clip in clips:
            if isinstance(clip, VideoError):
                channel.emit(DecodedClip(told, str(clip), (), None))
            else:
                _send(task, told, clip, channel)
            told += 1
    except VideoError as err:  # the video as a whole
        for number in range(told, len(task.starts_s)):
            channel.emit(DecodedClip(number, str(err), (), None))


def _require_unchanged(task: DecodeTask) -> None:
    if not task.source.is_plain_file:
        return
    path = Path(task.source.url)
    if path.is_file() and path.stat().st_size != task.bytes:
        raise VideoError(
            f"{task.video}: the file has changed since it was planned: it had {task.bytes} bytes, "
            f"now {path.stat().st_size}. Put the old file back, or encode it under a new name."
        )


def _fit(task: DecodeTask, frame: Frame) -> Frame:
    """Fit a frame to the bucket, unless the encoder's device is to do it."""
    if frame.shape[0] * frame.shape[1] <= task.whole_px:
        return frame
    return fit_frame(frame, task.bucket, task.resize)


def _send(task: DecodeTask, number: int, clip: ClipFrames, channel: Channel) -> None:
    slot, memory = channel.acquire()
    pixels = clip.copy_into(memory)
    _, height, width, _ = pixels.shape
    content = None
    if task.image_codec is not None:
        centre = fit_frame(pixels[(task.bucket.frames - 1) // 2], task.bucket, task.resize)
        content = encode_image(centre, task.image_codec)
    is_fitted = (height, width) == (task.bucket.height, task.bucket.width)
    size = None if is_fitted else (height, width)
    channel.emit(DecodedClip(number, None, clip.times_s, content, size), slot)
