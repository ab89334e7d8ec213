"""`stats`: what a store's latents are like, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reducio_latents.check.clips import Selection, StoredClip, select_clips
from reducio_latents.check.health import (
    Frames,
    HealthWarning,
    LatentScan,
    Thresholds,
    merge_warnings,
    motion_warnings,
    scan_store,
)
from reducio_latents.check.originals import Originals
from reducio_latents.errors import StoreError, VideoError
from reducio_latents.store import Store, open_store


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """What is looked at beside the latents themselves."""

    look: int = 32
    """Clips whose original frames are read again, to find frozen and cut-through ones; 0: none."""
    seed: int = 0
    """Of the choice of these clips."""
    corpus: str | None = None
    """Where the originals are; None: where the store says they were."""
    root: str | None = None
    video_backend: str = "pyav"
    clip_timeout_s: float = 120.0
    """A decoder that brings no original for so long has hung."""
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What was found."""

    store: Store
    scan: LatentScan
    warnings: list[HealthWarning]
    looked: int
    """Clips whose original frames were seen."""
    notes: tuple[str, ...]


def store_stats(
    path: str | Path,
    options: StatsOptions | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> StoreStats:
    """Read all latents and content images of a store, and the originals of some clips.

    `progress` is told (clips done, clips in all). Raises StoreError for a store that cannot be
    read or holds no clip; originals that cannot be read are a note.
    """
    options = options or StatsOptions()
    store = open_store(path)
    scan = scan_store(store, options.thresholds, progress)
    if not scan.clips:
        raise StoreError(
            f"{store.files.url} holds no encoded clip. See `status` for what it holds."
        )
    notes: list[str] = []
    seen: list[tuple[StoredClip, Frames]] = []
    if options.look:
        with Originals(
            store,
            options.corpus,
            root=options.root,
            backend=options.video_backend,
            timeout_s=options.clip_timeout_s,
        ) as originals:
            seen = list(_read(store, originals, options, notes))
    left = scan.clips - len(seen)
    if left:
        notes.append(
            f"Frozen and cut-through clips were looked for in {len(seen)} of {scan.clips} clips."
        )
    found = merge_warnings(scan.warnings(), motion_warnings(seen, options.thresholds))
    return StoreStats(store=store, scan=scan, warnings=found, looked=len(seen), notes=tuple(notes))


def _read(
    store: Store, originals: Originals, options: StatsOptions, notes: list[str]
) -> Iterator[tuple[StoredClip, Frames]]:
    if originals.problem is not None:
        notes.append(f"No originals: {originals.problem}.")
        return
    missed: dict[str, str] = {}
    for clip in select_clips(store, Selection(num=options.look, seed=options.seed)):
        try:
            yield clip, originals.read(clip)
        except VideoError as err:
            missed[clip.clip_id] = str(err)
    if missed:
        clip_id, why = next(iter(missed.items()))
        number = f"{len(missed)} original" + ("" if len(missed) == 1 else "s")
        notes.append(f"{number} could not be read, such as of {clip_id}: {why}.")
