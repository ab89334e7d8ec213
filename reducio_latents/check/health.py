"""What can be wrong with stored latents though every checksum holds. Thresholds are stated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.clips import CONTENT_IMAGE, MOTION, StoredClip
from reducio_latents.check.decoding import read_content_image
from reducio_latents.core.images import decode_image
from reducio_latents.errors import StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.writer import row_checksum

Frames = NDArray[np.uint8]

FP16_MAX = 65504.0
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a number is worth a warning."""

    dead_std_share: float = 0.01
    """A channel is dead where its std over all clips is below this share of the median one's."""
    fp16_share: float = 0.95
    """float16 is saturated from this share of its largest value, 65504, on."""
    collapsed_kl: float = 0.01
    """A posterior has collapsed below so many nats of KL to N(0, 1) per latent value."""
    black_luma: float = 16.0
    """A picture is black if 99 % of its pixels have a luma (0 to 255) below this."""
    frozen_step: float = 0.5
    """A clip is frozen if no frame differs from the one before by more than this (of 255)."""
    cut_step: float = 25.0
    """A cut runs through a clip where a frame differs from the one before by at least this, and"""
    cut_ratio: float = 5.0
    """by so many times the median difference within the clip."""


@dataclass(frozen=True)
class HealthWarning:
    """Something that a person should look at, and the clips that show it."""

    kind: str
    text: str
    """What was found, and by which threshold."""
    clips: tuple[str, ...]


@dataclass
class LatentScan:
    """What one pass over stored moments and content images found, clip by clip."""

    thresholds: Thresholds
    clips: int = 0
    count: int = 0
    """Values seen per channel."""
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    kl: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Sums per channel, of the means' values, their squares, and of the KL in nats."""
    examples: list[str] = field(default_factory=list)
    saturated: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    collapsed: list[str] = field(default_factory=list)
    black: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Clips whose bytes do not match their checksums; they count in nothing else."""
    digests: dict[bytes, list[str]] = field(default_factory=dict)

    def add_moments(self, clip_id: str, moments: NDArray[np.generic], payload: bytes) -> None:
        """Take in one clip's moments (2D, t, h, w) and the bytes they were read from."""
        self.clips += 1
        if len(self.examples) < 3:
            self.examples.append(clip_id)
        self.digests.setdefault(hashlib.blake2b(payload, digest_size=16).digest(), []).append(
            clip_id
        )
        values = moments.astype(np.float64)
        if not np.isfinite(values).all():
            self.not_finite.append(clip_id)
            return
        if moments.dtype == np.float16 and np.abs(values).max() >= self._fp16_limit:
            self.saturated.append(clip_id)
        mean, logvar = np.split(values.reshape(len(values), -1), 2)
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
        if kl.mean() < self.thresholds.collapsed_kl:
            self.collapsed.append(clip_id)
        if not self.count:
            self.total, self.squares, self.kl = (np.zeros(len(mean)) for _ in range(3))
        self.count += mean.shape[1]
        self.total += mean.sum(1)
        self.squares += (mean**2).sum(1)
        self.kl += kl.sum(1)

    def add_damaged(self, clip_id: str, column: str) -> None:
        """Take in a clip whose bytes in a column cannot be trusted."""
        self.clips += column == MOTION
        if clip_id not in self.damaged:
            self.damaged.append(clip_id)

    def add_image(self, clip_id: str, image_HWC: Frames) -> None:
        luma = image_HWC.astype(np.float32) @ LUMA
        if np.quantile(luma, 0.99) < self.thresholds.black_luma:
            self.black.append(clip_id)

    @property
    def _fp16_limit(self) -> float:
        return self.thresholds.fp16_share * FP16_MAX

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
        limits, found = self.thresholds, []
        some = tuple(self.examples)
        std, kl = self.channel_std, self.channel_kl
        if len(std):
            floor = limits.dead_std_share * float(np.median(std))
            if dead := np.flatnonzero(std <= floor).tolist():
                text = f"channels {_names(dead)} hardly vary: std at most {floor:.2g}, "
                text += f"{limits.dead_std_share:.0%} of the median channel's"
                found.append(HealthWarning("dead channels", text, some))
            if flat := np.flatnonzero(kl < limits.collapsed_kl).tolist():
                text = f"channels {_names(flat)} carry under {limits.collapsed_kl:g} nats a value"
                found.append(HealthWarning("posterior collapse", text, some))
        found += self._clip_warnings()
        return found

    def _clip_warnings(self) -> Iterator[HealthWarning]:
        limits = self.thresholds
        for kind, text, clips in [
            (
                "damaged clips",
                "bytes do not match their checksums; run `verify` to see all the damage",
                self.damaged,
            ),
            ("not finite", "latents hold NaN or infinity", self.not_finite),
            (
                "saturated float16",
                f"latents reach {self._fp16_limit:.0f}, {limits.fp16_share:.0%} of float16's range",
                self.saturated,
            ),
            (
                "posterior collapse",
                f"clips carry under {limits.collapsed_kl:g} nats a latent value",
                self.collapsed,
            ),
            (
                "black clips",
                f"99 % of the content image has a luma under {limits.black_luma:g} of 255",
                self.black,
            ),
            ("duplicate clips", "clips with equal latents, byte by byte", self._duplicates()),
        ]:
            if clips:
                yield HealthWarning(kind, text, tuple(clips))

    def _duplicates(self) -> list[str]:
        return [clip for same in self.digests.values() if len(same) > 1 for clip in same]


