"""Every n-th clip is decoded while it is encoded, from the very numbers that are stored.

Which clips is a function of the plan: rows of a bucket whose number divides by `every`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.autoencoders.protocol import Autoencoder, decoded_psnr
from reducio_latents.core.values import Posterior
from reducio_latents.encode.columns import ClipBatch, ColumnEncoder, MotionColumn, RowFailed
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.errors import QualityError
from reducio_latents.store.commit import ClipQuality
from reducio_latents.store.writer import Row
from reducio_latents.video.pixels import to_unit

log = logging.getLogger(__name__)

DIGITS = 4
"""Decimal places that are kept, of dB."""
ENOUGH = 8
"""Clips that must have been checked before their mean is held against the floor."""


@dataclass
class QualityCheck:
    """Decodes every n-th clip of each bucket and compares it with its frames."""

    autoencoder: Autoencoder
    """With both of its halves."""
    every: int
    shard_rows: int
    min_psnr: float | None = None
    """Mean PSNR in dB below which the run stops."""
    on_checked: Callable[[float], None] = lambda _: None
    """Told the mean so far."""
    column: ClassVar[str] = "motion"
    _sum: float = field(default=0.0, init=False)
    _count: int = field(default=0, init=False)

    @classmethod
    def of(
        cls,
        options: EncodeOptions,
        encoders: Sequence[ColumnEncoder],
        on_checked: Callable[[float], None],
    ) -> QualityCheck | None:
        """Return the check that the options ask for, if one of the encoders makes what it needs."""
        motion = next((e for e in encoders if isinstance(e, MotionColumn)), None)
        if not options.check_every or motion is None:
            return None
        every, rows, floor = options.check_every, options.shard_rows, options.min_psnr
        return cls(motion.autoencoder, every, rows, floor, on_checked)

    def measure(self, batch: ClipBatch, rows: Sequence[Row | RowFailed]) -> list[ClipQuality]:
        """Return the quality of those clips of a batch that are checked, given their stored rows.

        Raise QualityError when the mean of this run is below the floor.
        """
        found = []
        for i, (number, row) in enumerate(zip(batch.rows, rows, strict=True)):
            due = (batch.key.shard * self.shard_rows + number) % self.every == 0
            if due and isinstance(row, np.ndarray) and np.isfinite(row).all():
                assert batch.frames_BTHWC is not None
                found.append(self._check(batch, i, batch.frames_BTHWC[i : i + 1], row))
        if found:
            self._sum += sum(quality.psnr for quality in found)
            self._count += len(found)
            self.on_checked(self._sum / self._count)
            if self._count >= ENOUGH:
                require_floor(self._sum / self._count, self._count, self.min_psnr)
        return found

    def _check(
        self, batch: ClipBatch, number: int, frames_BTHWC: Tensor, row: NDArray[np.generic]
    ) -> ClipQuality:
        video = to_unit(frames_BTHWC.to(self.autoencoder.device))
        posterior = Posterior.of_moments(torch.from_numpy(np.asarray(row))[None].float())
        values = decoded_psnr(self.autoencoder, posterior, video)[0].tolist()
        return ClipQuality(
            row=batch.rows[number],
            clip_id=batch.clip_ids[number],
            psnr=round(sum(values) / len(values), DIGITS),
            psnr_frames=tuple(round(value, DIGITS) for value in values),
            psnr_whole=self._psnr_whole(video),
        )

    def _psnr_whole(self, video_BCTHW: Tensor) -> float | None:
        whole = untiled(self.autoencoder, *video_BCTHW.shape[-2:])
        if whole is None:
            return None
        try:
            posterior = whole.encode(video_BCTHW.to(whole.dtype))
            values: list[float] = decoded_psnr(whole, posterior, video_BCTHW)[0].tolist()
        except torch.OutOfMemoryError:
            log.warning("a whole frame does not fit in memory, so tiles are not compared with it.")
            return None
        return round(sum(values) / len(values), DIGITS)


def require_floor(mean: float, clips: int, floor: float | None) -> None:
    """Raise QualityError if the mean PSNR of so many clips is below the floor, both in dB."""
    if floor is not None and mean < floor:
        raise QualityError(
            f"the {clips} clips that were decoded again have a mean PSNR of {mean:.2f} dB, below "
            f"the floor of {floor:g} dB. Check that these are the right weights, and --dtype and "
            "--tiling; or lower --min-psnr and run the same command again: what is committed stays."
        )


def untiled(autoencoder: Autoencoder, height: int, width: int) -> Autoencoder | None:
    """Return the same autoencoder without tiles; None if frames of this size are one tile."""
    if autoencoder.tiling is None or max(height, width) <= autoencoder.tiling.tile_px:
        return None
    whole = copy.copy(autoencoder)
    whole.tiling = None
    return whole
