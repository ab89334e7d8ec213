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

LEVELS = 2**16
PIECE_VALUES = 2**16
"""Latents that are drawn at once on the CPU: what is in between stays in its cache."""


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
        count, channels, *grid = self.moments.shape
        latents = self.moments.new_empty((count, channels // 2, *grid), dtype=torch.float32)
        values = latents[:1].numel()
        numbers = None if self.keys is None else philox_numbers(self.keys, values)
        on_cpu = latents.device.type == "cpu"
        step = max(1, PIECE_VALUES // max(1, values)) if on_cpu else max(1, count)
        for piece in (slice(first, first + step) for first in range(0, count, step)):
            noise = None if numbers is None else normal(numbers[piece]).view(latents[piece].shape)
            # As a whole: halves, which lie apart, would take four times as long to widen.
            posterior = Posterior.of_moments(self.moments[piece].float())
            drawn = final_latents(posterior, noise, self.rule)
            if self.statistics is not None:
                drawn = normalize_channels(drawn, *self.statistics)
            latents[piece] = drawn
        if self.clips == 1:
            return latents
        return latents.view(count // self.clips, self.clips, *latents.shape[1:])


def normal(numbers: Tensor) -> Tensor:
    """Return the standard normal number, float32, of each number of 16 bits (int16)."""
    table = _normal_levels(numbers.device)
    if numbers.device.type == "cpu":
        return torch.from_numpy(table.numpy().take(numbers.numpy().view(np.uint16), mode="wrap"))
    return table[numbers.to(torch.int32)]  # -1 is the last one


@lru_cache
def _normal_levels(device: torch.device) -> Tensor:
    """Return the middles of LEVELS parts of a standard normal, all as likely, in order.

    They end at 4.32 and are scaled to variance 1; their kurtosis is 2.999. Looked up, a draw costs
    less than Box and Muller's logarithm and cosine, and is the same bits on every device.
    """
    middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = torch.special.ndtri(middles)
    table: Tensor = (levels / levels.std(correction=0)).float().to(device)
    return table
