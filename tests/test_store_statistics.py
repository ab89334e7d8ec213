"""Statistics of parts merge to those of the whole, however it was divided."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.store.statistics import ChannelStatistics

CHANNELS = 3


def assert_close(
    ours: ChannelStatistics, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
) -> None:
    flat = np.moveaxis(values, 1, 0).reshape(CHANNELS, -1)
    assert ours.count == flat.shape[1]
    scale = np.abs(flat).max(axis=1)
    np.testing.assert_allclose(ours.mean, flat.mean(axis=1), rtol=1e-12, atol=1e-12 * scale.max())
    np.testing.assert_allclose(ours.std, flat.std(axis=1), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1.0, -50.0]),
    order=st.randoms(use_true_random=False),
)
def test_any_division_gives_the_statistics_of_one_pass(
    seed: int, sizes: list[int], offset: float, order: object
) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((n, CHANNELS, 2, 3)) + offset for n in sizes]
    order.shuffle(parts)  # type: ignore[attr-defined]
    merged = reduce(ChannelStatistics.merge, map(ChannelStatistics.of, parts))
    if sum(sizes):
        assert_close(merged, np.concatenate(parts))
    else:
        assert (merged.count, merged.std) == (0, (0.0,) * CHANNELS)


def test_half_precision_values_are_summed_in_double_precision() -> None:
    values = np.full((100, CHANNELS, 50), 1000.5, np.float16)
    values[::2] = 1001.5
    found = ChannelStatistics.of(values)
    assert found.mean == (1001.0,) * CHANNELS
    assert found.std == (0.5,) * CHANNELS


def test_a_constant_channel_has_no_deviation_however_it_is_divided() -> None:
    parts = (ChannelStatistics.of(np.full((n, CHANNELS), 0.1)) for n in (1, 5, 2, 9))
    merged = reduce(ChannelStatistics.merge, parts)
    assert max(merged.std) < 1e-16
    assert merged.mean == pytest.approx((0.1,) * CHANNELS, rel=1e-15)
