"""Stored rows back to pictures, beside what they were made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.autoencoders import Autoencoder
from reducio_latents.check.clips import CONTENT_IMAGE, MOTION, StoredClip
from reducio_latents.check.originals import Originals
from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.images import decode_image
from reducio_latents.core.values import Posterior
from reducio_latents.errors import StoreError, VideoError
from reducio_latents.metrics.protocol import PROTOCOLS, ComparisonRule
from reducio_latents.metrics.psnr import psnr, to_pictures
from reducio_latents.store import Store
from reducio_latents.video.pixels import to_uint8


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """A stored clip, decoded, and the frames it was made of where they could be had."""

    clip: StoredClip
    posterior: Posterior
    """As stored, float32, batch of one."""
    latents: Tensor
    """Final latents (D, t, h, w) that were decoded."""
    decoded_TCHW: Tensor
    """float32 in [0, 1], clamped, not rounded."""
    original_THWC: NDArray[np.uint8] | None
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
    def decoded_THWC(self) -> NDArray[np.uint8]:
        frames = to_uint8(self.decoded_TCHW * 2 - 1).permute(0, 2, 3, 1)
        return np.ascontiguousarray(frames.cpu().numpy())

    def frame_psnr(self, protocol: ComparisonRule = PROTOCOLS["standard"]) -> Tensor | None:
        """Return the PSNR of each frame in dB, (T,), or None without the original."""
        original = self.original_TCHW
        return None if original is None else psnr(original, self.decoded_TCHW, protocol)

    @property
    def psnr_db(self) -> float | None:
        """The mean over frames of their PSNR, by the protocol `standard`."""
        frames = self.frame_psnr()
        return None if frames is None else float(frames.mean())


def decode_clips(
    store: Store,
    model: Autoencoder,
    clips: Iterable[StoredClip],
    originals: Originals,
    *,
    sample_seed: int | None = None,
) -> Iterator[DecodedClip]:
    """Yield each of `clips` decoded, one at a time, in order.

    The posterior's mean is decoded, or with `sample_seed` a draw from it, which depends on the
    seed and the clip alone. Raises StoreError for a model that needs content images, where the
    store has none, and for rows that are damaged.
    """
    store.require_columns([MOTION])
    if model.needs_content and CONTENT_IMAGE not in store.meta.columns:
        raise StoreError(
            f"{store.files.url} has no column content_image, without which {model.name} cannot "
            "decode. Encode the column: encode-corpus ... --columns motion,content_image."
        )
    for clip in clips:
        posterior = read_posterior(store, clip)
        noise = None if sample_seed is None else _noise(posterior.mean, clip.clip_id, sample_seed)
        rule = store.meta.columns[MOTION].final
        if rule is None:
            raise StoreError(f"{store.files.url} names no rule for final latents of motion.")
        latents = final_latents(posterior, noise, rule)
        content = read_content_image(store, clip)
        image = _content_tensor(content, clip) if model.needs_content else None
        pixels = model.decode(latents, image)[0, :, : clip.bucket.frames]
        original, problem = _original(originals, clip)
        yield DecodedClip(
            clip=clip,
            posterior=posterior,
            latents=latents[0],
            decoded_TCHW=to_pictures(pixels.cpu()),
            original_THWC=original,
            content_HWC=content,
            problem=problem,
        )


def read_posterior(store: Store, clip: StoredClip) -> Posterior:
    """Return the stored moments of a clip, float32, as a batch of one."""
    row = store.read_row(clip.key, clip.row, MOTION)
    if not isinstance(row, np.ndarray):
        raise StoreError(f"clip {clip.clip_id} has no motion latents in {store.files.url}.")
    return Posterior.of_moments(torch.from_numpy(row.astype(np.float32))[None])


def read_content_image(store: Store, clip: StoredClip) -> NDArray[np.uint8] | None:
    """Return the stored content image, uint8 RGB (H, W, 3); None if there is no such column."""
    if CONTENT_IMAGE not in store.meta.columns:
        return None
    try:
        row = store.read_row(clip.key, clip.row, CONTENT_IMAGE)
    except StoreError as err:
        raise StoreError(f"clip {clip.clip_id}: its content image is not there: {err}") from err
    if row is None:
        raise StoreError(f"clip {clip.clip_id} has no content image in {store.files.url}.")
    return content_pixels(row, clip.clip_id)


def content_pixels(row: NDArray[np.generic] | bytes, clip_id: str) -> NDArray[np.uint8]:
    """Return the pixels of a row of content_image, uint8 RGB (H, W, 3)."""
    if isinstance(row, bytes):
        return decode_image(row, f"content image of clip {clip_id}")
    return np.ascontiguousarray(row.transpose(1, 2, 0).astype(np.uint8))


def _content_tensor(content_HWC: NDArray[np.uint8] | None, clip: StoredClip) -> Tensor:
    if content_HWC is None:
        raise StoreError(f"clip {clip.clip_id} has no content image to decode with.")
    return torch.from_numpy(content_HWC).permute(2, 0, 1)[None].float() / 127.5 - 1


def _noise(mean: Tensor, clip_id: str, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}\0{clip_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(mean.shape, generator=generator)


def _original(
    originals: Originals, clip: StoredClip
) -> tuple[NDArray[np.uint8] | None, str | None]:
    try:
        return originals.read(clip), None
    except VideoError as err:
        return None, str(err)
