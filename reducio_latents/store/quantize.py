"""Eight bits a value: each token is divided by its largest value, and says how far off it is.

A token of `dim` values is `dim` + 4 bytes: int8 codes, the float16 step between two codes, and the
float16 root mean square error that rounding made. numpy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INT8_MEDIA_TYPE = "tokens/int8"
"""`ColumnMeta.content` of a column whose rows are arrays of such tokens."""
TAIL_BYTES = 4
"""Bytes of a token after its codes: step, then error, float16 each, little-endian."""
LEVELS = 127
"""Codes run from -127 to 127."""


def quantize(values: NDArray[np.floating]) -> NDArray[np.int8]:
    """Return the int8 codes and tails, (..., dim + 4), of tokens (..., dim).

    The step is absmax / 127, rounded to float16; values must be finite.
    """
    values = np.asarray(values, np.float32)
    largest = np.abs(values).max(axis=-1, keepdims=True)
    # Rounded up, so that the largest value keeps its code.
    step = (largest / LEVELS).astype("<f2")
    step = np.where(
        step.astype(np.float32) * LEVELS < largest, np.nextafter(step, np.float16(np.inf)), step
    )
    step = step.astype("<f2")
    divisor = np.where(step == 0, 1, step).astype(np.float32)
    codes = np.clip(np.rint(values / divisor), -LEVELS, LEVELS).astype(np.int8)
    error = codes * step.astype(np.float32) - values
    rms = np.sqrt(np.square(error, dtype=np.float64).mean(axis=-1, keepdims=True)).astype("<f2")
    tail = np.concatenate([step, rms], axis=-1).view(np.int8)
    return np.concatenate([codes, tail], axis=-1)


def dequantize(tokens: NDArray[np.int8]) -> NDArray[np.float32]:
    """Return the values, float32 (..., dim), of codes and tails (..., dim + 4)."""
    step, _ = _tails(tokens)
    return tokens[..., :-TAIL_BYTES].astype(np.float32) * step.astype(np.float32)


def relative_errors(tokens: NDArray[np.int8]) -> NDArray[np.float32]:
    """Return each token's root mean square error over its root mean square, (...)."""
    _, error = _tails(tokens)
    rms = np.sqrt(np.square(dequantize(tokens)).mean(axis=-1))
    relative: NDArray[np.float32] = error[..., 0] / np.maximum(rms, np.float32(1e-12))
    return relative


def _tails(tokens: NDArray[np.int8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    tail = np.ascontiguousarray(tokens[..., -TAIL_BYTES:]).view("<f2")
    return tail[..., :1], tail[..., 1:]
