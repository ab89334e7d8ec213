"""Import what the published Reducio extraction script writes: a safetensors file per video.

Such a file holds `z` (n, 16, t, h, w), the clips' final latents: one unseeded sample of each
posterior, after the layer norm. Mean and log-variance are gone for good, and so is the content
image, without which the decoder cannot work; so these stores train a diffusion model and are not
decoded. Their columns are named so that nobody takes them for ours:

    latents                `z` of a clip as it is; there is no final rule left to apply
    content_latent_sample  `z_2d`: one sample of SD-VAE's posterior of the centre frame, unscaled
    content_clip           `z_clip`: OpenCLIP's image tokens
    text                   T5 vectors of the caption (`caption_embs` of a folder of their own),
                           without the padding, in float16; clips of a video share them

What is not in the files is not known: which weights made them, the videos' folders (the script
joins them by `_`), captions, and when in its video a clip starts: `start_s` counts from the first
frame that the script took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from reducio_latents.core.clips import ClipSpec
from reducio_latents.corpus.build import clip_prefix
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.store.commit import Commit, Failure, ShardKey, list_commits
from reducio_latents.store.container import array_rows
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import ColumnMeta, StoreMeta
from reducio_latents.store.plan import (
    CLIP_SCHEMA,
    VIDEO_SCHEMA,
    Plan,
    PlanPart,
    PlanSpec,
    write_part,
)
from reducio_latents.store.plan.parts import ShardRange
from reducio_latents.store.row_kinds import Row, row_kind
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.text_rows import TEXT_MEDIA_TYPE
from reducio_latents.store.turns import at_work
from reducio_latents.store.writer import ColumnRows, StoreWriter, read_meta_if_any
from reducio_latents.upkeep.convert import ConvertReport, read_payloads
from reducio_latents.upkeep.extraction.options import ReferenceOptions
from reducio_latents.upkeep.extraction.reading import (
    ExtractedFile,
    MisfitError,
    agreeing,
    read_text,
)

COLUMNS = {
    "latents": ("z", "final latents"),
    "content_latent_sample": ("z_2d", "sample"),
    "content_clip": ("z_clip", "tokens"),
}
"""Column -> its key in the files, and what a row is."""
TEXT = "text"
ENCODER = "reducio extract_latent"


@dataclass(frozen=True)
class ReferenceReport:
    """What became of the files."""

    files: int
    """Found; those that are not in `failed` are stored."""
    clips: int
    failed: dict[str, str]
    """File -> why it is left out."""
    stored: ConvertReport


def import_reference(
    folder: Path,
    target: Files,
    text: Path | None = None,
    options: ReferenceOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceReport:
    """Make a store of the safetensors in `folder`, and of the T5 files of their names in `text`.

    A file that does not fit is left out, with its reason in the plan and in the report. Every row
    is read back and compared with the file that it came from. Run again, it goes on where it was
    stopped. Raise StoreError if no file fits, or if `target` is in use for something else.
    """
    options = options or ReferenceOptions()
    options.store_container()  # refuses a trainer's format before files are read
    paths = sorted(folder.glob("*.safetensors"))
    files, failed = agreeing(paths, options.temporal_stride, options.spatial_stride)
    if not files:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:3])
        raise StoreError(f"{folder} has no .safetensors files that fit. {why or 'Check the path'}.")
    part = _plan(files, failed, options)
    read_meta_if_any(target)  # refuses a place that is taken by something else
    with at_work(target, "importing"):
        write_part(target, 0, part)
        plan = Plan.of(part)
        meta = _describe(files, part.spec, options, with_text=text is not None)
        writer = StoreWriter.open(target, meta, array_rows(plan.shards(), options.shard_rows))
        run = _Import({file.video: file for file in files}, plan, writer, text)
        stored = run.shards(progress)
        run.finish(len(failed))
    return ReferenceReport(len(paths), part.clips.num_rows, failed, stored)


def _plan(
    files: Sequence[ExtractedFile], failed: Mapping[str, str], options: ReferenceOptions
) -> PlanPart:
    """Return the plan of all clips, by bucket and name of the file."""
    strides = options.temporal_stride, options.spatial_stride
    buckets = tuple(sorted({file.bucket(*strides) for file in files}))
    spec = PlanSpec(
        clip=ClipSpec(frames=buckets[0].frames, rate_fps=files[0].rate_fps),
        buckets=buckets,
        shard_rows=options.shard_rows,
    )
    clips: list[dict[str, Any]] = []
    shards = {}
    for bucket in buckets:
        begin = len(clips)
        for file in files:
            if file.bucket(*strides) == bucket:
                clips += _clips_of(file, bucket.name, len(clips) - begin, spec)
        shards[bucket.name] = ShardRange(0, len(clips) - begin)
    known = {
        file.path.name: {
            "rate_fps": file.rate_fps,
            "clips": file.clips,
            "bucket": file.bucket(*strides).name,
            "status": "planned",
        }
        for file in files
    }
    known |= {n: {"clips": 0, "status": "failed", "reason": why} for n, why in failed.items()}
    blank = dict.fromkeys(VIDEO_SCHEMA.names)
    videos = [{**blank, "video": Path(n).stem, "url": n, **about} for n, about in known.items()]
    return PlanPart(
        number=0,
        spec=spec,
        videos=pa.Table.from_pylist(sorted(videos, key=lambda v: str(v["video"])), VIDEO_SCHEMA),
        clips=pa.Table.from_pylist(clips, CLIP_SCHEMA),
        shards=shards,
    )


def _clips_of(
    file: ExtractedFile, bucket: str, first_row: int, spec: PlanSpec
) -> list[dict[str, Any]]:
    starts = [number * spec.clip.span_s for number in range(file.clips)]
    return [
        {
            "clip_id": f"{clip_prefix(file.video)}_{round(start_s * 1000):09d}",
            "video": file.video,
            "start_s": start_s,
            "bucket": bucket,
            "shard": row // spec.shard_rows,
            "row": row % spec.shard_rows,
            "status": "planned",
            "captions": [],
        }
        for row, start_s in enumerate(starts, first_row)
    ]


def _describe(
    files: Sequence[ExtractedFile], spec: PlanSpec, options: ReferenceOptions, with_text: bool
) -> StoreMeta:
    strides = options.temporal_stride, options.spatial_stride
    config = {"weights": "unknown", "temporal_stride": strides[0], "spatial_stride": strides[1]}
    columns = {}
    for name, (key, content) in COLUMNS.items():
        having = [file for file in files if key in file.shapes]
        if having:
            columns[name] = ColumnMeta(
                kind="array",
                content=content,
                encoder=ENCODER,
                config={**config, "key": key},
                dtype=having[0].dtypes[key],
                row_shapes={f.bucket(*strides).name: f.shapes[key][1:] for f in having},
            )
    if with_text:
        columns[TEXT] = ColumnMeta(
            kind="bytes",
            content=TEXT_MEDIA_TYPE,
            encoder=ENCODER,
            config={"weights": "unknown", "key": "caption_embs"},
            dtype="bytes",
        )
    return StoreMeta(
        container=options.store_container(),
        shard_rows=options.shard_rows,
        clip=spec.clip,
        buckets=tuple(bucket.name for bucket in spec.buckets),
        resize="unknown",
        corpus=str(files[0].path.parent),
        columns=columns,
    )


@dataclass(frozen=True)
class _Import:
    """Files, where their clips go, and who writes them."""

    files: Mapping[str, ExtractedFile]
    """By video."""
    plan: Plan
    writer: StoreWriter
    text: Path | None

    def shards(self, progress: Callable[[int, int], None]) -> ConvertReport:
        self.writer.drop_bad_commits(self.plan, self.writer.meta.columns)
        there = set(list_commits(self.writer.files))
        planned = self.plan.shards()
        commits: list[Commit] = []
        written: list[Commit] = []
        for number, (bucket, shard, _) in enumerate(planned):
            key = ShardKey(bucket, shard)
            clips = self.plan.shard_clips(*key, ["clip_id", "video", "start_s"]).to_pylist()
            columns = {
                n: self._rows(n, clips) for n in self.writer.meta.columns if self._fits(n, key)
            }
            missing = {n: rows for n, rows in columns.items() if (n, key) not in there}
            ids = [clip.pop("clip_id") for clip in clips]
            if missing:
                written += self.writer.write_shard(key, ids, missing, details=clips)
            commits += self._prove(key, columns)
            progress(number + 1, len(planned))
        return ConvertReport.of(len(planned), commits, there, written)

    def _fits(self, name: str, key: ShardKey) -> bool:
        """Whether any file of the bucket has the column."""
        return row_kind(self.writer.meta.columns[name]).has_bucket(key.bucket)

    def _rows(self, name: str, clips: Sequence[Mapping[str, Any]]) -> ColumnRows:
        rows: list[Row] = []
        failed: list[Failure] = []
        for video, group in groupby(clips, key=itemgetter("video")):
            several = list(group)
            try:
                rows += self._rows_of(name, self.files[video], several)
            except MisfitError as err:
                failed += [
                    Failure(row=row, clip_id=clip["clip_id"], video=video, reason=str(err))
                    for row, clip in enumerate(several, len(rows))
                ]
                rows += [None] * len(several)
        arrays = [row for row in rows if isinstance(row, np.ndarray)]
        statistics = {}
        if name == "latents" and arrays:
            statistics["final"] = ChannelStatistics.of(np.stack(arrays))
        return ColumnRows(rows=rows, failed=failed, statistics=statistics)

    def _rows_of(
        self, name: str, file: ExtractedFile, clips: Sequence[Mapping[str, Any]]
    ) -> list[Row]:
        """Return the rows of clips of one file; raise MisfitError if it has no such column."""
        if name == TEXT:
            assert self.text is not None
            return [read_text(self.text / file.path.name)] * len(clips)
        key, _ = COLUMNS[name]
        if key not in file.shapes:
            raise MisfitError(f"{file.path.name} has no {key}")
        span_s = self.plan.spec.clip.span_s
        tensor = file.tensor(key)
        return [tensor[round(clip["start_s"] / span_s)] for clip in clips]

    def _prove(self, key: ShardKey, columns: Mapping[str, ColumnRows]) -> list[Commit]:
        """Raise StoreError unless the store holds these rows."""
        files, meta = self.writer.files, self.writer.meta
        commits, memo = [], dict[str, bytes]()
        for name, column in columns.items():
            commit = Commit.read(files, key, name)
            stored = read_payloads(files, meta, commit, memo)
            wanted = [r.tobytes() if isinstance(r, np.ndarray) else r for r in column.rows]
            if stored != wanted or commit.failed != tuple(column.failed):
                raise StoreError(
                    f"{files.url}: {key} {name} holds other rows than {meta.corpus}. "
                    "Import into a new folder."
                )
            commits.append(commit)
        return commits

    def finish(self, failed_files: int) -> None:
        """Write what an encode run writes last: index, counts, statistics."""
        files = self.writer.files
        index = build_index(files, use_cache=False)
        write_index(files, index)
        parts: dict[str, list[ChannelStatistics]] = {}
        missing = set()
        for column, key in index.entries:
            commit = Commit.read(files, key, column)
            for where in (key.bucket, "all") if "final" in commit.statistics else ():
                parts.setdefault(f"{column}/{where}", []).append(commit.statistics["final"])
            if column == "latents":
                missing |= {failure.clip_id for failure in commit.failed}
        found, clips = len(self.files) + failed_files, self.plan.clips.num_rows
        counts = {
            "videos": _tally(found, failed_files),
            "clips": _tally(clips, len(missing)),
        }
        statistics = {
            name: {"final": reduce(ChannelStatistics.merge, some).summary()}
            for name, some in sorted(parts.items())
        }
        described = self.writer.meta
        self.writer.complete(
            self.plan,
            lambda now: replace(now or described, counts=counts, statistics=statistics),
        )


def _tally(found: int, failed: int) -> dict[str, int]:
    return {"found": found, "encoded": found - failed, "skipped": 0, "failed": failed}
