"""The order of batches is arithmetic: what it must give for any shards, ranks, workers, windows."""

from __future__ import annotations

import random
import time
from collections import Counter
from copy import deepcopy
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.dataset.hashing import (
    derive,
    derive_each,
    mix,
    mix_array,
    permutation,
    random_words,
)
from reducio_latents.dataset.order import SampleOrder, Samples, ShardStream, rank_slice, share

Place = tuple[int, int, int, int]
"""Bucket, stream, shard, row."""


PUBLISHED_WORDS = [6457827717110365317, 3203168211198807973, 9817491932198370423]
"""The first numbers of SplitMix64 with seed 1234567, as its reference implementation gives them."""
GOLDEN_DERIVED = 14485777805070305515
GOLDEN_WORDS = [7191089600892374487, 309689372594955804]
GOLDEN_PERMUTATION = [3, 4, 2, 5, 0, 7, 1, 6]
GOLDEN_EPOCH = [
    [(1, 0, 0, 2), (1, 1, 0, 1), (1, 0, 0, 0), (1, 1, 0, 0)],
    [(0, 0, 2, 0), (0, 0, 2, 1), (0, 0, 0, 3), (0, 0, 0, 1)],
    [(0, 0, 2, 2), (0, 0, 0, 2), (0, 0, 0, 0), (0, 0, 1, 2)],
    [(1, 0, 0, 1), (1, 0, 0, 3), (1, 0, 0, 4), (1, 1, 0, 2)],
]


def stream(
    masks: list[list[bool]],
    *,
    key: int = 1,
    window: int = 2,
    shuffle: bool = True,
    weight: str = "1",
) -> ShardStream:
    return ShardStream(
        counts=np.array([sum(mask) for mask in masks], np.int64),
        masks=[None if all(m) else np.packbits(np.array(m)).tobytes() for m in masks],
        key=key,
        window_shards=window,
        shuffle=shuffle,
        weight=Fraction(weight),
    )


masks = st.lists(st.lists(st.booleans(), max_size=9), max_size=7)


@st.composite
def orders(draw: st.DrawFn, *, max_streams: int = 1) -> tuple[SampleOrder, set[Place]]:
    """Return an order and every sample that it is made of."""
    buckets, places = [], set()
    shuffle = draw(st.booleans())
    window = draw(st.integers(1, 5))
    for b in range(draw(st.integers(1, 3))):
        streams = []
        for s in range(draw(st.integers(1, max_streams))):
            shards = draw(masks)
            streams.append(
                stream(shards, key=draw(st.integers(0, 9)), window=window, shuffle=shuffle)
            )
            places |= {
                (b, s, i, row) for i, m in enumerate(shards) for row, used in enumerate(m) if used
            }
        buckets.append(streams)
    order = SampleOrder(
        buckets,
        global_batch_size=draw(st.integers(1, 12)),
        seed=draw(st.integers(-3, 3)),
        shuffle=shuffle,
        drop_last=draw(st.booleans()),
    )
    return order, places


def places_of(bucket: int, samples: Samples) -> list[Place]:
    lists = (array.tolist() for array in samples)
    return [(bucket, i, shard, row) for i, shard, row in zip(*lists, strict=True)]


def epoch_of(order: SampleOrder, epoch: int) -> list[list[Place]]:
    return [places_of(*order.batch(epoch, k)) for k in range(order.num_batches(epoch))]


@given(orders(max_streams=3), st.integers(0, 5))
def test_every_sample_comes_once_an_epoch_but_for_each_buckets_incomplete_batch(
    made: tuple[SampleOrder, set[Place]], epoch: int
) -> None:
    order, places = made
    batches = epoch_of(order, epoch)
    seen = Counter(place for batch in batches for place in batch)
    assert set(seen.values()) <= {1}
    assert seen.keys() <= places
    missing = Counter(place[0] for place in places - seen.keys())
    assert all(count < order.global_batch_size for count in missing.values())
    if not order.drop_last:
        assert not missing


