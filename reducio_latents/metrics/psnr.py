"""PSNR, flicker (which it does not see) and SSIM, by one of two rules that is always named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.core.libraries import import_library
from reducio_latents.errors import ConfigError, GeometryError


@dataclass(frozen=True, kw_only=True)
class ComparisonRule:
    """What is done to frames before a metric sees them."""

    name: str
    mse_floor: float
    """Smallest mean squared error, so that equal pictures have a finite PSNR."""
    adds_floor: bool
    """Whether the floor is added to every error instead of taking the place of smaller ones."""
    ssim_side_px: int | None
    """SSIM averages blocks of round(shorter side / this) pixels first; None: frames as they are."""
    lpips_signed: bool
    """Whether LPIPS is given pixels in [-1, 1], as it was made for, or in [0, 1]."""
    note: str
    """The rule in words, written beside the numbers."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ComparisonRule(
            name="standard",
            mse_floor=1e-10,
            adds_floor=False,
            ssim_side_px=None,
            lpips_signed=True,
            note="PSNR a frame, at most 100 dB; SSIM at full size, Gaussian window of 11 px, sigma "
            "1.5; LPIPS of pixels in [-1, 1]; means over frames",
        ),
        ComparisonRule(
            name="paper",
            mse_floor=1e-8,
            adds_floor=True,
            ssim_side_px=256,
            lpips_signed=False,
            note="as the published Reducio-VAE repository measures: PSNR a frame with 1e-8 added "
            "to the error; SSIM after averaging blocks of round(shorter side / 256) px; LPIPS of "
            "pixels in [0, 1]; means over frames",
        ),
    )
}
"""The two differ much: the same 512-px pictures have SSIM 0.66 by one and 0.95 by the other."""
STANDARD = PROTOCOLS["standard"]


def protocol_named(name: str) -> ComparisonRule:
    if name not in PROTOCOLS:
        raise ConfigError(f"the metric protocol is {name!r}; choose {' or '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def psnr(x_NCHW: Tensor, y_NCHW: Tensor, protocol: ComparisonRule = STANDARD) -> Tensor:
    """Return the PSNR of each frame in dB, (N,), of frames in [0, 1]; symmetric.

    The error is the mean over channels and pixels. Average over frames for a clip.
    """
    require_same_shape(x_NCHW, y_NCHW)
    return _decibels(x_NCHW, y_NCHW, protocol)


def clip_psnr(x_BCTHW: Tensor, y_BCTHW: Tensor, protocol: ComparisonRule = STANDARD) -> Tensor:
    """Return the PSNR of each clip in dB, (B,), of the mean error of all its frames, in [0, 1].

    The mean over frames of `psnr` is lifted by a single perfect frame, by 5 dB of 16 frames: where
    the content image is repeated, it is one.
    """
    return _decibels(x_BCTHW, y_BCTHW, protocol)


def frame_psnr(x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
    """Return the PSNR of each frame of clips in [-1, 1], (B, T), in dB."""
    x, y = (to_pictures(video).flatten(0, 1) for video in (x_BCTHW, y_BCTHW))
    return psnr(x, y).reshape(len(x_BCTHW), -1)


def to_pictures(video: Tensor) -> Tensor:
    """Pixels in [-1, 1], (..., C, T, H, W), to pictures in [0, 1], (..., T, C, H, W): float32."""
    return ((video.float() + 1) / 2).clamp(0, 1).transpose(-4, -3)


def _decibels(x: Tensor, y: Tensor, protocol: ComparisonRule) -> Tensor:
    """Return the PSNR of each of the first axis."""
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    if protocol.adds_floor:
        return -10 * torch.log10(mse + protocol.mse_floor)
    return -10 * torch.log10(mse.clamp(min=protocol.mse_floor))


def flicker(original_TCHW: Tensor, decoded_TCHW: Tensor) -> Tensor:
    """Return the temporal flicker of a clip, a scalar in steps of 8-bit pixels (0 to 510).

    The mean over pixels and frame pairs of |(y[t+1] - y[t]) - (x[t+1] - x[t])|: what changes from
    frame to frame in the reconstruction y that does not in the original x, or the reverse. An
    error that stays the same in all frames is not counted. 0 for a single frame.
    """
    require_same_shape(original_TCHW, decoded_TCHW)
    error = decoded_TCHW.float() - original_TCHW.float()
    if len(error) < 2:
        return error.new_zeros(())
    return error.diff(dim=0).abs().mean() * 255


def require_same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
        raise GeometryError(
            f"the pictures to compare are {tuple(x.shape)} and {tuple(y.shape)}; both must be "
            "(N, 3, H, W) of one size."
        )


WINDOW_PX = 11
SIGMA_PX = 1.5


def ssim(x_NCHW: Tensor, y_NCHW: Tensor, protocol: ComparisonRule = STANDARD) -> Tensor:
    """Return the SSIM of each frame, (N,), of frames in [0, 1]; symmetric, 1 where they are equal.

    Only windows that lie inside the frame count; channels are averaged. Wang, Bovik, Sheikh and
    Simoncelli, IEEE TIP 13(4), 2004. Raises GeometryError for frames smaller than the window.
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
