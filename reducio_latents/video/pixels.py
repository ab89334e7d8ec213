"""Frames to the pixels that an encoder sees: resize to cover a bucket, crop, scale to [-1, 1].

A clip is uint8 at its bucket's size before anything else happens to it, so the content image that
is stored is exactly the frame that was encoded.

torch resizes uint8 on the CPU alone: each output is a sum of inputs with 16-bit integer weights,
one axis after the other, rounded to uint8 in between (after Pillow). Its float32 resize, which GPUs
have, differs from that by up to 2 of 255. Here are also the same integers in operations that run
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.core.geometry import Bucket, cover_and_centre

Doubles = NDArray[np.float64]
MOST_BITS = 22
WEIGHT_BITS = 15
"""A weight is a signed 16-bit integer."""


def _triangle(x: Doubles) -> Doubles:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: Doubles) -> Doubles:
    """Return the cubic convolution kernel with a = -0.5. Keys (1981), equation 4."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


KERNELS: dict[str, tuple[Callable[[Doubles], Doubles], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
}
"""Mode -> kernel, and how far it reaches, in pixels of the smaller picture."""


@dataclass(frozen=True, eq=False)
class Resampling:
    """Each output along one axis as a weighted sum of inputs; both tables are (taps, outputs)."""

    index: Tensor
    """Which inputs, int64."""
    weight: Tensor
    """int32, in units of 2**-bits; 0 where an output has fewer taps."""
    bits: int

    def crop(self, start: int, size: int) -> Resampling:
        """Return the same for a piece of the output."""
        piece = slice(start, start + size)
        return Resampling(self.index[:, piece], self.weight[:, piece], self.bits)

    def apply(self, pixels: Tensor, dim: int) -> Tensor:
        """Resample uint8 `pixels` along axis `dim`; uint8, on their device."""
        shape = [1] * pixels.ndim
        shape[dim] = -1
        pixels = pixels.to(torch.int32)
        total = None
        for inputs, weights in zip(self.index, self.weight, strict=True):
            taken = pixels.index_select(dim, inputs)
            if total is None:
                total = torch.full_like(taken, 1 << (self.bits - 1))  # so that halves round up
            total.addcmul_(taken, weights.view(shape))
        assert total is not None
        return total.bitwise_right_shift_(self.bits).clamp_(0, 255).to(torch.uint8)


def kernel_weights(
    size_in: int, scale: float, outputs: NDArray[np.int64], mode: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], Doubles]:
    """Return the first input of each output, how many it takes, and their weights (taps, outputs).

    Outputs are `scale` inputs apart; the weights of each sum to 1.
    """
    kernel, reach = KERNELS[mode]
    support = reach * max(scale, 1.0)
    centre = scale * (outputs + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    taps = np.minimum((centre + support + 0.5).astype(np.int64), size_in) - first
    tap = np.arange(taps.max())[:, None]
    weight = kernel((tap + first - centre + 0.5) * min(1.0 / scale, 1.0))
    weight = np.where(tap < taps, weight, 0.0)
    return first, taps, weight / weight.sum(axis=0)


@lru_cache(maxsize=256)
def resampling(size_in: int, size_out: int, mode: str, device: torch.device) -> Resampling:
    """Return how an axis of `size_in` pixels becomes one of `size_out`; `mode` is in `KERNELS`."""
    first, taps, weight = kernel_weights(size_in, size_in / size_out, np.arange(size_out), mode)
    tap = np.arange(taps.max())[:, None]
    bits = 0
    while bits < MOST_BITS and int(0.5 + weight.max() * 2 ** (bits + 1)) < 1 << WEIGHT_BITS:
        bits += 1
    whole = np.trunc(weight * 2**bits + np.copysign(0.5, weight)).astype(np.int32)
    index = np.minimum(tap + first, size_in - 1)
    return Resampling(torch.tensor(index, device=device), torch.tensor(whole, device=device), bits)


VALUES_AT_ONCE = 1 << 26
"""Values of frames that `fit_clip` resizes at once on a GPU: 256 MiB as int32, ten 1080p frames. On
a CPU it takes frame by frame, which stay in its cache."""


def fit_frame(frame_HWC: NDArray[np.uint8], bucket: Bucket, mode: str) -> NDArray[np.uint8]:
    """Resize (antialiased) to cover `bucket` and crop its centre: uint8 RGB (H, W, 3).

    `mode` is `bicubic` or `bilinear`. The numbers are torch's uint8 resampling, which agrees with
    Pillow's to 1 of 255.
    """
    height, width = frame_HWC.shape[:2]
    fit = cover_and_centre(height, width, bucket)
    pixels = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None]
    if (fit.height, fit.width) != (height, width):
        pixels = F.interpolate(
            pixels, size=(fit.height, fit.width), mode=mode, antialias=True, align_corners=False
        )
    cropped = pixels[0, :, _crop(fit.top, bucket.height), _crop(fit.left, bucket.width)]
    return np.ascontiguousarray(cropped.permute(1, 2, 0).numpy())


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

    def fit(self, frame_HWC: NDArray[np.uint8], bucket: Bucket, mode: str) -> NDArray[np.uint8]:
        """Return the part of a frame that this names, at the bucket's size."""
        if self.crop:
            height, width = frame_HWC.shape[:2]
            side = max(1, round(min(height, width) * math.sqrt(self.area)))
            top, left = round(self.y * (height - side)), round(self.x * (width - side))
            frame_HWC = frame_HWC[top : top + side, left : left + side]
        fitted = fit_frame(frame_HWC, bucket, mode)
        return fitted[:, ::-1] if self.mirror else fitted


def fit_clip(frames_THWC: Tensor, bucket: Bucket, mode: str) -> Tensor:
    """Fit uint8 frames (T, h, w, 3) to `bucket` on the device where they are: uint8 (T, H, W, 3).

    Bit for bit what `fit_frame` makes of each. Frames are resized a few at a time, so that what
    this takes beside them is bounded.
    """
    height, width = frames_THWC.shape[1:3]
    fit = cover_and_centre(height, width, bucket)
    if (fit.height, fit.width) == (height, width):
        return frames_THWC[:, _crop(fit.top, bucket.height), _crop(fit.left, bucket.width)]
    device = frames_THWC.device
    columns = resampling(width, fit.width, mode, device).crop(fit.left, bucket.width)
    rows = resampling(height, fit.height, mode, device).crop(fit.top, bucket.height)
    at_once = 1 if device.type == "cpu" else max(1, VALUES_AT_ONCE // (3 * height * width))
    parts = []
    for start in range(0, len(frames_THWC), at_once):
        frames = frames_THWC[start : start + at_once]
        wide = columns.apply(frames, dim=2)  # torch, too, resizes along the rows first
        parts.append(rows.apply(wide, dim=1))
    return torch.cat(parts)


def _crop(start: int, size: int) -> slice:
    return slice(start, start + size)


def to_unit(frames_BTHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) in [-1, 1].

    The result has the memory order of its input, which is `channels_last_3d`; call `.contiguous()`
    for the other one.
    """
    return frames_BTHWC.permute(0, 4, 1, 2, 3).to(dtype).div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], clamped, to the nearest of 0..255, same shape."""
    return pixels.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
