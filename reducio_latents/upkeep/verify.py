"""Prove a store against itself: description, plan, index, commits, files, rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from reducio_latents.core.parsing import parse_json
from reducio_latents.errors import StoreError
from reducio_latents.files.protocol import LISTING
from reducio_latents.store import index
from reducio_latents.store.commit import Commit, ShardKey, clips_sha256, commit_path, list_commits
from reducio_latents.store.container import array_nodes, array_rows
from reducio_latents.store.drop import LOCK
from reducio_latents.store.meta import ROOT
from reducio_latents.store.plan import VIDEO_SCHEMA, verify_parts
from reducio_latents.store.plan.parts import PART_KINDS, PENDING, part_path
from reducio_latents.store.reports import ERRORS, QUALITY, SHOTS, Reports, report_damage
from reducio_latents.store.store import Store
from reducio_latents.store.turns import ALONE, AT_WORK
from reducio_latents.store.writer import LISTED, PROBED_FOLDER, row_checksum

WORKING = ("runs/", "attempts/", f"{PROBED_FOLDER}/", f"{PENDING}/", f"{AT_WORK}/", LISTED)
"""Folders of runs that are under way, or were killed."""
BESIDE = ("README.md", "LICENSE", ".gitattributes")
FOLDERS_BESIDE = ("preview/", ".cache/")
"""Files, and folders, that whoever publishes a store, or fetches one, lays beside it."""


MISSING = "the file is missing"


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong, and which clips it costs."""

    where: str
    what: str
    clips: tuple[str, ...] = ()

    def __str__(self) -> str:  # an error's own text may say where
        return self.what if self.where in self.what else f"{self.where}: {self.what}"


@dataclass
class VerifyReport:
    """What was looked at and what was found."""

    commits: int = 0
    rows: int = 0
    bytes: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    """Column -> shards of the plan that have no commit yet: work to do, not damage."""
    damage: list[Damage] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.damage


def verify(store: Store, progress: Callable[[int], None] = lambda _: None) -> VerifyReport:
    """Read every byte of `store` and prove checksums, counts, shapes and finite values.

    `progress` is called with the number of commits done.
    """
    report = VerifyReport()
    report.damage += _verify_plan(store)
    try:
        shards = {ShardKey(s.bucket, s.shard): s.rows for s in store.plan.shards()}
        for _ in store.plan.clip_tables():
            pass  # read and proven
        store.plan.video_columns(*VIDEO_SCHEMA.names)
    except StoreError as err:  # there is nothing to hold the commits against
        report.damage = [*_verify_description(store), *report.damage, Damage("plan", str(err))]
        return report
    rows = array_rows(((*key, count) for key, count in shards.items()), store.meta.shard_rows)
    described = store.layout.describe(store.meta, rows, store.columns)
    report.damage = [*_verify_description(store, described), *report.damage]
    report.damage += _verify_arrays(store, described)
    proof = _CommitProof(store, shards, report)
    # Shard by shard: columns that share a file come one after another.
    for column, key in _listed_commits(store, report):
        report.damage += proof.of(column, key)
        report.commits += 1
        progress(report.commits)
    stored = _stored_index(store, report)
    report.damage += _verify_index(store, stored, proof.sound)
    report.damage += _noted(store, LISTING, _verify_listing(store))
    is_finished = stored is not None and stored.entries.keys() == proof.sound.keys() == proof.seen
    report.damage += _verify_reports(store, proof.sound if is_finished else None)
    for column in store.columns:
        if waiting := sum((column, key) not in proof.seen for key in shards):
            report.missing[column] = waiting
    known = set[str]()
    is_whole = is_finished and not report.missing
    report.damage += _verify_coordinates(store, known, is_finished=is_whole)
    report.damage += _noted(store, "", _unknown_files(store, shards, proof, known))
    return report


def _content(store: Store, path: str) -> tuple[bytes | None, str]:
    """Return what a file holds, or why that cannot be known."""
    try:
        return store.files.read(path), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, MISSING
    except StoreError as err:
        return None, str(err).rstrip(".")


def _noted(store: Store, path: str, damage: Iterator[Damage]) -> Iterator[Damage]:
    """Yield damage; what cannot be looked at is some, too."""
    try:
        yield from damage
    except StoreError as err:
        yield Damage(f"{store.files.url}/{path}".rstrip("/"), str(err))


def _listed_commits(store: Store, report: VerifyReport) -> list[tuple[str, ShardKey]]:
    try:
        return sorted(list_commits(store.files), key=lambda item: (item[1], item[0]))
    except StoreError as err:
        report.damage.append(Damage(f"{store.files.url}/commits", str(err)))
        return []


def _verify_description(
    store: Store, described: Mapping[str, bytes] | None = None
) -> Iterator[Damage]:
    data, meta = store.files.read(ROOT), store.meta
    good = [meta.to_json(), meta.to_json(array_nodes(described or {}))]
    if described is None:  # which arrays it should name is not known
        root = parse_json(data)
        root.pop("consolidated_metadata", None)
        data = f"{json.dumps(root, indent=2)}\n".encode()
        good = [f"{json.dumps(parse_json(good[0]), indent=2)}\n".encode()]
    if data not in good:
        yield Damage(f"{store.files.url}/{ROOT}", "it was changed since it was written")


