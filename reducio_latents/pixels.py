"""Frames to the pixels that an encoder sees: resize to cover a bucket, crop, scale to [-1, 1].

A clip is uint8 at its bucket's size before anything else happens to it, so the content image that
is stored is exactly the frame that was encoded.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.geometry import Bucket, cover_and_centre


def fit_frame(frame_HWC: NDArray[np.uint8], bucket: Bucket, mode: str) -> NDArray[np.uint8]:
    """Resize (antialiased) to cover `bucket` and crop its centre: uint8 RGB (H, W, 3).

    `mode` is `bicubic` or `bilinear`. The numbers are torch's uint8 resampling, which agrees with
    Pillow's and with the float path to 1 of 255.
    """
    height, width = frame_HWC.shape[:2]
    fit = cover_and_centre(height, width, bucket)
    pixels = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None]
    if (fit.height, fit.width) != (height, width):
        pixels = F.interpolate(
            pixels, size=(fit.height, fit.width), mode=mode, antialias=True, align_corners=False
        )
    cropped = pixels[0, :, fit.top : fit.top + bucket.height, fit.left : fit.left + bucket.width]
    return np.ascontiguousarray(cropped.permute(1, 2, 0).numpy())


def to_unit(frames_BTHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) in [-1, 1].

    The result has the memory order of its input, which is `channels_last_3d`; call `.contiguous()`
    for the other one.
    """
    return frames_BTHWC.permute(0, 4, 1, 2, 3).to(dtype).div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], clamped, to the nearest of 0..255, same shape."""
    return pixels.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
