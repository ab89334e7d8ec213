"""Rows anywhere in this process's memory, as one array that can be indexed.

The i-th row of the view begins `i * step` bytes after its lowest address. Rows overlap, and most of
them are not rows of anything, or not even mapped; only those that are asked for are touched.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.dataset.reader import Ints

PAGE = 4096
MAX_VIEW_BYTES = 2**62
"""NumPy counts overlapping rows as if they did not overlap."""


class MemoryView:
    """Rows of one shape and type, at addresses that are low + i * step and at most high."""

    def __init__(
        self,
        row_shape: tuple[int, ...],
        dtype: np.dtype[Any],
        low: int = 0,
        high: int = 0,
        step: int = PAGE,
    ) -> None:
        """`step` is a power of two, and `low` a multiple of it."""
        self._row_shape, self._dtype = row_shape, dtype
        self._low, self._high, self._step = low, high, step
        self._shift = step.bit_length() - 1
        items = math.prod(row_shape)
        count = (high - low) // step + 1
        self._array: NDArray[Any] | None = None
        if high and step % dtype.itemsize == 0 and count * items * dtype.itemsize < MAX_VIEW_BYTES:
            self._array = np.asarray(_Memory(low, (count, items), (step, dtype.itemsize), dtype))

    @property
    def can_gather(self) -> bool:
        """Whether there are rows, and each begins where a value of their type may."""
        return self._array is not None

    def covering(self, addresses: Ints) -> MemoryView:
        """Return a view that also has rows at these addresses."""
        if len(addresses) == 0:
            return self
        low, high = int(addresses.min()) // PAGE * PAGE, int(addresses.max())
        step = math.gcd(self._step, *np.unique(addresses % PAGE).tolist())
        if self._high:
            low, high = min(low, self._low), max(high, self._high)
        if (low, high, step) == (self._low, self._high, self._step):
            return self
        return MemoryView(self._row_shape, self._dtype, low, high, step)

    def gather(self, addresses: Ints, *, pin_memory: bool = False) -> Tensor:
        """Copy the rows at `addresses`, whose memory the caller holds, to (N, *row_shape)."""
        assert self._array is not None
        index = (addresses - self._low) >> self._shift
        shape = (len(index), *self._row_shape)
        if not pin_memory:
            return torch.from_numpy(self._array[index].reshape(shape))
        source = torch.from_numpy(self._array)
        out = torch.empty((len(index), source.shape[1]), dtype=source.dtype, pin_memory=True)
        return torch.index_select(source, 0, torch.from_numpy(index), out=out).view(shape)


class _Memory:
    """Memory of this process, described as NumPy asks for it."""

    def __init__(
        self, address: int, shape: tuple[int, int], strides: tuple[int, int], dtype: np.dtype[Any]
    ) -> None:
        # Nothing writes to it; but PyTorch warns of every array that says it must not be written.
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": dtype.newbyteorder("<").str,
        }
