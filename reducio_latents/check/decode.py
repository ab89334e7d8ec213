"""`decode`: stored clips as videos and one picture, beside what they were made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from reducio_latents.check.clips import StoredClip, select_clips
from reducio_latents.check.decoding import Originals, decode_clips
from reducio_latents.check.options import DecodeOptions
from reducio_latents.check.pictures import (
    Frames,
    SheetRow,
    contact_sheet,
    file_name,
    make_folder,
    one_after_another,
    side_by_side,
    write_picture,
)
from reducio_latents.store import Store, open_store
from reducio_latents.store.decoder import LatentDecoder

SHEET = "contact_sheet.png"
JOINED = "all_clips"
JOINED_BYTES = 256 << 20
"""Pixels of the clips in `all_clips`; those that would pass this are left out of it."""


def load_decoder(store: Store, options: DecodeOptions) -> LatentDecoder:
    """Return what decodes `store`, its model loaded."""
    dtype = getattr(torch, options.dtype)
    decoder = LatentDecoder(store, options.weights, options.device, dtype, model=options.model)
    decoder.load()
    return decoder


def open_originals(store: Store, options: DecodeOptions) -> Originals:
    """Open what `store` was made of."""
    return Originals(store, options.corpus, root=options.root, timeout_s=options.clip_timeout_s)


class DecodeResult(NamedTuple):
    """What became of one clip."""

    clip: StoredClip
    path: Path
    """What was written: a video, or of one frame a picture."""
    psnr_db: float | None
    """None if there is no original to compare with."""
    problem: str | None
    """Why there is none."""


def decode_store(
    store: str | Path,
    out: Path,
    options: DecodeOptions,
    on_clip: Callable[[DecodeResult], None] = lambda _: None,
) -> list[DecodeResult]:
    """Decode clips of `store` into `out`: one video a clip, and of all of them `contact_sheet.png`
    and one video in which they follow each other. Clips of one frame become pictures.

    In each, the original stands before the decoded clip; where it cannot be had, the stored content
    image does, and alone what was decoded if there is none either. `on_clip` is told of each
    clip as it is done. Raises StoreError or ConfigError for clips that are not there, and for a
    model that did not make the store.
    """
    opened = open_store(store)
    clips = select_clips(opened, options.selection)
    decoder = load_decoder(opened, options)
    make_folder(out)
    results, rows = [], []
    joined: list[Frames] = []
    with open_originals(opened, options) as originals:
        seed = options.sample_seed
        for decoded in decode_clips(decoder, clips, originals, sample_seed=seed):
            panels = decoded.panels
            path = out / f"{file_name(decoded.clip.clip_id)}.{options.format}"
            picture = side_by_side(panels)
            if len(picture) == 1:
                path = path.with_suffix(".png")
                write_picture(path, picture[0])
            else:
                decoder.write(path, picture)
                if sum(clip.nbytes for clip in joined) + picture.nbytes <= JOINED_BYTES:
                    joined.append(picture)
            result = DecodeResult(decoded.clip, path, decoded.psnr_db, decoded.problem)
            clip, psnr_db = result.clip, result.psnr_db
            score = "no original" if psnr_db is None else f"{psnr_db:.2f} dB"
            title = f"{clip.clip_id}   {clip.video} at {clip.start_s:g} s   {score}"
            rows.append(SheetRow(title, panels))
            results.append(result)
            on_clip(result)
    write_picture(out / SHEET, contact_sheet(rows))
    if joined:
        decoder.write(out / f"{JOINED}.{options.format}", one_after_another(joined))
    return results


def mean_psnr(results: list[DecodeResult]) -> float:
    """Return the mean over the clips that were compared, in dB; NaN if none was."""
    values = [result.psnr_db for result in results if result.psnr_db is not None]
    return sum(values) / len(values) if values else math.nan
