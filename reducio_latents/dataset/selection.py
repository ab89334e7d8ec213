"""What is read of a store: for each bucket its shards, and where samples begin in each.

Memory is O(shards): a shard of which every row is read is a number; one with exceptions (failed
clips, filters) has one bit a row beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.core.clips import TIME_TOLERANCE_S
from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.conditions import known
from reducio_latents.dataset.facts import by_shard
from reducio_latents.dataset.filters import Filters, wanted_clips
from reducio_latents.dataset.reader import Ints
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store import Store
from reducio_latents.store.plan import first_sums


@dataclass(frozen=True)
class BucketSelection:
    """What is read of one bucket. The sequences are parallel, one element a shard."""

    shards: tuple[int, ...]
    """Numbers of the shards."""
    counts: Ints
    """Samples in each."""
    masks: tuple[bytes | None, ...]
    """Bits of the rows where samples begin, as `numpy.packbits` packs them; None for every row."""


NOTHING_CHOSEN = BucketSelection((), np.zeros(0, np.int64), ())


RowFlags = dict[str, dict[int, NDArray[np.bool_]]]
"""By bucket and shard, one truth value a row."""


class Choice(NamedTuple):
    """What filters leave of a store."""

    rows: RowFlags
    """Where samples begin."""
    missing: dict[str, int]
    """By a name in the filters: clips of which it is not known, so that they do not pass."""

    def places(self, clips: pa.Table) -> NDArray[np.bool_]:
        """Return which rows of a table of clips, which has `PLACE_FIELDS`, are chosen."""
        found = np.zeros(len(clips), np.bool_)
        for key, part in by_shard(clips, np.asarray(pc.equal(clips["status"], "planned"))):
            flags = self.rows.get(key.bucket, {}).get(key.shard)
            if flags is not None:
                rows = clips["row"].take(part).to_numpy()
                found[part[rows < len(flags)]] = flags[rows[rows < len(flags)]]
        return found

    def packed(self) -> dict[str, BucketSelection]:
        found = {bucket: _pack(shards) for bucket, shards in self.rows.items()}
        return {bucket: chosen for bucket, chosen in found.items() if chosen.shards}


def select(store: Store, columns: Sequence[str], filters: Filters) -> Choice:
    """Return what the filters leave of the shards that have all of `columns`.

    Raise StoreError if nothing is there yet, ConfigError if the filters leave nothing.
    """
    choice = Choice(_whole_shards(store, columns, filters), {})
    if filters.need_plan:
        _exclude(choice, store, filters)
    if not any(flags.any() for shards in choice.rows.values() for flags in shards.values()):
        unknown = "".join(f"; {count} clips have no {n}" for n, count in choice.missing.items())
        raise ConfigError(
            f"the filters leave no sample of {store.files.url} ({filters}){unknown}. Loosen one of "
            "them."
        )
    return choice


def selection_digest(
    store: Store, columns: Sequence[str], chosen: Mapping[str, BucketSelection]
) -> str:
    """Return a hash of which clips of which store are read, wherever the store lies."""
    digest = hashlib.sha256(_identity(store))
    for name in columns:
        digest.update(f"{name}\0{store.meta.columns[name].fingerprint}\0".encode())
    for bucket, part in sorted(chosen.items()):
        digest.update(f"{bucket}\0{part.shards}\0{part.counts.tolist()}\0".encode())
        for mask in part.masks:
            digest.update(mask or b"all")
    return digest.hexdigest()


def _identity(store: Store) -> bytes:
    """Return what no two stores share, and no update of captions changes."""
    try:
        return first_sums(store.files)
    except FileNotFoundError:
        return store.meta.corpus.encode()


def _whole_shards(store: Store, columns: Sequence[str], filters: Filters) -> RowFlags:
    """Return, by bucket and shard, which rows have all of the columns."""
    store.require_columns(list(columns))
    _require_same_encoder(store, columns)
    shards = store.index.shards(columns)
    if not shards:
        raise StoreError(
            f"{store.files.url} has no shard yet with all of {', '.join(columns)}. "
            "Wait for the encode command, or run it again; `status` shows how far it is."
        )
    for bucket in filters.buckets or ():
        if bucket not in store.meta.buckets:
            raise ConfigError(
                f"{store.files.url} has no bucket {bucket!r}; it has "
                f"{', '.join(store.meta.buckets)}."
            )
    keep: RowFlags = {}
    for key, (rows, failed) in shards.items():
        if filters.buckets is None or key.bucket in filters.buckets:
            flags = np.ones(rows, np.bool_)
            flags[list(failed)] = False
            keep.setdefault(key.bucket, {})[key.shard] = flags
    return keep


def _require_same_encoder(store: Store, columns: Sequence[str]) -> None:
    expected = {name: store.meta.columns[name].fingerprint for name in columns}
    for (column, key), entry in store.index.entries.items():
        if entry.fingerprint != expected.get(column, entry.fingerprint):
            raise StoreError(
                f"{store.files.url}: shard {key} of {column} was made by an encoder with the "
                f"fingerprint {entry.fingerprint[:12]}..., the store's description says "
                f"{expected[column][:12]}... Delete the shard's commit and encode again."
            )


def _exclude(choice: Choice, store: Store, filters: Filters) -> None:
    """Turn off rows that the filters exclude, and those where no whole sample begins."""
    clips, wanted = wanted_clips(store, filters)
    names = {condition.name for group in filters.alternatives for condition in group}
    lacking = {name: ~np.asarray(known(clips[name])) for name in sorted(names)}
    video = clips["video"].combine_chunks().dictionary_encode().indices.to_numpy()
    start_s = clips["start_s"].to_numpy()
    for key, part in by_shard(clips, store.plan.owns_row):
        flags = choice.rows.get(key.bucket, {}).get(key.shard)
        if flags is None:
            continue
        if len(part) != len(flags):
            raise StoreError(
                f"{store.files.url}: the commit of shard {key} has {len(flags)} rows, the plan "
                f"{len(part)}. Run `verify` to see what is wrong."
            )
        for name, lacks in lacking.items():
            if count := int((lacks[part] & flags).sum()):
                choice.missing[name] = choice.missing.get(name, 0) + count
        flags &= wanted[part]
        if filters.clips_per_sample > 1:
            span_s = Bucket.parse(key.bucket).frames / store.meta.clip.rate_fps
            joined = _follows(video[part], start_s[part], span_s)
            flags[:] = sequence_starts(flags, joined, filters.clips_per_sample)


def _follows(video: Ints, start_s: NDArray[np.float64], span_s: float) -> NDArray[np.bool_]:
    """Return which clips begin where the row before ends, in the same video."""
    gap = np.abs(np.diff(start_s) - span_s)
    joined: NDArray[np.bool_] = np.zeros(len(video), np.bool_)
    joined[1:] = np.diff(video) == 0
    joined[1:] &= gap < TIME_TOLERANCE_S
    return joined


def sequence_starts(
    usable: NDArray[np.bool_], joined: NDArray[np.bool_], length: int
) -> NDArray[np.bool_]:
    """Return the rows where sequences of `length` usable rows begin, each joined to the one before.

    Runs are cut from their first row on, so sequences do not overlap and what is left of a run is
    not read.
    """
    starts_run = usable & ~(joined & np.concatenate([[False], usable[:-1]]))
    rows = np.arange(len(usable))
    in_run = rows - np.maximum.accumulate(np.where(starts_run, rows, 0))
    starts: NDArray[np.bool_] = usable & (in_run % length == 0)
    begins = np.flatnonzero(starts)
    ends = begins + length
    fits = ends <= len(usable)
    last = np.minimum(ends, len(usable)) - 1
    starts[begins] = fits & usable[last] & (in_run[last] == in_run[begins] + length - 1)
    return starts


def _pack(shards: Mapping[int, NDArray[np.bool_]]) -> BucketSelection:
    chosen = {number: flags for number, flags in sorted(shards.items()) if flags.any()}
    return BucketSelection(
        shards=tuple(chosen),
        counts=np.array([int(flags.sum()) for flags in chosen.values()], np.int64),
        masks=tuple(
            None if flags.all() else np.packbits(flags).tobytes() for flags in chosen.values()
        ),
    )
