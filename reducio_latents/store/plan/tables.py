"""The columns of a plan's two tables, and the columns that the corpus brings with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from reducio_latents.core.config import Scalar

REMOVED = "removed"
"""Of a video or clip that was taken out for good: it keeps its place and name, not its content."""
VIDEO_STATUS = ("planned", "too_short", "duplicate", "failed", REMOVED)
CLIP_STATUS = ("planned", "duplicate", REMOVED)
EXACT_FLOAT_INT = 2**53


def noted(
    name: str, kind: pa.DataType, description: str, *, nullable: bool = False, **schema: Any
) -> pa.Field:
    """Return a column; `schema` is what its JSON Schema says beyond the type."""
    metadata = {"description": description}
    if schema:
        metadata["schema"] = json.dumps(schema)
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


CLIP_SCHEMA = pa.schema(
    [
        noted(
            "clip_id",
            pa.string(),
            "Hash of the video's name, then start_s in milliseconds.",
            pattern="^[0-9a-f]{16}_[0-9]{9}$",
        ),
        noted("video", pa.string(), "Name of the video, relative to the corpus."),
        noted("start_s", pa.float64(), "Seconds from the video's first shown frame.", minimum=0),
        noted(
            "bucket",
            pa.string(),
            "Size that it is fitted to: frames x height x width.",
            pattern="^[0-9]+x[0-9]+x[0-9]+$",
        ),
        noted("shard", pa.int32(), "Number of the shard, of its bucket.", minimum=0),
        noted("row", pa.int32(), "Row in the shard.", minimum=0),
        noted(
            "status",
            pa.string(),
            "Whether the row is this clip's own, or that of a video with the same bytes, or empty.",
            enum=CLIP_STATUS,
        ),
        noted("captions", pa.list_(pa.string()), "Captions of the video, if it has any."),
    ]
)
"""One row a clip. What the corpus table carried follows, `corpus_` before names that are taken."""

SPAN_SCHEMA = pa.schema(
    [
        noted("span_start_s", pa.float64(), "Start of the span that it lies in.", nullable=True),
        noted("span_end_s", pa.float64(), "End of that span.", nullable=True),
    ]
)
"""Of a clip too, in seconds of its video, where the corpus lists spans."""

VIDEO_SCHEMA = pa.schema(
    [
        noted("video", pa.string(), "Name, relative to the corpus."),
        noted("url", pa.string(), "Its file or tar, relative to the corpus if it lies below."),
        noted("offset", pa.int64(), "First byte in a tar; null for a file.", nullable=True),
        noted("length", pa.int64(), "Bytes in a tar; null for a file.", nullable=True),
        noted("bytes", pa.int64(), "Size; null if it could not be read.", nullable=True),
        noted("sha256", pa.string(), "Of its bytes, hexadecimal.", nullable=True),
        noted("codec", pa.string(), "Name of the codec.", nullable=True),
        noted("width", pa.int32(), "Pixels, as shown.", nullable=True),
        noted("height", pa.int32(), "Pixels, as shown.", nullable=True),
        noted("rotation", pa.int32(), "Degrees that were applied to show it.", nullable=True),
        noted("rate_fps", pa.float64(), "Mean frames per second.", nullable=True),
        noted("duration_s", pa.float64(), "Seconds, first to end of last frame.", nullable=True),
        noted("frames", pa.int64(), "Frames in the file.", nullable=True),
        noted("clips", pa.int32(), "Rows it has in the table of clips."),
        noted("bucket", pa.string(), "Bucket of its clips; null if it has none.", nullable=True),
        noted("status", pa.string(), "What becomes of it.", enum=VIDEO_STATUS),
        noted("reason", pa.string(), "Why it has no clips of its own.", nullable=True),
        noted("duplicate_of", pa.string(), "Video with the same bytes.", nullable=True),
    ]
)
"""One row a video that was listed."""

VIDEO_SPAN_SCHEMA = pa.schema(
    [
        noted("spans", pa.int32(), "Spans that the corpus lists of it.", nullable=True),
        noted(
            "spans_without_clips",
            pa.string(),
            "Why some of them have no clip -> how many, as JSON.",
            nullable=True,
        ),
    ]
)
"""Of a video too, where the corpus lists spans."""

VIDEO_SHOT_SCHEMA = pa.schema(
    [
        noted("shots_by", pa.string(), "Detector and version, or `table`.", nullable=True),
        noted(
            "shot_starts_s",
            pa.list_(pa.float64()),
            "Starts of its shots, in order; null if they are not known.",
            nullable=True,
        ),
        noted("shot_ends_s", pa.list_(pa.float64()), "Their ends.", nullable=True),
        noted("shots_problem", pa.string(), "Why they are not known.", nullable=True),
    ]
)
"""Of a video too, where shots were looked for."""


def carried_names(keys: Iterable[str]) -> dict[str, str]:
    """Return what columns are called that the corpus brings, in order: their own names are."""
    keys = sorted(keys)
    taken = {*CLIP_SCHEMA.names, *SPAN_SCHEMA.names}
    names = {}
    for key in keys:
        name = key
        while name in taken or (name != key and name in keys):
            name = f"corpus_{name}"
        taken.add(name)
        names[key] = name
    return names


def column_of(values: list[Scalar | None]) -> pa.Array:
    """Return a column that the corpus brings, null where a row has no value.

    Whole numbers, numbers, truth values and texts keep their type; a column of several is text.
    """
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1:
        return pa.array(values)
    if kinds == {int, float} and all(abs(v) <= EXACT_FLOAT_INT for v in values if type(v) is int):
        return pa.array(values, pa.float64())
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())


def with_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return columns of a table; those that a video need not have are null then."""
    for field in [*VIDEO_SPAN_SCHEMA, *VIDEO_SHOT_SCHEMA]:
        if field.name in names and field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(list(names))


def concat_parts(tables: Sequence[pa.Table]) -> pa.Table:
    """Join parts whose carried columns may differ: a missing one is null, mixed types are text."""
    if len(tables) == 1:
        return tables[0]
    kinds: dict[str, list[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            seen = kinds.setdefault(field.name, [])
            # By equality, not by hash: a list's type read from Parquet names its items otherwise.
            if field.type not in seen:
                seen.append(field.type)
    wanted = {name: common_type(found) for name, found in kinds.items()}
    cast = []
    for table in tables:
        for i, field in enumerate(table.schema):
            if field.type != wanted[field.name]:
                column = table.column(i).cast(wanted[field.name])
                table = table.set_column(i, field.name, column)
        cast.append(table.replace_schema_metadata(None))
    return pa.concat_tables(cast, promote_options="default")


def common_type(kinds: Sequence[pa.DataType]) -> pa.DataType:
    kinds = [kind for kind in kinds if kind != pa.null()] or [pa.null()]
    if len(kinds) == 1:
        return kinds[0]
    return pa.float64() if set(kinds) == {pa.int64(), pa.float64()} else pa.string()
