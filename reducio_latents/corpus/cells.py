"""Columns of cells read at once: those that are plain. The others are left to who reads rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.corpus.entry import MAX_CAPTION, NO_CAPTION, as_scalar
from reducio_latents.store.plan.tables import CLIP_SCHEMA, column_of

Cells: TypeAlias = Any
"""A column of some rows: an array of texts, numbers, or what else Arrow has read; else a list."""
Column = NDArray[Any]
CAPTIONS = CLIP_SCHEMA.field("captions").type

_NOTHING = rf"(?i)^\s*(?:{'|'.join(sorted(NO_CAPTION))})\s*$"
_SECONDS = r"^\d{1,12}(?:\.\d{1,15})?$"
_CLOCK = r"^(?:(?P<h>\d{1,4}):)?(?P<m>\d{1,4}):(?P<s>[0-5]?\d(?:\.\d{1,9})?)$"
_ITEM = r"""(?:'[^'"\\,]*'|"[^'"\\,]*"|(?:0|[1-9]\d{0,11})(?:\.\d{1,15})?)"""
_PAIR = rf"^\[ *{_ITEM} *, *{_ITEM} *\]$"
_ODD = (
    r"^\s*[\[{(]|^\s*[\x00-\x1f\x7f-\x{a0}\x{1680}\x{2000}-\x{200f}\x{2028}-\x{202f}\x{205f}"
    r"\x{3000}]"
)
"""How a caption begins that may be a list, or nothing but rare spaces."""


def cells_of(values: list[Any]) -> Cells:
    """Return values as an array if they are texts, or numbers of one kind, or nothing."""
    if {type(value) for value in values} - {type(None)} in ({str}, {int}, {float}, {bool}):
        with suppress(UnicodeEncodeError, OverflowError, pa.ArrowInvalid):
            found = pa.array(values, from_pandas=True)
            return found if isinstance(found, pa.Array) else values
    return values


def has_texts(cells: Cells) -> bool:
    return isinstance(cells, pa.Array) and pa.types.is_string(cells.type)


def plain_list(cells: Cells) -> list[Any]:
    found: list[Any] = cells if isinstance(cells, list) else cells.to_pylist()
    return found


def are(cells: pa.Array, pattern: str, null: bool = False) -> Column:
    """Return which texts match; `null` says whether nothing does."""
    return np.asarray(pc.fill_null(pc.match_substring_regex(cells, pattern), null))


def plain_times(cells: Cells) -> tuple[Column, Column]:
    """Return what `as_time` does of each cell, NaN for nothing, and which are plain."""
    found = np.full(len(cells), np.nan)
    if has_texts(cells):
        seconds, clock = are(cells, _SECONDS), are(cells, _CLOCK)
        found[seconds] = cells.filter(seconds).cast(pa.float64())
        if clock.any():
            parts = pc.extract_regex(cells.filter(clock), _CLOCK)
            texts = (pc.struct_field(parts, i) for i in range(3))
            texts = (pc.if_else(pc.equal(text, ""), "0", text) for text in texts)
            hours, minutes, second = (np.asarray(text.cast(pa.float64())) for text in texts)
            found[clock] = 3600 * hours + 60 * minutes + second
        return found, seconds | clock | are(cells, _NOTHING, null=True)
    kind = None if isinstance(cells, list) else cells.type
    if kind is None or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return found, np.asarray([cell is None for cell in cells], bool)
    found = cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return found, ~(found < 0) & ~(found >= 1e12)


def plain_pairs(cells: Cells) -> tuple[Cells, Cells, Column]:
    """Return the firsts and seconds of a column of pairs, and which are plain."""
    if has_texts(cells):
        plain = are(cells, _PAIR, null=True)
        inside = pc.utf8_slice_codeunits(pc.if_else(plain, cells, None), 1, -1)
        two = pc.split_pattern(inside, ",", max_splits=1)
        first, second = (pc.utf8_trim(pc.list_element(two, i), " '\"") for i in range(2))
        return first, second, plain
    if isinstance(cells, pa.Array) and pa.types.is_list(cells.type):
        plain = np.asarray(pc.fill_null(pc.equal(pc.list_value_length(cells), 2), True))
        two = cells if plain.all() else pc.if_else(plain, cells, None)
        return pc.list_element(two, 0), pc.list_element(two, 1), plain
    values = plain_list(cells)
    plain = np.array([v is None or (isinstance(v, list) and len(v) == 2) for v in values], bool)
    found = [v if fits and v else (None, None) for v, fits in zip(values, plain, strict=True)]
    return cells_of([v[0] for v in found]), cells_of([v[1] for v in found]), plain


def plain_captions(cells: Cells) -> tuple[pa.Array, Column]:
    """Return the captions in each cell, lists of one or none, and which cells are plain."""
    if not has_texts(cells):
        plain = np.array([cell is None for cell in plain_list(cells)], bool)
        return pa.array([[]] * len(cells), CAPTIONS), plain
    long = pc.greater(pc.binary_length(cells), MAX_CAPTION)
    odd = are(cells, _ODD) | np.asarray(pc.fill_null(long, False))
    kept = ~are(cells, _NOTHING, null=True) & ~odd
    ends = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), cells.filter(kept)).cast(CAPTIONS), ~odd


def values_of(cells: Cells, place: Callable[[int], str]) -> pa.Array:
    """Return a column as `as_scalar` makes it of each cell."""
    kind = None if isinstance(cells, list) else cells.type
    if kind is not None:
        if pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
            return cells
        if pa.types.is_integer(kind) and kind != pa.uint64():
            return cells.cast(pa.int64())
        if kind in (pa.float32(), pa.float64()):
            return pc.if_else(pc.is_nan(cells), None, cells).cast(pa.float64())
    values = plain_list(cells)
    return column_of([as_scalar(value, where=place(i)) for i, value in enumerate(values)])
