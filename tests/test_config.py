"""Outside data is read strictly: every key known, every type right, the place named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import convert, from_mapping
from reducio_latents.encode import EncodeOptions, add_column, encode_corpus, plan_corpus
from reducio_latents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    ratio: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    mode: Literal["fast", "exact"] = "fast"
    inner: Inner = field(default_factory=lambda: Inner(size=1))
    maybe: int | None = None
    either: int | str = 0
    many: tuple[int | None, ...] = ()
    pair: tuple[int, str] = (1, "a")
    listed: list[float] = field(default_factory=list)
    table: dict[str, tuple[Inner, ...]] = field(default_factory=dict)
    anything: Any = None
    flag: bool = False


def read(**raw: Any) -> Outer:
    return from_mapping(Outer, {"name": "x", **raw}, where="file.json")


inners = st.builds(Inner, size=st.integers(), ratio=st.floats(allow_nan=False))


@given(
    outer=st.builds(
        Outer,
        name=st.text(),
        inner=inners,
        many=st.lists(st.none() | st.integers(), max_size=4).map(tuple),
        pair=st.tuples(st.integers(), st.text()),
        listed=st.lists(st.floats(allow_nan=False), max_size=3),
        table=st.dictionaries(st.text(), st.lists(inners, max_size=2).map(tuple), max_size=2),
        anything=st.none() | st.integers() | st.lists(st.text()),
        maybe=st.none() | st.integers(),
        either=st.integers() | st.text(),
        flag=st.booleans(),
    )
)
def test_what_a_dataclass_says_of_itself_reads_as_that_dataclass(outer: Outer) -> None:
    assert from_mapping(Outer, asdict(outer), where="x") == outer
    assert from_mapping(Outer, vars(outer), where="x") == outer


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"nam": "y"}, "file.json: unknown key 'nam'; did you mean 'name'?"),
        ({"zzz": 1}, "file.json: unknown key 'zzz'; known keys: name, mode, inner"),
        ({"name": 3}, "file.json: name must be str, got 3."),
        ({"mode": "slow"}, "file.json: mode must be one of fast, exact, got 'slow'."),
        ({"inner": {"size": "1"}}, "file.json: inner: size must be int, got '1'."),
        ({"inner": {"size": True}}, "file.json: inner: size must be int, got True."),
        ({"inner": {"siz": 1}}, "file.json: inner: unknown key 'siz'; did you mean 'size'?"),
        ({"inner": {}}, "file.json: inner: Inner.__init__() missing 1 required"),
        ({"inner": 3}, "file.json: inner must be a mapping, its keys size, "),
        ({"maybe": "1"}, "file.json: maybe must be int, got '1'."),
        ({"either": 1.5}, "file.json: either must be str, got 1.5."),
        ({"many": [1, "2"]}, "file.json: many must be int, got '2'."),
        ({"many": 3}, "file.json: many must be a list, each of it int | None, got 3."),
        ({"pair": [1]}, "file.json: pair must be a list of int and str, got [1]."),
        ({"listed": [True]}, "file.json: listed must be float, got True."),
        ({"table": {"a": [{"size": 1.5}]}}, "file.json: table.a: size must be int, got 1.5."),
        ({"flag": 1}, "file.json: flag must be bool, got 1."),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**raw)
    assert str(caught.value).startswith(message)


def test_whole_numbers_are_numbers_and_lists_are_tuples() -> None:
    outer = read(inner={"size": 1, "ratio": 2}, many=[1, None], pair=[2, "b"])
    assert (outer.inner.ratio, type(outer.inner.ratio)) == (2.0, float)
    assert (outer.many, outer.pair) == ((1, None), (2, "b"))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"x: Inner\.__init__\(\) missing .*'size'"):
        from_mapping(Inner, {}, where="x")


def test_a_value_out_of_range_is_refused_by_the_dataclass_itself() -> None:
    with pytest.raises(ConfigError, match=r"clip\.frames must be >= 1, got 0"):
        from_mapping(ClipSpec, {"frames": 0}, where="x")


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [(float, 3, 3.0), (int | None, None, None), (tuple[int, ...], [1, 2], (1, 2)), (Any, "x", "x")],
)
def test_single_values_are_read_alike(hint: Any, value: Any, expected: Any) -> None:
    assert convert(value, hint, where="--set x") == expected


def test_the_place_of_a_single_value_is_named() -> None:
    action: Callable[[], Any] = lambda: convert("a", int, where="--set steps")  # noqa: E731
    with pytest.raises(ConfigError, match="--set steps must be int, got 'a'"):
        action()


@pytest.mark.parametrize("function", [encode_corpus, plan_corpus, add_column])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modell": "x"}, ": unknown key 'modell'; did you mean 'model'?"),
        ({"clip": {"frame": 8}}, ": clip: unknown key 'frame'; did you mean 'frames'?"),
        ({"batch_size": 2.5}, ": batch_size must be int or one of auto, got 2.5"),
        ({"dtype": "half"}, ": dtype must be one of auto, float32, bfloat16, float16, got 'half'"),
        ({"options": EncodeOptions(), "model": "x"}, ": give options, or settings by name, not"),
    ],
)
def test_settings_by_name_are_read_as_strictly_as_a_file(
    function: Any, settings: dict[str, Any], message: str
) -> None:
    places = {"store": "s", "corpus": "c"}
    with pytest.raises(ConfigError) as caught:
        function(**places, **settings)
    assert str(caught.value).startswith(function.__name__ + message)


def test_paths_and_numbers_of_other_libraries_are_taken() -> None:
    raw = {"weights": Path("a/b"), "shard_rows": np.int64(4), "max_failed": np.float32(0.5)}
    options = from_mapping(EncodeOptions, raw, where="x")
    assert (options.weights, options.shard_rows, options.max_failed) == ("a/b", 4, 0.5)
    assert type(options.shard_rows) is int
