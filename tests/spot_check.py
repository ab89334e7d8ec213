"""A small store made in this process: drawn videos, encoded without workers, in a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.images import encode_image
from reducio_latents.corpus import list_corpus
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import probe_video
from reducio_latents.encode.columns import ClipBatch, ContentImageColumn, MotionColumn, RowFailed
from reducio_latents.files import LocalFiles
from reducio_latents.store.commit import ClipQuality, Failure, ShardKey
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import Plan, PlanSpec, write_part
from reducio_latents.store.reports import quality_parquet
from reducio_latents.store.row_statistics import row_statistics
from reducio_latents.store.writer import ColumnRows, Row, StoreWriter
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import fit_frame

Frames = NDArray[np.uint8]
SIDE = 64
RATE_FPS = 16.0


def moving(seed: int, frames: int = 16, side: int = SIDE) -> Frames:
    """Return a smooth scene that moves to the right."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    shift = np.arange(frames)[:, None, None] / 60
    waves = [
        0.5 + 0.4 * np.sin(2 * np.pi * (a * (x - shift) + b * y) + c) for a, b, c in rng.rand(3, 3)
    ]
    return (np.stack(waves, axis=-1) * 255).astype(np.uint8)


def write_video(path: Path, frames: Frames) -> None:
    """Write frames without loss of more than rounding, at 16 fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


def make_store(
    folder: Path,
    videos: Mapping[str, Frames],
    *,
    model: str = "bicubic-32x",
    images: bool = True,
    shard_rows: int = 2,
    broken: Sequence[str] = (),
    captions: Mapping[str, str] | None = None,
) -> tuple[Path, Path]:
    """Write `videos` and encode them; return the store and the corpus.

    Clips of the videos named in `broken` are recorded as failed.
    """
    corpus, root = folder / "videos", folder / "clips.latents"
    for name, frames in videos.items():
        write_video(corpus / name, frames)
    for name, text in (captions or {}).items():
        (corpus / name).write_text(text, encoding="utf-8")
    bucket = Bucket(16, SIDE, SIDE)
    spec = PlanSpec(clip=ClipSpec(), buckets=(bucket,), shard_rows=shard_rows)
    listed = list_corpus(corpus)
    backend = get_backend("pyav")
    part = plan_part(listed, {v.video: probe_video(v.source, backend) for v in listed}, spec)
    plan, files = Plan.of(part), LocalFiles(root)
    write_part(files, 0, part)
    encoders: list[MotionColumn | ContentImageColumn] = [
        MotionColumn(load_autoencoder(model), "bicubic")
    ]
    if images:
        encoders.append(ContentImageColumn("webp", "bicubic"))
    meta = StoreMeta(
        shard_rows=shard_rows,
        buckets=(bucket.name,),
        corpus=str(corpus),
        columns={encoder.name: encoder.describe([bucket]) for encoder in encoders},
    )
    writer = StoreWriter.open(files, meta, {bucket.name: plan.counts().clips["planned"]})
    for shard in plan.shards():
        key = ShardKey(shard.bucket, shard.shard)
        rows = plan.shard_clips(*key).to_pylist()
        batch = _batch(key, rows, plan, corpus, broken)
        failed = [
            Failure(row=r["row"], clip_id=r["clip_id"], video=r["video"], reason="it was bad")
            for r in rows
            if r["video"] in broken
        ]
        columns = {e.name: _column(e, batch, len(rows), failed) for e in encoders}
        writer.write_shard(key, [row["clip_id"] for row in rows], columns)
    write_index(files, build_index(files, use_cache=False))
    return root, corpus


def record(root: Path, psnr_db: Mapping[str, float]) -> None:
    """Write quality.parquet as if these clips had been decoded while encoding."""
    key = ShardKey(f"16x{SIDE}x{SIDE}", 0)
    clips = [
        (key, ClipQuality(row=row, clip_id=clip_id, psnr=value, psnr_frames=(value,) * 16))
        for row, (clip_id, value) in enumerate(psnr_db.items())
    ]
    (root / "quality.parquet").write_bytes(quality_parquet(clips))


def _batch(
    key: ShardKey,
    rows: Sequence[dict[str, object]],
    plan: Plan,
    corpus: Path,
    broken: Sequence[str],
) -> ClipBatch:
    kept = [row for row in rows if row["video"] not in broken]
    clips = np.zeros((len(kept), 16, SIDE, SIDE, 3), np.uint8)
    bucket = Bucket.parse(key.bucket)
    for clip, row in zip(clips, kept, strict=True):
        source = plan.source(str(row["video"]), str(corpus))
        read = get_backend("pyav").read_clips(
            source,
            (float(str(row["start_s"])),),
            frames=16,
            rate_fps=RATE_FPS,
            transform=lambda frame: fit_frame(frame, bucket, "bicubic"),
        )
        found = next(iter(read))
        if isinstance(found, Exception):
            raise found
        clip[:] = np.stack(found.frames)
    return ClipBatch(
        key=key,
        bucket=bucket,
        rows=tuple(int(str(row["row"])) for row in kept),
        clip_ids=tuple(str(row["clip_id"]) for row in kept),
        captions=((),) * len(kept),
        frames_BTHWC=torch.from_numpy(clips),
        content_files=tuple(encode_image(clip[7], "webp") for clip in clips),
    )


def _column(
    encoder: MotionColumn | ContentImageColumn,
    batch: ClipBatch,
    count: int,
    failed: Sequence[Failure],
) -> ColumnRows:
    made = list(encoder.launch(batch)()) if batch.rows else []
    rows: list[Row] = [None] * count
    for row, value in zip(batch.rows, made, strict=True):
        assert not isinstance(value, RowFailed)
        rows[row] = value
    statistics = row_statistics(encoder.describe([batch.bucket]), rows)
    return ColumnRows(rows=rows, failed=failed, statistics=statistics)
