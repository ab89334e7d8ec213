"""The statistics of a column's rows: a function of its description and of the rows, whoever asks.

A commit keeps them by shard. torch is imported when there are latents to make final.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.quantize import INT8_MEDIA_TYPE, dequantize, relative_errors
from reducio_latents.store.row_kinds import Row
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.text_rows import (
    POOLED_MEDIA_TYPE,
    TEXT_MEDIA_TYPE,
    decode_text_row,
    text_row_errors,
    text_row_lengths,
)

TOKENS, VECTOR = "tokens", "vector"
"""`ColumnMeta.content` of rows (tokens, dim), and of rows (dim,)."""
ROWS_AT_ONCE = 32
"""Rows of images and texts whose statistics are taken together; bounds memory."""
MAX_CHANNELS = 1 << 14
"""Of texts: numbers of all layers of a model, side by side, would outgrow a commit."""
VIDEO_AXES = 4
"""Of moments (2D, t, h, w). Those of a shard are taken together: so were the first stores made."""

Values = tuple[str, NDArray[Any]]


def row_statistics(column: ColumnMeta, rows: Sequence[Row]) -> dict[str, ChannelStatistics]:
    """Return what a commit says of these rows, None among them or not; of most columns, nothing.

    `mean`: of the means of moments. `final`: of what a model is given. `int8_error`: of 8-bit
    codes. `tokens`, `truncated`: of texts, whose `final` is left out beyond `MAX_CHANNELS`.
    """
    found: dict[str, ChannelStatistics] = {}
    for name, values in _values(column, [row for row in rows if row is not None]):
        part = ChannelStatistics.of(values)
        found[name] = found[name].merge(part) if name in found else part
    return found


def _values(column: ColumnMeta, rows: Sequence[Row]) -> Iterator[Values]:
    """Yield names and values (N, C, ...), a few rows at a time, in order."""
    if column.content in (TEXT_MEDIA_TYPE, POOLED_MEDIA_TYPE):
        for part in _parts([bytes(row) for row in rows if not isinstance(row, np.ndarray | None)]):
            yield from _of_texts(column, part)
        return
    if column.content not in ("moments", TOKENS, VECTOR, INT8_MEDIA_TYPE):
        return
    arrays = [row for row in rows if isinstance(row, np.ndarray)]
    whole = column.content == "moments" and arrays and arrays[0].ndim == VIDEO_AXES
    for part in _parts(arrays, len(arrays) if whole else ROWS_AT_ONCE):
        values = np.stack(part)
        if column.content == "moments":
            yield from _of_moments(column, values)
            continue
        is_int8 = column.content == INT8_MEDIA_TYPE
        tokens = dequantize(values) if is_int8 else values
        yield "final", tokens.reshape(-1, tokens.shape[-1])
        if is_int8:
            yield "int8_error", relative_errors(values).reshape(-1, 1)


def _parts(rows: Sequence[Any], size: int = ROWS_AT_ONCE) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _of_moments(column: ColumnMeta, moments: NDArray[Any]) -> Iterator[Values]:
    import torch

    from reducio_latents.core.gaussian import apply_final_rule
    from reducio_latents.core.values import Posterior

    mean = Posterior.of_moments(torch.from_numpy(moments).float()).mean
    yield "mean", mean.numpy()
    if column.final is not None:
        yield "final", apply_final_rule(column.final, mean).numpy()


def _of_texts(column: ColumnMeta, rows: Sequence[bytes]) -> Iterator[Values]:
    lengths = np.concatenate([text_row_lengths(row) for row in rows]).astype(np.float64)
    kept, full = lengths[:, :1], lengths[:, 1:]
    yield "tokens", kept
    yield "truncated", (kept < full).astype(np.float64)
    vectors = np.concatenate([values for row in rows for values in decode_text_row(row)])
    if vectors.shape[1] <= MAX_CHANNELS:
        yield "final", vectors
    if column.config.get("values") == "int8":
        yield "int8_error", np.concatenate([text_row_errors(row) for row in rows])[:, None]
