"""`stats`: what a store's latents are like, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reducio_latents.check.clips import MOTION, select_clips
from reducio_latents.check.health import HealthWarning, LatentScan, scan_store
from reducio_latents.check.options import Selection, StatsOptions
from reducio_latents.check.originals import Originals
from reducio_latents.dataset.conditions import parse_conditions
from reducio_latents.dataset.filters import Filters
from reducio_latents.dataset.selection import select
from reducio_latents.errors import StoreError, VideoError
from reducio_latents.store import Store, open_store


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What was found."""

    store: Store
    scan: LatentScan
    warnings: list[HealthWarning]
    looked: int
    """Clips whose original frames were seen; none if scores say of all what they would."""
    notes: tuple[str, ...]
    filtered: bool = False

    @property
    def statistics(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """As the store keeps them; of clips that filters have chosen, the means of the latents."""
        if not self.filtered:
            return self.store.meta.statistics
        std = self.scan.channel_std.tolist()
        count = float(self.scan.count)
        mean = (self.scan.total / max(self.scan.count, 1)).tolist()
        return {f"{MOTION}/all": {"mean": {"mean": mean, "std": std, "count": [count] * len(std)}}}


def store_stats(
    path: str | Path,
    options: StatsOptions | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> StoreStats:
    """Read all latents, content images and scores of a store; without scores, some originals too.

    `progress` is told (clips done, clips in all). Raises StoreError for a store that cannot be
    read or holds no clip; originals that cannot be read are a note.
    """
    options = options or StatsOptions()
    store = open_store(path)
    scan = LatentScan()
    chosen = None
    if conditions := parse_conditions(options.filters):
        chosen = select(store, [MOTION], Filters(filters=conditions))
    scan_store(store, scan, progress, None if chosen is None else chosen.rows)
    if not scan.clips:
        raise StoreError(
            f"{store.files.url} holds no encoded clip. See `status` for what it holds."
        )
    looked, notes = 0, list[str]()
    if options.look and scan.scored < scan.clips:
        looked, notes = _look_at_originals(store, scan, options)
    if max(looked, scan.scored) < scan.clips:
        notes.append(
            f"Frozen and cut-through clips were looked for in {max(looked, scan.scored)} of "
            f"{scan.clips} clips."
        )
    missing = {} if chosen is None else chosen.missing
    notes += [f"{n} clips have no {name}, so they are left out." for name, n in missing.items()]
    return StoreStats(
        store=store,
        scan=scan,
        warnings=scan.warnings(),
        looked=looked,
        notes=tuple(notes),
        filtered=chosen is not None,
    )


def _look_at_originals(
    store: Store, scan: LatentScan, options: StatsOptions
) -> tuple[int, list[str]]:
    """Return how many originals were seen, and what must be said of the others."""
    chosen = select_clips(
        store, Selection(num=options.look, seed=options.seed, filters=options.filters)
    )
    missed: list[str] = []
    with Originals(store, options.corpus, root=options.root) as originals:
        if originals.problem is not None:
            return 0, [f"No originals: {originals.problem}."]
        for clip in chosen:
            try:
                scan.add_frames(clip.clip_id, originals.read(clip))
            except VideoError as err:
                missed.append(f"{clip.clip_id}: {err}".rstrip("."))
    if not missed:
        return len(chosen), []
    number = f"{len(missed)} original" + ("" if len(missed) == 1 else "s")
    return len(chosen) - len(missed), [f"{number} could not be read, such as of {missed[0]}."]
