"""From stored moments to what a diffusion model trains on; noise that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.gaussian import FinalRule, final_latents
from reducio_latents.core.values import Posterior
from reducio_latents.dataset.hashing import GOLDEN, mix_array

LOW_WORD = 0xFFFFFFFF


def sample_moments(
    moments: Tensor,
    rule: FinalRule,
    generator: torch.Generator | None = None,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw final latents (B, D, ...), float32, from stored moments (B, 2D, ...) on their device.

    Noise comes from `generator`, or is given, standard normal, (B, D, ...). `rule` is the column's:
    `LatentDataset.final_rule()`.
    """
    posterior = Posterior.of_moments(moments)
    if noise is None:
        noise = torch.randn(
            posterior.mean.shape, generator=generator, device=moments.device, dtype=torch.float32
        )
    return final_latents(posterior, noise, rule)


def mean_of_moments(moments: Tensor, rule: FinalRule) -> Tensor:
    """Return the final latents (B, D, ...), float32, of the posterior's mean."""
    return final_latents(Posterior.of_moments(moments), None, rule)


def normalize_channels(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (latents - mean) / std of each channel, for latents (B, D, ...)."""
    shape = (-1, *(1,) * (latents.ndim - 2))
    return (latents - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def standard_normal(keys: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Return `count` standard normal numbers for each key, (len(keys), count).

    Box and Muller's transform (1958) of the SplitMix64 stream that starts at the key.
    """
    pairs = -(-count // 2)
    words = keys[:, None] + np.arange(1, pairs + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    words = mix_array(words)
    # In (0, 1]: its logarithm exists.
    radius = ((words >> np.uint64(32)).astype(np.float32) + np.float32(1)) * np.float32(2**-32)
    np.log(radius, out=radius)
    np.multiply(radius, np.float32(-2), out=radius)
    np.sqrt(radius, out=radius)
    angle = (words & np.uint64(LOW_WORD)).astype(np.float32) * np.float32(2 * np.pi / 2**32)
    normal = np.empty((len(keys), 2 * pairs), np.float32)
    np.multiply(radius, np.cos(angle), out=normal[:, :pairs])
    np.multiply(radius, np.sin(angle), out=normal[:, pairs:])
    return normal[:, :count]
