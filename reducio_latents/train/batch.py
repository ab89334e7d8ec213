"""What one rank sees in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ClipName(NamedTuple):
    """Which clip it is, for messages."""

    video: str
    start_s: float

    def __str__(self) -> str:
        return f"{self.video} at {self.start_s:.3f} s"


@dataclass(frozen=True)
class PixelBatch:
    """Clips of one size."""

    frames_BTHWC: Tensor
    """uint8 RGB."""
    seeds: tuple[int, ...]
    """One for each clip: where its random numbers come from."""
    clips: tuple[ClipName, ...]


def clip_noise(seeds: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise (B, *shape), each clip's from its own seed."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
