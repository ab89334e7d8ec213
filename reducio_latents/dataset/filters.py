"""Which clips are wanted: filters over a store's plan, as one truth value per clip."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.dataset.conditions import Alternatives, Condition, passing
from reducio_latents.dataset.facts import clip_facts
from reducio_latents.errors import ConfigError
from reducio_latents.files.parquet import read_parquet
from reducio_latents.store import Store

Flags = NDArray[np.bool_]
SPLIT_DIGITS = 13
"""Hexadecimal digits of a hash that make a fraction: 52 bits, as many as a float has."""
SHOWN = 3
NEEDED = ("clip_id", "video", "start_s")
"""What choosing clips takes of the plan, whatever the conditions are."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which clips of a store are read. All conditions must hold."""

    buckets: tuple[str, ...] | None = None
    """Names of the buckets to read; None for all."""
    require_caption: bool = False
    """Only clips whose video has a caption in the plan."""
    filters: Alternatives = ()
    """Only clips for which these conditions hold, on what is known of them: `scores` by name, the
    columns that the corpus' table had, `psnr`, and `video`, `start_s`, `bucket`, `captions` (how
    many). As pyarrow takes them: `[("motion", ">", 2.0), ("aesthetic score", ">=", 5)]`, all of
    which must hold, or a list of such lists, one of which must; with = == != < > <= >= in, not in.
    What is not known of a clip, null or NaN, is never right: `LatentDataset.missing` counts it."""
    min_psnr: float | None = None
    """Short for `[("psnr", ">=", ...)]`: the PSNR in `quality.parquet`, in dB."""
    clip_ids: Sequence[str] | str | Path | None = None
    """Only these clips; or a Parquet file with a column `clip_id`."""
    split: Literal["train", "val"] | None = None
    """One of two halves: whole videos, told apart by a hash of their bytes, or of their name where
    those were not hashed. A video stays where it is when others are added."""
    val_fraction: float = 0.05
    """Share of the videos in the split `val`."""
    clips_per_sample: int = 1
    """Consecutive clips of one video that make up a sample."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction must be between 0 and 1, got {self.val_fraction}.")
        if self.clips_per_sample < 1:
            raise ConfigError(f"clips_per_sample must be >= 1, got {self.clips_per_sample}.")

    def __str__(self) -> str:
        """Return the filters that are set, as a person would list them."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        names = [name for name, value in _UNSET.items() if chosen[name] != value]
        names += ["val_fraction"] if self.split else []
        texts = [f"{name}={_plain(chosen[name])!r}" for name in names]
        if self.clip_ids is not None and not isinstance(self.clip_ids, str | Path):
            texts.append(f"clip_ids ({len(self.clip_ids)} of them)")
        elif self.clip_ids is not None:
            texts.append(f"clip_ids={str(self.clip_ids)!r}")
        return ", ".join(texts) or "none is set"

    @property
    def need_plan(self) -> bool:
        """Whether the plan's table of clips has to be read."""
        chosen = (self.clip_ids, self.split)
        return (
            self.clips_per_sample > 1
            or bool(self.alternatives)
            or any(value is not None for value in chosen)
        )

    @property
    def alternatives(self) -> Alternatives:
        """All conditions on facts, those that have a word of their own among them."""
        also: list[Condition] = []
        if self.require_caption:
            also.append(Condition("plan.captions", ">", 0))
        if self.min_psnr is not None:
            also.append(Condition("quality.psnr", ">=", self.min_psnr))
        groups = self.filters or ((),)
        return tuple(found for group in groups if (found := (*group, *also)))


def _plain(value: Any) -> Any:
    """Return conditions as they are given."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return [[tuple(condition) for condition in group] for group in value]
    return value


_UNSET = {f.name: f.default for f in fields(Filters) if f.name not in ("clip_ids", "val_fraction")}


def wanted_clips(store: Store, filters: Filters) -> tuple[pa.Table, Flags]:
    """Return the clips of the plan, and for each whether the filters let it pass.

    The table has what the filters name, and `NEEDED`. Raise StoreError or ConfigError for a
    condition that cannot be tested.
    """
    alternatives = filters.alternatives
    names = [condition.name for group in alternatives for condition in group]
    clips = clip_facts(store, [*NEEDED, *names])
    flags = np.asarray(pc.equal(clips["status"], "planned"))
    if filters.clip_ids is not None:
        # A clip that is a duplicate names its original's row, so it is looked up among all.
        place = store.plan.places(clips)
        named = _has_id(clips, _read_ids(filters.clip_ids), store)
        flags = np.isin(place, place[named]) & flags
    if alternatives:
        flags = flags & passing(alternatives, clips)
    if filters.split is not None:
        held_out = _is_held_out(store, clips, filters.val_fraction)
        flags = flags & (held_out if filters.split == "val" else ~held_out)
    return clips, flags


def _read_ids(clip_ids: Sequence[str] | str | Path) -> pa.Array:
    try:
        if not isinstance(clip_ids, str | Path):
            return pa.array([str(name) for name in clip_ids], pa.string())
        table = read_parquet(clip_ids, ["clip_id"])
        return table["clip_id"].combine_chunks().cast(pa.string())
    except (OSError, KeyError, pa.ArrowException) as err:
        why = str(err).partition("\n")[0]
        raise ConfigError(
            f"clip_ids: {clip_ids} is not a Parquet file with a column clip_id ({why})."
        ) from err


def _has_id(clips: pa.Table, wanted: pa.Array, store: Store) -> Flags:
    """Return which clips are named; raise ConfigError if one that is named does not exist."""
    unknown = wanted.filter(pc.invert(pc.is_in(wanted, clips["clip_id"].combine_chunks())))
    if len(unknown):
        names = ", ".join(map(str, unknown.slice(0, SHOWN).to_pylist()))
        raise ConfigError(
            f"clip_ids names {len(unknown)} clips that {store.files.url} does not have, such as "
            f"{names}. Is the list of another store?"
        )
    return np.asarray(pc.is_in(clips["clip_id"], wanted))


def _is_held_out(store: Store, clips: pa.Table, fraction: float) -> Flags:
    names, digests = (store.plan.videos[name].to_pylist() for name in ("video", "sha256"))
    hashes = dict(zip(names, digests, strict=True))
    video = clips["video"].combine_chunks().dictionary_encode()
    most = fraction * 16**SPLIT_DIGITS
    held_out = [
        int((hashes[name] or hashlib.sha256(name.encode()).hexdigest())[:SPLIT_DIGITS], 16) < most
        for name in video.dictionary.to_pylist()
    ]
    flags: Flags = np.array(held_out, np.bool_)[video.indices.to_numpy()]
    return flags
