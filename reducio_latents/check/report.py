"""What a report says: clips decoded and measured, curves, statistics, warnings, failures."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reducio_latents.autoencoders.protocol import is_untrained
from reducio_latents.check.clips import (
    RecordedClip,
    StoredClip,
    recorded_quality,
    select_clips,
)
from reducio_latents.check.decode import load_decoder, open_originals
from reducio_latents.check.decoding import DecodedClip, decode_clips
from reducio_latents.check.health import (
    HealthWarning,
    LatentScan,
    scan_clips,
    scan_store,
)
from reducio_latents.check.options import CheckOptions
from reducio_latents.check.pictures import Frames, Panel, difference, side_by_side
from reducio_latents.core.gaussian import kl_to_unit_normal
from reducio_latents.metrics.psnr import (
    WINDOW_PX,
    ComparisonRule,
    flicker,
    protocol_named,
    psnr,
    ssim,
)
from reducio_latents.store import Store, open_store
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.reports import ClipError, Reports
from reducio_latents.video.write import write_mp4

HISTOGRAM_BINS = 31
HISTOGRAM_LIMIT = 4.0
"""Final latents of a sound store lie mostly within +-4."""
DIFFERENCE_GAIN = 4
PAGE_CRF = "23"
"""Of the videos inside the page: a third of the bytes that `decode` writes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One clip against its original."""

    frame_psnr_db: tuple[float, ...]
    frame_ssim: tuple[float, ...]
    """Empty where the frames are too small for SSIM."""
    flicker: float

    @property
    def psnr_db(self) -> float:
        return sum(self.frame_psnr_db) / len(self.frame_psnr_db)

    @property
    def ssim(self) -> float:
        """The mean over frames; NaN if there is none."""
        return sum(self.frame_ssim) / len(self.frame_ssim) if self.frame_ssim else math.nan


@dataclass(frozen=True, kw_only=True)
class ReportClip:
    """One clip of the report."""

    clip: StoredClip
    video: bytes
    """H.264 in MP4: the panels next to each other."""
    labels: tuple[str, ...]
    """Of the panels."""
    scores: Scores | None
    problem: str | None
    """Why there are no scores."""
    kl_nats: float
    """KL to N(0, 1) per latent value."""
    histogram: tuple[int, ...]
    """Final latents in HISTOGRAM_BINS equal bins of +-HISTOGRAM_LIMIT."""
    recorded_db: float | None
    """The PSNR that was recorded while the clip was encoded, if it was."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows."""

    store: str
    meta: StoreMeta
    model: str
    protocol: ComparisonRule
    clips: Sequence[ReportClip]
    warnings: Sequence[HealthWarning]
    channel_kl: tuple[float, ...]
    failed: Sequence[ClipError]
    untrained: bool = False
    """The model has random weights: its pictures are noise, and its numbers judge nothing."""
    recorded: Sequence[RecordedClip] = ()
    """What was measured while encoding, of any clips of the store."""
    notes: tuple[str, ...] = field(default=())
    """What was not looked at, and why."""

    @property
    def scored(self) -> list[tuple[ReportClip, Scores]]:
        return [(clip, clip.scores) for clip in self.clips if clip.scores is not None]


