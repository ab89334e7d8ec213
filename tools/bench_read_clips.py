"""The clips that `bench_read.py` and its peers read, and the store that holds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

from reducio_latents.core.clips import ClipSpec  # noqa: E402
from reducio_latents.core.geometry import Bucket, LatentGeometry  # noqa: E402
from reducio_latents.corpus import CorpusVideo  # noqa: E402
from reducio_latents.corpus.build import plan_part  # noqa: E402
from reducio_latents.corpus.probe import ProbeRecord  # noqa: E402
from reducio_latents.files import LocalFiles  # noqa: E402
from reducio_latents.files.source import VideoSource  # noqa: E402
from reducio_latents.store.commit import ShardKey  # noqa: E402
from reducio_latents.store.container import array_rows  # noqa: E402
from reducio_latents.store.index import build_index, write_index  # noqa: E402
from reducio_latents.store.meta import ColumnMeta, StoreMeta  # noqa: E402
from reducio_latents.store.plan import PlanSpec, read_plan, write_part  # noqa: E402
from reducio_latents.store.writer import ColumnRows, StoreWriter  # noqa: E402

SHARD_ROWS = 512
CLIPS_PER_VIDEO = 8
GEOMETRY = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=32)
DEFAULT_CLIPS = {256: 43008, 1024: 2048}
"""At 256 px 0.7 GB of moments, at 1024 px 0.5 GB."""

Sample = tuple[torch.Tensor, list[str]]
"""Moments (B, 2D, t, h, w) float16, and captions if they are asked for."""
Reader = Callable[[], Iterator[Sample]]
"""Gives one shuffled epoch."""


@dataclass(frozen=True)
class Clips:
    """What is read: made anew by every writer, so that nothing has to be held in memory."""

    size: int
    count: int
    batch_size: int
    text: bool

    @property
    def shape(self) -> tuple[int, ...]:
        depth, *grid = GEOMETRY.latent_shape(16, self.size, self.size)
        return (2 * depth, *grid)

    @property
    def row_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """Yield (number of the first clip, moments (512, ...)): noise, the clip's number first."""
        for first in range(0, self.count, SHARD_ROWS):
            rows = min(SHARD_ROWS, self.count - first)
            rng = np.random.default_rng(first)
            block = rng.standard_normal((rows, *self.shape), np.float32).astype(np.float16)
            numbers = np.arange(first, first + rows)
            flat = block.reshape(rows, -1)
            flat[:, 0], flat[:, 1] = numbers // 1024, numbers % 1024
            yield first, block

    def clips(self) -> Iterator[tuple[int, NDArray[np.float16]]]:
        for first, block in self.blocks():
            yield from enumerate(block, first)

    def caption(self, number: int) -> str:
        return f"a caption of video {number // CLIPS_PER_VIDEO}, such as a person would write it"


def numbers_of(moments: torch.Tensor) -> list[int]:
    high, low = moments.flatten(1)[:, :2].to(torch.int64).T
    numbers: list[int] = (1024 * high + low).tolist()
    return numbers


def write_store(clips: Clips, folder: Path, container: str) -> Path:
    """Write the clips as a latent store."""
    path = folder / container
    files, bucket = LocalFiles(path), Bucket(16, clips.size, clips.size)
    videos = [
        CorpusVideo(f"{n:07d}.mp4", VideoSource(f"/{n:07d}.mp4"), (clips.caption(8 * n),))
        for n in range(clips.count // CLIPS_PER_VIDEO)
    ]
    record = ProbeRecord(width=clips.size, height=clips.size, duration_s=CLIPS_PER_VIDEO + 0.1)
    spec = PlanSpec(clip=ClipSpec(), buckets=(bucket,), shard_rows=SHARD_ROWS)
    path.mkdir()
    write_part(files, 0, plan_part(videos, dict.fromkeys([v.video for v in videos], record), spec))
    plan = read_plan(files)
    assert plan is not None
    motion = ColumnMeta(
        kind="array",
        content="moments",
        encoder="noise",
        config={},
        row_shapes={bucket.name: clips.shape},
        final={"rule": "layer_norm", "eps": 1e-5},
    )
    text = ColumnMeta(kind="bytes", content="text/plain", encoder="utf-8", config={}, dtype="bytes")
    meta = StoreMeta(
        container=container,  # type: ignore[arg-type]
        shard_rows=SHARD_ROWS,
        buckets=(bucket.name,),
        columns={"motion": motion, "caption": text},
    )
    writer = StoreWriter.open(files, meta, array_rows(plan.shards(), SHARD_ROWS))
    for (first, block), shard in zip(clips.blocks(), plan.shards(), strict=True):
        rows = plan.shard_clips(shard.bucket, shard.shard)
        captions = [clips.caption(first + i).encode() for i in range(len(block))]
        writer.write_shard(
            ShardKey(shard.bucket, shard.shard),
            rows["clip_id"].to_pylist(),
            {"motion": ColumnRows(rows=list(block)), "caption": ColumnRows(rows=captions)},
            details=rows.select(["video", "start_s"]).to_pylist(),
        )
    write_index(files, build_index(files, use_cache=False))
    return path
