"""What a run is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dit.flow import TIMES
from reducio_latents.errors import ConfigError

PRECISIONS = ("fp32", "bf16")
LATENTS = ("sample", "mean")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """When and how samples are made. None of it changes what is trained."""

    every: int = 0
    """Steps; 0 for never."""
    count: int = 4
    """Held-out clips."""
    steps: int = 50
    """Of Euler's method."""
    guidance: float = 1.5
    weights: str | None = None
    """Of the store's VAE."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("count", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"samples' {name} must be >= {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All that decides the numbers. A run goes on with the settings it was begun with."""

    batch_size: int = 64
    """Clips a step, over all ranks."""
    width: int = 384
    depth: int = 8
    heads: int = 6
    patch: int = 1
    lr: float = 1e-4
    warmup_steps: int = 100
    """Steps in which the learning rate rises to `lr`, where it stays."""
    ema_decay: float = 0.999
    dropout: float = 0.1
    """Share of the samples that are trained without their conditions."""
    latents: Literal["sample", "mean"] = "sample"
    """`sample` draws from the posteriors anew every epoch, `mean` takes their means."""
    times: str = "logit-normal"
    precision: str = "fp32"
    seed: int = 0
    columns: tuple[str, ...] | None = None
    """`motion` and what it is conditioned on; None for all that the store has."""
    val_fraction: float = 0.05
    """Share of the videos that is never trained on."""

    def __post_init__(self) -> None:
        for name, known in (
            ("times", TIMES),
            ("precision", PRECISIONS),
            ("latents", LATENTS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}.")
        for name in ("ema_decay", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.lr <= 0 or self.warmup_steps < 1 or self.seed < 0:
            raise ConfigError(
                f"lr must be > 0, warmup_steps >= 1, seed >= 0; got {self.lr}, "
                f"{self.warmup_steps}, {self.seed}."
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long a run goes, and what it leaves on the way. Another command may change them."""

    steps: int = 10_000
    checkpoint_every: int = 500
    log_every: int = 10
    deterministic: bool = False
    """Bit-exact resume on a GPU, too, by slower kernels."""
    samples: SampleSettings = field(default_factory=SampleSettings)
    tell: Callable[[str], None] = print
    """Takes what the first rank has to say, a line at a time."""

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")
