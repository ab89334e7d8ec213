"""After the last shard: index, statistics, counts and errors, all made from plan and commits."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa

from reducio_latents.encode.report import Tally
from reducio_latents.files import Files
from reducio_latents.files.parquet import read_parquet
from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.index import Index, IndexEntry, require_same_clips, write_index
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import Plan, ShardSums
from reducio_latents.store.reports import ERRORS, ClipError, Reports
from reducio_latents.store.statistics import ChannelStatistics
from reducio_latents.store.writer import StoreWriter
from reducio_latents.version import __version__
from reducio_latents.video.identity import CHANGED

log = logging.getLogger(__name__)

ALL = "all"


@dataclass
class Outcome:
    """All commits of a store, folded."""

    entries: dict[tuple[str, ShardKey], IndexEntry]
    statistics: dict[str, dict[str, dict[str, list[float]]]]
    reports: Reports
    """What failed, and how well clips decode."""

    @property
    def errors(self) -> list[ClipError]:
        return self.reports.errors


def gather(writer: StoreWriter) -> Outcome:
    """Read every commit once, in order, so that the sums do not depend on who wrote when.

    Columns that another process has added meanwhile are gathered with the rest.
    """
    writer.take_in_columns()
    entries: dict[tuple[str, ShardKey], IndexEntry] = {}
    merged: dict[tuple[str, str], dict[str, ChannelStatistics]] = {}
    reports = Reports()
    for commit in _commits(writer):
        entries[commit.column, commit.key] = IndexEntry.of(commit)
        reports.add(commit)
        for bucket in (commit.bucket, ALL):
            sums = merged.setdefault((commit.column, bucket), {})
            for name, part in commit.statistics.items():
                sums[name] = sums[name].merge(part) if name in sums else part
    statistics = {
        f"{column}/{bucket}": {name: part.summary() for name, part in sorted(sums.items())}
        for (column, bucket), sums in sorted(merged.items())
        if sums
    }
    return Outcome(entries, statistics, reports)


def finish(writer: StoreWriter, plan: Plan, counts: Mapping[str, Tally], outcome: Outcome) -> None:
    """Write index, reports and the store's description."""
    write_index(writer.files, Index(outcome.entries))
    for name, data in outcome.reports.files(plan).items():
        writer.files.write(name, data)
    writer.meta = StoreMeta.update(
        writer.files,
        lambda stored: replace(
            stored or writer.meta,
            counts={name: asdict(tally) for name, tally in counts.items()},
            statistics=outcome.statistics,
            versions=versions(),
        ),
    )


def replaced_videos(files: Files) -> frozenset[str]:
    """Return the videos of which a run has found that they are not the ones that were planned."""
    try:
        rows = read_parquet(files.read(ERRORS), ["video", "reason"]).to_pylist()
    except FileNotFoundError:
        return frozenset()
    except (KeyError, pa.ArrowException, OSError) as err:
        log.warning("%s/%s cannot be read, and will be written again: %s", files.url, ERRORS, err)
        return frozenset()
    return frozenset(row["video"] for row in rows if f"{CHANGED} planned" in row["reason"])


def versions() -> dict[str, str]:
    """Return the versions of all that the stored numbers depend on."""
    found = {"reducio_latents": __version__, "python": platform.python_version()}
    for name in (
        "torch",
        "numpy",
        "pyarrow",
        "av",
        "decord",
        "pillow",
        "diffusers",
        "transformers",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commits(writer: StoreWriter) -> Iterator[Commit]:
    sums = ShardSums(writer.files)
    for column, key in list_commits(writer.files):
        if column in writer.meta.columns:
            commit = Commit.read(writer.files, key, column)
            require_same_clips(writer.files, commit, sums)
            yield commit
