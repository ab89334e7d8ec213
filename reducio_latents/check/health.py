"""`stats`: what stored latents are like, and what can be wrong though every checksum holds."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.clips import CONTENT_IMAGE, MOTION, StoredClip, select_clips
from reducio_latents.check.decoding import Originals, content_pixels
from reducio_latents.check.options import Selection, StatsOptions
from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.conditions import parse_conditions
from reducio_latents.dataset.facts import SCORES_COLUMN
from reducio_latents.dataset.filters import Filters
from reducio_latents.dataset.selection import RowFlags, select
from reducio_latents.errors import StoreError, VideoError
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.writer import row_checksum

NONE_OF_THEM: NDArray[np.bool_] = np.zeros(0, np.bool_)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)

DEAD_STD_SHARE = 0.01
"""A channel is dead where its std over all clips is below this share of the median one's."""
FP16_SHARE = 0.95
FP16_MAX = 65504.0
"""float16 is saturated from that share of this, its largest value, on."""
COLLAPSED_KL = 0.01
"""A posterior has collapsed below so many nats of KL to N(0, 1) per latent value."""
BLACK_LUMA = 16.0
"""A picture is black if 99 % of its pixels have a luma (0 to 255) below this."""
FROZEN_STEP = 0.5
"""A clip is frozen if no frame differs from the one before by more than this (of 255)."""
CUT_STEP, CUT_RATIO = 25.0, 5.0
"""A cut runs through a clip where a frame differs from the one before by at least the first, and by
so many times the median difference within the clip."""
FAULTS = {
    "damaged clips": "bytes do not match their checksums; run `verify` to see all the damage",
    "not finite": "latents hold NaN or infinity",
    "saturated float16": f"latents reach {FP16_SHARE * FP16_MAX:.0f}, {FP16_SHARE:.0%} of "
    "float16's range",
    "posterior collapse": f"clips carry under {COLLAPSED_KL:g} nats a latent value",
    "black clips": f"99 % of all pixels have a luma under {BLACK_LUMA:g} of 255",
    "duplicate clips": "clips with equal latents, byte by byte",
    "frozen clips": f"no frame differs from the last by more than {FROZEN_STEP:g} of 255",
    "cut-through clips": f"a frame differs from the last by {CUT_STEP:g} of 255 or more, and by "
    f"{CUT_RATIO:g} times the clip's median step (by scores: the steps beside it)",
}
"""What clips can have, and by which threshold."""


@dataclass(frozen=True)
class HealthWarning:
    """Something that a person should look at, and the clips that show it."""

    kind: str
    text: str
    """What was found, and by which threshold."""
    clips: tuple[str, ...]


@dataclass
class LatentScan:
    """What was found in stored moments, content images and frames, clip by clip."""

    clips: int = 0
    scored: int = 0
    """Of which scores say whether they are frozen, or cut through."""
    count: int = 0
    """Values seen per channel."""
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    kl: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Sums per channel, of the means' values, their squares, and of the KL in nats."""
    examples: list[str] = field(default_factory=list)
    _found: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    """Kind of fault -> the clips that have it, each once, in the order in which they came."""
    _digests: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add_moments(self, clip_id: str, moments: NDArray[np.generic], payload: bytes) -> None:
        """Take in one clip's moments (2D, t, h, w) and the bytes they were read from."""
        self.clips += 1
        self.examples += [clip_id] if len(self.examples) < 3 else []
        self._digests[hashlib.blake2b(payload, digest_size=16).digest()].append(clip_id)
        values = moments.astype(np.float64)
        if not np.isfinite(values).all():
            self._found["not finite"][clip_id] = None
            return
        if moments.dtype == np.float16 and np.abs(values).max() >= FP16_SHARE * FP16_MAX:
            self._found["saturated float16"][clip_id] = None
        mean, logvar = np.split(values.reshape(len(values), -1), 2)
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
        if kl.mean() < COLLAPSED_KL:
            self._found["posterior collapse"][clip_id] = None
        if not self.count:
            self.total, self.squares, self.kl = (np.zeros(len(mean)) for _ in range(3))
        self.count += mean.shape[1]
        self.total += mean.sum(1)
        self.squares += (mean**2).sum(1)
        self.kl += kl.sum(1)

    def add_damaged(self, clip_id: str, column: str) -> None:
        """Take in a clip whose bytes do not match their checksum; it counts in nothing else."""
        self.clips += column == MOTION
        self._found["damaged clips"][clip_id] = None

    def add_frames(self, clip_id: str, frames_THWC: NDArray[np.uint8]) -> None:
        """Take in a clip's frames, or its content image alone, (1, H, W, 3)."""
        for kind in frame_faults(frames_THWC):
            self._found[kind][clip_id] = None

    def add_scores(self, clip_id: str, scores: Mapping[str, float], frames: int) -> None:
        """Take in what a column `scores` says of a clip."""
        self.scored += 1
        most, cut = scores["motion_max"], scores["cut"]
        if frames == 1:
            return
        if most <= FROZEN_STEP:
            self._found["frozen clips"][clip_id] = None
        if most >= max(CUT_STEP, CUT_RATIO * (most - cut)):
            self._found["cut-through clips"][clip_id] = None

    @property
    def channel_std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel's mean over all clips and positions."""
        if not self.count:
            return np.zeros(0)
        average = self.total / self.count
        return np.sqrt(np.maximum(self.squares / self.count - average**2, 0))

    @property
    def channel_kl(self) -> NDArray[np.float64]:
        """KL to N(0, 1) of each channel, in nats per latent value."""
        return self.kl / self.count if self.count else np.zeros(0)

    def warnings(self) -> list[HealthWarning]:
        found = []
        some, std = tuple(self.examples), self.channel_std
        if len(std):
            floor = DEAD_STD_SHARE * float(np.median(std))
            if dead := np.flatnonzero(std <= floor).tolist():
                text = f"channels {_names(dead)} hardly vary: std at most {floor:.2g}, "
                text += f"{DEAD_STD_SHARE:.0%} of the median channel's"
                found.append(HealthWarning("dead channels", text, some))
            if flat := np.flatnonzero(self.channel_kl < COLLAPSED_KL).tolist():
                text = f"channels {_names(flat)} carry under {COLLAPSED_KL:g} nats a value"
                found.append(HealthWarning("posterior collapse", text, some))
        twins = [clip for same in self._digests.values() if len(same) > 1 for clip in same]
        clips = {**self._found, "duplicate clips": dict.fromkeys(twins)}
        return found + [
            HealthWarning(kind, text, tuple(clips[kind]))
            for kind, text in FAULTS.items()
            if clips.get(kind)
        ]


