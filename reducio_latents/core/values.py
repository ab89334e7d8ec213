"""The tensors that cross module boundaries, each with what it means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)
NO_NOISE_LOGVAR = LOGVAR_RANGE[0]
"""exp(-15) is below the spacing of float16."""


class Posterior(NamedTuple):
    """What an encoder knows about a batch of clips: one diagonal Gaussian over latents each."""

    mean: Tensor
    """(B, D, t, h, w); of images (B, D, h, w)."""
    logvar: Tensor
    """Of the same shape: log of the variance, clamped by the encoder to LOGVAR_RANGE."""

    @classmethod
    def of_moments(cls, moments: Tensor) -> Posterior:
        """Split moments (B, 2D, ...): the channels of the mean, then those of the log-variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    @classmethod
    def certain(cls, mean: Tensor) -> Posterior:
        """Return what an autoencoder without a distribution gives: a point."""
        return cls(mean, torch.full_like(mean, NO_NOISE_LOGVAR))

    @property
    def moments(self) -> Tensor:
        """Both along the channels, (B, 2D, ...), as a store keeps them."""
        return torch.cat([self.mean, self.logvar], dim=1)

    def clamped(self) -> Posterior:
        """Return it with the log-variance inside LOGVAR_RANGE, as encoders give it."""
        return Posterior(self.mean, self.logvar.clamp(*LOGVAR_RANGE))
