"""Batches out of a store's own content images, for columns that need no video."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from reducio_latents.core.images import LOSSLESS
from reducio_latents.encode.columns import CAPTIONS, CONTENT
from reducio_latents.encode.source import (
    PlannedClip,
    ReadyBatch,
    ShardWork,
    clip_batch,
    cut_shard,
    part_removed,
)
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey, list_commits

COLUMN = "content_image"
DECODE_THREADS = 4
BATCHES_AHEAD = 2


class StoredContent:
    """The content images that a store holds without loss, as batches of the plan's clips.

    Cut into the same batches as when videos are decoded, so that an encoder sees the same tensors.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    def can_serve(self, needs: frozenset[str]) -> bool:
        """Whether encoders that need `needs` can do without videos where images are stored."""
        return CONTENT in needs and needs <= {CONTENT, CAPTIONS}

    def has(self, key: ShardKey) -> bool:
        """Whether the content images of a shard are here, and exact."""
        return key in self._keys

    @cached_property
    def _store(self) -> Store:
        return Store(self._files)

    @cached_property
    def _keys(self) -> frozenset[ShardKey]:
        column = self._store.meta.columns.get(COLUMN)
        if column is None or column.encoder not in LOSSLESS:
            return frozenset()
        return frozenset(key for name, key in list_commits(self._files) if name == COLUMN)

    def batches(self, works: Iterable[ShardWork], batch_size: int) -> Iterator[ReadyBatch]:
        """Yield the batches of `works`, in order, decoded ahead by threads.

        A clip whose image is not there has failed, for the reason that the image's commit gives.
        Raises StoreError for an image that does not match its checksum.
        """
        with ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="images") as pool:
            waiting: deque[Future[ReadyBatch]] = deque()
            for work in works:
                shard = _Shard(self._store, work)
                for clips, last in cut_shard(work, batch_size):
                    waiting.append(pool.submit(shard.read, clips, last))
                    if len(waiting) > BATCHES_AHEAD:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


class _Shard:
    """The stored content images of one shard."""

    def __init__(self, store: Store, work: ShardWork) -> None:
        self._work, self._kind = work, store.kind(COLUMN)
        commit = store.commit(work.key, COLUMN)
        self._where = f"{store.files.url}/{commit.file}"
        self._row = store.row_reader(work.key, COLUMN, commit)
        self._failed = {failure.row: failure for failure in commit.failed}
        # Also where the image is still there, since the removal was killed.
        self._failed |= {failure.row: failure for failure in part_removed(work.clips)[1]}

    def read(self, clips: Sequence[PlannedClip], last: bool) -> ReadyBatch:
        failed = tuple(self._failed[clip.row] for clip in clips if clip.row in self._failed)
        kept = [clip for clip in clips if clip.row not in self._failed]
        if not kept:
            return ReadyBatch(self._work, clips, None, failed, last)
        pixels = np.stack([self._pixels(clip.row) for clip in kept])
        batch = replace(clip_batch(self._work, kept), content_BHWC=torch.from_numpy(pixels))
        return ReadyBatch(self._work, clips, batch, failed, last)

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        """Return one image, uint8 (H, W, 3)."""
        stored = self._row(row)
        assert stored is not None
        try:
            value = self._kind.value(stored, self._work.key.bucket)
        except StoreError as err:
            raise StoreError(f"{self._where}: row {row}: {err}") from err
        return np.ascontiguousarray(value.transpose(1, 2, 0), dtype=np.uint8)
