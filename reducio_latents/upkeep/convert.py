"""From one container to the other, or to the newest format, shard by shard; what is committed there
is not done again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from reducio_latents.core.choices import Container
from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, Files
from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.container import LAYOUTS, array_rows
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import FORMAT_VERSION, StoreMeta
from reducio_latents.store.plan.parts import PENDING
from reducio_latents.store.reports import ERRORS, QUALITY, SHOTS
from reducio_latents.store.store import Store
from reducio_latents.store.turns import at_work
from reducio_latents.store.writer import ColumnRows, StoreWriter, read_meta_if_any, row_checksum

PLAN = "plan"
REPORTS = (QUALITY, ERRORS, SHOTS)
"""Files beside the rows that say something about them."""
COMPARED = (
    "rows",
    "row_crc32c",
    "failed",
    "fingerprint",
    "clips_sha256",
    "statistics",
    "quality",
)
"""Fields of a commit that are the same in every container."""


@dataclass(frozen=True)
class ConvertReport:
    """What is in the new store, every row of it compared with the old one's checksums."""

    shards: int
    commits: int
    rows: int
    """Rows with a value, over all columns."""
    failed: int
    """Rows without one."""
    bytes: int
    """Of the files that were written now."""
    skipped: int
    """Commits that were there before."""

    @classmethod
    def of(
        cls,
        shards: int,
        commits: Sequence[Commit],
        there: Collection[tuple[str, ShardKey]],
        written: Iterable[Commit],
    ) -> Self:
        return cls(
            shards=shards,
            commits=len(commits),
            rows=sum(commit.done for commit in commits),
            failed=sum(len(commit.failed) for commit in commits),
            bytes=sum({commit.file: commit.file_bytes for commit in written}.values()),
            skipped=sum((commit.column, commit.key) in there for commit in commits),
        )


def convert_store(
    source: Store,
    target: Files,
    container: Container,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConvertReport:
    """Write `source` to `target` in another container, row by row the same bytes; or from format 1
    to the newest one.

    Plan, statistics, counts, failures and reports come along. Run again, it goes on where it was
    stopped. `progress` is told (shards done, shards in all). Raise StoreError if `target` is in
    use for something else, a row of `source` does not match its checksum, or one of `target` does
    not match that of `source`.
    """
    if source.files.url == target.url:
        raise StoreError(f"{target.url} cannot be converted onto itself. Give a new folder.")
    is_older = container == "zarr" and source.meta.format_version < FORMAT_VERSION
    if source.meta.container == container and not is_older:
        raise StoreError(f"{source.files.url} is a {container} store already. Copy it as it is.")
    read_meta_if_any(target)  # refuses a place that is taken by something else
    with at_work(target, "converting"):
        _copy_plan(source.files, target)
        rows = array_rows(source.plan.shards(), source.meta.shard_rows)
        meta = replace(source.meta, container=container, format_version=FORMAT_VERSION)
        writer = StoreWriter.open(target, meta, rows)
        commits = _commits_by_shard(source)
        writer.drop_bad_commits(source.plan, meta.columns)
        there = set(list_commits(target))
        written: list[Commit] = []
        for number, (key, shard) in enumerate(commits.items()):
            missing = {name: commit for name, commit in shard.items() if (name, key) not in there}
            if missing:
                written += _convert_shard(source, writer, key, missing)
            _prove_shard(target, writer.meta, shard)
            progress(number + 1, len(commits))
        _copy_plan(source.files, target)  # again: clips may have been removed meanwhile
        _finish(source, writer)
        every = [commit for shard in commits.values() for commit in shard.values()]
        return ConvertReport.of(len(commits), every, there, written)


def _prove_shard(files: Files, meta: StoreMeta, originals: Mapping[str, Commit]) -> None:
    """Raise StoreError unless commits, and the rows that they speak of, are as in `originals`."""
    memo: dict[str, bytes] = {}
    for name, original in originals.items():
        commit = Commit.read(files, original.key, name)
        for field in COMPARED:
            if getattr(commit, field) != getattr(original, field):
                raise StoreError(
                    f"{files.url}: {commit.key} {name} has other {field} than its original. "
                    "Convert to a new folder."
                )
        read_payloads(files, meta, commit, memo)


def read_payloads(
    files: Files, meta: StoreMeta, commit: Commit, memo: dict[str, bytes]
) -> list[Buffer | None]:
    """Return the rows of a shard as they are stored, each proven against its checksum.

    `memo` has the shard's files that were read before: columns of a tar share theirs.
    """
    where = f"{files.url}/{commit.file}"
    try:
        data = memo.get(commit.file) or memo.setdefault(commit.file, files.read(commit.file))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise StoreError(f"{where} is missing. Run `verify` to see all the damage.") from err
    ranges = LAYOUTS[meta.container].locate(files, meta, commit).tolist()
    found: list[Buffer | None] = []
    for row, (crc, (start, length)) in enumerate(zip(commit.row_crc32c, ranges, strict=True)):
        payload = data[start : start + length] if start >= 0 else None
        if (None if payload is None else row_checksum(payload)) != crc:
            raise StoreError(
                f"{where}: row {row} does not match its checksum. "
                "Run `verify` to see all the damage, and mend it first."
            )
        found.append(payload)
    return found


def _commits_by_shard(source: Store) -> dict[ShardKey, dict[str, Commit]]:
    found: dict[ShardKey, dict[str, Commit]] = {}
    for column, key in list_commits(source.files):
        if column in source.meta.columns:
            found.setdefault(key, {})[column] = source.commit(key, column)
    return dict(sorted(found.items()))


def _convert_shard(
    source: Store, writer: StoreWriter, key: ShardKey, commits: Mapping[str, Commit]
) -> Sequence[Commit]:
    columns, timings, memo = {}, {}, dict[str, bytes]()
    for name, commit in commits.items():
        columns[name] = ColumnRows(
            rows=read_payloads(source.files, source.meta, commit, memo),
            failed=commit.failed,
            statistics=commit.statistics,
            quality=commit.quality,
        )
        timings.update(commit.timings)
    clips = source.plan.shard_clips(*key, ["clip_id", "video", "start_s"]).to_pylist()
    return writer.write_payloads(key, clips, columns, timings)


def _copy_plan(source: Files, target: Files) -> None:
    # The clips come last: they are what makes a part of a plan count.
    complete = [path for path in source.list(PLAN) if not path.startswith(PENDING)]
    for path in sorted(complete, key=lambda name: (f"{PLAN}/part-" in name, name)):
        if not target.create(path, source.read(path)):
            raise StoreError(
                f"{target.url}/{path} is of another plan than {source.url}'s. Give a new folder."
            )


def _finish(source: Store, writer: StoreWriter) -> None:
    for path in REPORTS:
        if source.files.size(path) is not None:
            writer.files.write(path, source.files.read(path))
    write_index(writer.files, build_index(writer.files, use_cache=False))
    own = {name: getattr(writer.meta, name) for name in ("container", "format_version")}
    now = replace(source.meta, **own)
    columns = writer.meta.columns
    writer.complete(
        source.plan, lambda stored: replace(now, columns=stored.columns if stored else columns)
    )
