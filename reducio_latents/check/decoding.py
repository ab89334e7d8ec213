"""Stored rows back to pictures, beside what they were made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.check.clips import CONTENT_IMAGE, MOTION, StoredClip
from reducio_latents.check.pictures import Frames, Panel
from reducio_latents.core.gaussian import final_latents
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.values import Posterior
from reducio_latents.corpus import corpus_root
from reducio_latents.errors import LatentsError, StoreError, VideoError
from reducio_latents.metrics.psnr import psnr, to_pictures
from reducio_latents.store import Store
from reducio_latents.store.decoder import LatentDecoder
from reducio_latents.video.identity import Expected
from reducio_latents.video.pixels import to_uint8
from reducio_latents.video.reading import ClipRead, ClipReader, ClipRequest

Pixels = NDArray[np.uint8]


class Originals(AbstractContextManager["Originals", None]):
    """Reads clips of the videos that a store was made of, and proves that they are still the same.

    `corpus` is where the videos are now: what the encode command was given, or the folder it was
    moved to. None: where the store says, and by its `root`, if none is given. They are read in a
    process of their own, which may crash or be silent for `timeout_s`, until the `with` block ends.
    """

    def __init__(
        self,
        store: Store,
        corpus: str | None = None,
        *,
        root: str | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        self._store = store
        self._lost: dict[str, str] = {}
        """Videos that cannot be read, and why: a decoder that hung once is not waited for again."""
        self._root = ""
        self.problem: str | None = None
        """Why no original can be read at all; None while it is possible."""
        place = corpus if corpus is not None else store.meta.corpus
        if corpus is None and root is None:
            root = store.meta.root
        try:
            self._root = corpus_root(place, root)
        except (LatentsError, OSError) as err:
            if corpus is not None:
                raise
            reason = str(err).removesuffix(" Check the path.").rstrip(".")
            self.problem = (
                f"the corpus is not reachable ({reason}); if it has moved, say by --corpus where to"
            )
        self._reader = ClipReader(map(Bucket.parse, store.meta.buckets), timeout_s=timeout_s)

    def read(self, clip: StoredClip) -> Pixels:
        """Return the clip as it was encoded, uint8 RGB (T, H, W, 3), fitted to its bucket.

        Raises VideoError where the video is gone, is not the one that was encoded, or fails.
        """
        if self.problem is not None or clip.video in self._lost:
            raise VideoError(self.problem or self._lost[clip.video])
        plan, meta = self._store.plan, self._store.meta
        video = plan.video(clip.video, clip.key)  # as it was then: it may have been replaced
        request = ClipRequest(
            video=clip.video,
            source=plan.source(clip.video, self._root),
            bucket=clip.bucket,
            clip=meta.clip,
            starts_s=(clip.start_s,),
            resize=meta.resize,
            deinterlace=meta.deinterlace != "none",
            exact_colours=meta.colours == "exact",
            expected=Expected(video["bytes"], video["sha256"], since="encoded"),
        )
        [found] = self._reader.read([request])
        if not isinstance(found, ClipRead):
            why = found.reason if found is not None else ""
            self._lost[clip.video] = why
            raise VideoError(why)
        frames: Pixels = found.frames.numpy()
        return frames

    def __exit__(self, *_: object) -> None:
        self._reader.close()


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
        noise = None
        if sample_seed is not None:
            digest = hashlib.sha256(f"{sample_seed}\0{clip.clip_id}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            noise = torch.randn(posterior.mean.shape, generator=generator)
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
