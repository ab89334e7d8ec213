"""Small stores without any video: a plan, a few columns, rows made from their clip's id."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.files import Files
from reducio_latents.store.commit import Commit, Failure, ShardKey, commit_path, list_commits
from reducio_latents.store.container import array_rows
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import ROOT, ColumnMeta, StoreMeta
from reducio_latents.store.plan import PlanPart, PlanSpec, read_plan, write_part
from reducio_latents.store.plan.parts import ShardRange
from reducio_latents.store.plan.tables import CLIP_SCHEMA, VIDEO_SCHEMA
from reducio_latents.store.reports import Reports
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.writer import ColumnRows, Row, StoreWriter

BUCKET = "16x32x64"
SHAPE = (4, 1, 1, 2)
FRAMES, SIDES = 16, (32, 64)

MOTION = ColumnMeta(
    kind="array",
    content="moments",
    encoder="fake",
    config={"weights_sha256": "a" * 64},
    row_shapes={BUCKET: SHAPE},
    final={"rule": "layer_norm", "eps": 1e-5},
)
IMAGE = ColumnMeta(kind="bytes", content="image/webp", encoder="webp", config={}, dtype="bytes")
CAPTION = ColumnMeta(kind="bytes", content="text/plain", encoder="utf-8", config={}, dtype="bytes")
COLUMNS = {"motion": MOTION, "content_image": IMAGE, "caption": CAPTION}


def clip_ids(count: int) -> list[str]:
    return [f"{zlib.crc32(b'%d' % number):08x}-{number * 1000:09d}" for number in range(count)]


def plan_part(count: int, shard_rows: int, bucket: str = BUCKET) -> PlanPart:
    """Return a plan of `count` clips, one a video."""
    ids = clip_ids(count)
    videos = [f"folder/{name}.mp4" for name in ids]
    rows = [
        {
            "clip_id": ids[i],
            "video": videos[i],
            "start_s": i / 2,
            "bucket": bucket,
            "shard": i // shard_rows,
            "row": i % shard_rows,
            "status": "planned",
            "captions": [f"caption {i}"],
        }
        for i in range(count)
    ]
    size = Bucket.parse(bucket)
    known = {"url": "", "clips": 1, "status": "planned"}
    blank = {field.name: None for field in VIDEO_SCHEMA}
    return PlanPart(
        number=0,
        spec=PlanSpec(clip=ClipSpec(frames=size.frames), buckets=(size,), shard_rows=shard_rows),
        videos=pa.Table.from_pylist(
            [{**blank, **known, "video": v} for v in sorted(videos)], VIDEO_SCHEMA
        ),
        clips=pa.Table.from_pylist(rows, CLIP_SCHEMA),
        shards={bucket: ShardRange(0, count)},
    )


def motion_row(clip_id: str) -> NDArray[np.float16]:
    rng = np.random.RandomState(zlib.crc32(clip_id.encode()))
    return rng.standard_normal(SHAPE).astype(np.float16)


def row_of(column: str, clip_id: str) -> Row:
    if column == "motion":
        return motion_row(clip_id)
    number = int(clip_id[-9:]) // 1000
    if column == "caption":  # some are equal, some empty
        return b"" if number % 4 == 3 else b"caption %d" % (number % 3)
    rng = np.random.RandomState(number)
    return b"RIFF" + rng.bytes(5 + number % 7)


def column_rows(
    column: str, ids: Sequence[str], failed: Sequence[int] = (), videos: str = "folder"
) -> ColumnRows:
    rows = [None if i in failed else row_of(column, name) for i, name in enumerate(ids)]
    statistics = {}
    arrays = [row for row in rows if isinstance(row, np.ndarray)]
    if arrays:
        statistics["mean"] = ChannelStatistics.of(np.stack(arrays))
    failures = [
        Failure(row=i, clip_id=ids[i], video=f"{videos}/{ids[i]}.mp4", reason="it is broken")
        for i in sorted(failed)
    ]
    return ColumnRows(rows=rows, failed=failures, statistics=statistics)


def row_in(array: Any, row: int, shard_rows: int = 4) -> bytes | None:
    """Return a row of any length as other readers get it, of an array that can be sliced."""
    shard, number = divmod(row, shard_rows)
    start, length = np.asarray(array[shard, 16 * number : 16 * number + 16]).view("<u8").tolist()
    if start == 2**64 - 1:
        return None
    return np.asarray(array[shard, start : start + length]).tobytes()


def make_meta(
    container: Literal["zarr", "webdataset"] = "zarr",
    shard_rows: int = 4,
    columns: Mapping[str, ColumnMeta] = COLUMNS,
) -> StoreMeta:
    return StoreMeta(
        container=container,
        shard_rows=shard_rows,
        buckets=(BUCKET,),
        corpus="videos",
        columns=dict(columns),
    )


def open_writer(files: Files, meta: StoreMeta, clips: int) -> StoreWriter:
    """Write the plan if there is none, and open the store."""
    if read_plan(files) is None:
        write_part(files, 0, plan_part(clips, meta.shard_rows))
    return StoreWriter.open(files, meta, rows_of(files, meta))


def rows_of(files: Files, meta: StoreMeta) -> dict[str, int]:
    plan = read_plan(files)
    assert plan is not None
    return array_rows(plan.shards(), meta.shard_rows)


def write_shards(
    writer: StoreWriter,
    columns: Sequence[str] = tuple(COLUMNS),
    failed: Mapping[int, Sequence[int]] | None = None,
    only: Sequence[int] | None = None,
) -> list[Commit]:
    """Write every shard of the plan; `failed` names the failed rows of a shard."""
    plan = read_plan(writer.files)
    assert plan is not None
    commits = []
    for shard in plan.shards():
        if only is not None and shard.shard not in only:
            continue
        table = plan.shard_clips(shard.bucket, shard.shard)
        ids = table["clip_id"].to_pylist()
        details: list[dict[str, Any]] = table.select(["video", "start_s"]).to_pylist()
        bad = (failed or {}).get(shard.shard, ())
        # Captions do not fail with their video.
        rows = {c: column_rows(c, ids, () if c == "caption" else bad) for c in columns}
        key = ShardKey(shard.bucket, shard.shard)
        commits += writer.write_shard(key, ids, rows, details=details)
    return commits


def put_commit(files: Files, commit: Commit) -> None:
    """Put a commit in the place of the one that is there."""
    files.write(commit_path(commit.key, commit.column), commit.to_json())


def put_meta(files: Files, meta: StoreMeta) -> None:
    """Write a description, and what other readers are told, as the end of a run does."""
    writer, plan = StoreWriter(files, meta), read_plan(files)
    assert plan is not None
    writer.write_coordinates(plan)
    files.write(ROOT, meta.to_json(writer.describe(meta, rows_of(files, meta))))


def finish(writer: StoreWriter) -> None:
    """Write what an encode run writes last."""
    write_index(writer.files, build_index(writer.files, use_cache=False))
    plan, reports = read_plan(writer.files), Reports()
    assert plan is not None
    for column, key in list_commits(writer.files):
        reports.add(Commit.read(writer.files, key, column))
    for name, data in reports.files(plan).items():
        writer.files.write(name, data)
    clips = {"found": 7, "encoded": 6, "skipped": 0, "failed": 1}
    writer.meta = replace(writer.meta, counts={"clips": clips}, versions={"numpy": "1"})
    put_meta(writer.files, writer.meta)


def make_store(
    files: Files,
    container: Literal["zarr", "webdataset"] = "zarr",
    clips: int = 7,
    shard_rows: int = 4,
    columns: Mapping[str, ColumnMeta] = COLUMNS,
    failed: Mapping[int, Sequence[int]] | None = None,
) -> StoreWriter:
    """Write a whole store: by default 7 clips in shards of 4 and 3."""
    writer = open_writer(files, make_meta(container, shard_rows, columns), clips)
    write_shards(writer, tuple(columns), failed)
    finish(writer)
    return writer


class MemoryFiles:
    """Files in a dictionary; `before_write` may raise."""

    def __init__(self, url: str = "memory") -> None:
        self._url = url
        self.data: dict[str, bytes] = {}
        self.writes = 0
        self.fail_at: int | None = None
        """Number of the write that raises Killed, counted from 1; later ones raise too."""

    @property
    def url(self) -> str:
        return self._url

    def read(self, path: str) -> bytes:
        if path not in self.data:
            raise FileNotFoundError(path)
        return self.data[path]

    def read_range(self, path: str, start: int, length: int) -> bytes:
        data = self.read(path)
        start = max(0, len(data) + start) if start < 0 else start
        return data[start : start + length]

    def write(self, path: str, data: Any) -> None:
        self.writes += 1
        if self.fail_at is not None and self.writes >= self.fail_at:
            raise KilledError(path)
        parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        self.data[path] = b"".join(bytes(part) for part in parts)

    def create(self, path: str, data: Any) -> bool:
        if path not in self.data:
            self.write(path, data)
            return True
        parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        return self.data[path] == b"".join(bytes(part) for part in parts)

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        if self.data.get(path) == old:
            self.write(path, new)
        return self.data.get(path) == new

    def size(self, path: str) -> int | None:
        return len(self.data[path]) if path in self.data else None

    def sizes(self, paths: Any) -> dict[str, int]:
        return {path: len(data) for path, data in self.data.items()}

    def list(self, prefix: str) -> Any:
        return iter(sorted(p for p in self.data if not prefix or p.startswith(f"{prefix}/")))

    def delete(self, path: str) -> None:
        self.data.pop(path, None)

    def local_path(self, path: str) -> None:
        return None


class KilledError(BaseException):
    """The process ends here."""