def scan_store(
    store: Store,
    scan: LatentScan,
    progress: Callable[[int, int], None] = lambda _, __: None,
    only: RowFlags | None = None,
) -> None:
    """Read every stored moment, content image and score once, or those of `only` some rows.

    `progress` is told (clips done, in all).
    """
    store.require_columns([MOTION])
    shards = store.index.shards([MOTION])
    total = sum(rows - len(empty) for rows, empty in shards.values())
    if only is not None:
        total = sum(int(flags.sum()) for found in only.values() for flags in found.values())
    others = {column: store.index.shards([column]) for column in (CONTENT_IMAGE, SCORES_COLUMN)}
    for key in shards:
        wanted = None if only is None else only.get(key.bucket, {}).get(key.shard, NONE_OF_THEM)
        if wanted is not None and not wanted.any():
            continue
        clip_ids = store.plan.shard_clips(key.bucket, key.shard)["clip_id"].to_pylist()
        for column in (MOTION, *(column for column, there in others.items() if key in there)):
            for row, payload in _payloads(store, key, column):
                if wanted is not None and not wanted[row]:
                    continue
                if payload is None:
                    scan.add_damaged(clip_ids[row], column)
                else:
                    value = store.decode_row(payload, key.bucket, column)
                    _add(scan, store, key.bucket, clip_ids[row], column, value, payload)
        progress(scan.clips, total)


def scan_clips(store: Store, scan: LatentScan, clips: Sequence[StoredClip]) -> None:
    """Look at these clips alone; raise StoreError for one whose bytes are damaged."""
    for clip in clips:
        for column in (MOTION, CONTENT_IMAGE):
            known = column in store.meta.columns
            row = store.read_row(clip.key, clip.row, column) if known else None
            if row is not None:
                payload = row if isinstance(row, bytes) else row.tobytes()
                _add(scan, store, clip.key.bucket, clip.clip_id, column, row, payload)


def _add(
    scan: LatentScan,
    store: Store,
    bucket: str,
    clip_id: str,
    column: str,
    row: NDArray[np.generic] | bytes,
    payload: bytes,
) -> None:
    if column == CONTENT_IMAGE:
        scan.add_frames(clip_id, content_pixels(store, row, bucket, clip_id)[None])
    elif column == SCORES_COLUMN:
        names = store.meta.columns[SCORES_COLUMN].config["names"]
        if {"motion_max", "cut"} <= {*names}:
            scores = dict(zip(names, np.asarray(row).tolist(), strict=True))
            scan.add_scores(clip_id, scores, Bucket.parse(bucket).frames)
    else:
        assert isinstance(row, np.ndarray)
        scan.add_moments(clip_id, row, payload)


def _payloads(store: Store, key: ShardKey, column: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield (row, bytes) of every row of a shard that is not empty; the file is read once.

    None stands for bytes that do not match their checksum.
    """
    commit = store.commit(key, column)
    try:
        data = store.files.read(commit.file)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise StoreError(
            f"{store.files.url}/{commit.file} is missing. Run `verify` to see what it costs."
        ) from err
    for row, (offset, length) in enumerate(store.ranges(commit).tolist()):
        if offset >= 0:
            payload = data[offset : offset + length]
            yield row, payload if row_checksum(payload) == commit.row_crc32c[row] else None


def frame_faults(frames_THWC: NDArray[np.uint8]) -> Iterator[str]:
    """Yield what a clip is of frozen, black and cut through; one frame can only be black."""
    luma = frames_THWC.astype(np.float32) @ LUMA
    if np.quantile(luma, 0.99) < BLACK_LUMA:
        yield "black clips"
    steps = np.abs(np.diff(luma, axis=0)).mean((1, 2))
    if len(steps) and steps.max() <= FROZEN_STEP:
        yield "frozen clips"
    if len(steps) and steps.max() >= max(CUT_STEP, CUT_RATIO * np.median(steps)):
        yield "cut-through clips"


def _names(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


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
