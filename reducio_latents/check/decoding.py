"""Stored rows back to pictures, beside what they were made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.check.clips import CONTENT_IMAGE, MOTION, StoredClip
from reducio_latents.check.originals import Originals
from reducio_latents.check.pictures import Frames, Panel
from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.values import Posterior
from reducio_latents.errors import StoreError, VideoError
from reducio_latents.metrics.psnr import psnr, to_pictures
from reducio_latents.store import Store
from reducio_latents.store.decoder import LatentDecoder
from reducio_latents.video.pixels import to_uint8


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """A stored clip, decoded, and the frames it was made of if they could be had."""

    clip: StoredClip
    posterior: Posterior
    """As stored, float32, batch of one."""
    latents: Tensor
    """Final latents (D, t, h, w) that were decoded."""
    decoded_TCHW: Tensor
    """float32 in [0, 1], clamped, not rounded."""
    original_THWC: Frames | None
    content_HWC: NDArray[np.uint8] | None
    """The stored content image, if the store has that column."""
    problem: str | None
    """Why there is no original."""

    @property
    def original_TCHW(self) -> Tensor | None:
        """float32 in [0, 1]."""
        if self.original_THWC is None:
            return None
        return torch.from_numpy(self.original_THWC).permute(0, 3, 1, 2).float() / 255

    @property
    def decoded_THWC(self) -> Frames:
        frames = to_uint8(self.decoded_TCHW * 2 - 1).permute(0, 2, 3, 1)
        return np.ascontiguousarray(frames.numpy())

    @property
    def psnr_db(self) -> float | None:
        """The mean over frames of their PSNR, by the protocol `standard`."""
        original = self.original_TCHW
        return None if original is None else float(psnr(original, self.decoded_TCHW).mean())

    @property
    def panels(self) -> list[Panel]:
        """What to show, left to right: original or content image, then decoded."""
        decoded = Panel("decoded", self.decoded_THWC)
        if self.original_THWC is not None:
            return [Panel("original", self.original_THWC), decoded]
        if self.content_HWC is not None:
            still = np.repeat(self.content_HWC[None], len(decoded.frames), axis=0)
            return [Panel("content image", still), decoded]
        return [decoded]


def decode_clips(
    decoder: LatentDecoder,
    clips: Iterable[StoredClip],
    originals: Originals,
    *,
    sample_seed: int | None = None,
) -> Iterator[DecodedClip]:
    """Yield each of `clips` of the decoder's store decoded, one at a time, in order.

    The posterior's mean is decoded, or with `sample_seed` a draw from it, which depends on the
    seed and the clip alone. Raises StoreError for a model that needs content images if the store
    has none, and for rows that are damaged.
    """
    store, model = decoder.store, decoder.load()
    if model.needs_content and CONTENT_IMAGE not in store.meta.columns:
        raise StoreError(
            f"{store.files.url} has no column content_image, without which {model.name} cannot "
            "decode. Encode the column: encode-corpus ... --columns motion,content_image."
        )
    rule = store.meta.columns[MOTION].final
    if rule is None:
        raise StoreError(f"{store.files.url} names no rule for final latents of motion.")
    for clip in clips:
        row = store.read_row(clip.key, clip.row, MOTION)
        if not isinstance(row, np.ndarray):
            raise StoreError(f"clip {clip.clip_id} has no motion latents in {store.files.url}.")
        posterior = Posterior.of_moments(torch.from_numpy(row.astype(np.float32))[None])
        noise = None if sample_seed is None else _noise(posterior.mean, clip.clip_id, sample_seed)
        latents = final_latents(posterior, noise, rule)
        content = _read_content_image(store, clip)
        image = None if content is None else torch.from_numpy(content).permute(2, 0, 1)[None]
        original, problem = None, None
        try:
            original = originals.read(clip)
        except VideoError as err:
            problem = str(err).rstrip(".")
        yield DecodedClip(
            clip=clip,
            posterior=posterior,
            latents=latents[0],
            decoded_TCHW=to_pictures(decoder.pixels(latents, image)[0]),
            original_THWC=original,
            content_HWC=content,
            problem=problem,
        )


def _read_content_image(store: Store, clip: StoredClip) -> NDArray[np.uint8] | None:
    """Return the stored content image, uint8 RGB (H, W, 3); None if there is no such column."""
    if CONTENT_IMAGE not in store.meta.columns:
        return None
    try:
        row = store.read_row(clip.key, clip.row, CONTENT_IMAGE)
    except StoreError as err:
        raise StoreError(f"clip {clip.clip_id}: its content image is missing: {err}") from err
    if row is None:
        raise StoreError(f"clip {clip.clip_id} has no content image in {store.files.url}.")
    return content_pixels(store, row, clip.key.bucket, clip.clip_id)


def content_pixels(
    store: Store, row: NDArray[np.generic] | bytes, bucket: str, clip_id: str
) -> NDArray[np.uint8]:
    """Return the pixels of a row of content_image, uint8 RGB (H, W, 3)."""
    try:
        image = store.kind(CONTENT_IMAGE).value(row, bucket)
    except StoreError as err:
        raise StoreError(f"the content image of clip {clip_id}: {err}") from err
    return np.ascontiguousarray(image.transpose(1, 2, 0), np.uint8)


def _noise(mean: Tensor, clip_id: str, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}\0{clip_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(mean.shape, generator=generator)
