"""Antialiased resizing of 8-bit pictures in whole numbers: every device agrees on every bit.

torch resizes uint8 on the CPU alone: each output is a sum of inputs with 16-bit integer weights,
one axis after the other, rounded to uint8 in between (after Pillow). Its float32 resize, which GPUs
have, differs from that by up to 2 of 255. Here are the same integers in operations that run
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
MOST_BITS = 22
WEIGHT_BITS = 15
"""A weight is a signed 16-bit integer."""


def _triangle(x: Floats) -> Floats:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: Floats) -> Floats:
    """Return the cubic convolution kernel with a = -0.5. Keys (1981), equation 4."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


KERNELS: dict[str, tuple[Callable[[Floats], Floats], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
}
"""Mode -> kernel, and how far it reaches, in pixels of the smaller picture."""


@dataclass(frozen=True, eq=False)
class Resampling:
    """Each output along one axis as a weighted sum of inputs; both tables are (taps, outputs)."""

    index: Tensor
    """Which inputs, int64."""
    weight: Tensor
    """int32, in units of 2**-bits; 0 where an output has fewer taps."""
    bits: int

    def crop(self, start: int, size: int) -> Resampling:
        """Return the same for a piece of the output."""
        piece = slice(start, start + size)
        return Resampling(self.index[:, piece], self.weight[:, piece], self.bits)

    def apply(self, pixels: Tensor, dim: int) -> Tensor:
        """Resample uint8 `pixels` along axis `dim`; uint8, on their device."""
        shape = [1] * pixels.ndim
        shape[dim] = -1
        pixels = pixels.to(torch.int32)
        total = None
        for inputs, weights in zip(self.index, self.weight, strict=True):
            taken = pixels.index_select(dim, inputs)
            if total is None:
                total = torch.full_like(taken, 1 << (self.bits - 1))  # so that halves round up
            total.addcmul_(taken, weights.view(shape))
        assert total is not None
        return total.bitwise_right_shift_(self.bits).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def resampling(size_in: int, size_out: int, mode: str, device: torch.device) -> Resampling:
    """Return how an axis of `size_in` pixels becomes one of `size_out`; `mode` is in `KERNELS`."""
    kernel, reach = KERNELS[mode]
    scale = size_in / size_out
    support = reach * max(scale, 1.0)
    centre = scale * (np.arange(size_out) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    taps = np.minimum((centre + support + 0.5).astype(np.int64), size_in) - first
    tap = np.arange(taps.max())[:, None]
    weight = kernel((tap + first - centre + 0.5) * min(1.0 / scale, 1.0))
    weight = np.where(tap < taps, weight, 0.0)
    weight /= weight.sum(axis=0)
    bits = 0
    while bits < MOST_BITS and int(0.5 + weight.max() * 2 ** (bits + 1)) < 1 << WEIGHT_BITS:
        bits += 1
    whole = np.trunc(weight * 2**bits + np.copysign(0.5, weight)).astype(np.int32)
    index = np.minimum(tap + first, size_in - 1)
    return Resampling(torch.tensor(index, device=device), torch.tensor(whole, device=device), bits)
