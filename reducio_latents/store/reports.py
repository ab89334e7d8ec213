"""What a store says of its clips beside their rows: errors, quality and shots.parquet.

Both are functions of the plan and of the commits, so whoever has those can make them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.store.commit import WAS_REMOVED, ClipQuality, Commit, ShardKey
from reducio_latents.store.plan import Plan
from reducio_latents.store.plan.bounded import bounded_table
from reducio_latents.store.plan.tables import noted

ERRORS = "errors.parquet"
QUALITY = "quality.parquet"
SHOTS = "shots.parquet"
WRITER = f"parquet-cpp-arrow version {pa.__version__}"
"""Who has written a table, as pyarrow puts it."""


ERRORS_SCHEMA = pa.schema(
    [
        pa.field("video", pa.string(), nullable=False),
        pa.field("clip_id", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""A row is a failed video (clip_id null, stage `probe`) or clip (stage: the column it lacks)."""
QUALITY_SCHEMA = pa.schema(
    [
        noted("clip_id", pa.string(), "The clip that was decoded while it was encoded."),
        noted("bucket", pa.string(), "Its size, TxHxW."),
        noted("shard", pa.int32(), "Its shard in the bucket."),
        noted("row", pa.int32(), "Its row in the shard."),
        noted("psnr", pa.float64(), "Mean over its frames of the PSNR, in dB; peak 1."),
        noted("psnr_frames", pa.list_(pa.float64()), "The PSNR of each frame, in dB."),
        noted(
            "psnr_whole",
            pa.float64(),
            "What psnr would be without tiles, in dB; null where there are none, or where a whole "
            "frame does not fit in memory.",
            nullable=True,
        ),
    ]
)
SHOTS_SCHEMA = pa.schema(
    [
        noted("video", pa.string(), "Name, relative to the corpus."),
        noted("start_s", pa.float64(), "Of a shot, in seconds of the video.", nullable=True),
        noted("end_s", pa.float64(), "Where its last frame ends.", nullable=True),
        noted("detector", pa.string(), "What found it, and its version; or `table`."),
        noted("settings", pa.string(), "Of the detector."),
        noted("problem", pa.string(), "Why the shots are not known.", nullable=True),
    ]
)
"""A row is a shot, or a video whose shots are not known: `start_s` and `end_s` are null then."""


@dataclass(frozen=True, order=True)
class ClipError:
    """One failed clip."""

    video: str
    clip_id: str
    column: str = field(compare=False)
    reason: str = field(compare=False)


class Reports:
    """The reports in the making: every commit is added, in the order of `list_commits`."""

    def __init__(self) -> None:
        self._errors: dict[str, ClipError] = {}
        self.quality: list[tuple[ShardKey, ClipQuality]] = []
        """Of the clips that were decoded while they were encoded."""

    def add(self, commit: Commit) -> None:
        for failure in commit.failed:
            error = ClipError(failure.video, failure.clip_id, commit.column, failure.reason)
            if failure.reason != WAS_REMOVED:
                self._errors.setdefault(failure.clip_id, error)
        self.quality += [(commit.key, quality) for quality in commit.quality]

    @property
    def errors(self) -> list[ClipError]:
        """Failed clips by video; the first column that lacks a clip speaks for it."""
        return sorted(self._errors.values())

    def files(self, plan: Plan) -> Mapping[str, bytes]:
        """Return the reports, name -> bytes; without quality.parquet if no clip was decoded, and
        without shots.parquet if none were looked for."""
        rows = [
            {"video": row["video"], "clip_id": None, "stage": "probe", "reason": row["reason"]}
            for row in plan.failed_videos().to_pylist()
        ]
        rows += [
            {"video": e.video, "clip_id": e.clip_id, "stage": e.column, "reason": e.reason}
            for e in self.errors
        ]
        found = {ERRORS: _parquet(rows, ERRORS_SCHEMA)}
        if self.quality:
            found[QUALITY] = quality_parquet(self.quality)
        if plan.spec.shots:
            found[SHOTS] = shots_parquet(plan)
        return found


def quality_parquet(clips: Iterable[tuple[ShardKey, ClipQuality]]) -> bytes:
    """Return the bytes of quality.parquet, its rows in the order of `clips`."""
    rows = [{"bucket": key.bucket, "shard": key.shard, **vars(clip)} for key, clip in clips]
    return _parquet(rows, QUALITY_SCHEMA)


def shots_parquet(plan: Plan) -> bytes:
    """Return the bytes of shots.parquet, by video in the order of the plan."""
    columns = ("shots_by", "shot_starts_s", "shot_ends_s", "shots_problem")
    videos = plan.video_columns("video", *columns)
    videos = videos.filter(pc.is_valid(videos["shots_by"])).combine_chunks()
    ends = videos["shot_ends_s"]
    counts = np.maximum(pc.list_value_length(ends).fill_null(0).to_numpy(), 1)
    rows = videos.take(np.repeat(np.arange(len(videos)), counts))

    def times(name: str) -> pa.Array:
        known = pc.if_else(pc.is_valid(videos[name]), videos[name], pa.scalar([None], ends.type))
        return pc.list_flatten(known)

    table = pa.table(
        {
            "video": rows["video"],
            "start_s": times("shot_starts_s"),
            "end_s": times("shot_ends_s"),
            "detector": rows["shots_by"],
            "settings": pa.repeat(plan.spec.shots, len(rows)),
            "problem": rows["shots_problem"],
        },
        schema=SHOTS_SCHEMA,
    )
    return _written(table)


def _parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    return _written(pa.Table.from_pylist(rows, schema))


def _written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def read_quality(files: Files, columns: Sequence[str]) -> pa.Table | None:
    """Return columns of quality.parquet, None if there is none; StoreError if it is damaged."""
    where = f"{files.url}/{QUALITY}"
    try:
        table = bounded_table(files.read(QUALITY)).select(columns)
        table = table.cast(pa.schema([QUALITY_SCHEMA.field(name) for name in columns]))
        if any(table[f.name].null_count for f in table.schema if not f.nullable):
            raise ValueError("a value is missing")
        return table
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, MemoryError, pa.ArrowException) as err:
        raise StoreError(
            f"{where} cannot be read: {err}. Restore it, with its columns {', '.join(columns)}, "
            "from a copy."
        ) from err


def report_damage(data: bytes, expected: bytes | None, versions: Mapping[str, str]) -> str:
    """Return what is wrong with a report's file; nothing if it is `expected`, where that is known.

    Another version of pyarrow may say the same table by other bytes; which one wrote it is part of
    the store's `versions`.
    """
    if data == expected:
        return ""
    try:
        writer = pq.read_metadata(pa.BufferReader(data)).created_by
        table = bounded_table(data)
        same = expected is None or table.equals(bounded_table(expected))
    except (OSError, KeyError, ValueError, MemoryError, pa.ArrowException) as err:
        return f"it cannot be read ({err})"
    if not same or (expected is not None and writer == WRITER):
        return "it is not what plan and commits say"
    known = re.escape(versions["pyarrow"]) if "pyarrow" in versions else r"[\d.]+"
    if not re.fullmatch(WRITER.replace(pa.__version__, known), writer or ""):
        return "it was changed since it was written"
    return ""
