"""Reducio-VAE in plain PyTorch: Tian et al., arXiv 2411.13552. Knows no store and no video file."""

from __future__ import annotations

from reducio_latents.vae.config import ReducioVAEConfig
from reducio_latents.vae.model import ReducioVAE
from reducio_latents.vae.tiling import Tiling

__all__ = ["ReducioVAE", "ReducioVAEConfig", "Tiling"]
