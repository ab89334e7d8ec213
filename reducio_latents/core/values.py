"""The tensors that cross module boundaries, each with what it means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


class Posterior(NamedTuple):
    """What an encoder knows about a batch of clips: one diagonal Gaussian over latents each."""

    mean: Tensor
    """(B, D, t, h, w)."""
    logvar: Tensor
    """(B, D, t, h, w): log of the variance, clamped by the encoder to LOGVAR_RANGE."""

    @classmethod
    def of_moments(cls, moments: Tensor) -> Posterior:
        """Split moments (B, 2D, ...): the channels of the mean, then those of the log-variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    @property
    def moments(self) -> Tensor:
        """Both along the channels, (B, 2D, ...), as a store keeps them."""
        return torch.cat([self.mean, self.logvar], dim=1)

    def clamped(self) -> Posterior:
        """Return it with the log-variance inside LOGVAR_RANGE, as encoders give it."""
        return Posterior(self.mean, self.logvar.clamp(*LOGVAR_RANGE))
