"""The columns a diffusion model is conditioned on: codes of the content image and of the text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reducio_latents.conditioning.images import ImageCodes, ImageEncoder
from reducio_latents.conditioning.text import TextEncoder
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import CAPTIONS, CONTENT, ClipBatch, ColumnEncoder, RowFailed
from reducio_latents.errors import ConfigError
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.limits import MAX_ROW_BYTES
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.quantize import INT8_MEDIA_TYPE, TAIL_BYTES, quantize
from reducio_latents.store.row_statistics import TOKENS, VECTOR
from reducio_latents.store.text_rows import (
    POOLED_MEDIA_TYPE,
    TEXT_MEDIA_TYPE,
    CaptionTokens,
    pack_text_row,
)
from reducio_latents.store.writer import Row
from reducio_latents.video.pixels import to_unit


def pixels_of(batch: ClipBatch) -> Tensor:
    """Return the content images of a batch, float32 (B, 3, H, W) in [-1, 1]."""
    assert batch.content_BHWC is not None
    return to_unit(batch.content_BHWC[:, None])[:, :, 0]


def measured(error: float | None) -> dict[str, float]:
    """Return what `ColumnMeta.measured` says of the precision."""
    return {} if error is None else {"float32_error": float(f"{error:.3g}")}


def float16_rows(codes: Tensor) -> Sequence[Row]:
    return list(codes.to(torch.float16).cpu().contiguous().numpy())


@dataclass(frozen=True)
class PictureColumn(ColumnEncoder):
    """What the columns of codes of the content image have in common."""

    encoder: Any
    """An ImageAutoencoder, or a SharedImageEncoder."""
    resize: str
    needs: frozenset[str] = frozenset({CONTENT})

    def meta(self, content: str, rows: dict[str, tuple[int, ...]], **more: Any) -> ColumnMeta:
        """Return the description of rows of these shapes, by bucket."""
        return ColumnMeta(
            kind="array",
            content=content,
            encoder=self.encoder.name,
            config={**self.encoder.config, "resize": self.resize},
            row_shapes=rows,
            measured=measured(self.encoder.error),
            **more,
        )


@dataclass(frozen=True)
class ContentLatentColumn(PictureColumn):
    """`content_latent`: moments of the content image, mean above log-variance, (2D, h, w)."""

    name: str = "content_latent"

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        shapes = {}
        for bucket in buckets:
            depth, _, *grid = self.encoder.geometry.latent_shape(1, bucket.height, bucket.width)
            shapes[bucket.name] = (2 * depth, *grid)
        return self.meta("moments", shapes, final=dict(self.encoder.final_rule))

    def encode(self, batch: ClipBatch) -> Sequence[Row]:
        return float16_rows(self.encoder.encode(pixels_of(batch)).moments)


class SharedImageEncoder(ImageEncoder):
    """One image encoder for two columns: the last batch is not encoded twice."""

    _last: tuple[ClipBatch, ImageCodes] | None = None

    def codes(self, batch: ClipBatch) -> ImageCodes:
        if self._last is None or self._last[0] is not batch:
            self._last = batch, self.encode(pixels_of(batch))
        return self._last[1]


@dataclass(frozen=True)
class ContentClipColumn(PictureColumn):
    """`content_clip`: the content image's patch tokens, float16 (tokens, dim), or in 8 bits."""

    name: str = "content_clip"

    @property
    def _is_int8(self) -> bool:
        return bool(self.encoder.options.quantization == "int8")

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        tokens, dim = self.encoder.tokens_shape
        shape = (tokens, dim + TAIL_BYTES if self._is_int8 else dim)
        return self.meta(
            INT8_MEDIA_TYPE if self._is_int8 else TOKENS,
            {bucket.name: shape for bucket in buckets},
            dtype="int8" if self._is_int8 else "float16",
        )

    def encode(self, batch: ClipBatch) -> Sequence[Row]:
        tokens = self.encoder.codes(batch).tokens
        return list(quantize(tokens.cpu().numpy())) if self._is_int8 else float16_rows(tokens)


@dataclass(frozen=True)
class ContentClipPooledColumn(PictureColumn):
    """`content_clip_pooled`: the content image as one vector, float16 (dim,)."""

    name: str = "content_clip_pooled"

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        if (dim := self.encoder.pooled_dim) is None:
            raise ConfigError(
                f"{self.encoder.options.model} has no pooled vector; leave {self.name} out."
            )
        return self.meta(VECTOR, {bucket.name: (dim,) for bucket in buckets})

    def encode(self, batch: ClipBatch) -> Sequence[Row]:
        return float16_rows(self.encoder.codes(batch).pooled)


@dataclass
class TextColumn(ColumnEncoder):
    """`text`, `text:NAME`: token vectors of each caption of a clip, or one vector of each.

    `store.text_rows` says how a row lies. Within a shard equal captions are encoded once and give
    one row, and a shard's rows depend on nothing outside it.
    """

    encoder: TextEncoder
    name: str = "text"
    needs: frozenset[str] = frozenset({CAPTIONS})
    _shard: ShardKey | None = field(default=None, repr=False)
    _rows: dict[tuple[str, ...], bytes] = field(default_factory=dict, repr=False)

    @property
    def values(self) -> str:
        return self.encoder.values

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        return ColumnMeta(
            kind="bytes",
            content=POOLED_MEDIA_TYPE if self.encoder.recipe.pooled else TEXT_MEDIA_TYPE,
            encoder=self.encoder.name,
            config={**self.encoder.config, "dim": self.encoder.dim, "values": self.values},
            dtype="bytes",
            measured=measured(self.encoder.error),
            empty_row=base64.b64encode(self._pack([self.encoder.empty])).decode(),
        )

    def encode(self, batch: ClipBatch) -> Sequence[Row | RowFailed]:
        if batch.key != self._shard:
            self._shard, self._rows = batch.key, {}
        new = [key for key in dict.fromkeys(batch.captions) if key not in self._rows]
        # A clip without captions has the empty one.
        found = iter(self.encoder.encode([caption for key in new for caption in key or ("",)]))
        for key in new:
            self._rows[key] = self._pack([next(found) for _ in key or ("",)])
        return [self._bounded(self._rows[captions]) for captions in batch.captions]

    def _bounded(self, row: bytes) -> bytes | RowFailed:
        if len(row) <= MAX_ROW_BYTES:
            return row
        return RowFailed(
            f"its texts take {len(row) >> 20} MiB, a row {MAX_ROW_BYTES >> 20} at most. Cut them: "
            "--text-max-tokens."
        )

    def _pack(self, captions: Sequence[CaptionTokens]) -> bytes:
        limit = np.finfo(np.float16).max if self.values == "float16" else np.finfo(np.float32).max
        for caption in captions:
            if not (np.abs(caption.vectors) <= limit).all():
                raise ConfigError(
                    f"{self.encoder.name} gave NaN or a value beyond {self.values}. Compute in "
                    "float32 or bfloat16, and store text as bfloat16."
                )
        return pack_text_row(captions, self.values)
