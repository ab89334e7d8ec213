"""What a decode worker of the trainer does: one clip, cropped, resized, maybe mirrored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import fit_frame
from reducio_latents.video.processes import Channel

Pixels = NDArray[np.uint8]

PRELOAD = (
    "reducio_latents.train.decoding",
    "reducio_latents.corpus.probe",
    "reducio_latents.video.pyav",
)
"""What the worker processes of a run have imported before they start."""


@dataclass(frozen=True)
class Augmentation:
    """A square part of the frame, maybe mirrored; the same for all frames of a clip."""

    area: float = 1.0
    """Share of the largest square in the frame."""
    x: float = 0.5
    y: float = 0.5
    """Where it lies: 0 at the left or top, 1 at the right or bottom."""
    crop: bool = False
    """False: the whole frame, fitted to the bucket around its centre."""
    mirror: bool = False


@dataclass(frozen=True)
class ClipTask:
    """One clip to be decoded."""

    source: VideoSource
    start_s: float
    bucket: Bucket
    rate_fps: float
    resize: str
    backend: str
    augmentation: Augmentation


def decode_clip(task: ClipTask, channel: Channel) -> None:
    """Send None and the pixels, uint8 (T, H, W, 3), in a slot; or why there are none, as text."""
    torch.set_num_threads(1)  # there are as many workers as cores
    transform = partial(fit, bucket=task.bucket, mode=task.resize, how=task.augmentation)
    try:
        (clip,) = get_backend(task.backend).read_clips(
            task.source,
            (task.start_s,),
            frames=task.bucket.frames,
            rate_fps=task.rate_fps,
            transform=transform,
        )
        if isinstance(clip, VideoError):
            raise clip
    except VideoError as err:
        channel.emit(str(err))
        return
    slot, memory = channel.acquire()
    clip.copy_into(memory)
    channel.emit(None, slot)


def fit(frame_HWC: Pixels, bucket: Bucket, mode: str, how: Augmentation) -> Pixels:
    """Return the part of a frame that `how` names, at the bucket's size."""
    if how.crop:
        height, width = frame_HWC.shape[:2]
        side = max(1, round(min(height, width) * math.sqrt(how.area)))
        top, left = round(how.y * (height - side)), round(how.x * (width - side))
        frame_HWC = frame_HWC[top : top + side, left : left + side]
    fitted = fit_frame(frame_HWC, bucket, mode)
    return fitted[:, ::-1] if how.mirror else fitted
