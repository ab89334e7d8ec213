"""Structural similarity. Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13(4), 2004."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.errors import GeometryError
from reducio_latents.metrics.protocol import PROTOCOLS, Protocol
from reducio_latents.metrics.psnr import require_same_shape

WINDOW_PX = 11
SIGMA_PX = 1.5
C1, C2 = 0.01**2, 0.03**2
"""For values in [0, 1]."""


def ssim(x_NCHW: Tensor, y_NCHW: Tensor, protocol: Protocol = PROTOCOLS["standard"]) -> Tensor:
    """Return the SSIM of each frame, (N,), of frames in [0, 1]; symmetric, 1 where they are equal.

    Only windows that lie inside the frame count; channels are averaged. Raises GeometryError for
    frames smaller than the window.
    """
    require_same_shape(x_NCHW, y_NCHW)
    x, y = x_NCHW.float(), y_NCHW.float()
    if protocol.ssim_side_px is not None:
        block = max(1, round(min(x.shape[-2:]) / protocol.ssim_side_px))
        x, y = F.avg_pool2d(x, block), F.avg_pool2d(y, block)
    if min(x.shape[-2:]) < WINDOW_PX:
        raise GeometryError(
            f"SSIM needs frames of at least {WINDOW_PX} px a side, got {tuple(x.shape[-2:])}."
        )
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(
        5
    )
    var_x, var_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(pixels: Tensor) -> Tensor:
    """Average under the Gaussian window, along one axis and then the other, without padding."""
    offsets = torch.arange(WINDOW_PX, dtype=pixels.dtype, device=pixels.device) - WINDOW_PX // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA_PX**2))
    weights = weights / weights.sum()
    channels = pixels.shape[1]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        kernel = weights.reshape(shape).repeat(channels, 1, 1, 1)
        pixels = F.conv2d(pixels, kernel, groups=channels)
    return pixels