@given(orders(max_streams=2), st.integers(0, 3))
def test_a_batch_holds_samples_of_one_bucket_and_is_full(
    made: tuple[SampleOrder, set[Place]], epoch: int
) -> None:
    order, _ = made
    batches = epoch_of(order, epoch)
    assert all(len({place[0] for place in batch}) == 1 for batch in batches)
    sizes = Counter(len(batch) for batch in batches)
    if order.drop_last:
        assert set(sizes) <= {order.global_batch_size}
    else:
        incomplete = sum(n for size, n in sizes.items() if size != order.global_batch_size)
        assert incomplete <= len(order.buckets)


@settings(max_examples=50)
@given(orders(max_streams=2), st.integers(0, 2**32))
def test_any_batch_of_any_epoch_can_be_asked_for_at_any_time(
    made: tuple[SampleOrder, set[Place]], seed: int
) -> None:
    order, _ = made
    batches: dict[tuple[int, int], list[Place]] = {}
    for epoch in range(3):
        fresh = deepcopy(order)  # knows nothing of other epochs
        batches |= {(epoch, k): batch for k, batch in enumerate(epoch_of(fresh, epoch))}
    for epoch, k in random.Random(seed).sample(list(batches), len(batches)):
        assert places_of(*order.batch(epoch, k)) == batches[epoch, k]


