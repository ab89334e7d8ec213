"""Which clips of a store to look at: by id, at random, or the worst that were measured."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.check.options import Selection
from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.conditions import known, parse_conditions
from reducio_latents.dataset.facts import clip_facts
from reducio_latents.dataset.filters import Filters
from reducio_latents.dataset.selection import select
from reducio_latents.errors import StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.reports import read_quality

MOTION, CONTENT_IMAGE = "motion", "content_image"
SHOWN_COLUMNS = ("clip_id", "video", "start_s", "bucket", "shard", "row", "captions")


class StoredClip(NamedTuple):
    """One clip that a store holds, and where."""

    clip_id: str
    video: str
    """Path of its video, relative to the corpus."""
    start_s: float
    key: ShardKey
    row: int
    captions: tuple[str, ...]

    @property
    def bucket(self) -> Bucket:
        return Bucket.parse(self.key.bucket)


class RecordedClip(NamedTuple):
    """What was measured of a clip while it was encoded, by the protocol `standard`."""

    clip_id: str
    bucket: str
    psnr_db: float
    """The mean over its frames."""
    frame_psnr_db: tuple[float, ...]


def select_clips(store: Store, selection: Selection) -> list[StoredClip]:
    """Return the clips that `selection` names, all of them encoded.

    Raises StoreError for an id that the store does not hold, saying what became of it, and if
    there is nothing to choose from.
    """
    store.require_columns([MOTION])
    shards = _stored_shards(store, selection.buckets)
    if selection.ids:
        return _by_id(store, shards, selection.ids, selection.buckets)
    total = sum(rows - len(empty) for rows, empty in shards.values())
    if total == 0:
        what = f" in {', '.join(selection.buckets)}" if selection.buckets else ""
        raise StoreError(
            f"{store.files.url} holds no encoded clip{what}. See `status` for what it holds."
        )
    if selection.sort or selection.worst or selection.filters:
        return _by_facts(store, selection)
    chosen = random.Random(selection.seed).sample(range(total), min(selection.num, total))
    return list(_at_positions(store, shards, sorted(chosen)))


_Shards = Mapping[ShardKey, tuple[int, frozenset[int]]]


def _stored_shards(store: Store, buckets: Sequence[str]) -> _Shards:
    unknown = sorted(set(buckets) - set(store.meta.buckets))
    if unknown:
        raise StoreError(
            f"{store.files.url} has no bucket {unknown[0]}; it has {', '.join(store.meta.buckets)}."
        )
    found = store.index.shards([MOTION])
    return {key: value for key, value in found.items() if not buckets or key.bucket in buckets}


def _at_positions(store: Store, shards: _Shards, positions: list[int]) -> Iterator[StoredClip]:
    """Yield the clips at ascending positions among all rows that are not empty."""
    before, waiting = 0, iter(positions)
    wanted = next(waiting, None)
    for key, (rows, empty) in shards.items():
        here = [row for row in range(rows) if row not in empty]
        table = store.plan.shard_clips(key.bucket, key.shard)
        while wanted is not None and wanted < before + len(here):
            yield _rows(table.slice(here[wanted - before], 1).to_pylist())[0]
            wanted = next(waiting, None)
        before += len(here)


def _by_id(
    store: Store, shards: _Shards, ids: Sequence[str], buckets: Sequence[str]
) -> list[StoredClip]:
    wanted = pa.array(ids, pa.string())
    planned = store.plan.clips.filter(pc.is_in(store.plan.clips["clip_id"], value_set=wanted))
    clips = {clip.clip_id: clip for clip in _rows(planned.to_pylist())}
    for clip_id in ids:
        if clip_id not in clips:
            some = store.plan.clips["clip_id"].slice(0, 10_000).to_pylist()
            close = get_close_matches(clip_id, some, n=1)
            hint = f" Did you mean {close[0]}?" if close else " `decode --num` shows some."
            raise StoreError(f"{store.files.url} has no clip {clip_id!r}.{hint}")
        _require_stored(store, shards, clips[clip_id], buckets)
    return [clips[clip_id] for clip_id in ids]


def _require_stored(
    store: Store, shards: _Shards, clip: StoredClip, buckets: Sequence[str]
) -> None:
    if buckets and clip.key.bucket not in buckets:
        raise StoreError(
            f"clip {clip.clip_id} is of bucket {clip.key.bucket}, not of {', '.join(buckets)}. "
            "Leave --bucket out."
        )
    if clip.key not in shards:
        raise StoreError(
            f"clip {clip.clip_id} is planned but not encoded yet. Run the encode command again."
        )
    if clip.row in shards[clip.key][1]:
        failed = {f.row: f.reason for f in store.commit(clip.key, MOTION).failed}
        raise StoreError(f"clip {clip.clip_id} of {clip.video} failed: {failed[clip.row]}")


def _by_facts(store: Store, selection: Selection) -> list[StoredClip]:
    """Return clips that pass the filters: the first ones by a fact, or some at random."""
    conditions = parse_conditions(selection.filters)
    choice = select(store, [MOTION], Filters(buckets=selection.buckets or None, filters=conditions))
    sort = selection.sort or ("quality.psnr" if selection.worst else "")
    if selection.worst and not recorded_quality(store):
        raise StoreError(
            f"{store.files.url} has no recorded PSNR, so the worst clips are not known. Encode "
            "with --check-every, or look at clips at random: leave --worst out."
        )
    name, order = sort.removeprefix("-"), "descending" if sort[:1] == "-" else "ascending"
    clips = clip_facts(store, ["plan.clip_id", name] if name else ["plan.clip_id"])
    good = choice.places(clips)
    if name:
        good &= np.asarray(known(clips[name]))
        if not good.any():
            raise StoreError(f"{store.files.url} has no clip of which {name} is known.")
        places = np.flatnonzero(good)
        keys = [(name, order), ("plan.clip_id", "ascending")]
        chosen = places[pc.sort_indices(clips.take(places), sort_keys=keys).to_numpy()]
    else:
        count = int(good.sum())
        drawn = random.Random(selection.seed).sample(range(count), min(selection.num, count))
        chosen = np.flatnonzero(good)[sorted(drawn)]
    table = store.plan.clip_columns(SHOWN_COLUMNS).take(chosen[: selection.num])
    return _rows(table.to_pylist())


def recorded_quality(store: Store) -> list[RecordedClip]:
    """Return what was measured of clips while they were encoded, clip by clip; often nothing."""
    table = read_quality(store.files, ["clip_id", "bucket", "psnr", "psnr_frames"])
    return [
        RecordedClip(row["clip_id"], row["bucket"], row["psnr"], tuple(row["psnr_frames"]))
        for row in (table.to_pylist() if table is not None else ())
    ]


def _rows(rows: list[dict[str, Any]]) -> list[StoredClip]:
    return [
        StoredClip(
            clip_id=row["clip_id"],
            video=row["video"],
            start_s=row["start_s"],
            key=ShardKey(row["bucket"], row["shard"]),
            row=row["row"],
            captions=tuple(row["captions"] or ()),
        )
        for row in rows
    ]
