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
        self._row_shape, self._dtype = row_shape, dtype
        self._low, self._high, self._step = low, high, step
        items = math.prod(row_shape)
        count = (high - low) // step + 1
        self._array: NDArray[Any] | None = None
        if high and step % dtype.itemsize == 0 and count * items * dtype.itemsize < MAX_VIEW_BYTES:
            self._array = np.asarray(_Memory(low, (count, items), (step, dtype.itemsize), dtype))

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

    def gather(
        self, addresses: Ints, buffers: NDArray[Any], offsets: Ints, *, pin_memory: bool = False
    ) -> Tensor:
        """Copy the rows at `addresses` into one tensor (N, *row_shape).

        The same rows begin at `offsets` of `buffers`, which keep their memory alive.
        """
        shape = (len(addresses), *self._row_shape)
        if self._array is None:
            rows = self._gather_by_row(buffers, offsets, shape)
            return rows.pin_memory() if pin_memory else rows
        index = (addresses - self._low) // self._step
        if not pin_memory:
            return torch.from_numpy(self._array[index]).view(shape)
        source = torch.from_numpy(self._array)
        out = torch.empty((len(index), source.shape[1]), dtype=source.dtype, pin_memory=True)
        return torch.index_select(source, 0, torch.from_numpy(index), out=out).view(shape)

    def _gather_by_row(
        self, buffers: NDArray[Any], offsets: Ints, shape: tuple[int, ...]
    ) -> Tensor:
        """Copy row by row, for rows that begin where no value of their type could."""
        out = np.empty((shape[0], math.prod(self._row_shape)), self._dtype)
        target = out.view(np.uint8)
        length = target.shape[1]
        for row, buffer, start in zip(target, buffers, offsets.tolist(), strict=True):
            row[:] = buffer[start : start + length]
        return torch.from_numpy(out).view(shape)


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
