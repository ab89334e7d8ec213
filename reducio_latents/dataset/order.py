"""The order of samples, as arithmetic: integers in, integers out, no files and no state.

Global batch number k of epoch e is a pure function of (samples per shard, seed, e, k, global batch
size). It is found in these steps, and none of them depends on ranks, workers or the batch before:

  pass        one visit to each sample of a bucket of a store: its shards are permuted, taken in
              windows of `window_shards`, and the samples are permuted within each window
  stream      the passes one after another. Epoch e takes positions [floor(e w n), floor((e+1) w n))
              of it: n samples, weight w. With w = 1, epoch e is pass e
  bucket      the streams of its stores, merged so that each batch has every store's share
  batches     the bucket cut every G samples; the last incomplete one is dropped or kept
  epoch       the batches of all buckets, interleaved at random, those of one bucket in order

Memory is O(shards), and O(batches) small integers for the interleaving; samples are expanded only
for the windows that a batch touches. Random numbers are those of `hashing`, so the order is a
specification: golden values in the tests hold it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reducio_latents.dataset.hashing import derive, permutation
from reducio_latents.dataset.reader import Ints

SHARDS, WINDOW, BUCKETS, MIXTURE = range(4)
"""What a random key is for: one number each, so that no two draws are the same."""
KEPT_WINDOWS = 3
"""Batches are read a few at a time, and one may lie across two windows."""


class Samples(NamedTuple):
    """Samples of one bucket, in order. Three arrays of one length."""

    stream: Ints
    """Which of the bucket's streams."""
    shard: Ints
    """Position of the shard in its stream."""
    row: Ints
    """Row of the shard where the sample begins."""


class Ahead(NamedTuple):
    """What a stream reads soon."""

    window: tuple[int, int]
    """Pass and number of the window that is being read."""
    shards: Ints
    """Positions of its shards, then of those of the next window."""


