"""Before the first frame: list the corpus, probe what is new, plan it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.clips import TimeSpan
from reducio_latents.core.config import convert
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.parsing import compact_json
from reducio_latents.corpus import CorpusVideo, corpus_root
from reducio_latents.corpus.listed import EarlierListing, Listing, read_listed, write_listed
from reducio_latents.corpus.listing import list_changed
from reducio_latents.corpus.planning import plan_listed
from reducio_latents.corpus.probe import OnProbe, ProbeRecord, Probing
from reducio_latents.corpus.shots import ShotSource, VideoShots, shot_source
from reducio_latents.corpus.table import TableColumns
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.source import PlannedClip, ShardWork
from reducio_latents.errors import ConfigError
from reducio_latents.files import Files
from reducio_latents.files.parquet import read_parquet
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import ShardKey, list_commits
from reducio_latents.store.plan import (
    REMOVED,
    Plan,
    PlanPart,
    PlanSpec,
    PlanTakenError,
    StoredPart,
    edit_part,
    read_plan,
    require_plan,
    write_part,
)
from reducio_latents.store.reports import ERRORS, SHOTS, shots_parquet
from reducio_latents.store.row_kinds import TextRows, TokenVectorRows, row_kind
from reducio_latents.store.seal import seal, unseal
from reducio_latents.store.turns import alone
from reducio_latents.store.writer import PROBED_FOLDER, StoreWriter
from reducio_latents.video.identity import CHANGED, Expected, stamp_of

log = logging.getLogger(__name__)
KEPT_EVERY_S = 20.0
"""How often what was probed is kept for the run after this one, if this one is killed."""
GONE = "is no longer in the corpus"
"""In the reason why a clip has failed."""


@dataclass(frozen=True)
class Planned:
    """A corpus, and the plan that covers it."""

    find: Callable[[str], VideoSource | None]
    """Where a video of the plan lies now; None if the corpus no longer lists it."""
    plan: Plan
    stamps: Mapping[str, str] = field(default_factory=dict)
    """Of the videos that this run has probed: see `stamp_of`."""
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Clip id -> captions, where the corpus has others now than the plan."""
    gone: int = 0
    """Videos of the plan that the corpus does not list any more."""

    def locate(self, key: ShardKey, video: str) -> dict[str, Any]:
        """Return where a video of a shard lies now and what it must be, or why it is not read."""
        found, row = self.find(video), self.plan.video(video, key)
        if found is None:
            return {"source": VideoSource(""), "problem": f"{video} {GONE}."}
        stamp = self.stamps.get(video, "")
        return {"source": found, "expected": Expected(row["bytes"], row["sha256"], stamp)}

    def has_again(self, key: ShardKey, gone: frozenset[str]) -> bool:
        """Whether a shard has videos that were `gone`, and all of its videos are listed now.

        So it is after a run over another corpus, whose videos it shares in part, has made it.
        """
        videos = self._videos(key)
        return not gone.isdisjoint(videos) and all(map(self.find, videos))

    def has_some(self, key: ShardKey) -> bool:
        """Whether some video of a shard is listed now, or none is wanted any more."""
        videos = self._videos(key)
        return not videos or any(map(self.find, videos))

    def _videos(self, key: ShardKey) -> list[str]:
        """Return the videos of a shard, but for those of which all was removed."""
        clips = self.plan.shard_clips(*key, ["video", "status"])
        kept = clips.filter(pc.not_equal(clips["status"], REMOVED))
        found: list[str] = kept["video"].unique().to_pylist()
        return found

    def work(self, key: ShardKey) -> ShardWork:
        """Return the clips of one shard."""
        names = ("row", "clip_id", "video", "start_s")
        table = self.plan.shard_clips(key.bucket, key.shard, [*names, "captions", "status"])
        columns = (table[name].to_pylist() for name in names)
        captions = (tuple(found or ()) for found in table["captions"].to_pylist())
        removed = (status == REMOVED for status in table["status"].to_pylist())
        clips = tuple(PlannedClip(*row) for row in zip(*columns, captions, removed, strict=True))
        return ShardWork(key, clips)


