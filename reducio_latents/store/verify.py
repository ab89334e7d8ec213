"""Prove a store against itself: plan, commits, files, rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from reducio_latents.errors import StoreError
from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.store import Store
from reducio_latents.store.writer import row_checksum


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong, and which clips it costs."""

    where: str
    what: str
    clips: tuple[str, ...] = ()


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
    shards = {ShardKey(s.bucket, s.shard): s.rows for s in store.plan.shards()}
    committed: dict[str, set[ShardKey]] = {name: set() for name in store.columns}
    for column, key in list_commits(store.files):
        report.damage += _verify_commit(store, column, key, shards, report)
        committed.setdefault(column, set()).add(key)
        report.commits += 1
        progress(report.commits)
    for column, done in committed.items():
        if waiting := shards.keys() - done:
            report.missing[column] = len(waiting)
    return report


def _verify_commit(
    store: Store,
    column: str,
    key: ShardKey,
    shards: dict[ShardKey, int],
    report: VerifyReport,
) -> Iterator[Damage]:
    name = f"{key} {column}"
    if key not in shards or column not in store.meta.columns:
        unknown = f"column {column}" if column not in store.meta.columns else "shard"
        yield Damage(name, f"there is a commit, but the store describes no such {unknown}")
        return
    clip_ids = store.plan.shard_clips(key.bucket, key.shard)["clip_id"].to_pylist()
    try:
        commit = Commit.read(store.files, key, column)
    except StoreError as err:
        yield Damage(name, str(err), tuple(clip_ids))
        return
    if commit.rows != shards[key] or len(commit.row_crc32c) != commit.rows:
        yield Damage(
            name, f"the commit has {commit.rows} rows, the plan {shards[key]}", tuple(clip_ids)
        )
        return
    if commit.fingerprint != store.meta.columns[column].fingerprint:
        yield Damage(
            name, "the commit was made by an encoder with another fingerprint", tuple(clip_ids)
        )
    yield from _verify_failures(commit, clip_ids)
    yield from _verify_file(store, commit, clip_ids, report)


def _verify_failures(commit: Commit, clip_ids: list[str]) -> Iterator[Damage]:
    failed = {failure.row for failure in commit.failed}
    empty = {row for row, crc in enumerate(commit.row_crc32c) if crc is None}
    for row in sorted(failed ^ empty):
        state = "failed, but has a checksum" if row in failed else "empty without a reason"
        yield Damage(f"{commit.key} {commit.column}", f"row {row} is {state}", (clip_ids[row],))


def _verify_file(
    store: Store, commit: Commit, clip_ids: list[str], report: VerifyReport
) -> Iterator[Damage]:
    where = f"{store.files.url}/{commit.file}"
    try:
        data = store.files.read(commit.file)
    except (FileNotFoundError, NotADirectoryError):
        yield Damage(where, "the file is missing", tuple(clip_ids))
        return
    report.bytes += len(data)
    changed = hashlib.sha256(data).hexdigest() != commit.file_sha256
    if changed and len(data) != commit.file_bytes:
        what = f"the file has {len(data)} bytes, the commit says {commit.file_bytes}"
        yield Damage(where, what, tuple(_damaged_rows(store, commit, data, clip_ids)[0]))
        return
    bad_rows, why = _damaged_rows(store, commit, data, clip_ids)
    report.rows += commit.done
    if changed or bad_rows:
        yield Damage(where, why or "bytes outside the rows differ from the commit", tuple(bad_rows))


def _damaged_rows(
    store: Store, commit: Commit, data: bytes, clip_ids: list[str]
) -> tuple[list[str], str]:
    """Return the clips whose rows cannot be used as they lie in `data`, and what is wrong."""
    try:
        ranges = store.ranges(commit)
    except StoreError as err:
        return list(clip_ids), str(err)
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
    return bad, " and ".join(sorted(reasons))


def _is_sound(store: Store, commit: Commit, payload: bytes) -> bool:
    try:
        value = store.decode_row(payload, commit.bucket, commit.column)
    except (ValueError, StoreError):
        return False
    return isinstance(value, bytes) or bool(np.isfinite(value).all())
