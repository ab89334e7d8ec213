"""The original frames of stored clips, read again from the corpus as the encoder read them."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.clips import StoredClip
from reducio_latents.corpus import corpus_root
from reducio_latents.errors import LatentsError, VideoError
from reducio_latents.pixels import fit_frame
from reducio_latents.store import Store
from reducio_latents.video import get_backend
from reducio_latents.video.source import VideoSource, open_source

READ_BYTES = 1 << 20


class Originals:
    """Reads clips of the videos that a store was made of, and proves that they are still the same.

    `corpus` is where the videos are now: what the encode command was given, or the folder it was
    moved to. None: where the store says.
    """

    def __init__(
        self,
        store: Store,
        corpus: str | None = None,
        *,
        root: str | None = None,
        backend: str = "pyav",
    ) -> None:
        self._store = store
        self._backend = backend
        self._changed: dict[str, str | None] = {}
        self._root = ""
        self.problem: str | None = None
        """Why no original can be read at all; None while it is possible."""
        place = corpus if corpus is not None else store.meta.corpus
        try:
            self._root = corpus_root(place, root)
        except (LatentsError, OSError) as err:
            if corpus is not None:
                raise
            self.problem = f"the corpus is not reachable ({err})"

    def read(self, clip: StoredClip) -> NDArray[np.uint8]:
        """Return the clip as it was encoded, uint8 RGB (T, H, W, 3), fitted to its bucket.

        Raises VideoError where the video is gone, is not the one that was encoded, or fails.
        """
        if self.problem is not None:
            raise VideoError(self.problem)
        source = self._store.plan.source(clip.video, self._root)
        changed = self._changed_since(clip.video, source)
        if changed is not None:
            raise VideoError(changed)
        meta = self._store.meta
        clips = get_backend(self._backend).read_clips(
            source,
            (clip.start_s,),
            frames=clip.bucket.frames,
            rate_fps=meta.clip.rate_fps,
            transform=partial(fit_frame, bucket=clip.bucket, mode=meta.resize),
        )
        found = next(iter(clips))
        if isinstance(found, VideoError):
            raise found
        return np.stack(list(found.frames))

    def _changed_since(self, video: str, source: VideoSource) -> str | None:
        """Return what is wrong with a video's bytes; each video is hashed once."""
        if video not in self._changed:
            self._changed[video] = self._compare(video, source)
        return self._changed[video]

    def _compare(self, video: str, source: VideoSource) -> str | None:
        try:
            digest = hash_source(source)
        except VideoError:
            return f"{video} is no longer at {source.url}"
        if digest != self._store.plan.video(video)["sha256"]:
            return f"{video} has changed since it was encoded (its hash differs)"
        return None


def hash_source(source: VideoSource) -> str:
    """Return the SHA-256 of a video's bytes, hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open_source(source) as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
    except OSError as err:
        raise VideoError(f"{source}: cannot be read: {err}.") from err
    return digest.hexdigest()
