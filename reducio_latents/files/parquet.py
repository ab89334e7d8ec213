"""Parquet tables, read whole and by the thread that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from os import PathLike
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

BYTES_NAMES = ("video", "mp4", "bytes", "video_bytes", "content", "file", "media")
PICTURE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes")
"""Names of a column that may hold videos, or pictures, themselves, the likeliest first."""


def video_leaf(schema: pa.Schema) -> str | None:
    """Return the path of the column that holds the bytes of videos: `video`, or `video.bytes` of
    one that has paths too, as `datasets` writes it. None if there is none.

    Or those of pictures, if no column is of videos: else they are thumbnails.
    """
    names = {name.lower(): name for name in reversed(schema.names)}
    of_videos = any("video" in name for name in names)
    for known in BYTES_NAMES if of_videos else (*BYTES_NAMES, *PICTURE_NAMES):
        if known in names:
            kind = schema.field(names[known]).type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return str(names[known])
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{names[known]}.bytes"
    return None


def read_video(source: IO[Any], row: int) -> bytes | None:
    """Return the bytes of a video in a row of a file that has a `video_leaf`, else None.

    Its row group is read up to there, one value at a time.
    """
    with pq.ParquetFile(source) as file:
        leaf = video_leaf(file.schema_arrow)
        if leaf is None:
            return None
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                batches = file.iter_batches(1, [group], [leaf], use_threads=False)
                value = next(islice(batches, row, None)).column(0)[0].as_py()
                found: bytes | None = value["bytes"] if isinstance(value, dict) else value
                return found
            row -= rows
    return None


def read_parquet(
    source: bytes | str | PathLike[str] | IO[Any], columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the table of a file, or of its bytes; of it, `columns`, all of which must be there.

    `pyarrow.parquet.read_table` leaves its work to a pool of threads. One that still holds a Python
    buffer when the interpreter ends aborts the process ("terminate called without an active
    exception"), which short commands ran into every second time.

    Raises KeyError for a column that is not there, OSError or ArrowException for what cannot be
    read.
    """
    with pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source) as file:
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if missing:
            raise KeyError(f"no column {missing[0]}")
        return file.read(columns=columns, use_threads=False)