@dataclass
class ShardStream:
    """The endless stream of one bucket of one store: pass after pass over its samples."""

    counts: Ints
    """Samples in each shard."""
    masks: Sequence[bytes | None]
    """Bits of the rows where each shard's samples begin; None for rows 0, 1, ..., count - 1."""
    key: int
    """Where its randomness starts."""
    window_shards: int
    shuffle: bool = True
    weight: Fraction = Fraction(1)
    """Passes an epoch."""
    total: int = field(init=False)
    """Samples in all."""
    _passes: tuple[tuple[int, Ints, list[int]], ...] = field(default=(), repr=False)
    _windows: tuple[tuple[int, int, Ints, Ints], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.total = int(self.counts.sum())

    def bounds(self, epoch: int) -> tuple[int, int]:
        """Return the positions [start, stop) of the stream that make up an epoch."""
        each = self.weight * self.total
        return floor(epoch * each), floor((epoch + 1) * each)

    def take(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return (shard, row) of the samples at positions [start, stop)."""
        parts = []
        while start < stop:
            number, offset = divmod(start, self.total)
            _, ends = self._shards_of(number)
            window = bisect_right(ends, offset)
            shard, row = self._window(number, window)
            first = offset - (ends[window - 1] if window else 0)
            last = min(len(shard), first + stop - start)
            parts.append((shard[first:last], row[first:last]))
            start += last - first
        if len(parts) == 1:
            return parts[0]
        empty = np.zeros(0, np.int64)
        shards, rows = zip(*parts, strict=True) if parts else ((empty,), (empty,))
        return np.concatenate(shards), np.concatenate(rows)

    def ahead(self, position: int) -> Ahead:
        """Return the window of a position, and the shards of it and of the next one."""
        number, offset = divmod(position, self.total)
        order, ends = self._shards_of(number)
        window = bisect_right(ends, offset)
        first = window * self.window_shards
        shards = order[first : first + 2 * self.window_shards]
        if window + 1 == len(ends):
            shards = np.append(shards, self._shards_of(number + 1)[0][: self.window_shards])
        return Ahead((number, window), shards)

    def _shards_of(self, number: int) -> tuple[Ints, list[int]]:
        """Return the shards in the order of pass `number`, and where each window ends."""
        for known, order, ends in self._passes:
            if known == number:
                return order, ends
        order = np.arange(len(self.counts))
        if self.shuffle:
            order = permutation(len(self.counts), derive(self.key, number, SHARDS))
        starts = np.arange(0, len(order), self.window_shards)
        ends = np.cumsum(np.add.reduceat(self.counts[order], starts)).tolist()
        # One assignment of a whole tuple: threads may do this at once, and at worst do it twice.
        self._passes = ((number, order, ends), *self._passes[:1])
        return order, ends

    def _window(self, number: int, window: int) -> tuple[Ints, Ints]:
        """Return (shard, row) of all samples of a window, in order."""
        for known_pass, known, shard, row in self._windows:
            if (known_pass, known) == (number, window):
                return shard, row
        order, _ = self._shards_of(number)
        shards = order[window * self.window_shards : (window + 1) * self.window_shards]
        shard = np.repeat(shards, self.counts[shards])
        row = np.concatenate([self._rows(position) for position in shards.tolist()])
        if self.shuffle:
            mixed = permutation(len(shard), derive(self.key, number, WINDOW, window))
            shard, row = shard[mixed], row[mixed]
        self._windows = ((number, window, shard, row), *self._windows[: KEPT_WINDOWS - 1])
        return shard, row

    def _rows(self, position: int) -> Ints:
        mask = self.masks[position]
        if mask is None:
            return np.arange(self.counts[position])
        return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8)))


class SampleOrder:
    """Which samples make up global batch k of epoch e; see the module's text."""

    def __init__(
        self,
        buckets: Sequence[Sequence[ShardStream]],
        *,
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        """`buckets[b]` holds the streams, one a store, that bucket b is made of."""
        self.buckets = [[stream for stream in streams if stream.total] for streams in buckets]
        self.positions = [[i for i, s in enumerate(streams) if s.total] for streams in buckets]
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._only = [np.full(global_batch_size, p[0] if p else 0) for p in self.positions]
        """What `Samples.stream` is where a bucket has one stream; shared, not to be written to."""
        self._epochs: tuple[tuple[int, _Epoch], ...] = ()

    def num_batches(self, epoch: int) -> int:
        return len(self._epoch(epoch).bucket)

    def bucket_sizes(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return how many samples and how many batches each bucket has in an epoch."""
        plan = self._epoch(epoch)
        return plan.samples, plan.batches

    def batch(self, epoch: int, number: int) -> tuple[int, Samples]:
        """Return the bucket and the samples of global batch `number`, 0 <= number < num_batches."""
        plan = self._epoch(epoch)
        bucket = int(plan.bucket[number])
        start = int(plan.within[number]) * self.global_batch_size
        stop = min(start + self.global_batch_size, plan.samples[bucket])
        streams, ranges = self.buckets[bucket], plan.ranges[bucket]
        if len(streams) == 1:
            first, _ = ranges[0]
            shard, row = streams[0].take(first + start, first + stop)
            return bucket, Samples(self._only[bucket][: len(row)], shard, row)
        lengths = [last - first for first, last in ranges]
        parts = []
        for i, (begin, end) in enumerate(
            zip(share(lengths, start), share(lengths, stop), strict=True)
        ):
            shard, row = streams[i].take(ranges[i][0] + begin, ranges[i][0] + end)
            parts.append(Samples(np.full(len(row), self.positions[bucket][i]), shard, row))
        merged = Samples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        if self.shuffle:
            mixed = permutation(stop - start, derive(self.seed, epoch, MIXTURE, bucket, start))
            merged = Samples(*(array[mixed] for array in merged))
        return bucket, merged

    def ahead(self, epoch: int, number: int) -> tuple[int, dict[int, Ahead]]:
        """Return a batch's bucket, and what each of its streams reads now and next."""
        plan = self._epoch(epoch)
        bucket = int(plan.bucket[number])
        ranges = plan.ranges[bucket]
        start = int(plan.within[number]) * self.global_batch_size
        begins = share([last - first for first, last in ranges], start)
        streams = zip(self.positions[bucket], self.buckets[bucket], ranges, begins, strict=True)
        return bucket, {i: stream.ahead(first + n) for i, stream, (first, _), n in streams}

    def _epoch(self, epoch: int) -> _Epoch:
        for known, plan in self._epochs:
            if known == epoch:
                return plan
        ranges = [[stream.bounds(epoch) for stream in streams] for streams in self.buckets]
        samples = [sum(stop - start for start, stop in each) for each in ranges]
        size = self.global_batch_size
        batches = [n // size if self.drop_last else -(-n // size) for n in samples]
        bucket = np.repeat(np.arange(len(batches), dtype=np.int32), batches)
        if self.shuffle and len(batches) > 1:
            bucket = bucket[permutation(len(bucket), derive(self.seed, epoch, BUCKETS))]
        plan = _Epoch(ranges, samples, batches, bucket, _count_before(bucket, batches))
        self._epochs = ((epoch, plan), *self._epochs[:1])
        return plan


class _Epoch(NamedTuple):
    """An epoch in outline."""

    ranges: list[list[tuple[int, int]]]
    """Positions [start, stop) of each stream of each bucket."""
    samples: list[int]
    """Samples of each bucket."""
    batches: list[int]
    """Batches of each bucket."""
    bucket: NDArray[np.int32]
    """Bucket of each batch of the epoch."""
    within: NDArray[np.int32]
    """Number of the batch within its bucket."""


def _count_before(bucket: NDArray[np.int32], batches: Sequence[int]) -> NDArray[np.int32]:
    """Return, for each position, how many earlier ones have the same bucket."""
    within = np.empty(len(bucket), np.int32)
    counted = [np.arange(count, dtype=np.int32) for count in batches]
    within[np.argsort(bucket, kind="stable")] = np.concatenate([*counted, np.zeros(0, np.int32)])
    return within


def share(lengths: Sequence[int], position: int) -> list[int]:
    """Return how many of the first `position` items of a merged stream come from each part.

    Shares are nearly proportional, never shrink as `position` grows, and add up to it.

    >>> share([6, 3], 3), share([6, 3], 6)
    ([2, 1], [4, 2])
    """
    shares, left = [], sum(lengths)
    for length in lengths:
        taken = position * length // left if left else 0
        shares.append(taken)
        position, left = position - taken, left - length
    return shares


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """Return the part of `count` samples that a rank reads.

    >>> [rank_slice(8, rank, 4) for rank in range(2)]
    [slice(0, 2, None), slice(2, 4, None)]
    """
    return slice(count * rank // world_size, count * (rank + 1) // world_size)
