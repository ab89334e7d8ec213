"""Clips lie inside their video, on the frame grid, where the policy says."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.core.clips import TIME_TOLERANCE_S, ClipSpec, parse_policy
from reducio_latents.core.starts import clip_starts, possible_in
from reducio_latents.errors import ConfigError

policies = st.one_of(
    st.sampled_from(["all", "centre"]),
    st.integers(1, 40).map("uniform:{}".format),
    st.integers(1, 40).map("random:{}".format),
    st.floats(0.01, 9).map("stride:{}".format),
)
specs = st.builds(
    ClipSpec,
    frames=st.integers(1, 33),
    rate_fps=st.sampled_from([8.0, 16.0, 23.976, 30000 / 1001, 60.0, 1000.0]),
    policy=policies,
    seed=st.integers(0, 3),
)
durations = st.floats(0, 60)


@given(durations, specs)
def test_every_frame_of_every_clip_is_shown_inside_the_video(
    duration_s: float, spec: ClipSpec
) -> None:
    for start_s in clip_starts(duration_s, spec, "a.mp4"):
        last_s = start_s + (spec.frames - 1) / spec.rate_fps
        assert start_s >= 0
        assert last_s <= duration_s - TIME_TOLERANCE_S + 1e-9


@given(durations, specs)
def test_starts_are_distinct_in_order_and_on_the_frame_grid(
    duration_s: float, spec: ClipSpec
) -> None:
    starts = clip_starts(duration_s, spec, "a.mp4")
    steps = [start_s * spec.rate_fps for start_s in starts]
    assert all(math.isclose(step, round(step), abs_tol=1e-6) for step in steps)
    assert all(a < b for a, b in pairwise(starts))


@given(durations, specs)
def test_a_video_has_clips_under_one_policy_exactly_if_under_all(
    duration_s: float, spec: ClipSpec
) -> None:
    possible = int(possible_in(np.array([duration_s]), spec.frames, spec.rate_fps)[0])
    assert bool(clip_starts(duration_s, spec, "a.mp4")) == (possible > 0)


def test_all_gives_clips_one_after_another() -> None:
    assert clip_starts(4.0, ClipSpec(policy="all")) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(("duration_s", "count"), [(0.93, 0), (0.9375, 0), (0.94, 1), (1.0, 1)])
def test_the_last_frame_must_still_be_on_show(duration_s: float, count: int) -> None:
    assert len(clip_starts(duration_s, ClipSpec())) == count


def test_stride_counts_in_seconds_and_may_overlap() -> None:
    assert clip_starts(2.0, ClipSpec(policy="stride:0.5")) == [0.0, 0.5, 1.0]
    assert clip_starts(6.0, ClipSpec(policy="stride:2.5")) == [0.0, 2.5, 5.0]


def test_centre_leaves_as_much_before_as_after() -> None:
    assert clip_starts(3.0, ClipSpec(policy="centre")) == [1.0]


@given(st.integers(2, 30), st.floats(1.1, 40))
def test_uniform_reaches_from_the_first_possible_start_to_the_last(
    count: int, duration_s: float
) -> None:
    starts = clip_starts(duration_s, ClipSpec(policy=f"uniform:{count}"))
    possible = int(possible_in(np.array([duration_s]), 16, 16.0)[0])
    assert len(starts) == min(count, possible)
    if possible > 1:
        assert starts[0] == 0
        assert starts[-1] == (possible - 1) / 16
        gaps = [b - a for a, b in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1 / 16 + 1e-9


def test_random_depends_on_seed_and_video_and_on_nothing_else() -> None:
    def draw(seed: int, video: str) -> list[float]:
        return clip_starts(60.0, ClipSpec(policy="random:8", seed=seed), video)

    assert len(draw(0, "a.mp4")) == 8
    assert draw(0, "a.mp4") == draw(0, "a.mp4")
    assert draw(0, "a.mp4") != draw(1, "a.mp4")
    assert draw(0, "a.mp4") != draw(0, "b.mp4")


def test_random_draws_are_the_same_on_every_machine_and_version() -> None:
    starts = clip_starts(20.0, ClipSpec(policy="random:4", seed=7), "cats/ginger.mp4")
    assert [round(start_s * 16) for start_s in starts] == [47, 57, 113, 133]


def test_random_visits_every_start_alike() -> None:
    spec = ClipSpec(policy="random:2")
    drawn = [s for i in range(2000) for s in clip_starts(1.5, spec, f"{i}.mp4")]
    counts = [drawn.count(step / 16) for step in range(possible_in(np.array([1.5]), 16, 16.0)[0])]
    expected = len(drawn) / len(counts)
    assert sum(counts) == len(drawn)
    # Chi-squared with 8 degrees of freedom; 26.1 is its 99.9 % quantile.
    assert sum((n - expected) ** 2 / expected for n in counts) < 26.1


@pytest.mark.parametrize(
    "policy",
    ["", "most", "all:3", "stride", "stride:0", "stride:-1", "stride:nan", "uniform:2.5",
     "random:0", "random:", "random:many", "uniform:inf", "centre:1"],
)  # fmt: skip
def test_a_policy_that_is_none_is_refused_by_name(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"clip\.policy is "):
        ClipSpec(policy=policy)


def test_a_policy_is_a_name_and_a_number() -> None:
    assert parse_policy("stride:2.5") == ("stride", 2.5)
    assert parse_policy("all") == ("all", 0.0)