def _verify_plan(store: Store) -> Iterator[Damage]:
    try:
        for path, what in verify_parts(store.files):
            yield Damage(f"{store.files.url}/{path}", what)
    except StoreError as err:
        yield Damage(f"{store.files.url}/plan", str(err))


def _verify_arrays(store: Store, described: Mapping[str, bytes]) -> Iterator[Damage]:
    """Prove the small files that let other readers open the container."""
    for path, data in described.items():
        where = f"{store.files.url}/{path}"
        mend = "run the encode command again to write it anew"
        found, why = _content(store, path)
        if found is None:
            yield Damage(where, f"{why}; {mend}")
        elif found != data:
            yield Damage(where, f"it does not say what the store's description says; {mend}")


def _stored_index(store: Store, report: VerifyReport) -> index.Index | None:
    try:
        return index.read_index(store.files)
    except StoreError as err:
        report.damage.append(Damage(f"{store.files.url}/{index.PATH}", str(err)))
        return None


def _verify_index(
    store: Store, stored: index.Index | None, commits: Mapping[tuple[str, ShardKey], Commit]
) -> Iterator[Damage]:
    where = f"{store.files.url}/{index.PATH}"
    if stored is None:
        return
    for item, entry in stored.entries.items():
        if item in commits and entry != index.IndexEntry.of(commits[item]):
            yield Damage(where, f"it disagrees with the commit of {item[1]} {item[0]}; delete it")
    if store.files.read(index.PATH) != stored.to_json():
        yield Damage(where, "it was changed since it was written; delete it")


def _verify_reports(
    store: Store, commits: Mapping[tuple[str, ShardKey], Commit] | None
) -> Iterator[Damage]:
    """Prove reports against plan and commits; while a run is under way, that they can be read.

    `commits` are given where the index says that all of them were there when a run ended.
    """
    reports = Reports()
    by_path = sorted((commits or {}).items(), key=lambda item: commit_path(item[0][1], item[0][0]))
    for _, commit in by_path:
        reports.add(commit)
    expected = reports.files(store.plan)
    # An import makes no report of what failed, and keeps no versions.
    fails = bool(reports.errors or len(store.plan.failed_videos())) and store.meta.versions
    for name in (ERRORS, QUALITY, SHOTS):
        where = f"{store.files.url}/{name}"
        wanted = None if commits is None else expected.get(name, b"")
        data, why = _content(store, name)
        if data is not None:
            why = report_damage(data, wanted, store.meta.versions)
        elif why == MISSING and (not wanted or (name == ERRORS and not fails)):
            continue
        if why:
            yield Damage(where, f"{why}; run the encode command again to write it anew")


def _verify_coordinates(store: Store, seen: set[str], *, is_finished: bool) -> Iterator[Damage]:
    """Prove which clip each row is said to be of, once a run has said so of all; note the files."""
    for path, data in store.layout.coordinates(store.meta, store.plan):
        seen.add(path)
        found, why = _content(store, path) if is_finished else (data, "")
        if found != data:
            what = why or "it does not say what the plan says"
            yield Damage(f"{store.files.url}/{path}", f"{what}; run the encode command again")


def _unknown_files(
    store: Store, shards: Iterable[ShardKey], proof: _CommitProof, known: set[str]
) -> Iterator[Damage]:
    """Find files that no part of the store names; `known` are some that are named."""
    rows = dict.fromkeys(store.meta.buckets, 0)
    known |= {ROOT, index.PATH, LISTING, ERRORS, QUALITY, SHOTS, *BESIDE}
    known.update(store.layout.describe(store.meta, rows, store.columns))
    known.update(commit_path(key, column) for column, key in proof.seen)
    known.update(commit.file for commit in proof.sound.values())
    for key in shards:  # also of shards that are not committed, or not any more
        for column in store.columns:
            known.update(store.layout.paths(store.meta, key, column))
    # A plan's next part may have been begun.
    known.update(part_path(kind, n) for kind in PART_KINDS for n in range(store.plan.parts + 1))
    for path in store.files.list(""):
        if path in (LOCK, ALONE) or path.startswith((*WORKING, *FOLDERS_BESIDE)):
            continue
        if path not in known:
            yield Damage(f"{store.files.url}/{path}", "it is no file of this store; move it away")


def _verify_listing(store: Store) -> Iterator[Damage]:
    """Prove that the listing for web servers names only what exists."""
    data, why = _content(store, LISTING)
    if data is None:
        if why != MISSING:
            yield Damage(f"{store.files.url}/{LISTING}", why)
        return
    there = {*store.files.list("commits"), *store.files.list("plan")}
    names = data.decode(errors="replace").split("\n")[:-1]
    if not there.issuperset(names) or data != "".join(f"{n}\n" for n in sorted({*names})).encode():
        yield Damage(
            f"{store.files.url}/{LISTING}", "it names missing files; run the encode command again"
        )


