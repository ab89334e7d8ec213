"""The order of clips is arithmetic: any number of ranks goes on from any place."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.errors import ConfigError
from reducio_latents.train.batch import TrainOrder, batch_numbers
from reducio_latents.train.config import DataConfig
from reducio_latents.train.split import set_apart
from reducio_latents.train.stream import augmentation, clip_seed


@given(
    buckets=st.lists(st.integers(0, 2), min_size=4, max_size=40),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_clip_once_but_for_what_fills_no_batch(
    buckets: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    sizes = Counter(buckets)
    if not any(size >= batch_size for size in sizes.values()):
        return
    order = TrainOrder(buckets, batch_size, seed)
    numbers = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
    batches = [order.clips(number) for number in numbers]
    assert all(len({buckets[clip] for clip in batch}) == 1 for batch in batches)
    seen = Counter(clip for batch in batches for clip in batch)
    assert set(seen.values()) == {1}
    assert sum(seen.values()) == sum(n // batch_size * batch_size for n in sizes.values())


@given(ranks=st.integers(1, 4), later=st.integers(1, 4), accumulate=st.integers(1, 3))
def test_ranks_share_the_order_and_others_continue_it(
    ranks: int, later: int, accumulate: int
) -> None:
    def taken(done: int, steps: int, size: int) -> list[int]:
        parts = [batch_numbers(done, steps, size, rank, accumulate) for rank in range(size)]
        return sorted(number for part in parts for number in part)

    first = taken(0, 3, ranks)
    second = taken(len(first), 2, later)
    assert first + second == list(range(accumulate * (3 * ranks + 2 * later)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order, again, other = (TrainOrder([0] * 20, 2, seed) for seed in (5, 5, 6))
    there_and_back = [order.clips(n) for n in (3, 25, 3)]
    assert there_and_back[0] == there_and_back[2] == again.clips(3)
    epochs = [[order.clips(n) for n in range(e * 10, e * 10 + 10)] for e in (0, 1)]
    assert epochs[0] != epochs[1] != [other.clips(n) for n in range(10)]


def test_twice_the_batch_on_one_rank_is_the_same_clips() -> None:
    small, large = TrainOrder([0] * 12, 2, 0), TrainOrder([0] * 12, 4, 0)
    for step in range(6):
        ranks = [
            small.clips(number) for r in (0, 1) for number in batch_numbers(2 * step, 1, 2, r, 1)
        ]
        assert [*ranks[0], *ranks[1]] == large.clips(step)


def test_a_split_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="no bucket fills a batch of 4"):
        TrainOrder([0, 0, 0, 1, 1], 4, 0)


def test_whole_videos_are_set_apart_and_adding_one_moves_few() -> None:
    videos = [f"{i}.mp4" for i in range(200)]
    apart = set(set_apart(videos, 0.1))
    assert len(apart) == 20
    assert len(apart ^ set(set_apart([*videos, "new.mp4"], 0.1))) <= 2
    assert len(set_apart(videos[:3], 0.05)) == 1
    assert set_apart(videos, 0.0) == []


def test_a_clip_is_cropped_otherwise_in_each_epoch_and_the_same_after_a_restart() -> None:
    data = DataConfig(crop_area=(0.25, 0.5))
    drawn = [augmentation(data, clip_seed(0, epoch, 7)) for epoch in range(200)]
    assert len({how.x for how in drawn}) == 200
    assert all(0.25 <= how.area <= 0.5 for how in drawn)
    assert 60 < sum(how.mirror for how in drawn) < 140
    assert drawn == [augmentation(data, clip_seed(0, epoch, 7)) for epoch in range(200)]
    assert not any(augmentation(DataConfig(flip=False), s).mirror for s in range(20))
