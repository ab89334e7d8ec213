"""Structural similarity. Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13(4), 2004."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from reducio_latents.core.libraries import import_library
from reducio_latents.errors import GeometryError
from reducio_latents.metrics.protocol import STANDARD, ComparisonRule
from reducio_latents.metrics.psnr import require_same_shape

WINDOW_PX = 11
SIGMA_PX = 1.5


def ssim(x_NCHW: Tensor, y_NCHW: Tensor, protocol: ComparisonRule = STANDARD) -> Tensor:
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
    library = import_library("pytorch_msssim", "SSIM", extra="encode")
    found: Tensor = library.ssim(
        x, y, data_range=1.0, size_average=False, win_size=WINDOW_PX, win_sigma=SIGMA_PX
    )
    return found
