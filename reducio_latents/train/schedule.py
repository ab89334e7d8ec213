"""How a learning rate changes over the steps: a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from reducio_latents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Multiplier of a learning rate: `start` until `from_step`, then on to `end` at `to_step`."""

    start: float = 1.0
    end: float = 1.0
    from_step: int = 0
    to_step: int = 0
    """Equal to `from_step`: a sudden change there."""
    shape: Literal["linear", "cosine"] = "linear"
    """How it goes from start to end."""
    warmup_steps: int = 0
    """The first steps rise linearly from 0, on top of the rest."""

    def __post_init__(self) -> None:
        if min(self.start, self.end) < 0:
            raise ConfigError(
                f"a schedule multiplies by start={self.start} and end={self.end}; use 0 or more."
            )
        if min(self.from_step, self.warmup_steps) < 0 or self.to_step < self.from_step:
            raise ConfigError(
                f"a schedule changes from step {self.from_step} to step {self.to_step} after "
                f"{self.warmup_steps} of warm-up; use 0 <= from_step <= to_step."
            )

    def multiplier(self, step: int) -> float:
        """Return what the base rate is multiplied by at `step`, counted from 0.

        >>> Schedule(end=0.01, to_step=1_000_000).multiplier(500_000)
        0.505
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (self.start + (self.end - self.start) * self._share(step))

    def _share(self, step: int) -> float:
        """How far from start to end, 0 to 1."""
        if step >= self.to_step:
            return 1.0
        if step <= self.from_step:
            return 0.0
        share = (step - self.from_step) / (self.to_step - self.from_step)
        return share if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
