"""The original frames of stored clips, read again from the corpus as the encoder read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.clips import StoredClip
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import corpus_root
from reducio_latents.errors import LatentsError, VideoError
from reducio_latents.store import Store
from reducio_latents.video.identity import Expected
from reducio_latents.video.reading import ClipRead, ClipReader, ClipRequest

Pixels = NDArray[np.uint8]


class Originals:
    """Reads clips of the videos that a store was made of, and proves that they are still the same.

    `corpus` is where the videos are now: what the encode command was given, or the folder it was
    moved to. None: where the store says, and by its `root`, if none is given. They are read in a
    process of their own, which may crash or be silent for `timeout_s`; close it, or use `with`.
    """

    def __init__(
        self,
        store: Store,
        corpus: str | None = None,
        *,
        root: str | None = None,
        backend: str = "pyav",
        timeout_s: float = 120.0,
    ) -> None:
        self._store = store
        self._backend = backend
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
            backend=self._backend,
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

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Originals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
