"""The rows of one batch, which may lie in several stores."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.dataset.hashing import derive, derive_each
from reducio_latents.dataset.order import Samples
from reducio_latents.dataset.reader import ColumnReader, DamagedRowsError, Ints
from reducio_latents.dataset.source import Source

ROW_BITS = np.uint64(32)


class BatchRows:
    """The rows of a batch, which may lie in several stores."""

    def __init__(self, sources: Sequence[Source], bucket: str, samples: Samples) -> None:
        self.bucket = bucket
        self._sources = sources
        self._samples = samples
        self._parts: list[tuple[int, Any]]
        """Each store, and where in the batch its rows are."""
        if len(sources) == 1:
            self._parts = [(0, slice(None))]
            return
        found = np.unique(samples.stream).tolist()
        if not found:  # no sample at all: any store that has the bucket knows the shapes
            found = [i for i, source in enumerate(sources) if bucket in source.selection]
        self._parts = [(i, np.flatnonzero(samples.stream == i)) for i in found]

    def arrays(self, reader: Callable[[int], ColumnReader], *, pin: bool) -> Tensor:
        if len(self._parts) == 1:
            source, _ = self._parts[0]
            return reader(source).arrays(self._samples.shard, self._samples.row, pin_memory=pin)
        out: Tensor | None = None
        for source, places in self._parts:
            part = _renumbered(places, reader(source).arrays, self._samples)
            if out is None:
                shape = (len(self._samples.row), *part.shape[1:])
                out = torch.empty(shape, dtype=part.dtype, pin_memory=pin)
            out[torch.from_numpy(places)] = part
        assert out is not None
        return out

    def payloads(self, reader: Callable[[int], ColumnReader]) -> list[bytes]:
        found: list[bytes] = [b""] * len(self._samples.row)
        for source, places in self._parts:
            values = _renumbered(places, reader(source).payloads, self._samples)
            found = _placed(found, places, values)
        return found

    def facts_of(self, name: str) -> list[Any]:
        found: list[Any] = [None] * len(self._samples.row)
        for source, places in self._parts:
            shards, rows = self._samples.shard[places], self._samples.row[places]
            values = self._sources[source].facts_of(name, self.bucket, shards, rows)
            found = _placed(found, places, values)
        return found

    def words(self, key: int) -> NDArray[np.uint64]:
        """Return a random number of 64 bits for each clip, whatever batch it comes in."""
        words = np.empty(len(self._samples.row), np.uint64)
        bucket = zlib.crc32(self.bucket.encode())
        for source, places in self._parts:
            numbers = np.array(self._sources[source].selection[self.bucket].shards, np.uint64)
            shards = numbers[self._samples.shard[places]]
            clips = (shards << ROW_BITS) | self._samples.row[places].astype(np.uint64)
            words[places] = derive_each(derive(key, bucket, source), clips)
        return words


def _renumbered(places: Any, read: Callable[[Ints, Ints], Any], samples: Samples) -> Any:
    """Read the rows at `places` of a batch, naming damaged ones by their place in the batch."""
    try:
        return read(samples.shard[places], samples.row[places])
    except DamagedRowsError as err:
        everywhere = np.arange(len(samples.row))[places]
        bad = everywhere[list(err.positions)].tolist()
        raise DamagedRowsError(str(err), bad) from err


def _placed(target: list[Any], places: Any, values: list[Any]) -> list[Any]:
    if isinstance(places, slice):
        return values
    for place, value in zip(places.tolist(), values, strict=True):
        target[place] = value
    return target
