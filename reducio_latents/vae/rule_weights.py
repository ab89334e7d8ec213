"""Weights made by a rule instead of by training: for trying things out, and for golden numbers.

The same on every machine: NumPy's RandomState, seeded by the key, never changes its stream.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reducio_latents.vae.decoder import time_sinusoid


def rule_weight(key: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return the float32 weight of a state-dict key, normal with the variance of a good init.

    Norm weights are near 1, biases near 0, position codes the sinusoid. Seed 0 is the rule that the
    reference numbers of Reducio-VAE were made with.
    """
    if key.endswith("pos_embed"):
        return time_sinusoid(shape[1], shape[3])
    crc = zlib.crc32(key.encode())
    n = np.random.RandomState([crc, seed] if seed else crc).standard_normal(shape)
    normal = torch.from_numpy(n.astype(np.float32))
    if len(shape) == 1:
        return 1 + 0.1 * normal if key.endswith("weight") else 0.05 * normal
    return normal / math.sqrt(math.prod(shape[1:]))