def list_by(
    corpus: str | Path, options: EncodeOptions, before: EarlierListing | None = None
) -> Listing:
    """List a corpus as the options say; of what is as it was `before`, only names."""
    columns = TableColumns(
        path=options.path_column,
        caption=options.caption_column,
        start=options.start_column,
        end=options.end_column,
    )
    return list_changed(corpus, columns, options.root, options.label, before)


def make_plan(
    corpus: str | Path,
    files: Files,
    options: EncodeOptions,
    buckets: Sequence[Bucket],
    on_probe: OnProbe = lambda _, __: None,
    *,
    write: bool = True,
) -> Planned:
    """List `corpus` and plan what the store at `files` does not have in its plan yet.

    With `write` the new part is stored.
    """
    shots = shot_source(options.shots) if options.shots else ShotSource()
    replaced = failed_videos(files, f"{CHANGED} planned")
    needs_all = options.retry_failed or replaced or shots.table is not None
    listing = list_by(corpus, options, None if needs_all else read_listed(files))
    listed = listing.videos
    spec = PlanSpec(
        clip=options.clip_spec,
        buckets=tuple(buckets),
        shard_rows=options.shard_rows,
        duplicates=options.duplicates,
        shots=shots.settings,
    )
    probing = Probing(
        backend=options.video_backend,
        deinterlace=options.deinterlaces,
        workers=options.workers,
        timeout_s=options.clip_timeout_s,
        memory_bytes=options.worker_memory_mb << 20,
        shots=shots,
    )
    records: dict[str, ProbeRecord] = {}
    probed = None
    if write and shots.detector is not None:  # decoding a corpus takes hours
        probed = ProbedSoFar(files, f"{spec.shots}; {probing.backend}, {probing.deinterlace}")
        records |= probed.restore(listed)

    def store(part: PlanPart) -> StoredPart:
        if spec.shots:
            files.delete(SHOTS)  # it is made anew, also by the run after one that was killed
        write_part(files, part.number, part)
        return StoredPart.of(files, part.number)

    while True:
        try:
            new = plan_listed(
                listed,
                spec,
                read_plan(files),
                probing,
                on_probe,
                retry_failed=options.retry_failed,
                replaced=replaced,
                records=records,
                keep=store if write else PlanPart.packed,
                on_record=(lambda _, __: None) if probed is None else probed.keep,
                unread=listing.unread,
            )
            break
        except PlanTakenError:
            log.info("another run has planned meanwhile: planning what is still missing.")
    if probed is not None:
        probed.forget()
    if write and spec.shots and (new.parts or files.size(SHOTS) is None):
        files.write(SHOTS, shots_parquet(new.plan))
    if write and (new.parts or new.captions or new.lost or len(listed)):
        write_listed(files, None if new.captions or new.lost else listing.record())
    sources = {video.video: video.source for video in listed}
    left, root = frozenset(new.gone), corpus_root(corpus, options.root)

    def find(video: str) -> VideoSource | None:
        found = sources.get(video)
        unread = found is None and len(listing.unread) and video not in left
        return new.plan.source(video, root) if unread else found

    return Planned(find, new.plan, new.stamps, new.captions, len(left))


