"""What the published extraction's files do not say. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reducio_latents.core.choices import Container
from reducio_latents.core.config import check_choices


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What the files do not say, and what to make of them."""

    temporal_stride: Literal[4, 2] = 4
    """Frames per latent step of the model that made them."""
    spatial_stride: int = 32
    shard_rows: int = 512
    container: Container = "zarr"
    """What DST is to be."""

    def __post_init__(self) -> None:
        check_choices(self)
