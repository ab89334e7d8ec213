"""Random numbers as a specification: SplitMix64 by counter; a key gives the same numbers for ever.

NumPy's and PyTorch's generators may change their streams between versions; an order that must be
the same after an upgrade, or on another machine, cannot lean on them.
Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix(x: int) -> int:
    """Return SplitMix64's finaliser of a 64-bit integer: a bijection that looks random."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive(*parts: int) -> int:
    """Return a 64-bit key that depends on each of `parts` and on their order."""
    key = GOLDEN
    for part in parts:
        key = mix((key ^ mix((part + GOLDEN) & _MASK)) + GOLDEN & _MASK)
    return key


def mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `mix` of each value; `x` is overwritten."""
    shifted = x >> np.uint64(30)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, np.uint64(0xBF58476D1CE4E5B9), out=x)
    np.right_shift(x, np.uint64(27), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, np.uint64(0x94D049BB133111EB), out=x)
    np.right_shift(x, np.uint64(31), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    return x


def random_words(count: int, key: int) -> NDArray[np.uint64]:
    """Return words 1..count of the SplitMix64 stream that starts at `key`; no two are equal."""
    counters = np.arange(1, count + 1, dtype=np.uint64)
    np.multiply(counters, np.uint64(GOLDEN), out=counters)
    np.add(counters, np.uint64(key), out=counters)
    return mix_array(counters)


def permutation(count: int, key: int) -> NDArray[np.intp]:
    """Return a permutation of range(count): the order that sorts `random_words(count, key)`."""
    # The words differ from one another, so any sort gives this order, stable or not.
    return np.argsort(random_words(count, key))


def derive_each(key: int, x: NDArray[Any]) -> NDArray[np.uint64]:
    """Return `derive(key, i)` for each integer i of `x`."""
    words = mix_array(x.astype(np.uint64) + np.uint64(GOLDEN))
    np.bitwise_xor(words, np.uint64(derive(key)), out=words)
    np.add(words, np.uint64(GOLDEN), out=words)
    return mix_array(words)
