"""From stored moments to what a diffusion model trains on; noise that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from reducio_latents.core.gaussian import FinalRule, final_latents
from reducio_latents.core.values import Posterior
from reducio_latents.dataset.philox import philox_numbers

PIECE_VALUES = 2**17
"""Latents that a CPU draws at a time, so that what comes between stays in a core's cache."""
QUARTER = 2**14


def sample_moments(
    moments: Tensor,
    rule: FinalRule,
    generator: torch.Generator | None = None,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw final latents (B, D, ...), float32, from stored moments (B, 2D, ...) on their device.

    Noise comes from `generator`, or is given, standard normal, (B, D, ...). `rule` is the column's:
    `LatentDataset.final_rule()`.
    """
    posterior = Posterior.of_moments(moments)
    if noise is None:
        noise = torch.randn(
            posterior.mean.shape, generator=generator, device=moments.device, dtype=torch.float32
        )
    return final_latents(posterior, noise, rule)


def mean_of_moments(moments: Tensor, rule: FinalRule) -> Tensor:
    """Return the final latents (B, D, ...), float32, of the posterior's mean."""
    return final_latents(Posterior.of_moments(moments), None, rule)


def normalize_channels(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (latents - mean) / std of each channel, for latents (B, D, ...)."""
    shape = (-1, *(1,) * (latents.ndim - 2))
    shift, scale = (torch.tensor(v, device=latents.device).view(shape) for v in (mean, std))
    return (latents - shift) / scale


@dataclass(frozen=True)
class Undrawn:
    """Moments of a batch on their way to final latents, drawn on whatever device they are."""

    moments: Tensor
    """(N, 2D, ...), as stored."""
    keys: Tensor | None
    """(N,) int64, which decide each clip's noise; None for the mean."""
    rule: FinalRule
    statistics: tuple[Sequence[float], Sequence[float]] | None = None
    """Mean and standard deviation by channel, if latents are normalised."""
    clips: int = 1
    """Clips of a sample; if several, (N, D, ...) becomes (N / clips, clips, D, ...)."""

    def to(self, device: torch.device) -> Undrawn:
        """Return it on a device; on a GPU the copies run beside what comes next."""
        keys = None if self.keys is None else self.keys.to(device, non_blocking=True)
        return replace(self, moments=self.moments.to(device, non_blocking=True), keys=keys)

    def draw(self) -> Tensor:
        """Return final latents, float32."""
        posterior = Posterior.of_moments(self.moments)
        size, count = len(self.moments), posterior.mean[:1].numel()
        step = max(1, size if self.moments.is_cuda else PIECE_VALUES // max(1, count))
        if self.keys is not None:
            numbers = philox_numbers(self.keys, -(-count // 2))
        for start in range(0, max(1, size), step):
            piece = slice(start, start + step)
            mean, logvar = (half[piece] for half in posterior)
            noise = None
            if self.keys is not None:
                noise = normal(numbers[piece])[:, :count].reshape(mean.shape)
            drawn = final_latents(Posterior(mean, logvar), noise, self.rule)
            if self.statistics is not None:
                drawn = normalize_channels(drawn, *self.statistics)
            if start == 0:
                latents = drawn if size <= step else drawn.new_empty(size, *drawn.shape[1:])
            if size > step:
                latents[piece] = drawn
        if self.clips == 1:
            return latents
        return latents.view(len(latents) // self.clips, self.clips, *latents.shape[1:])


def normal(numbers: Tensor) -> Tensor:
    """Return two standard normal numbers for each of 16 bits: (N, n) int16 to (N, 2n) float32."""
    points = _normal_points(numbers.device)
    if numbers.device.type == "cpu":
        indices = numbers.numpy().view(np.uint16)
        found = torch.from_numpy(points.numpy().take(indices, mode="wrap"))
    else:
        found = points[numbers.to(torch.int32)]  # -1 is the last one
    return torch.view_as_real(found).flatten(1)


@lru_cache
def _normal_points(device: torch.device) -> Tensor:
    """Return 2^16 points of the plane, complex64, that lie as pairs of standard normals do.

    Radii are Box and Muller's (1958), sqrt(-2 log u), of u evenly apart; angles go on by the golden
    ratio, as in a sunflower; and each point comes turned to all four quarters, so that means and
    covariances are exact. Along any line the distribution is wrong by 3.3e-4 at most, the kurtosis
    is 3.001, the end 4.56. Looked up, a normal number takes 8 random bits and no logarithm, and has
    the same bits on every device.
    """
    turns = torch.arange(QUARTER, dtype=torch.float64)
    radii = torch.sqrt(-2 * torch.log((turns + 0.5) / QUARTER))
    radii /= (radii.square().mean() / 2).sqrt()
    quarter = torch.polar(radii, torch.pi / 2 * (turns * (5**0.5 - 1) / 2 % 1))
    return torch.cat([quarter * 1j**k for k in range(4)]).to(torch.complex64).to(device)
