"""Two floors that any autoencoder must stand above, behind the `Autoencoder` protocol.

`repeat-content` has no latents: it shows the content image for the whole clip. `bicubic-32x` keeps
each frame at 1/32 of its size. Neither has weights.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.autoencoders.protocol import Autoencoder, LoadOptions
from reducio_latents.core.devices import usable_device
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.parsing import fingerprint_of
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError
from reducio_latents.vae.config import SPATIAL_STRIDE
from reducio_latents.vae.model import check_pixels


class Baseline(Autoencoder):
    """What two baselines have in common: a size, and no weights."""

    final_rule: dict[str, Any] = {"rule": "scale_shift", "scale": 1.0, "shift": 0.0}
    dtype = torch.float32
    precision: dict[str, Any] = {}
    config: dict[str, Any] = {}

    def __init__(self, options: LoadOptions) -> None:
        self.device = usable_device(options.device)
        self.fingerprint = fingerprint_of({"architecture": self.name})
        self.precision = {"dtype": "float32", "device": self.device.type}
        described = {"architecture": self.name, "tiling": self.tiling}
        self.config = {**described, "precision": self.precision}
        self.check_clip = self.geometry.latent_shape


class RepeatContent(Baseline):
    """Shows the content image `FRAMES` times; its latents have no values."""

    name = "repeat-content"
    needs_content = True
    geometry = LatentGeometry(channels=0, temporal_stride=1, spatial_stride=SPATIAL_STRIDE)

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return a posterior of shape (B, 0, T, h, w): it says how long the clip is, no more."""
        check_pixels("video", video_BCTHW, ndim=5)
        batch, _, *size = video_BCTHW.shape
        shape = (batch, *self.geometry.latent_shape(*size))
        empty = torch.zeros(shape, device=self.device)
        return Posterior(empty, empty)

    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        self.geometry.check_latents(latents.shape)
        if content_image is None:
            raise ConfigError(f"{self.name} decodes with the clip's content image; give it too.")
        still = content_image.to(self.device).float()
        return still[:, :, None].expand(-1, -1, latents.shape[2], -1, -1)


class Bicubic(Baseline):
    """Resizes every frame to 1/32 a side, antialiased, and back; the latents are its pixels."""

    name = "bicubic-32x"
    geometry = LatentGeometry(channels=3, temporal_stride=1, spatial_stride=SPATIAL_STRIDE)

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        check_pixels("video", video_BCTHW, ndim=5)
        _, _, h, w = self.geometry.latent_shape(*video_BCTHW.shape[2:])
        small = _resize(video_BCTHW.to(self.device).float(), (h, w))
        return Posterior.certain(small)

    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return the video of latents; a content image is not needed or used."""
        self.geometry.check_latents(latents.shape)
        h, w = latents.shape[3:]
        return _resize(latents.to(self.device).float(), (h * SPATIAL_STRIDE, w * SPATIAL_STRIDE))


def load_baseline(name: str, weights: WeightsPlace | None, options: LoadOptions) -> Baseline:
    """Make `repeat-content` or `bicubic-32x`; raise ConfigError for weights, which neither has."""
    if weights is not None:
        raise ConfigError(f"{name} has no weights; leave out {weights}.")
    if options.compile != "none":
        raise ConfigError(f'{name} has no network to compile. Use compile="none".')
    if name == RepeatContent.name and options.parts == "encoder":
        raise ConfigError(f"{name} has no latents to store: it is a floor for `evaluate`.")
    for baseline in (RepeatContent, Bicubic):
        if name == baseline.name:
            return baseline(options)
    raise ConfigError(f"there is no autoencoder {name!r}; baselines take no `:`.")


def _resize(video_BCTHW: Tensor, size: tuple[int, int]) -> Tensor:
    frames = rearrange(video_BCTHW, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, size=size, mode="bicubic", antialias=True, align_corners=False)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(video_BCTHW))
