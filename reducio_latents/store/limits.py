"""What names and numbers a store may hold. What comes from its files is held against these once.

A store may come from a stranger. Names become paths, numbers become addresses and sizes of memory,
so each has a form or a bound here; what breaks one is refused before it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError, StoreError

COLUMN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+@=-]{0,99}")
SHA256 = re.compile(r"[0-9a-f]{64}|")
ROW_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
"""Of arrays: what both NumPy and PyTorch have."""
MAX_SHARD_ROWS = 1 << 16
MAX_SHARDS = 1 << 31
MAX_FILE_BYTES = 1 << 48
MAX_SIDE = 1 << 14
"""Pixels of a bucket's side, and frames."""
MAX_PIXELS = 1 << 25
"""Of one frame: 7680 x 4320 fits."""
MAX_ROW_BYTES = 1 << 27
"""Of one row, also when it is unpacked."""
MAX_AXES = 32

COORDINATES = {"clip_id": "string", "video": "string", "start_s": "float64"}
"""What stands beside the columns of a bucket for other readers of Zarr, and of which type."""

Ranges = NDArray[np.int64]


def must_hold(holds: bool, what: str) -> None:
    """Raise ConfigError, which readers of files turn into a StoreError, unless `holds`."""
    if not holds:
        raise ConfigError(what)


def require_column(name: str) -> None:
    """A column's name is one segment of a path, and not the name of what stands beside columns."""
    good = COLUMN_NAME.fullmatch(name) is not None and name not in ("zarr.json", *COORDINATES)
    must_hold(column_in(name) == name, f"column {name[:100]!r} would lie where a text: one does.")
    must_hold(
        good,
        f"column name {name[:100]!r}: use letters, digits and _ . : + @ = -, 100 at most, and none "
        f"of {', '.join(COORDINATES)}.",
    )


def column_folder(name: str) -> str:
    """Return what a column is called in paths: `text.clip` for `text:clip`.

    Not every file system, nor every reader of Zarr, takes a colon.
    """
    return name.replace(":", ".", 1) if name.startswith("text:") else name


def column_in(folder: str) -> str:
    """Return the column that `column_folder` calls so."""
    return folder.replace(".", ":", 1) if folder.startswith("text.") else folder


def require_bucket(name: str) -> None:
    size = Bucket.parse(name[:100])
    small = max(size.frames, size.height, size.width) <= MAX_SIDE
    small = small and size.height * size.width <= MAX_PIXELS
    must_hold(size.name == name and small, f"bucket {name[:100]!r} is too large or oddly written.")


def require_count(value: int, most: int, what: str, least: int = 0) -> None:
    must_hold(least <= value <= most, f"{what} is {str(value)[:30]}, not {least} to {most}.")


def require_rows(rows: Sequence[int], count: int, what: str) -> None:
    """Numbers of rows are of the `count` that there are, each named once."""
    good = len(set(rows)) == len(rows) and all(0 <= row < count for row in rows)
    must_hold(good, f"{what} names a row twice, or one that is not of {count}.")


def require_shape(shape: Sequence[int], itemsize: int) -> None:
    good = len(shape) <= MAX_AXES and all(0 < side <= MAX_ROW_BYTES for side in shape)
    good = good and math.prod(shape) * itemsize <= MAX_ROW_BYTES
    must_hold(good, f"rows of shape {str(tuple(shape))[:60]} have a bad axis or are too large.")


def checked_ranges(ranges: Any, file_bytes: int, where: str) -> Ranges:
    """Return (offset, length) of rows as int64, those of empty rows (-1, 0).

    Raise StoreError for a range that does not lie in a file of so many bytes. No sum is taken
    before both of its parts are known to be small.
    """
    try:
        found: Ranges = np.array(ranges, np.int64).reshape(-1, 2)
    except (OverflowError, ValueError, TypeError) as err:
        raise StoreError(f"{where}: a row begins beyond any file. Run `verify`.") from err
    offsets, lengths = found.T
    empty = (offsets == -1) & (lengths == 0)
    inside = (offsets >= 0) & (lengths >= 0) & (offsets <= file_bytes)
    inside &= lengths <= np.minimum(MAX_ROW_BYTES, file_bytes - np.where(inside, offsets, 0))
    if not (empty | inside).all():
        raise StoreError(
            f"{where} has rows that end beyond it, or are too large. Run `verify` to see what it "
            "costs."
        )
    return found
