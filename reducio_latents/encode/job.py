"""A run that is ready to start: what to encode, by what, into where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pyarrow.compute as pc

from reducio_latents.core.choices import Colours, Deinterlace
from reducio_latents.core.config import convert
from reducio_latents.corpus import corpus_root
from reducio_latents.encode.attempts import Journal
from reducio_latents.encode.columns import ColumnEncoder
from reducio_latents.encode.options import BUCKET_MULTIPLE, EncodeOptions
from reducio_latents.encode.prepare import GONE, Planned, failed_videos, make_plan, take_captions
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.registry import batch_size_of, build_columns, describe_column
from reducio_latents.encode.stop import Stop
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource, public_url
from reducio_latents.store import index
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.container import array_rows
from reducio_latents.store.index import same_clips
from reducio_latents.store.meta import ColumnMeta, StoreMeta, require_same
from reducio_latents.store.plan import Plan, read_plan, require_plan
from reducio_latents.store.writer import StoreWriter, read_meta_if_any

log = logging.getLogger(__name__)

Moved = Mapping[str, VideoSource | None]
"""Videos that are not where the plan has them, and where they are; None if they are gone."""


@dataclass
class Job:
    """A run that is ready to start: what to encode, by what, into where."""

    options: EncodeOptions
    planned: Planned
    encoders: Sequence[ColumnEncoder]
    writer: StoreWriter
    root: str = ""
    """What the addresses in the plan are relative to now."""
    stop: Stop = field(default_factory=Stop)
    """Set when the run is asked to end early."""
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def journal(self) -> Journal:
        """Who has taken up which shard how often."""
        return Journal(self.writer.files)

    @cached_property
    def largest_px(self) -> int:
        """Pixels of a frame of the largest video that is to be encoded."""
        videos = self.planned.plan.video_columns("status", "width", "height")
        sizes = videos.filter(pc.equal(videos["status"], "planned"))
        return pc.max(pc.multiply(sizes["width"], sizes["height"])).as_py() or 0

    @property
    def batch_size(self) -> int:
        """How many rows of a shard are handed to the encoders at once."""
        return batch_size_of(self.options, self.writer.meta.columns)

    @property
    def names(self) -> list[str]:
        return list(self.options.columns)

    def shards(self) -> dict[ShardKey, int]:
        """Return the rows of every shard of the plan, but for those of clips that were removed."""
        plan = self.planned.plan
        return {
            ShardKey(s.bucket, s.shard): s.rows - len(plan.removed.get((s.bucket, s.shard), ()))
            for s in plan.shards()
        }

    def take_in_plan(self) -> None:
        """Take in what another run has planned since, so that all of the store is counted."""
        plan = read_plan(self.writer.files)
        if plan is not None and plan.parts > self.planned.plan.parts:
            self.planned = replace(self.planned, plan=plan)

    def todo(self) -> dict[ShardKey, tuple[str, ...]]:
        """Return those of `missing` that this run can do.

        A shard of which its corpus has no video is another's, of a run over another corpus, at work
        now or stopped: it is left to that one.
        """
        return {key: names for key, names in self.missing().items() if self.planned.has_some(key)}

    def missing(self) -> dict[ShardKey, tuple[str, ...]]:
        """Return the columns that each unfinished shard lacks, in order."""
        done = same_clips(self.writer.files)
        lacking = {
            key: tuple(name for name in self.names if (name, key) not in done)
            for key in self.shards()
        }
        return {key: names for key, names in lacking.items() if names}


def as_begun(options: EncodeOptions, store: str | Path) -> EncodeOptions:
    """Return the options with what they leave to the store, if there is one.

    It goes on deinterlacing or not, with the same colours, and without what is new among the
    default columns since it was begun: else the command that went on with it before would read
    every video again. Refuses a place that is taken by something else.
    """
    files = open_files(store)
    meta = read_meta_if_any(files)
    if meta is None:
        return options
    if options.deinterlace == "auto":
        begun = convert(meta.deinterlace, Deinterlace, where="deinterlace of the store")
        options = replace(options, deinterlace=begun)
    if options.colours == "auto":
        colours = convert(meta.colours, Colours, where="colours of the store")
        options = replace(options, colours=colours)
    usual = options.columns == EncodeOptions.columns and options.scorer is None
    if not usual or "scores" in meta.columns:
        return options
    log.warning("the store was begun without scores; to have them: add-column %s scores", files.url)
    return replace(options, columns=tuple(name for name in options.columns if name != "scores"))


@dataclass(frozen=True)
class RunRequest:
    """What `encode_corpus` was asked for."""

    corpus: str
    store: str
    options: EncodeOptions
    progress: Progress = field(default_factory=Progress)
    stop: Stop = field(default_factory=Stop)
    run: str = ""
    """The name under which it is at work, if it is already."""


def prepare(request: RunRequest) -> Job:
    """Load the encoders, refuse what does not fit, plan what is new, open the store."""
    with request.stop.at_once():
        # Before a model is loaded for nothing.
        stored = read_meta_if_any(open_files(request.store))
        known = {} if stored is None else stored.columns
        encoders = build_columns(request.options, known)
        job = plan_job(request, describe_store(encoders, request.options, known))
    return replace(job, encoders=encoders)


def describe_store(
    encoders: Sequence[ColumnEncoder], options: EncodeOptions, known: Collection[str] = ()
) -> dict[str, ColumnMeta]:
    """Return the description of each column, as these encoders will make it.

    What a column's precision costs is measured unless it is `known`: the store's word stays.
    """
    buckets = options.bucket_list(BUCKET_MULTIPLE)
    return {
        encoder.name: describe_column(encoder, options, buckets, measure=encoder.name not in known)
        for encoder in encoders
    }


def plan_job(request: RunRequest, columns: Mapping[str, ColumnMeta]) -> Job:
    """Return a job without encoders, for a process that only plans; else as `prepare`."""
    corpus, options, files = request.corpus, request.options, open_files(request.store)
    stored = read_meta_if_any(files)
    buckets = options.bucket_list(BUCKET_MULTIPLE)
    meta = StoreMeta(
        container=options.container,
        shard_rows=options.shard_rows,
        clip=options.clip_spec,
        buckets=tuple(bucket.name for bucket in buckets),
        resize=options.resize,
        deinterlace="bwdif" if options.deinterlaces else "none",
        colours="exact" if options.exact_colours else "swscale",
        corpus=public_url(corpus),
        root=options.root and public_url(options.root),
        columns=dict(columns),
    )
    if stored is not None:
        require_same(meta, stored, files.url)
    with request.stop.at_once():
        planned = make_plan(corpus, files, options, buckets, request.progress.probed)
    writer = StoreWriter.open(files, meta, array_rows(planned.plan.shards(), options.shard_rows))
    writer.drop_bad_commits(planned.plan, options.columns)
    if options.update_captions and planned.captions:
        planned = take_captions(writer, planned, options.columns, request.run)
    if options.retry_failed:
        forget_failures(writer, planned.plan)
    elif gone := failed_videos(files, GONE):
        forget_failures(writer, planned.plan, lambda key: planned.has_again(key, gone))
    root = corpus_root(corpus, options.root)
    return Job(options, planned, (), writer, root, request.stop, request.progress)


def join(request: RunRequest, root: str, moved: Moved) -> Job:
    """Load the encoders for a run that another process has planned.

    `root` is what the plan's addresses are relative to, `moved` names the videos that lie elsewhere
    or are gone.
    """
    files = open_files(request.store)
    meta, plan = StoreMeta.read(files), require_plan(files)

    def find(video: str) -> VideoSource | None:
        return moved[video] if video in moved else plan.source(video, root)

    encoders = build_columns(request.options, meta.columns)
    writer, planned = StoreWriter(files, meta), Planned(find, plan)
    return Job(request.options, planned, encoders, writer, root, request.stop, request.progress)


def forget_failures(
    writer: StoreWriter, plan: Plan, wanted: Callable[[ShardKey], bool] = lambda _: True
) -> None:
    """Make every shard with a failed clip that is `wanted` count as not done."""
    failed = [
        (entry.key, entry.column)
        for entry in index.build_index(writer.files, use_cache=False, prove=False).entries.values()
        if not plan.removed.get(entry.key, frozenset()).issuperset(entry.failed)
        and wanted(entry.key)
    ]
    if failed:
        writer.files.delete(index.PATH)
    for key, column in failed:
        writer.drop_commit(key, column)
