"""What turns clips into rows: one encoder a column, behind one small Protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.core.geometry import Bucket, require_fits
from reducio_latents.core.images import IMAGE_MEDIA_TYPES
from reducio_latents.encode.fast_path import BATCH_SIZE, fastest_batch, is_exact, measure
from reducio_latents.encode.gpu import BatchEncoder
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.writer import Row

FRAMES, TIMES, CONTENT, CAPTIONS = "frames", "times", "content", "captions"
"""What a column encoder may need of a batch."""


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Consecutive rows of one shard, ready to encode. Rows whose clip failed are not in it."""

    key: ShardKey
    bucket: Bucket
    rows: tuple[int, ...]
    """Their rows in the shard, ascending."""
    clip_ids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    """Each clip's captions, none or more."""
    frames_BTHWC: Tensor | None = None
    """uint8 (B, T, H, W, 3) on the CPU, where an encoder needs frames."""
    times_s: tuple[tuple[float, ...], ...] | None = None
    """When each frame appears in its video, in seconds from the first shown one."""
    content_BHWC: Tensor | None = None
    """uint8 (B, H, W, 3) on the CPU: the content images as pixels."""
    content_files: tuple[bytes, ...] | None = None
    """The content images as image files, in the codec of the run."""


class RowFailed(NamedTuple):
    """Stands for the row of a clip that one column cannot give."""

    reason: str


class ColumnEncoder:
    """Makes one column. Implementations hold weights, not files."""

    name: str
    """The column's name in the store."""
    needs: frozenset[str]
    """Which of `frames`, `times`, `content`, `captions` a batch must hold."""

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        """Return the column's description; raise GeometryError for a bucket that does not fit."""
        raise NotImplementedError

    def measure(self, bucket: Bucket) -> dict[str, float]:
        """Return what a fast way to encode costs, as `ColumnMeta.measured` keeps it."""
        return {}

    def launch(self, batch: ClipBatch) -> Callable[[], Sequence[Row | RowFailed]]:
        """Begin to encode a batch; what is returned waits for its rows, one for each clip.

        So a GPU has the next batch before it is asked for this one.
        """
        rows = self.encode(batch)
        return lambda: rows

    def encode(self, batch: ClipBatch) -> Sequence[Row | RowFailed]:
        """Return the rows at once, where `launch` is not another."""
        raise NotImplementedError

    def take_busy_s(self) -> float | None:
        """Return the GPU's seconds in what was encoded since the last call; None if not known."""
        return None


@dataclass(frozen=True)
class MotionColumn(ColumnEncoder):
    """`motion`: the posterior's moments, mean above log-variance, float16 (2D, t, h, w)."""

    autoencoder: Autoencoder
    resize: str
    pad_to: int | None = None
    """Clips to fill every batch up to, for compiled encoders."""
    load_exact: Callable[[], Autoencoder] | None = None
    """Loads the same in float32, to measure against; None where nothing is to be measured."""
    decodes_to_measure: bool = False
    finds_batch_size: bool = False
    """Whether to measure with which batch size the GPU is fastest."""
    name: str = "motion"
    needs: frozenset[str] = frozenset({FRAMES})
    _measured: dict[Bucket, dict[str, float]] = field(
        default_factory=dict, init=False, compare=False
    )

    @cached_property
    def batches(self) -> BatchEncoder:
        return BatchEncoder(self.autoencoder, pad_to=self.pad_to)

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        model = self.autoencoder
        geometry, shapes = model.geometry, {}
        require_fits(buckets, model.check_clip, geometry.spatial_stride, model.name)
        for bucket in buckets:
            depth, *grid = geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
            shapes[bucket.name] = (2 * depth, *grid)
        return ColumnMeta(
            kind="array",
            content="moments",
            encoder=self.autoencoder.name,
            config={**self.autoencoder.config, "resize": self.resize},
            dtype="float16",
            row_shapes=shapes,
            final=dict(self.autoencoder.final_rule),
        )

    def measure(self, bucket: Bucket) -> dict[str, float]:
        """Return the error of this way to encode against float32 (see `fast_path`), and the batch
        size that is found; both once, though asked for again."""
        if bucket not in self._measured:
            self._measured[bucket] = self._measure(bucket)
        return dict(self._measured[bucket])

    def _measure(self, bucket: Bucket) -> dict[str, float]:
        found = {}
        if self.load_exact is not None and not is_exact(self.autoencoder.precision):
            found = measure(
                lambda frames: self.batches.launch(frames)(),
                self.load_exact,
                bucket,
                decode=self.decodes_to_measure,
            )
        if self.finds_batch_size:
            found[BATCH_SIZE] = fastest_batch(self.batches.launch, bucket)
        return found

    def launch(self, batch: ClipBatch) -> Callable[[], Sequence[Row]]:
        assert batch.frames_BTHWC is not None
        moments = self.batches.launch(batch.frames_BTHWC)
        return lambda: list(moments())

    def take_busy_s(self) -> float | None:
        return self.batches.take_busy_s()


@dataclass(frozen=True)
class ContentImageColumn(ColumnEncoder):
    """`content_image`: the centre frame at the clip's size, as an image file."""

    codec: str
    resize: str
    name: str = "content_image"
    needs: frozenset[str] = frozenset({CONTENT})

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        raw = self.codec == "raw"
        return ColumnMeta(
            kind="array" if raw else "bytes",
            content=IMAGE_MEDIA_TYPES[self.codec],
            encoder=self.codec,
            config={"resize": self.resize},
            dtype="uint8" if raw else "bytes",
            row_shapes={b.name: (3, b.height, b.width) for b in buckets} if raw else {},
        )

    def encode(self, batch: ClipBatch) -> Sequence[Row]:
        if self.codec != "raw":
            assert batch.content_files is not None
            return list(batch.content_files)
        assert batch.content_BHWC is not None
        chw: NDArray[np.uint8] = batch.content_BHWC.permute(0, 3, 1, 2).contiguous().numpy()
        return list(chw)


@dataclass(frozen=True)
class CaptionColumn(ColumnEncoder):
    """`caption`: UTF-8 text; several captions of a clip are separated by a NUL character."""

    name: str = "caption"
    needs: frozenset[str] = frozenset({CAPTIONS})

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        return ColumnMeta(
            kind="bytes", content="text/plain", encoder="utf-8", config={}, dtype="bytes"
        )

    def encode(self, batch: ClipBatch) -> Sequence[Row]:
        return ["\0".join(captions).encode() for captions in batch.captions]


@dataclass(frozen=True)
class FrameTimesColumn(ColumnEncoder):
    """`frame_times`: when each chosen frame appears, float64 (T,), seconds from the first shown."""

    backend: str
    name: str = "frame_times"
    needs: frozenset[str] = frozenset({TIMES})

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        return ColumnMeta(
            kind="array",
            content="seconds",
            encoder=self.backend,
            config={},
            dtype="float64",
            row_shapes={bucket.name: (bucket.frames,) for bucket in buckets},
        )

    def encode(self, batch: ClipBatch) -> Sequence[Row]:
        assert batch.times_s is not None
        return list(np.array(batch.times_s, np.float64))
