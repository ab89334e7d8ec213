"""`add_column`: more columns for a store, or other ones in place of some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from reducio_latents.core.choices import Colours, Deinterlace, ImageCodec, ResizeMode
from reducio_latents.core.config import convert, made_from
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import CAPTIONS, ColumnEncoder
from reducio_latents.encode.finish import Ledger, run_job
from reducio_latents.encode.job import Job
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.prepare import Planned, list_by
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.registry import build_columns, describe_column
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.stored import COLUMN as CONTENT_IMAGE
from reducio_latents.encode.stored import StoredContent
from reducio_latents.errors import ConfigError, CorpusError, StoreError
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.container import array_rows
from reducio_latents.store.drop import drop_column
from reducio_latents.store.meta import StoreMeta, column_differences
from reducio_latents.store.turns import at_work
from reducio_latents.store.writer import StoreWriter


def add_column(
    store: str | Path,
    columns: Sequence[str] = (),
    options: EncodeOptions | None = None,
    *,
    replacing: Sequence[str] = (),
    corpus: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> EncodeReport:
    """Make `columns` for every clip that `store` has planned; remake those in `replacing`.

    Only these columns are touched. They are made from the stored captions and content images where
    that is exact; where it is not, from the videos of `corpus`, by default the one that the store
    names. Clips, sizes and shards are the store's; of the options (or `settings`, by name) those
    count that say how the columns are made.

    To resume, call again: what is committed stays, also of a column that is being replaced; one
    that is already as asked for is left as it is. Raise ConfigError for no column or an unknown
    one, StoreError for a column that the store has made differently, CorpusError if videos are
    needed and gone.
    """
    ledger = Ledger()
    options = made_from(EncodeOptions, options, settings, "add_column")
    opened = Store(open_files(store))
    with at_work(opened.files, "adding columns"):
        names = tuple(dict.fromkeys([*columns, *replacing]))
        chosen = _options_for(opened.meta, names, options)
        kept = {name: meta for name, meta in opened.meta.columns.items() if name not in replacing}
        encoders = build_columns(chosen, kept)
        meta = _describe(opened, encoders, chosen, replacing)
        needs_videos = _lacks_exact_content(opened, encoders)
        if corpus is None and chosen.root is None:
            chosen = replace(chosen, root=opened.meta.root)
        videos = _list(corpus or opened.meta.corpus, chosen, needs_videos) if needs_videos else {}
        for name in replacing:
            stored = opened.meta.columns.get(name)
            if stored is not None and column_differences(meta.columns[name], stored):
                drop_column(opened.files, opened.meta, name)
        shards = [(s.bucket, s.shard, s.rows) for s in opened.plan.shards()]
        writer = StoreWriter.open(opened.files, meta, array_rows(shards, meta.shard_rows))
        writer.drop_bad_commits(opened.plan, names)
        find = videos.get if needs_videos else partial(opened.plan.source, corpus_root="")
        planned, told = Planned(find, opened.plan), progress or Progress()
        return run_job(Job(chosen, planned, encoders, writer, progress=told), ledger)


def _options_for(meta: StoreMeta, names: tuple[str, ...], options: EncodeOptions) -> EncodeOptions:
    """Return the options with what the store has decided."""
    if not names:
        raise ConfigError("name at least one column to add or to replace, as content_clip.")
    image = meta.columns.get(CONTENT_IMAGE)
    codec = options.image_codec
    if image and CONTENT_IMAGE not in names:
        codec = convert(image.encoder, ImageCodec, where=f"the codec of {CONTENT_IMAGE}")
    return replace(
        options,
        columns=names,
        container=meta.container,
        shard_rows=meta.shard_rows,
        clip=meta.clip,
        resize=convert(meta.resize, ResizeMode, where="the resize rule of the store"),
        deinterlace=convert(meta.deinterlace, Deinterlace, where="the store's deinterlacing"),
        colours=convert(meta.colours, Colours, where="the store's colours"),
        image_codec=codec,
    )


def _describe(
    opened: Store,
    encoders: Sequence[ColumnEncoder],
    options: EncodeOptions,
    replacing: Sequence[str],
) -> StoreMeta:
    """Return the store's description with the columns as they will be.

    Raise StoreError for one that was made differently and is not to be replaced.
    """
    stored = opened.meta
    buckets = [Bucket.parse(name) for name in stored.buckets]
    columns = dict(stored.columns)
    for encoder in encoders:
        there = stored.columns.get(encoder.name)
        is_new = there is None or encoder.name in replacing
        column = describe_column(encoder, options, buckets, measure=is_new)
        lines = [] if there is None else column_differences(column, there)
        if lines and not is_new:
            raise StoreError(
                f"{opened.files.url} has a column {encoder.name} that was made differently: "
                f"{'; '.join(lines[:4])}. Use the same settings, or replace it: "
                f"--replace {encoder.name}."
            )
        if is_new:
            # One that is already as asked for keeps its description, with what it measured.
            columns[encoder.name] = column if there is None or lines else there
    return replace(stored, columns=columns)


def _lacks_exact_content(opened: Store, encoders: Sequence[ColumnEncoder]) -> str:
    """Return why videos are needed; empty if they are not."""
    images = StoredContent(opened.files)
    shards = [ShardKey(shard.bucket, shard.shard) for shard in opened.plan.shards()]
    for encoder in encoders:
        if encoder.needs <= {CAPTIONS}:
            continue
        if not images.can_serve(encoder.needs):
            return f"{encoder.name} is made of frames"
        missing = sum(not images.has(key) for key in shards)
        if missing:
            return f"{missing} shards have no content_image that is exact"
    return ""


def _list(corpus: str | Path, options: EncodeOptions, why: str) -> dict[str, VideoSource]:
    try:
        listed = list_by(corpus, options).videos
    except CorpusError as err:
        raise CorpusError(f"videos are needed, because {why}; but {err} Give --corpus.") from err
    return {video.video: video.source for video in listed}
