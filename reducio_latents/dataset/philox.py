"""Philox4x64-10: random numbers by key and counter, the same integers on every device.

Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
On the CPU NumPy's own, in C; elsewhere the same in PyTorch's integers, which wrap as those of C do.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 0xFFFFFFFF
BLOCK_NUMBERS = 16
"""Numbers of 16 bits that a counter gives."""


def philox_numbers(keys: Tensor, count: int) -> Tensor:
    """Return `count` random numbers of 16 bits for each key, (N, count) int16.

    keys: (N,) int64, of any 64 bits each, the lower half of Philox' key; counters are 1, 2, ...
    """
    blocks = -(-count // BLOCK_NUMBERS)
    by_numpy = keys.device.type == "cpu"
    words = _words_by_numpy(keys, blocks) if by_numpy else _words_by_torch(keys, blocks)
    return words.flatten().view(torch.int16).view(len(keys), BLOCK_NUMBERS * blocks)[:, :count]


class _Own(threading.local):
    """A thread's generator, which takes longer to make than the noise of a clip."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=0)
        self.fresh: Any = dict(self.generator.state)
        self.fresh["buffer"] = (0,) * 4  # read four times as fast as the array that it was


_own = _Own()


def _words_by_numpy(keys: Tensor, blocks: int) -> Tensor:
    generator, fresh = _own.generator, _own.fresh
    words = np.empty((len(keys), 4 * blocks), np.uint64)
    for row, key in zip(words, keys.numpy().view(np.uint64).tolist(), strict=True):
        fresh["state"] = {"counter": (0,) * 4, "key": (key, 0)}  # the counter that was used last
        generator.state = fresh
        row[:] = generator.random_raw(4 * blocks)
    return torch.from_numpy(words.view(np.int64))


def _words_by_torch(keys: Tensor, blocks: int) -> Tensor:
    counter = torch.zeros((4, 1, blocks), dtype=torch.int64, device=keys.device)
    counter[0] = torch.arange(1, blocks + 1, device=keys.device)
    key = torch.stack([keys, torch.zeros_like(keys)])[:, :, None]
    return philox(counter, key).movedim(0, -1).reshape(len(keys), 4 * blocks)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return the four words (4, ...) of counters (4, ...) under keys (2, ...), all int64."""
    multipliers, weyl = (c.view(2, *(1,) * (key.ndim - 1)) for c in _constants(key.device))
    left, right = counter[0::2], counter[1::2]
    for _ in range(ROUNDS):
        high, low = _product(left, multipliers)
        left, right = high.flip(0) ^ right ^ key, low.flip(0)
        key = key + weyl
    return torch.stack([left, right.expand_as(left)], 1).flatten(0, 1)


def _product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 64 bits of unsigned products, by halves of 32 bits."""
    x_low, x_high, y_low, y_high = x & LOW, _upper(x), y & LOW, _upper(y)
    middle = x_low * y_high + _upper(x_low * y_low)
    other = x_high * y_low + (middle & LOW)
    return x_high * y_high + _upper(middle) + _upper(other), x * y


def _upper(x: Tensor) -> Tensor:
    return (x >> 32) & LOW  # int64 is shifted with its sign


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return MULTIPLIERS and WEYL, (2,) each; kept, as copying to a GPU waits for its stream."""
    values = np.array([MULTIPLIERS, WEYL], np.uint64).view(np.int64)
    multipliers, weyl = torch.from_numpy(values).to(device)
    return multipliers, weyl