@given(orders(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_ranks_and_workers_only_divide_the_batches_among_themselves(
    made: tuple[SampleOrder, set[Place]], world_size: int, workers: int, epoch: int
) -> None:
    order, _ = made
    whole = epoch_of(order, epoch)
    for batch in whole:
        parts = [batch[rank_slice(len(batch), rank, world_size)] for rank in range(world_size)]
        assert [place for part in parts for place in part] == batch
        if len(batch) == order.global_batch_size and len(batch) % world_size == 0:
            assert {len(part) for part in parts} == {len(batch) // world_size}
    taken = [k for w in range(workers) for k in range(w, len(whole), workers)]
    assert sorted(taken) == list(range(len(whole)))


@given(masks, st.integers(1, 4))
def test_without_shuffling_samples_come_as_they_lie(shards: list[list[bool]], size: int) -> None:
    order = SampleOrder(
        [[stream(shards, shuffle=False)]],
        global_batch_size=size,
        seed=3,
        shuffle=False,
        drop_last=False,
    )
    for epoch in range(2):
        seen = [place for batch in epoch_of(order, epoch) for place in batch]
        assert seen == sorted(seen)


def test_epochs_and_seeds_differ() -> None:
    shards = [[True] * 16] * 8

    def first(seed: int, epoch: int) -> list[Place]:
        made = stream(shards, key=seed)
        return epoch_of(SampleOrder([[made]], global_batch_size=32, seed=seed), epoch)[0]

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_a_specification() -> None:
    """These values must never change: stored states of training runs rest on them."""
    assert random_words(3, 1234567).tolist() == PUBLISHED_WORDS
    assert derive(0, 1, 2) == GOLDEN_DERIVED
    assert random_words(2, 7).tolist() == GOLDEN_WORDS
    assert permutation(8, 5).tolist() == GOLDEN_PERMUTATION
    order = SampleOrder(
        [
            [stream([[True] * 4, [True, False, True, True], [True] * 3], key=7)],
            [stream([[True] * 5], key=8), stream([[True] * 3], key=9)],
        ],
        global_batch_size=4,
        seed=1,
    )
    assert epoch_of(order, 2) == GOLDEN_EPOCH


def test_hashes_of_arrays_are_those_of_integers() -> None:
    values = [0, 1, 2**40, 2**63]
    assert mix_array(np.array(values, np.uint64)).tolist() == [mix(v) for v in values]
    assert derive_each(9, np.array(values)).tolist() == [derive(9, v) for v in values]


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(count: int, key: int) -> None:
    assert sorted(permutation(count, key).tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    counts = Counter(tuple(permutation(4, derive(key)).tolist()) for key in range(24_000))
    assert len(counts) == 24
    assert max(abs(n - 1000) for n in counts.values()) < 160  # five standard deviations


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_shares_of_a_mixture_never_shrink_and_add_up(lengths: list[int]) -> None:
    total = sum(lengths)
    shares = [share(lengths, position) for position in range(total + 1)]
    assert shares[0] == [0] * len(lengths)
    assert shares[-1] == lengths
    for position, (now, after) in enumerate(pairwise(shares)):
        assert sum(now) == position
        assert all(0 <= b - a <= 1 for a, b in zip(now, after, strict=True))


@given(
    st.sampled_from(["1/2", "1", "3/2", "2", "1/3", "7/5"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_a_weighted_store_has_each_clip_as_often_as_any_other(
    weight: str, counts: list[int], window: int
) -> None:
    """After e epochs a store of weight w has given e * w passes: each clip that often, to one."""
    made = stream([[True] * n for n in counts], window=window, weight=weight)
    order = SampleOrder([[made]], global_batch_size=1, seed=0)
    seen: Counter[Place] = Counter()
    for epoch in range(6):
        for batch in epoch_of(order, epoch):
            seen.update(batch)
        passes = Fraction(weight) * (epoch + 1)
        assert sum(seen.values()) == int(passes * sum(counts))
        if passes.denominator == 1:
            assert set(seen.values()) == {int(passes)}


def test_each_batch_of_a_mixture_holds_all_stores_in_proportion() -> None:
    streams = [stream([[True] * 50] * 4, weight="1"), stream([[True] * 50] * 2, weight="2")]
    order = SampleOrder([streams], global_batch_size=20, seed=0)
    for batch in epoch_of(order, 0):
        assert Counter(place[1] for place in batch) == {0: 10, 1: 10}
    firsts = [batch[0][1] for batch in epoch_of(order, 0)]
    assert set(firsts) == {0, 1}  # stores take no fixed place in a batch


def test_batches_of_buckets_are_interleaved() -> None:
    order = SampleOrder(
        [[stream([[True] * 100], key=1)], [stream([[True] * 100], key=2)]],
        global_batch_size=2,
        seed=0,
    )
    changes = sum(a[0][0] != b[0][0] for a, b in pairwise(epoch_of(order, 0)))
    assert 30 < changes < 70  # 50 for coins


def million_clips(window: int = 64) -> SampleOrder:
    shards = 1954
    made = ShardStream(np.full(shards, 512), [None] * shards, key=3, window_shards=window)
    return SampleOrder([[made]], global_batch_size=256, seed=0)


def test_resuming_among_a_million_clips_takes_no_time() -> None:
    million_clips().batch(0, 0)
    starts = []
    for epoch in (3, 500):
        order = million_clips()
        begin = time.process_time()
        order.batch(epoch, order.num_batches(epoch) - 1)
        starts.append(time.process_time() - begin)
    assert max(starts) < 0.1


def test_memory_does_not_grow_with_the_clips_of_a_shard() -> None:
    """Only the samples of the windows in use are expanded."""
    order = million_clips(window=4)
    for k in range(0, order.num_batches(0), 50):
        order.batch(0, k)
    (made,) = order.buckets[0]
    expanded = sum(len(shard) for _, _, shard, _ in made._windows)
    assert expanded <= 3 * 4 * 512


@pytest.mark.parametrize("window", [16, 64])
def test_neighbours_in_a_video_come_apart_as_documented(window: int) -> None:
    """In a window of n samples as in a permutation of n: 0.29 n apart, in one batch of G by G/n."""
    shards, rows, size = 256, 512, 256
    made = ShardStream(np.full(shards, rows), [None] * shards, key=5, window_shards=window)
    shard, row = made.take(0, shards * rows)
    position = np.empty((shards, rows), np.int64)
    position[shard, row] = np.arange(shards * rows)
    apart = np.abs(np.diff(position, axis=1))
    samples = window * rows
    assert np.median(apart) == pytest.approx((1 - 0.5**0.5) * samples, rel=0.02)
    together = np.mean(position[:, 1:] // size == position[:, :-1] // size)
    assert together == pytest.approx(size / samples, rel=0.1)


@settings(max_examples=25)
@given(orders(max_streams=2), st.integers(0, 2))
def test_an_order_is_the_same_after_pickling(
    made: tuple[SampleOrder, set[Place]], epoch: int
) -> None:
    import pickle

    order, _ = made
    before = epoch_of(order, epoch)
    assert epoch_of(pickle.loads(pickle.dumps(order)), epoch) == before
