"""The sizes of a Reducio-VAE. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.errors import ConfigError, GeometryError

FRAMES = 16
"""Frames of a clip, T. The decoder's position codes are made for 16 and no other number."""
SPATIAL_STRIDE = 32
IMAGE_CHANNELS = 3
REDUCIO_STRIDES = (2, 4)

CodedTarget = Literal["video", "difference"]

CHANNEL_MULTIPLIERS = (1, 2, 2, 4, 4, 4)
"""Channels of the six levels of video encoder and decoder, in widths."""
CONTENT_MULTIPLIERS = (1, 2, 4, 4)
"""Channels of the four levels of the content encoder, in widths."""


@dataclass(frozen=True, kw_only=True)
class ReducioVAEConfig:
    """Sizes of the three networks; the defaults are the published ones."""

    temporal_stride: int = 4
    """Frames per latent step: 4 (ft4) or 2 (ft2)."""
    width: int = 128
    """Channels of the video encoder's first level; a multiple of 8, as are the other widths."""
    content_width: int = 128
    """Channels of the content encoder's first level."""
    decoder_width: int = 128
    """Channels of the decoder's last level."""
    latent_channels: int = 16
    """Channels of the latents, D; the encoder gives twice as many, mean and log-variance."""
    target: CodedTarget = "video"
    """What is encoded and decoded. `video`: the clip, as published. `difference`: the clip less its
    content image, which decoding adds again. An untrained model then repeats the content image, and
    what little training it gets goes into what moves."""

    def __post_init__(self) -> None:
        if self.target not in get_args(CodedTarget):
            raise ConfigError(
                f"target is {self.target!r}; choose one of {', '.join(get_args(CodedTarget))}."
            )
        if self.temporal_stride not in REDUCIO_STRIDES:
            raise ConfigError(f"temporal_stride is {self.temporal_stride}; Reducio-VAE has 2 or 4.")
        for name in ("width", "content_width", "decoder_width"):
            width = getattr(self, name)
            if width < 8 or width % 8:
                usable = max(8, width // 8 * 8)
                raise ConfigError(f"{name} is {width}; use a multiple of 8, such as {usable}.")
        if self.latent_channels < 1:
            raise ConfigError(f"latent_channels must be >= 1, got {self.latent_channels}.")

    @property
    def geometry(self) -> LatentGeometry:
        return LatentGeometry(
            channels=self.latent_channels,
            temporal_stride=self.temporal_stride,
            spatial_stride=SPATIAL_STRIDE,
        )

    @property
    def temporal_halvings(self) -> int:
        """How many of the encoder's five down-samplings halve time as well: log2 of the stride."""
        return self.temporal_stride.bit_length() - 1

    @property
    def latent_frames(self) -> int:
        """Latent steps of a clip, t."""
        return FRAMES // self.temporal_stride

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raise GeometryError, naming a size that would do, unless a clip (T, H, W) fits."""
        if frames != FRAMES:
            raise GeometryError(
                f"the clip has {frames} frames, but Reducio-VAE takes {FRAMES} at a time. "
                f"Cut the video into clips of {FRAMES} frames."
            )
        self.geometry.latent_shape(frames, height, width)
