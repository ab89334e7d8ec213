"""Two ways of measuring the same pictures, by name, so that no number stands without its rule."""

from __future__ import annotations

from dataclasses import dataclass

from reducio_latents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ComparisonRule:
    """One of them: what is done to frames before a metric sees them."""

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
