"""The tensors that cross module boundaries, each with what it means."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Posterior(NamedTuple):
    """What an encoder knows about a batch of clips: one diagonal Gaussian over latents each."""

    mean: Tensor
    """(B, D, t, h, w)."""
    logvar: Tensor
    """(B, D, t, h, w): log of the variance, clamped by the encoder to [-30, 20]."""
