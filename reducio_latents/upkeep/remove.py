"""Taking clips out of a store for good: their rows, and all else that says what they showed.

The plan is marked first. From then on nothing makes these clips again, and plan and commits say
what is still to be done: a removal that was killed is ended by the same call. A clip keeps its
place, its id and the name of its video, by which it is known that it must not come back.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.core.regular import open_regular
from reducio_latents.core.text import printable
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import Files, open_files
from reducio_latents.files.parquet import read_parquet
from reducio_latents.store import Store, index
from reducio_latents.store.commit import (
    WAS_REMOVED,
    Commit,
    Failure,
    ShardKey,
    commit_path,
    list_commits,
)
from reducio_latents.store.container import HeldFile, Repacked
from reducio_latents.store.plan import (
    CLIP_SCHEMA,
    REMOVED,
    SPAN_SCHEMA,
    VIDEO_SCHEMA,
    VIDEO_SPAN_SCHEMA,
    Plan,
    complete_parts,
    edit_part,
    read_plan,
)
from reducio_latents.store.plan.parts import PLACE
from reducio_latents.store.reports import SHOTS, shots_parquet
from reducio_latents.store.row_statistics import row_statistics
from reducio_latents.store.turns import alone
from reducio_latents.store.whole import sum_up
from reducio_latents.store.writer import StoreWriter, read_meta_if_any, row_checksum

MOST_ID_BYTES = 1 << 30
"""Of a list of clip ids: some 30 million."""
NAMED_IN_ERRORS = 3
MEND = (
    "Delete the commits of shard {}, and remove again: its files go then, and the encode command "
    "makes the other clips anew."
)
NAMES_COMPARED = 100_000


@dataclass
class RemoveReport:
    """What was taken out, or with `dry_run` would be."""

    videos: dict[str, int] = field(default_factory=dict)
    """Each video that loses clips, or all that it could have -> how many, now."""
    before: int = 0
    """Clips that were asked for and had been removed before."""
    shards: int = 0
    """That held rows of them."""
    files: int = 0
    """That were written anew or deleted."""
    bytes: int = 0
    """Of these files, as they were."""

    @property
    def clips(self) -> int:
        return sum(self.videos.values())


def remove_clips(
    store: str | Path,
    videos: Sequence[str] = (),
    clip_ids: Sequence[str] | str | Path = (),
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RemoveReport:
    """Take all clips of `videos`, and those of `clip_ids`, out of `store` for good.

    Videos with the same bytes go with a video, and clips that share a row with each other.
    `clip_ids` are ids, or a file of them: one a line, or Parquet with a column `clip_id`. To end a
    removal that was killed, call again. `progress` is told (shards done, shards in all). With
    `dry_run` nothing is changed.

    Raise ConfigError for a video or a clip that the store does not have, and then nothing was
    changed; StoreError for a store that is being written.
    """
    files = open_files(store)
    if read_meta_if_any(files) is None and (plan := read_plan(files)) is not None:
        opened = None  # a corpus that was planned, and no clip of it encoded
    else:
        opened = Store(files)
        plan = opened.plan
    chosen = _chosen(plan, videos, clip_ids)
    report = RemoveReport(videos=chosen.losses, before=chosen.before)
    if dry_run:
        if opened is not None:
            _foresee(opened, chosen, report)
        return report
    with alone(files, "removing clips"):
        if opened is not None:
            StoreWriter(files, opened.meta).sweep()
        complete_parts(files)
        for number in range(plan.parts):
            edit_part(files, number, {"part": chosen.mark_clips, "videos": chosen.mark_videos})
        if opened is not None:
            _remove(Store(files), report, progress)
        elif plan.spec.shots and (marked := read_plan(files)) is not None:
            files.write(SHOTS, shots_parquet(marked))
    return report


def _remove(opened: Store, report: RemoveReport, progress: Callable[[int, int], None]) -> None:
    """Take out of the columns what the plan says is removed."""
    if opened.plan.removed:
        opened.files.delete(index.PATH)
    there = _commits_of(opened, opened.plan.removed)
    errors = []
    for done, (key, gone) in enumerate(sorted(opened.plan.removed.items())):
        try:
            _clean(opened, ShardKey(*key), gone, there.get(key, []), report)
        except StoreError as err:  # the others are to be clean whatever became of this one
            errors.append(str(err))
        progress(done + 1, len(opened.plan.removed))
    if errors:
        more = f" {len(errors) - 1} more shards are damaged, too." if len(errors) > 1 else ""
        raise StoreError(f"{errors[0]}{more}")
    sum_up(StoreWriter(opened.files, opened.meta), opened.plan)


@dataclass(frozen=True)
class _Chosen:
    """What is to be removed of a plan."""

    plan: Plan
    places: NDArray[np.int64]
    """Of the rows that go, as `Plan.places` counts."""
    videos: frozenset[str] = frozenset()
    """Those of which nothing is left."""
    losses: dict[str, int] = field(default_factory=dict)
    before: int = 0

    def of(self, clips: pa.Table) -> NDArray[np.bool_]:
        """Return which clips go, or went."""
        return np.isin(self.plan.places(clips), self.places)

    def mark_clips(self, clips: pa.Table) -> pa.Table:
        """Return clips with those marked that go, and without what it says of their content."""
        here = pa.array(self.of(clips))
        for number, column in enumerate(clips.schema):
            if column.name == "status":
                value = pa.scalar(REMOVED, column.type)
            elif column.name == "captions":
                value = pa.scalar([], column.type)
            elif column.name not in (*CLIP_SCHEMA.names, *SPAN_SCHEMA.names):
                value = pa.scalar(None, column.type)  # what the corpus carried
            else:
                continue
            clips = clips.set_column(number, column, pc.if_else(here, value, clips[column.name]))
        return clips

    def mark_videos(self, videos: pa.Table) -> pa.Table:
        """Return videos, likewise."""
        these = pc.is_in(videos["video"], pa.array(self.videos, pa.string()))
        for number, column in enumerate(videos.schema):
            known = column.name in (*VIDEO_SCHEMA.names, *VIDEO_SPAN_SCHEMA.names)
            if known and column.name not in ("status", "reason"):
                continue
            text = {"status": REMOVED, "reason": WAS_REMOVED}.get(column.name)
            value = pa.scalar(text, column.type)  # null: the shots that were found in it
            videos = videos.set_column(
                number, column, pc.if_else(these, value, videos[column.name])
            )
        return videos


def _chosen(plan: Plan, videos: Sequence[str], clip_ids: Sequence[str] | str | Path) -> _Chosen:
    ids = _read_ids(clip_ids)
    if not videos and not len(ids):
        said = isinstance(clip_ids, str | Path)
        where = f"{printable(str(clip_ids))} names no clip: " if said else ""
        raise ConfigError(f"{where}name the videos or the clips that are to be removed.")
    known = plan.known.named(sorted(videos))
    for name in videos:
        if name not in known:
            names = plan.known.names.slice(0, NAMES_COMPARED).to_pylist()
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see its plan for those it has."
            raise ConfigError(f"the plan has no video {name!r}; {hint} Nothing was removed.")
    named = plan.with_copies(videos) if videos else set()
    names, found, places = pa.array(named, pa.string()), list[pa.Array](), list[NDArray[Any]]()
    for clips in plan.clip_tables("clip_id", "video", *PLACE):
        by_id = pc.is_in(clips["clip_id"], ids)
        found.append(clips["clip_id"].filter(by_id).combine_chunks())
        asked = np.asarray(pc.or_(by_id, pc.is_in(clips["video"], names)))
        places.append(plan.places(clips)[asked])
    unknown = ids.filter(pc.invert(pc.is_in(ids, pa.concat_arrays(found)))) if found else ids
    if len(unknown):
        shown = ", ".join(map(str, unknown.slice(0, NAMED_IN_ERRORS).to_pylist()))
        raise ConfigError(
            f"{len(unknown)} clips are not in the plan, such as {shown}. Is the list of another "
            "store? Nothing was removed."
        )
    chosen = _Chosen(plan, np.unique(np.concatenate(places)) if places else np.zeros(0, np.int64))
    losses: Counter[str] = Counter()
    kept, before = set[str](), 0
    for clips in plan.clip_tables("video", *PLACE):
        gone, marked = chosen.of(clips), np.asarray(pc.equal(clips["status"], REMOVED))
        losses.update(clips["video"].filter(pa.array(gone & ~marked)).to_pylist())
        before += int((gone & marked).sum())
    for clips in plan.clip_tables("video", *PLACE):
        stays = ~chosen.of(clips) & np.asarray(pc.not_equal(clips["status"], REMOVED))
        stays &= np.asarray(pc.is_in(clips["video"], pa.array(losses, pa.string())))
        kept |= set(clips["video"].filter(pa.array(stays)).unique().to_pylist())
    now = plan.known.named(sorted(named))
    losses.update({name: 0 for name in named if now[name].status != REMOVED})
    return replace(
        chosen,
        videos=frozenset(named | (losses.keys() - kept)),
        losses=dict(sorted(losses.items())),
        before=before,
    )


def _read_ids(clip_ids: Sequence[str] | str | Path) -> pa.Array:
    """Return clip ids, those of a file if that is named; raise ConfigError for another file."""
    if not isinstance(clip_ids, str | Path):
        return pa.array([str(name) for name in clip_ids], pa.string())
    path = Path(clip_ids)
    try:
        if path.suffix == ".parquet":
            with open_regular(path) as file:
                return read_parquet(file, ["clip_id"])["clip_id"].combine_chunks().cast(pa.string())
        with open_regular(path) as file:
            data = file.read(MOST_ID_BYTES + 1)
        if len(data) > MOST_ID_BYTES:
            raise ConfigError(f"{path} has more than {MOST_ID_BYTES >> 20} MiB. Split it.")
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except (OSError, KeyError, UnicodeDecodeError, pa.ArrowException) as err:
        why = str(err).partition("\n")[0]
        raise ConfigError(
            f"{path} is no list of clip ids, one a line, or Parquet with a column clip_id ({why})."
        ) from err
    return pa.array([line for line in lines if line and line != "clip_id"], pa.string())


def _commits_of(
    store: Store, shards: Mapping[tuple[str, int], object]
) -> dict[tuple[str, int], list[str]]:
    """Return the columns that are committed of these shards."""
    found: dict[tuple[str, int], list[str]] = {}
    for column, key in list_commits(store.files):
        if key in shards and column in store.meta.columns:
            found.setdefault(key, []).append(column)
    return found


def _foresee(store: Store, chosen: _Chosen, report: RemoveReport) -> None:
    """Count what a removal would write anew."""
    shards: dict[tuple[str, int], None] = {}
    for clips in store.plan.clip_tables(*PLACE):
        here = clips.filter(pa.array(chosen.of(clips)))
        shards |= dict.fromkeys(zip(*(here[n].to_pylist() for n in PLACE[:2]), strict=True))
    files: dict[str, int] = {}
    for key, columns in _commits_of(store, shards).items():
        commits = [store.commit(ShardKey(*key), column) for column in columns]
        files |= {commit.file: commit.file_bytes for commit in commits}
        report.shards += 1
    report.files, report.bytes = len(files), sum(files.values())


def _clean(
    store: Store, key: ShardKey, gone: frozenset[int], columns: Sequence[str], report: RemoveReport
) -> None:
    """Take rows out of a shard: out of each file, then out of the commits that speak of it.

    What is done already is found so. Files that no commit speaks of are deleted.
    """
    files, by_file = store.files, dict[str, dict[str, Commit]]()
    for name in columns:
        commit = Commit.read(files, key, name)
        by_file.setdefault(commit.file, {})[name] = commit
    clips = store.plan.shard_clips(*key, ["clip_id", "video", "start_s"]).to_pylist()
    touched: dict[str, int] = {}
    for path, commits in by_file.items():
        if all(_is_clean(commit, gone) for commit in commits.values()):
            continue
        data = _read(files, path, key)
        try:
            file = HeldFile(key, clips, data, [*commits])
            packed, held = store.layout.repack(store.meta, file, gone)
        except StoreError as err:
            raise StoreError(f"{files.url}/{path} is damaged ({err}). {MEND.format(key)}") from err
        if packed != data:
            files.write(path, packed)
            touched[path] = len(data)
        for name, commit in commits.items():
            now = _without(store, commit, packed, held[name], gone, clips)
            files.write(commit_path(key, name), now.to_json())
    paths = {path for name in store.columns for path in store.layout.paths(store.meta, key, name)}
    for path in sorted(paths - by_file.keys()):
        if (size := files.size(path)) is not None:
            files.delete(path)
            touched[path] = size
    report.files += len(touched)
    report.bytes += sum(touched.values())
    report.shards += bool(touched)


def _read(files: Files, path: str, key: ShardKey) -> bytes:
    try:
        return files.read(path)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise StoreError(f"{files.url}/{path} is missing. {MEND.format(key)}") from err


def _is_clean(commit: Commit, gone: frozenset[int]) -> bool:
    return commit.removed == gone and all(commit.row_crc32c[row] is None for row in gone)


def _without(
    store: Store,
    commit: Commit,
    packed: bytes,
    held: Repacked,
    gone: frozenset[int],
    clips: Sequence[Mapping[str, str]],
) -> Commit:
    """Return the commit of a file out of which rows were taken; of the others it says the same."""
    failed = [failure for failure in commit.failed if failure.row not in gone]
    failed += [
        Failure(
            row=row,
            clip_id=clips[row]["clip_id"],
            video=clips[row]["video"],
            reason=WAS_REMOVED,
        )
        for row in gone
    ]
    crcs = [None if row in gone else crc for row, crc in enumerate(commit.row_crc32c)]
    statistics = {}
    if commit.statistics:
        rows = [
            store.decode_row(bytes(row), commit.bucket, commit.column)
            for row, crc in zip(held.rows, crcs, strict=True)
            if row is not None and row_checksum(row) == crc
        ]
        made = row_statistics(store.meta.columns[commit.column], rows)
        statistics = {name: made[name] for name in commit.statistics if name in made}
    return replace(
        commit,
        file_bytes=len(packed),
        file_sha256=hashlib.sha256(packed).hexdigest(),
        row_crc32c=tuple(crcs),
        ranges=held.ranges,
        failed=tuple(sorted(failed, key=lambda failure: failure.row)),
        statistics=statistics,
        quality=tuple(clip for clip in commit.quality if clip.row not in gone),
    )