def scan_store(
    store: Store,
    thresholds: Thresholds | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> LatentScan:
    """Read every stored moment and content image once; `progress` is told (clips done, in all)."""
    store.require_columns([MOTION])
    scan = LatentScan(thresholds or Thresholds())
    shards = store.index.shards([MOTION])
    total = sum(rows - len(empty) for rows, empty in shards.values())
    images = store.index.shards([CONTENT_IMAGE])
    for key in shards:
        clip_ids = store.plan.shard_clips(key.bucket, key.shard)["clip_id"].to_pylist()
        for row, payload in _payloads(store, key, MOTION):
            if payload is None:
                scan.add_damaged(clip_ids[row], MOTION)
                continue
            value = store.decode_row(payload, key.bucket, MOTION)
            assert isinstance(value, np.ndarray)
            scan.add_moments(clip_ids[row], value, payload)
        if key in images:
            for row, payload in _payloads(store, key, CONTENT_IMAGE):
                if payload is None:
                    scan.add_damaged(clip_ids[row], CONTENT_IMAGE)
                else:
                    scan.add_image(clip_ids[row], _image(store, key, payload))
        progress(scan.clips, total)
    return scan


def scan_clips(
    store: Store, clips: Sequence[StoredClip], thresholds: Thresholds | None = None
) -> LatentScan:
    """Look at these clips alone; raise StoreError for one whose bytes are damaged."""
    scan = LatentScan(thresholds or Thresholds())
    for clip in clips:
        row = store.read_row(clip.key, clip.row, MOTION)
        assert isinstance(row, np.ndarray)
        scan.add_moments(clip.clip_id, row, row.tobytes())
        image = read_content_image(store, clip)
        if image is not None:
            scan.add_image(clip.clip_id, image)
    return scan


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


def _image(store: Store, key: ShardKey, payload: bytes) -> Frames:
    value = store.decode_row(payload, key.bucket, CONTENT_IMAGE)
    if isinstance(value, bytes):
        return decode_image(value, f"a content image of shard {key}")
    image: Frames = value.transpose(1, 2, 0).astype(np.uint8)
    return image


def motion_warnings(
    clips: Sequence[tuple[StoredClip, Frames]], thresholds: Thresholds | None = None
) -> list[HealthWarning]:
    """Return what is wrong with the frames (T, H, W, 3) of clips: frozen, black, cut through."""
    limits = thresholds or Thresholds()
    kinds: dict[str, list[str]] = {"frozen": [], "black": [], "cut": []}
    for clip, frames in clips:
        for kind in frame_faults(frames, limits):
            kinds[kind].append(clip.clip_id)
    dark, frozen, cut = limits.black_luma, limits.frozen_step, limits.cut_step
    texts = {
        "frozen": f"no frame differs from the last by more than {frozen:g} of 255",
        "black": f"99 % of all pixels have a luma under {dark:g} of 255",
        "cut": f"a frame differs from the last by {cut:g} of 255 or more, and by "
        f"{limits.cut_ratio:g} times the clip's median step",
    }
    names = {"frozen": "frozen clips", "black": "black clips", "cut": "cut-through clips"}
    return [
        HealthWarning(names[kind], texts[kind], tuple(found))
        for kind, found in kinds.items()
        if found
    ]


def merge_warnings(
    first: Sequence[HealthWarning], second: Sequence[HealthWarning]
) -> list[HealthWarning]:
    """Return all warnings; the second ones without clips that a first one of that kind names."""
    merged = list(first)
    for warning in second:
        known = {clip for other in first if other.kind == warning.kind for clip in other.clips}
        if fresh := tuple(clip for clip in warning.clips if clip not in known):
            merged.append(HealthWarning(warning.kind, warning.text, fresh))
    return merged


def frame_faults(frames_THWC: Frames, thresholds: Thresholds) -> list[str]:
    """Return which of `frozen`, `black`, `cut` a clip is."""
    luma = frames_THWC.astype(np.float32) @ LUMA
    found = []
    steps = np.abs(np.diff(luma, axis=0)).mean((1, 2))
    if len(steps) and steps.max() <= thresholds.frozen_step:
        found.append("frozen")
    if np.quantile(luma, 0.99) < thresholds.black_luma:
        found.append("black")
    if len(steps) and steps.max() >= thresholds.cut_step:
        found += ["cut"] if steps.max() >= thresholds.cut_ratio * np.median(steps) else []
    return found


def _names(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
