"""A commit: the last thing written for a (shard, column). Its presence means the work is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from reducio_latents.core.config import from_mapping
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import Files
from reducio_latents.store.limits import (
    MAX_FILE_BYTES,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    SHA256,
    column_folder,
    column_in,
    must_hold,
    require_bucket,
    require_column,
    require_count,
    require_rows,
)
from reducio_latents.store.seal import seal, unseal
from reducio_latents.store.statistics import ChannelStatistics

COMMITS_FOLDER = "commits"
WAS_REMOVED = "was removed"
"""Why a row is empty whose clip was taken out for good: no failure, so no report names it."""


class ShardKey(NamedTuple):
    """Names a shard: up to `shard_rows` clips of one bucket."""

    bucket: str
    shard: int

    def __str__(self) -> str:
        return f"{self.bucket}/{self.shard:06d}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One clip that could not be made."""

    row: int
    clip_id: str
    video: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClipQuality:
    """How well one clip decodes from what is stored of it."""

    row: int
    clip_id: str
    psnr: float
    """Mean over frames of the PSNR, in dB."""
    psnr_frames: tuple[float, ...]
    psnr_whole: float | None = None
    """What `psnr` would be without tiles; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What was done for one column of one shard."""

    bucket: str
    column: str
    shard: int
    rows: int
    """Rows of the plan in this shard, failed ones included."""
    fingerprint: str
    """Of the column, when these rows were made."""
    file: str
    """Path of the file with the rows, relative to the store. Columns may share one."""
    file_bytes: int
    file_sha256: str
    row_crc32c: tuple[int | None, ...]
    """Checksum of each row's payload; None where the row is empty."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Offset and length of each row's payload in `file`, for containers without an index of
    their own; (-1, 0) where the row is empty."""
    failed: tuple[Failure, ...] = ()
    clips_sha256: str = ""
    """Of the clip ids, one a line, in the order of rows: ties the commit to its plan."""
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    """`mean`: of the raw mean. `final`: of the final latents made of it."""
    quality: tuple[ClipQuality, ...] = ()
    """Of those clips that were decoded while they were encoded, by row."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage. With the checksum, all that differs between two runs over equal clips."""
    crc32c: int = field(default=0, compare=False)
    """Of the bytes of this record before it."""

    @property
    def key(self) -> ShardKey:
        return ShardKey(self.bucket, self.shard)

    @property
    def done(self) -> int:
        return self.rows - len(self.failed)

    @property
    def removed(self) -> set[int]:
        """The rows of clips that were taken out."""
        return {failure.row for failure in self.failed if failure.reason == WAS_REMOVED}

    def to_json(self) -> bytes:
        """Return the bytes of the stored commit."""
        record = {name: value for name, value in asdict(self).items() if name != "crc32c"}
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        return seal(text.encode())

    @classmethod
    def read(
        cls, files: Files, key: ShardKey, column: str, *, agrees_with_itself: bool = True
    ) -> Self:
        """Read one commit; raise StoreError if it is missing, damaged, or names what may not be.

        So it does if its numbers of rows disagree, unless `agrees_with_itself` is not asked for.
        """
        path = commit_path(key, column)
        where = f"{files.url}/{path}"
        try:
            commit = from_mapping(cls, unseal(files.read(path)), where="it")
            require_entry(commit)
            if agrees_with_itself:
                must_hold(len(commit.row_crc32c) == commit.rows, "row_crc32c has other rows")
                require_rows([failure.row for failure in commit.failed], commit.rows, "failed")
                require_rows([clip.row for clip in commit.quality], commit.rows, "quality")
        except FileNotFoundError as err:
            raise StoreError(
                f"{where} is missing: column {column} of this shard is not done. "
                "Run the encode command again."
            ) from err
        except (ConfigError, ValueError) as err:
            raise StoreError(
                f"{where} is damaged ({str(err).rstrip('.')}). Delete it and run the encode "
                "command again: only this shard is done anew."
            ) from err
        if (commit.bucket, commit.shard, commit.column) != (*key, column):
            raise StoreError(f"{where} speaks of another shard. Delete it and encode again.")
        return commit


def require_entry(entry: Any) -> None:
    """Raise ConfigError unless the names and numbers of a commit are such as a store may hold.

    A commit's line in the index has the same ones.
    """
    require_bucket(entry.bucket)
    require_column(entry.column)
    require_count(entry.shard, MAX_SHARDS, "shard")
    require_count(entry.rows, MAX_SHARD_ROWS, "rows")
    require_count(entry.file_bytes, MAX_FILE_BYTES, "file_bytes")
    must_hold(SHA256.fullmatch(entry.file_sha256) is not None, "file_sha256 is no sha256.")
    inside = all(part not in ("", ".", "..") for part in entry.file.split("/"))
    must_hold(inside or not entry.file_bytes, f"it names a file outside the store: {entry.file!r}")


def clips_sha256(clip_ids: Iterable[str]) -> str:
    """Return the value of `Commit.clips_sha256` for these clips."""
    return hashlib.sha256("".join(f"{clip_id}\n" for clip_id in clip_ids).encode()).hexdigest()


def commit_path(key: ShardKey, column: str) -> str:
    return f"{COMMITS_FOLDER}/{key.bucket}/{column_folder(column)}/{key.shard:06d}.json"


def list_commits(files: Files) -> Iterator[tuple[str, ShardKey]]:
    """Yield (column, shard) of every commit there is, by name alone, in order."""
    pattern = re.compile(rf"{COMMITS_FOLDER}/([^/]+)/([^/]+)/(\d{{6,10}})\.json", re.ASCII)
    for path in files.list(COMMITS_FOLDER):
        if match := pattern.fullmatch(path):
            yield column_in(match[2]), ShardKey(match[1], int(match[3]))