class _CommitProof:
    """Proves commits and what they speak of. The last file is kept: columns may share it."""

    def __init__(self, store: Store, shards: Collection[ShardKey], report: VerifyReport) -> None:
        self._store = store
        self._shards = shards
        self._report = report
        self._file: tuple[str, bytes | None, str] = ("", None, "")
        self.sound: dict[tuple[str, ShardKey], Commit] = {}
        """The commits that can be read, whatever became of their rows; without what is told of
        each row."""
        self.seen: set[tuple[str, ShardKey]] = set()

    def of(self, column: str, key: ShardKey) -> Iterator[Damage]:
        name, store = f"{key} {column}", self._store
        self.seen.add((column, key))
        if key not in self._shards or column not in store.meta.columns:
            unknown = f"column {column}" if column not in store.meta.columns else "shard"
            yield Damage(name, f"there is a commit, but the store describes no such {unknown}")
            return
        clip_ids = tuple(store.plan.shard_clips(*key, ["clip_id"])["clip_id"].to_pylist())
        try:
            commit = Commit.read(store.files, key, column, agrees_with_itself=False)
        except StoreError as err:
            yield Damage(name, str(err), clip_ids)
            return
        if commit.rows != len(clip_ids) or len(commit.row_crc32c) != commit.rows:
            what = f"the commit has {commit.rows} rows, the plan {len(clip_ids)}"
            yield Damage(name, what, clip_ids)
            return
        self.sound[column, key] = replace(commit, row_crc32c=(), ranges=())
        if commit.clips_sha256 != clips_sha256(clip_ids):
            yield Damage(name, "the commit is of other clips than the plan's", clip_ids)
        if commit.fingerprint != store.meta.columns[column].fingerprint:
            what = "the commit was made by an encoder with another fingerprint"
            yield Damage(name, what, clip_ids)
        gone = store.plan.removed.get(key, frozenset())
        yield from _verify_failures(commit, clip_ids, gone)
        yield from self._verify_file(commit, clip_ids)

    def _verify_file(self, commit: Commit, clip_ids: tuple[str, ...]) -> Iterator[Damage]:
        where = f"{self._store.files.url}/{commit.file}"
        data, sha256 = self._read(commit.file)
        if data is None:
            yield Damage(where, sha256, clip_ids)
            return
        bad, why = _damaged_rows(self._store, commit, data, clip_ids)
        self._report.rows += commit.done
        if sha256 == commit.file_sha256 and not bad:
            return
        if len(data) != commit.file_bytes:
            why = f"the file has {len(data)} bytes, the commit says {commit.file_bytes}"
        yield Damage(where, why or "bytes outside the rows differ from the commit", bad)

    def _read(self, path: str) -> tuple[bytes | None, str]:
        """Return a file and its sha256, or why it cannot be read."""
        if self._file[0] != path:
            data, why = _content(self._store, path)
            self._file = (path, data, why if data is None else hashlib.sha256(data).hexdigest())
            self._report.bytes += len(data or b"")
        return self._file[1:]


def _verify_failures(
    commit: Commit, clip_ids: tuple[str, ...], gone: frozenset[int]
) -> Iterator[Damage]:
    failed = {failure.row: failure.clip_id for failure in commit.failed}
    empty = {row for row, crc in enumerate(commit.row_crc32c) if crc is None}
    for row in sorted(failed.keys() ^ empty):
        state = "failed, but has a checksum" if row in failed else "empty without a reason"
        yield Damage(f"{commit.key} {commit.column}", f"row {row} is {state}", clip_ids[row:][:1])
    for row in sorted(commit.removed ^ gone):
        what = "its clip was removed, but not its bytes: run the remove command again"
        if row not in gone:
            what = "it was removed, but the plan has it: restore the plan from a copy"
        yield Damage(f"{commit.key} {commit.column} row {row}", what)


def _damaged_rows(
    store: Store, commit: Commit, data: bytes, clip_ids: tuple[str, ...]
) -> tuple[tuple[str, ...], str]:
    """Return the clips whose rows cannot be used as they lie in `data`, and what is wrong."""
    try:
        ranges = store.ranges(commit)
    except StoreError as err:
        return clip_ids, str(err)
    bad, reasons = [], set()
    for row, (crc, (offset, length)) in enumerate(
        zip(commit.row_crc32c, ranges.tolist(), strict=True)
    ):
        if crc is None:
            continue
        payload = data[offset : offset + length] if offset >= 0 else b""
        if offset < 0 or len(payload) != length or row_checksum(payload) != crc:
            reasons.add("rows do not match their checksums")
        elif not _is_sound(store, commit, payload):
            reasons.add("rows hold NaN, infinity or another shape")
        else:
            continue
        bad.append(clip_ids[row])
    return tuple(bad), " and ".join(sorted(reasons))


def _is_sound(store: Store, commit: Commit, payload: bytes) -> bool:
    try:
        value = store.decode_row(payload, commit.bucket, commit.column)
    except (ValueError, StoreError):
        return False
    return isinstance(value, bytes) or store.kind(commit.column).is_finite(value)
