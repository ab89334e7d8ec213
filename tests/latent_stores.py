"""Synthetic stores for reading: videos of several clips, several buckets, every kind of column.

Nothing is decoded or encoded. The first value of a clip's moments is its number among all clips, so
a test can tell from a batch which clips it holds.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import Scalar
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.files import Files, LocalFiles
from reducio_latents.files.source import VideoSource
from reducio_latents.store import Store
from reducio_latents.store.commit import Failure, ShardKey
from reducio_latents.store.container import array_rows
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import ColumnMeta, StoreMeta
from reducio_latents.store.plan import PlanSpec, read_plan, write_part
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.text_rows import TEXT_MEDIA_TYPE, CaptionTokens, pack_text_row
from reducio_latents.store.writer import ColumnRows, Row, StoreWriter
from tests.stores import put_meta

CHANNELS = 2
WIDTH = 5
"""Of the token vectors of a text."""


@dataclass(frozen=True)
class StoreSpec:
    """What a synthetic store holds."""

    videos: int = 6
    clips_per_video: int = 4
    """Clips of the longest video; of `varied` videos, the others have 1, 2, ... of them."""
    varied: bool = False
    buckets: tuple[str, ...] = ("16x32x32",)
    """Videos take turns among them."""
    shard_rows: int = 8
    columns: tuple[str, ...] = ("motion",)
    container: Literal["zarr", "webdataset"] = "zarr"
    compression: Literal["none", "zstd"] = "none"
    """Of the column `text`."""
    failed: frozenset[int] = frozenset()
    """Numbers of the clips that could not be made."""
    captions: Callable[[int], tuple[str, ...]] = field(default=lambda video: (f"video {video}",))
    duplicates: Mapping[int, int] = field(default_factory=dict)
    """Video -> the earlier one that has the same bytes."""
    extra: Callable[[int], Mapping[str, Scalar]] = field(default=lambda video: {})
    """What the corpus' table says of a video."""
    policy: str = "all"
    weights: str = "a"
    """Stands for the encoder's weights in its fingerprint."""


def moments_of(
    number: int, shape: tuple[int, ...] = (2 * CHANNELS, 4, 1, 1)
) -> NDArray[np.float16]:
    """Return a clip's moments: noise, but for the first value, which is its number."""
    values = np.random.RandomState(number).standard_normal(shape).astype(np.float16)
    values.reshape(-1)[0] = number
    return values


def scores_of(number: int) -> NDArray[np.float32]:
    """Return a clip's scores, motion and brightness: its number, and NaN for every fifth."""
    return np.array([number, np.nan if number % 5 == 4 else number % 5], np.float32)


def numbers_in(moments: Tensor) -> list[int]:
    """Return which clips a batch of moments holds."""
    return [int(value) for value in moments.reshape(-1, *moments.shape[-4:]).flatten(1)[:, 0]]


def image_of(number: int, bucket: str) -> NDArray[np.uint8]:
    """Return a clip's content image, uint8 (H, W, 3)."""
    size = Bucket.parse(bucket)
    return np.random.RandomState(number).randint(
        0, 256, (size.height, size.width, 3), dtype=np.uint8
    )


def text_of(number: int, caption: int) -> NDArray[np.float32]:
    """Return the token vectors of one of a clip's captions."""
    rng = np.random.RandomState(1000 * number + caption)
    return rng.standard_normal((number % 4, WIDTH)).astype(np.float16).astype(np.float32)


def write_store(path: Path | Files, spec: StoreSpec | None = None, **changes: object) -> Store:
    """Write a whole store and open it. On a disk, the same one again is a copy."""
    spec = replace(spec or StoreSpec(), **changes)  # type: ignore[arg-type]
    if not isinstance(path, Path) or any(path.glob("*")):
        return _write(LocalFiles(path) if isinstance(path, Path) else path, spec)
    if repr(spec) not in WRITTEN:
        _write(LocalFiles(path), spec)
        found = [file for file in path.rglob("*") if file.is_file()]
        WRITTEN[repr(spec)] = spec, {file.relative_to(path): file.read_bytes() for file in found}
    for name, data in WRITTEN[repr(spec)][1].items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return Store(LocalFiles(path))


WRITTEN: dict[str, tuple[StoreSpec, dict[Path, bytes]]] = {}
"""By what a spec reads like: the spec, so that its functions keep their places; and the files."""


def _write(files: Files, spec: StoreSpec) -> Store:
    writer = plan_store(files, spec)
    shards = read_plan(files).shards()  # type: ignore[union-attr]
    for shard in shards:
        write_shard(writer, spec, ShardKey(shard.bucket, shard.shard))
    finish_store(writer)
    return Store(files)


def plan_store(files: Files, spec: StoreSpec) -> StoreWriter:
    """Write the plan and the description of a store that has no shard yet."""
    plan_spec = PlanSpec(
        clip=ClipSpec(policy=spec.policy),
        buckets=tuple(map(Bucket.parse, spec.buckets)),
        shard_rows=spec.shard_rows,
    )
    videos = [video_of(i, spec) for i in range(spec.videos)]
    records = {v.video: record_of(i, spec) for i, v in enumerate(videos)}
    write_part(files, 0, plan_part(videos, records, plan_spec))
    plan = read_plan(files)
    assert plan is not None
    return StoreWriter.open(files, meta_of(spec), array_rows(plan.shards(), spec.shard_rows))


def video_of(number: int, spec: StoreSpec) -> CorpusVideo:
    name = f"folder/{number:05d}.mp4"
    return CorpusVideo(
        name,
        VideoSource(f"/corpus/{name}"),
        captions=spec.captions(number),
        extra=spec.extra(number),
    )


