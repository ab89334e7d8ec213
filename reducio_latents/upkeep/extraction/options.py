"""What the published extraction's files do not say. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reducio_latents.core.choices import Container, TrainerFormat
from reducio_latents.core.config import check_choices
from reducio_latents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What the files do not say, and what to make of them."""

    temporal_stride: Literal[4, 2] = 4
    """Frames per latent step of the model that made them."""
    spatial_stride: int = 32
    shard_rows: int = 512
    container: Literal[Container, TrainerFormat] = "zarr"
    """What DST is to be: a store, or the cache of another trainer."""

    def __post_init__(self) -> None:
        check_choices(self)

    def store_container(self) -> Container:
        """Return what holds a store; raise ConfigError for a trainer's cache."""
        if self.container == "zarr" or self.container == "webdataset":
            return self.container
        raise ConfigError(
            f"samples of a published extraction have no posterior, which {self.container} starts "
            "from. Encode the videos, then convert that store."
        )
