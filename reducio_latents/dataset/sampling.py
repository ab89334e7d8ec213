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

NORMAL_LEVELS = 2**16


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
        noise, (mean, logvar) = None, Posterior.of_moments(self.moments)
        if self.keys is not None:
            numbers = philox_numbers(self.keys, mean[:1].numel())
            noise = normal(numbers).view(mean.shape)
        latents = final_latents(Posterior(mean, logvar), noise, self.rule)
        if self.statistics is not None:
            latents = normalize_channels(latents, *self.statistics)
        if self.clips == 1:
            return latents
        return latents.view(len(latents) // self.clips, self.clips, *latents.shape[1:])


def normal(numbers: Tensor) -> Tensor:
    """Return the standard normal number, float32, of each number of 16 bits (int16)."""
    table = _normal_levels(numbers.device)
    if numbers.device.type == "cpu":
        found = torch.empty(numbers.shape)
        for row, out in zip(numbers.numpy().view(np.uint16), found.numpy(), strict=True):
            table.numpy().take(row, out=out, mode="wrap")  # row by row: indices stay in the cache
        return found
    return table[numbers.to(torch.int32)]  # -1 is the last one


@lru_cache
def _normal_levels(device: torch.device) -> Tensor:
    """Return the middles of NORMAL_LEVELS parts of a standard normal, all as likely, in order.

    They end at 4.32 and are scaled to variance 1; their kurtosis is 2.999. Looked up, a draw costs
    less than Box and Muller's logarithm and cosine, and is the same bits on every device.
    """
    middles = (torch.arange(NORMAL_LEVELS, dtype=torch.float64) + 0.5) / NORMAL_LEVELS
    levels = torch.special.ndtri(middles)
    table: Tensor = (levels / levels.std(correction=0)).float().to(device)
    return table
