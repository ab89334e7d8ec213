"""Per-channel mean and variance that merge exactly, whatever the order shards were made in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from reducio_latents.store.limits import must_hold


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Count, mean and summed squared deviation of each channel, in float64."""

    count: int
    """Values seen per channel."""
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    """Sum of squared deviations from the mean."""

    def __post_init__(self) -> None:
        must_hold(self.count >= 0 and len(self.mean) == len(self.m2), "statistics do not fit.")
        must_hold(min(self.m2, default=0) >= 0, "statistics have a negative deviation.")

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Self:
        """Return the statistics of `values` (N, C, ...), per channel over all other axes."""
        channels = values.shape[1]
        flat = np.moveaxis(values, 1, 0).reshape(channels, -1).astype(np.float64)
        if flat.shape[1] == 0:
            return cls(count=0, mean=(0.0,) * channels, m2=(0.0,) * channels)
        mean = flat.mean(axis=1)
        m2 = np.square(flat - mean[:, None]).sum(axis=1)
        return cls(count=flat.shape[1], mean=tuple(mean.tolist()), m2=tuple(m2.tolist()))

    def merge(self, other: Self) -> Self:
        """Return the statistics of both together. Chan, Golub & LeVeque (1979), equation 2.1."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        must_hold(len(self.mean) == len(other.mean), "statistics are of other channels.")
        count = self.count + other.count
        mean, m2 = [], []
        for mean_a, m2_a, mean_b, m2_b in zip(
            self.mean, self.m2, other.mean, other.m2, strict=True
        ):
            delta = mean_b - mean_a
            mean.append(mean_a + delta * other.count / count)
            m2.append(m2_a + m2_b + delta * delta * self.count * other.count / count)
        return type(self)(count=count, mean=tuple(mean), m2=tuple(m2))

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of each channel."""
        return tuple(math.sqrt(m2 / self.count) if self.count else 0.0 for m2 in self.m2)

    def summary(self) -> dict[str, list[float]]:
        """Return what a store's description says of them."""
        return {"mean": list(self.mean), "std": list(self.std), "count": [float(self.count)]}
