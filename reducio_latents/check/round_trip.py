"""Clips through an autoencoder and back, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reducio_latents.autoencoders import Autoencoder
from reducio_latents.check.pictures import Frames
from reducio_latents.core.clips import centre_frame
from reducio_latents.core.images import encode_image
from reducio_latents.errors import GeometryError
from reducio_latents.video.pixels import to_unit

LATENT_BYTES = 2
"""Of one value: latents are stored as float16."""
MAX_REPEATED = 32


@dataclass(frozen=True)
class FrameRule:
    """How a clip is made as long as a model wants it."""

    given: int
    used: int
    """`given`, and as many repetitions of the last frame as are needed."""

    def __str__(self) -> str:
        return str(self.given) if self.used == self.given else f"{self.given} as {self.used}"


class RoundTrip(NamedTuple):
    """What came back of a batch of clips."""

    video_BCTHW: Tensor
    """float32 on the CPU, clamped to [-1, 1], as many frames as were given."""
    seconds: float
    """Encoding and decoding, without copies to and from the device."""
    stored_bytes: int
    """Of the batch: final latents as float16, and the content images the decoder needs."""


def frame_rule(model: Autoencoder, frames: int, height: int, width: int) -> FrameRule:
    """Return how clips of this size go through `model`.

    The last frame is repeated up to the next length that the model takes; what is decoded of the
    repetitions is dropped. Raises GeometryError if no length near it does.
    """
    refusal = None
    for used in range(frames, frames + MAX_REPEATED):
        if not model.geometry.takes(used):
            continue
        try:
            model.check_clip(used, height, width)
        except GeometryError as err:
            refusal = refusal or err
        else:
            return FrameRule(frames, used)
    raise GeometryError(f"{model.name}: {refusal}") from refusal


@torch.inference_mode()
def round_trip(model: Autoencoder, frames_BTHWC: Frames, rule: FrameRule) -> RoundTrip:
    """Encode, take the final latents of the mean, and decode; frames are uint8."""
    video = to_unit(torch.from_numpy(frames_BTHWC)).contiguous()
    centre = centre_frame(rule.given)
    content = video[:, :, centre].to(model.device) if model.needs_content else None
    if rule.used > rule.given:
        last = video[:, :, -1:].expand(-1, -1, rule.used - rule.given, -1, -1)
        video = torch.cat([video, last], dim=2)
    video = video.to(model.device)
    _synchronise(model.device)
    start = time.perf_counter()
    latents = model.final_latents(model.encode(video))
    decoded = model.decode(latents, content)
    _synchronise(model.device)
    seconds = time.perf_counter() - start
    stored = latents.numel() * LATENT_BYTES
    if model.needs_content:
        stored += sum(len(encode_image(clip[centre], "webp")) for clip in frames_BTHWC)
    pixels = decoded[:, :, : rule.given].float().clamp(-1, 1).cpu()
    return RoundTrip(pixels, seconds, stored)


def count_parameters(model: Autoencoder) -> int:
    """Return how many weights the model has; 0 for one that has none."""
    return 0 if model.model is None else sum(p.numel() for p in model.model.parameters())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
