"""How good the model is on clips that it does not train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reducio_latents.errors import TrainingError
from reducio_latents.metrics.lpips import LPIPS
from reducio_latents.metrics.psnr import clip_psnr, psnr, ssim, to_pictures
from reducio_latents.train.config import TrainConfig, ValidationConfig
from reducio_latents.train.ranks import RunRanks
from reducio_latents.train.split import ClipTable
from reducio_latents.train.step import autocast
from reducio_latents.train.stream import BatchRequest, BatchStream
from reducio_latents.vae import ReducioVAE, Tiling
from reducio_latents.vae.model import centre_image
from reducio_latents.video.pixels import to_uint8, to_unit

SCORES = ("psnr_db", "ssim", "clip_psnr_db", "content_psnr_db", "l1", "lpips")


class Pair(NamedTuple):
    """A clip and what the model makes of it, uint8 (T, H, W, 3) on the CPU."""

    original: Tensor
    reconstruction: Tensor


@dataclass(frozen=True)
class Validation:
    """What a validation found, on every rank."""

    clips: int
    scores: dict[str, float]
    """Means over clips. psnr_db, ssim and lpips are means over frames. clip_psnr_db is of the error
    of a whole clip, and content_psnr_db the same for the content image repeated: their difference
    is what the motion latents are worth."""
    pairs: list[Pair]
    """The first clips that this rank saw, for looking at."""


@torch.no_grad()
def validate(
    vae: ReducioVAE, table: ClipTable, config: TrainConfig, ranks: RunRanks, lpips: LPIPS | None
) -> Validation:
    """Measure `vae` on the validation clips; each rank takes its share of the batches."""
    requests = list(validation_requests(table, config.validation))[ranks.rank :: ranks.size]
    totals: dict[str, float] = dict.fromkeys(SCORES if lpips is not None else SCORES[:-1], 0.0)
    clips, pairs = 0, list[Pair]()
    for batch in BatchStream(table, config.data, requests):
        video = to_unit(batch.frames_BTHWC.to(ranks.device)).contiguous()
        recon = reconstruct(vae, video, config)
        for name, values in score_clips(video, recon, lpips).items():
            totals[name] += float(values.sum())
        clips += len(batch.clips)
        pairs += to_pairs(video, recon)[: config.log.pictures - len(pairs)]
    sums = torch.tensor([clips, *totals.values()], dtype=torch.float64, device=ranks.device)
    means = ranks.mean(sums)
    if not means[0]:
        raise TrainingError("no validation clip could be read; see the warnings above.")
    count = float(means[0]) * ranks.size
    found = (means[1:] / means[0]).tolist()
    return Validation(round(count), dict(zip(totals, found, strict=True)), pairs)


def validation_requests(table: ClipTable, settings: ValidationConfig) -> Iterator[BatchRequest]:
    """Yield the batches of a validation, each of one bucket."""
    chosen = table.spread(settings.clips)
    for number in range(len(table.sizes)):
        clips = [clip for clip in chosen if table.bucket_numbers[clip] == number]
        for start in range(0, len(clips), settings.batch_size):
            yield BatchRequest(tuple(clips[start : start + settings.batch_size]))


@torch.no_grad()
def reconstruct(vae: ReducioVAE, video: Tensor, config: TrainConfig) -> Tensor:
    """Return the video as the latents' means give it back, clamped to [-1, 1]."""
    tiling = tiling_for(config.validation.tiling, video.shape[-2])
    with autocast(config, video.device):
        latents = vae.final_latents(vae.encode(video, tiling))
        recon = vae.decode(latents, centre_image(video), tiling)
    return recon.float().clamp(-1, 1)


def tiling_for(tiling: Tiling | None, height: int) -> Tiling | None:
    """Return the tiling where frames are higher than one whole tile, else None."""
    if tiling is None or height <= int(tiling.tile_px * (1 + tiling.overlap)):
        return None
    return tiling


def score_clips(video: Tensor, recon: Tensor, lpips: LPIPS | None) -> dict[str, Tensor]:
    """Return the scores of each clip, (B,), of pixels in [-1, 1]."""
    batch, frames = video.shape[0], video.shape[2]
    x, y = (v.transpose(1, 2).flatten(0, 1) for v in (video, recon))
    unit_x, unit_y = (to_pictures(v).flatten(0, 1) for v in (video, recon))
    repeated = centre_image(video).unsqueeze(2).expand_as(video)
    scores = {
        "psnr_db": psnr(unit_x, unit_y).reshape(batch, frames).mean(1),
        "ssim": ssim(unit_x, unit_y).reshape(batch, frames).mean(1),
        "clip_psnr_db": clip_psnr((video + 1) / 2, (recon + 1) / 2),
        "content_psnr_db": clip_psnr((video + 1) / 2, (repeated + 1) / 2),
        "l1": (video - recon).abs().flatten(1).mean(1),
    }
    if lpips is not None:
        scores["lpips"] = lpips(x, y).reshape(batch, frames).mean(1)
    return scores


def to_pairs(video: Tensor, recon: Tensor) -> list[Pair]:
    """Split a batch in [-1, 1] into pairs for looking at."""
    originals, reconstructions = (to_uint8(x).permute(0, 2, 3, 4, 1).cpu() for x in (video, recon))
    return [Pair(x, y) for x, y in zip(originals, reconstructions, strict=True)]


def compare(pairs: Sequence[Pair]) -> Tensor:
    """Return one video (T, 2H, n*W, 3): originals above reconstructions, side by side."""
    rows = (torch.cat([pair[i] for pair in pairs], dim=2) for i in (0, 1))
    return torch.cat(list(rows), dim=1)