def build_report(
    store: str | Path,
    options: CheckOptions,
    *,
    on_clip: Callable[[int, int], None] = lambda _, __: None,
    on_scan: Callable[[int, int], None] = lambda _, __: None,
) -> Report:
    """Decode and measure the clips that `options` choose, and look through the whole store.

    `on_clip` and `on_scan` are told (clips done, clips in all). Raises as `decode_store` does.
    """
    opened = open_store(store)
    clips = select_clips(opened, options.selection)
    decoder = load_decoder(opened, options)
    model = decoder.load()
    untrained = is_untrained(model)
    recorded = recorded_quality(opened)
    known = {clip.clip_id: clip.psnr_db for clip in recorded}
    shown: list[ReportClip] = []
    protocol = protocol_named(options.protocol)
    scan, looked = LatentScan(), 0
    with open_originals(opened, options) as originals:
        seed = options.sample_seed
        for decoded in decode_clips(decoder, clips, originals, sample_seed=seed):
            clip_id = decoded.clip.clip_id
            page_clip = _measure(decoded, protocol, opened.meta.clip.rate_fps, known.get(clip_id))
            shown.append(page_clip)
            frames = decoded.original_THWC
            if frames is None and not untrained:  # whose noise would say nothing about the clip
                frames = decoded.decoded_THWC
            if frames is not None:
                scan.add_frames(clip_id, frames)
                looked += 1
            on_clip(len(shown), len(clips))
    if options.scan == "all":
        scan_store(opened, scan, on_scan)
    else:
        scan_clips(opened, scan, clips)
    notes = []
    if originals.problem is not None:
        notes.append(f"No originals to compare with: {originals.problem}.")
    elif lost := [clip.problem for clip in shown if clip.problem is not None]:
        notes.append(
            f"{len(lost)} of {len(shown)} clips have no original to compare with, such as: "
            f"{lost[0]}."
        )
    if options.scan == "shown":
        notes.append("Faults were looked for among the clips shown alone.")
    elif looked < scan.clips:
        notes.append(
            f"Frozen and cut-through clips were looked for among {looked} of those shown, "
            f"all other faults among all {scan.clips} clips of the store."
        )
    return Report(
        store=opened.files.url,
        meta=opened.meta,
        model=model.name,
        protocol=protocol,
        clips=shown,
        warnings=scan.warnings(),
        channel_kl=tuple(scan.channel_kl.tolist()),
        failed=_failures(opened),
        untrained=untrained,
        recorded=recorded,
        notes=tuple(notes),
    )


def _measure(
    decoded: DecodedClip, protocol: ComparisonRule, rate_fps: float, recorded_db: float | None
) -> ReportClip:
    panels = decoded.panels
    if decoded.original_THWC is not None:
        apart = difference(decoded.original_THWC, decoded.decoded_THWC, DIFFERENCE_GAIN)
        panels.append(Panel(f"difference x{DIFFERENCE_GAIN}", apart))
    values = kl_to_unit_normal(decoded.posterior) / decoded.posterior.mean[0].numel()
    return ReportClip(
        clip=decoded.clip,
        video=encode_mp4(side_by_side(panels, labelled=False), rate_fps),
        labels=tuple(panel.label for panel in panels),
        scores=_score(decoded, protocol),
        problem=decoded.problem,
        kl_nats=float(values[0]),
        histogram=_histogram(decoded.latents.cpu().numpy()),
        recorded_db=recorded_db,
    )


def _score(decoded: DecodedClip, protocol: ComparisonRule) -> Scores | None:
    original = decoded.original_TCHW
    if original is None:
        return None
    wide_enough = min(original.shape[-2:]) >= WINDOW_PX
    similar = ssim(original, decoded.decoded_TCHW, protocol) if wide_enough else torch.empty(0)
    return Scores(
        frame_psnr_db=tuple(psnr(original, decoded.decoded_TCHW, protocol).tolist()),
        frame_ssim=tuple(similar.tolist()),
        flicker=float(flicker(original, decoded.decoded_TCHW)),
    )


def _histogram(latents: NDArray[np.float32]) -> tuple[int, ...]:
    clipped = np.clip(latents.ravel(), -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
    counts, _ = np.histogram(clipped, HISTOGRAM_BINS, (-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT))
    return tuple(counts.tolist())


def encode_mp4(frames_THWC: Frames, rate_fps: float) -> bytes:
    """Return a clip as an MP4 file that browsers play."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames_THWC, rate_fps, crf=PAGE_CRF)
        return path.read_bytes()


def _failures(store: Store) -> list[ClipError]:
    """Return videos that failed, without a clip, then clips that did."""
    reports = Reports()
    for (column, key), entry in store.index.entries.items():
        if entry.failed:
            reports.add(store.commit(key, column))
    videos = store.plan.videos.select(["video", "status", "reason"]).to_pylist()
    return [
        ClipError(row["video"], "", "probe", row["reason"] or "")
        for row in videos
        if row["status"] == "failed"
    ] + reports.errors
