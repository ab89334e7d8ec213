"""Image autoencoders for the content image: AutoencoderKL of diffusers, as Stable Diffusion's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reducio_latents.autoencoders.diffusers import is_of_pictures, load_diffusers
from reducio_latents.autoencoders.network import NetworkAutoencoder
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.conditioning.options import ContentLatentOptions
from reducio_latents.conditioning.precision import probe_pixels, settle
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError


class ImageAutoencoder:
    """A frozen AutoencoderKL, on one device."""

    def __init__(
        self,
        options: ContentLatentOptions,
        device: torch.device | str = "cpu",
        *,
        trust_config: bool = False,
    ) -> None:
        loading = LoadOptions(device=device, parts="encoder", trust_config=trust_config)
        exact = load_diffusers(f"diffusers:{options.model}", None, loading)
        if not is_of_pictures(exact):
            raise ConfigError(
                f"{options.model} is a video autoencoder ({exact.architecture}); content_latent "
                "takes one of pictures. Use it for motion: --model diffusers:DIR."
            )
        self.autoencoder, self.dtype, self.error = settle(
            exact,
            options.dtype,
            NetworkAutoencoder.with_dtype,
            lambda autoencoder: autoencoder.encode(probe_pixels()[:, :, None]).mean,
            needs_float32=exact.config["model"].get("force_upcast") is True,
        )
        self.name = self.autoencoder.name
        self.geometry = self.autoencoder.geometry
        self.final_rule = self.autoencoder.final_rule

    @property
    def config(self) -> dict[str, Any]:
        """All that changes numbers, as JSON."""
        return self.autoencoder.config

    def encode(self, images_BCHW: Tensor) -> Posterior:
        """Return the moments, float32 (B, D, h, w), of pixels in [-1, 1]."""
        mean, logvar = self.autoencoder.encode(images_BCHW[:, :, None])
        return Posterior(mean[:, :, 0], logvar[:, :, 0])