def take_captions(
    writer: StoreWriter, planned: Planned, columns: Sequence[str], run: str
) -> Planned:
    """Put new captions into the plan; what was made of the old ones counts as not done.

    The run makes `columns` anew; of others it is said what is to be done. The commits go first:
    killed in between, the same run finds the same changes again.
    """
    clips = pa.array(planned.captions, pa.string())

    def edit(table: pa.Table) -> pa.Table:
        changed = pc.is_in(table["clip_id"], clips)
        if not pc.any(changed).as_py():
            return table
        rows = zip(table["clip_id"].to_pylist(), table["captions"].to_pylist(), strict=True)
        now = [list(planned.captions.get(clip_id, old)) for clip_id, old in rows]
        number = table.schema.get_field_index("captions")
        field_ = table.schema.field(number)
        return table.set_column(number, field_, pa.array(now, field_.type))

    with alone(writer.files, "updating captions", run):
        shards, others = set(), set[str]()
        for table in planned.plan.clip_tables("clip_id", "bucket", "shard"):
            here = table.filter(pc.is_in(table["clip_id"], clips))
            pairs = zip(here["bucket"].to_pylist(), here["shard"].to_pylist(), strict=True)
            shards |= {ShardKey(*pair) for pair in pairs}
        for column, key in sorted(list_commits(writer.files)):
            if key in shards and column in writer.meta.columns:
                kind = row_kind(writer.meta.columns[column])
                if isinstance(kind, TextRows | TokenVectorRows):
                    writer.drop_commit(key, column)
                    others |= {column}.difference(columns)
        for number in range(planned.plan.parts):
            edit_part(writer.files, number, {"part": edit})
    for column in sorted(others):
        log.warning(
            "%s was made of captions that have changed: to make %d shards of it anew, run "
            "add-column %s %s with its options.",
            column,
            len(shards),
            writer.files.url,
            column,
        )
    return replace(planned, plan=require_plan(writer.files))


def failed_videos(files: Files, reason: str) -> frozenset[str]:
    """Return the videos of which an earlier run has written that clips failed for this reason."""
    try:
        rows = read_parquet(files.read(ERRORS), ["video", "reason"]).to_pylist()
    except FileNotFoundError:
        return frozenset()
    except (KeyError, pa.ArrowException, OSError) as err:
        log.warning("%s/%s cannot be read, and will be written again: %s", files.url, ERRORS, err)
        return frozenset()
    return frozenset(row["video"] for row in rows if reason in row["reason"])


class ProbedSoFar:
    """Records in small files of the store, until the plan has them."""

    def __init__(self, files: Files, settings: str) -> None:
        self._files, self._settings = files, settings
        self._waiting: dict[str, Any] = {}
        self._kept_s = time.monotonic()

    def restore(self, listed: Iterable[CorpusVideo]) -> dict[str, ProbeRecord]:
        """Return what was found with the same settings of videos that have not changed since."""
        rows: dict[str, Any] = {}
        for path in list(self._files.list(PROBED_FOLDER)):
            try:
                raw = unseal(self._files.read(path))
                if raw["settings"] == self._settings:
                    rows |= {name: _record_of(row) for name, row in raw["records"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
                continue  # damaged, or another version's: it is found out again
        known = {v.video: v.source for v in listed if v.video in rows}
        return {
            name: rows[name]
            for name, source in known.items()
            if rows[name].stamp and rows[name].stamp == stamp_of(source)
        }

    def keep(self, video: str, record: ProbeRecord) -> None:
        """Take a record in, and write those that have come once in a while."""
        self._waiting[video] = asdict(record)
        if time.monotonic() - self._kept_s >= KEPT_EVERY_S:
            body = compact_json({"settings": self._settings, "records": self._waiting})
            self._files.write(f"{PROBED_FOLDER}/{uuid.uuid4().hex}.json", seal(body))
            self._waiting, self._kept_s = {}, time.monotonic()

    def forget(self) -> None:
        """Remove the files: the plan has all of it."""
        for path in list(self._files.list(PROBED_FOLDER)):
            self._files.delete(path)


def _record_of(row: dict[str, Any]) -> ProbeRecord:
    told = row.pop("shots")
    found: ProbeRecord = convert({**row, "shots": None}, ProbeRecord, where=PROBED_FOLDER)
    spans = convert(told["spans"], list[tuple[float, float]], where=PROBED_FOLDER)
    problem = convert(told["problem"], str | None, where=PROBED_FOLDER)
    by = convert(told["by"], str, where=PROBED_FOLDER)
    shots = VideoShots(by, tuple(TimeSpan(*span) for span in spans), problem)
    return replace(found, shots=shots)
