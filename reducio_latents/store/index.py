"""Which shards a reader may use: all commits folded into one small file, O(shards) in size.

The index is a convenience that can be made again from the commits at any time; commits that it does
not have are read one by one. Whoever takes back or replaces a commit that it may have removes it
first (`StoreWriter.drop_commit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from reducio_latents.core.config import convert
from reducio_latents.core.parsing import compact_json
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import Files
from reducio_latents.files.protocol import LISTING
from reducio_latents.store.commit import COMMITS_FOLDER as COMMITS
from reducio_latents.store.commit import Commit, ShardKey, commit_path, list_commits, require_entry
from reducio_latents.store.limits import require_rows
from reducio_latents.store.plan import ShardSums
from reducio_latents.store.seal import seal, unseal

PATH = "index.json"
READERS = 16
"""Commits read at once; what they wait for is the disk or the network."""


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One commit, without what only its rows' reader needs."""

    column: str
    bucket: str
    shard: int
    rows: int
    failed: tuple[int, ...] = ()
    """Rows that are empty."""
    file: str = ""
    file_bytes: int = 0
    file_sha256: str = ""
    fingerprint: str = ""

    @classmethod
    def of(cls, commit: Commit) -> Self:
        same = {f.name: getattr(commit, f.name) for f in fields(cls) if f.name != "failed"}
        return cls(**same, failed=tuple(f.row for f in commit.failed))

    @property
    def key(self) -> ShardKey:
        return ShardKey(self.bucket, self.shard)


@dataclass(frozen=True)
class Index:
    """Every commit of a store at one moment."""

    entries: Mapping[tuple[str, ShardKey], IndexEntry] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the bytes of the stored index: a line a commit, in order."""
        lines = b",\n".join(compact_json(vars(entry)) for entry in self.entries.values())
        return seal(b'{"format_version":1,"commits":[\n%s\n]}' % lines)

    def columns(self) -> list[str]:
        return sorted({column for column, _ in self.entries})

    def shards(self, columns: Iterable[str]) -> dict[ShardKey, tuple[int, frozenset[int]]]:
        """Return (rows, empty rows) of every shard that has all of `columns`, in order of name.

        A row is empty if any of the columns failed for it.
        """
        wanted = list(columns)
        found: dict[ShardKey, tuple[int, frozenset[int]]] = {}
        for key in sorted({key for column, key in self.entries if column in wanted}):
            parts = [self.entries.get((column, key)) for column in wanted]
            present = [part for part in parts if part is not None]
            if len(present) == len(wanted):
                failed = frozenset(row for part in present for row in part.failed)
                if len({part.rows for part in present}) > 1:
                    raise StoreError(
                        f"shard {key} has {present[0].rows} rows in one column and other numbers "
                        f"in others. Run `verify`; delete {PATH} if it is damaged."
                    )
                found[key] = (present[0].rows, failed)
        return found


def build_index(files: Files, *, use_cache: bool = True, prove: bool = True) -> Index:
    """Return the index of all commits: the stored index and the commits that it lacks.

    With `prove`, raise StoreError for a commit, of those that are read, of other clips than the
    plan's.
    """
    stored = read_index(files) if use_cache else None
    cached = stored.entries if stored is not None else {}
    present = list(list_commits(files))
    missing = [(column, key) for column, key in present if (column, key) not in cached]
    sums = ShardSums(files)

    def slim(item: tuple[str, ShardKey]) -> Commit:
        # Of all commits at once, what is told of each row would be too much to hold.
        whole = Commit.read(files, item[1], item[0])
        return replace(whole, row_crc32c=(), ranges=(), quality=(), statistics={})

    fresh: dict[tuple[str, ShardKey], IndexEntry] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for commit in pool.map(slim, missing):
            if prove:  # by this thread alone: each would read the same piece of the plan
                require_same_clips(files, commit, sums)
            fresh[commit.column, commit.key] = IndexEntry.of(commit)
    return Index({item: cached.get(item) or fresh[item] for item in present})


def require_same_clips(files: Files, commit: Commit, sums: ShardSums) -> None:
    """Raise StoreError for a commit that was made of other clips than the plan has there."""
    if sums.of(*commit.key) not in (None, commit.clips_sha256):
        where = f"{files.url}/{commit_path(commit.key, commit.column)}"
        raise StoreError(
            f"{where} is of other clips than the plan's. Delete it "
            "and run the encode command again: only this shard is made anew."
        )


def same_clips(files: Files, *, with_rows: bool = False) -> set[tuple[str, ShardKey]]:
    """Return the commits that there are, but for those of other clips than the plan's; `with_rows`,
    also but for those whose file is gone or has another size."""
    sums = ShardSums(files)

    def said_by(item: tuple[str, ShardKey]) -> Any:
        column, key = item
        try:
            said = unseal(files.read(commit_path(key, column)))
            return [said.get(name) for name in ("clips_sha256", "file", "file_bytes")]
        except (FileNotFoundError, ValueError):
            return None  # who reads it says what is wrong

    present = list(list_commits(files))
    with ThreadPoolExecutor(READERS) as pool:
        told = dict(zip(present, pool.map(said_by, present), strict=True))
    same = {i for i, said in told.items() if not said or sums.of(*i[1]) in (None, said[0])}
    if not with_rows:
        return same
    sizes = files.sizes({said[1] for said in told.values() if said and said[1]})
    return {i for i in same if not told[i] or sizes.get(told[i][1], 0) == told[i][2]}


def write_index(files: Files, index: Index) -> None:
    """Write the index, and the listing for places that can be read but not listed.

    Commits that come while it is written are taken in, so that of several runs that end at once
    the last one leaves all of them.
    """
    names: list[str] = []
    while names != (now := sorted([*files.list(COMMITS), *files.list("plan")])):
        if names:
            index = build_index(files)
        files.write(PATH, index.to_json())
        files.write(LISTING, "".join(f"{name}\n" for name in now).encode())
        names = now


def read_index(files: Files) -> Index | None:
    """Return the stored index, or None if there is none; raise StoreError if it is damaged."""
    try:
        raw = unseal(files.read(PATH))
        entries: list[IndexEntry] = convert(raw["commits"], list[IndexEntry], where="it")
        for entry in entries:
            require_entry(entry)
            require_rows(entry.failed, entry.rows, "failed")
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError, KeyError, TypeError) as err:
        raise StoreError(
            f"{files.url}/{PATH} is damaged ({str(err).rstrip('.')}). Delete it: it is made again "
            "from the commits."
        ) from err
    return Index({(entry.column, entry.key): entry for entry in entries})