def record_of(number: int, spec: StoreSpec) -> ProbeRecord:
    original = spec.duplicates.get(number, number)
    clips = 1 + original % spec.clips_per_video if spec.varied else spec.clips_per_video
    bucket = Bucket.parse(spec.buckets[original % len(spec.buckets)])
    return ProbeRecord(
        codec="h264",
        width=bucket.width,
        height=bucket.height,
        rate_fps=16.0,
        duration_s=clips + 0.2,
        frames=16 * clips,
        bytes=1,
        sha256=hashlib.sha256(b"%d" % original).hexdigest(),
    )


def meta_of(spec: StoreSpec) -> StoreMeta:
    sizes = {name: Bucket.parse(name) for name in spec.buckets}
    columns = {
        "motion": ColumnMeta(
            kind="array",
            content="moments",
            encoder="fake",
            config={"weights": spec.weights},
            row_shapes={
                n: (2 * CHANNELS, 4, b.height // 32, b.width // 32) for n, b in sizes.items()
            },
            final={"rule": "layer_norm", "eps": 1e-5},
        ),
        "content_latent": ColumnMeta(
            kind="array",
            content="moments",
            encoder="fake-2d",
            config={},
            row_shapes={n: (8, b.height // 16, b.width // 16) for n, b in sizes.items()},
            final={"rule": "scale_shift", "scale": 0.5, "shift": 0.25},
        ),
        "content_image": ColumnMeta(
            kind="bytes", content="image/png", encoder="png", config={}, dtype="bytes"
        ),
        "caption": ColumnMeta(
            kind="bytes", content="text/plain", encoder="utf-8", config={}, dtype="bytes"
        ),
        "text": ColumnMeta(
            kind="bytes",
            content=TEXT_MEDIA_TYPE,
            encoder="fake-text",
            config={},
            dtype="bytes",
            compression=spec.compression,
        ),
        "scores": ColumnMeta(
            kind="array",
            content="scores",
            encoder="fake-scores",
            config={"names": ["motion", "brightness"]},
            dtype="float32",
            row_shapes=dict.fromkeys(sizes, (2,)),
        ),
    }
    return StoreMeta(
        container=spec.container,
        shard_rows=spec.shard_rows,
        clip=ClipSpec(policy=spec.policy),
        buckets=spec.buckets,
        corpus="/corpus",
        columns={name: columns[name] for name in spec.columns},
    )


def write_shard(
    writer: StoreWriter, spec: StoreSpec, key: ShardKey, columns: Sequence[str] | None = None
) -> None:
    """Write one shard of a planned store."""
    plan = read_plan(writer.files)
    assert plan is not None
    clips = plan.shard_clips(key.bucket, key.shard)
    numbers = {name: i for i, name in enumerate(plan.clips["clip_id"].to_pylist())}
    rows = clips.select(["clip_id", "video", "start_s"]).to_pylist()
    captions = clips["captions"].to_pylist()
    failures = [
        Failure(row=i, clip_id=row["clip_id"], video=row["video"], reason="it is broken")
        for i, row in enumerate(rows)
        if numbers[row["clip_id"]] in spec.failed
    ]
    broken = {failure.row for failure in failures}
    columns = spec.columns if columns is None else columns
    made: dict[str, ColumnRows] = {}
    for name in columns:
        meta = writer.meta.columns[name]
        values = [
            None if i in broken else _row(name, meta, numbers[row["clip_id"]], key, captions[i])
            for i, row in enumerate(rows)
        ]
        made[name] = ColumnRows(rows=values, failed=failures, statistics=_statistics(name, values))
    writer.write_shard(key, [row["clip_id"] for row in rows], made, details=rows)


def _row(name: str, meta: ColumnMeta, number: int, key: ShardKey, captions: Sequence[str]) -> Row:
    if name == "scores":
        return scores_of(number)
    if meta.kind == "array":
        return moments_of(number, meta.row_shapes[key.bucket])
    if name == "caption":
        return "\0".join(captions).encode()
    if name == "text":
        texts = [text_of(number, i) for i in range(max(1, len(captions)))]
        return pack_text_row([CaptionTokens(t, len(t)) for t in texts], "float16")
    out = io.BytesIO()
    Image.fromarray(image_of(number, key.bucket)).save(out, "PNG")
    return out.getvalue()


def _statistics(name: str, rows: Sequence[Row]) -> dict[str, ChannelStatistics]:
    means = [row[:CHANNELS].astype(np.float32) for row in rows if isinstance(row, np.ndarray)]
    if name != "motion" or not means:
        return {}
    flat = np.stack(means).reshape(len(means), -1)
    flat = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    final = flat.reshape(len(means), *means[0].shape)
    return {"final": ChannelStatistics.of(final)}


def finish_store(writer: StoreWriter) -> None:
    """Write the index and the statistics, as the end of an encode run does."""
    index = build_index(writer.files, use_cache=False)
    write_index(writer.files, index)
    merged: dict[str, ChannelStatistics] = {}
    store = Store(writer.files)
    for (column, key), _ in index.entries.items():
        for name, part in store.commit(key, column).statistics.items():
            merged[name] = merged[name].merge(part) if name in merged else part
    summary = {
        name: {"mean": list(s.mean), "std": list(s.std), "count": [float(s.count)]}
        for name, s in merged.items()
    }
    writer.meta = replace(writer.meta, statistics={"motion/all": summary} if summary else {})
    put_meta(writer.files, writer.meta)
