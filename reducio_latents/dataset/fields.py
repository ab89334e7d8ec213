"""From stored rows to what a batch holds: images, texts, token vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.reader import DamagedRowsError
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.text_rows import MEDIA_TYPE as TOKEN_VECTORS
from reducio_latents.store.text_rows import decode_text_row

RowT = TypeVar("RowT")
Words = Callable[[], Iterable[np.uint64]]
"""Gives a random number for each row."""

FINAL_LATENTS = "final latents"
CAPTION_SEPARATOR = "\0"
"""Between the captions of one clip, in a row of text."""


def is_image(meta: ColumnMeta) -> bool:
    return meta.kind == "bytes" and meta.content.startswith("image/")


def is_text(meta: ColumnMeta) -> bool:
    return meta.kind == "bytes" and meta.content.startswith("text/")


def is_token_vectors(meta: ColumnMeta) -> bool:
    return meta.kind == "bytes" and meta.content == TOKEN_VECTORS


def decode_images(files: Sequence[bytes], bucket: str, where: str) -> Tensor:
    """Decode images of the bucket's size, uint8 RGB (N, 3, H, W)."""
    from reducio_latents.core.images import decode_image

    size = Bucket.parse(bucket)
    out = np.empty((len(files), 3, size.height, size.width), np.uint8)
    for position, pixels in enumerate(_each(files, lambda data: decode_image(data, where))):
        if pixels.shape != (size.height, size.width, 3):
            raise DamagedRowsError(
                f"{where}: an image has {pixels.shape[0]}x{pixels.shape[1]} pixels in bucket "
                f"{bucket}. Run `verify`.",
                [position],
            )
        out[position] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(out)


def choose_captions(rows: Sequence[bytes], words: Words) -> list[str]:
    """Return one caption of each row; where there are several, the row's word decides which."""
    texts = _each(rows, bytes.decode)
    if not any(CAPTION_SEPARATOR in text for text in texts):
        return texts
    several = (text.split(CAPTION_SEPARATOR) for text in texts)
    return [_choose(captions, word) for captions, word in zip(several, words(), strict=True)]


def choose_vectors(rows: Sequence[bytes], words: Words) -> list[NDArray[Any]]:
    """Return the token vectors (tokens, dim) of one caption of each row, the same one."""
    several = _each(rows, decode_text_row)
    return [_choose(captions, word) for captions, word in zip(several, words(), strict=True)]


def _choose(captions: Sequence[RowT], word: np.uint64) -> RowT:
    return captions[int(word) % len(captions)]


def pad_vectors(vectors: Sequence[NDArray[Any]], length: int | None) -> tuple[Tensor, Tensor]:
    """Return (N, L, dim), zero after each text's end, and the mask (N, L), true before it.

    L is `length`, longer texts being cut, or that of the longest.
    """
    if not vectors:
        return torch.zeros((0, length or 0, 0)), torch.zeros((0, length or 0), dtype=torch.bool)
    longest = max(len(v) for v in vectors) if length is None else length
    dim = vectors[0].shape[1]
    padded = np.zeros((len(vectors), longest, dim), vectors[0].dtype)
    mask = np.zeros((len(vectors), longest), np.bool_)
    for row, (target, present, values) in enumerate(zip(padded, mask, vectors, strict=True)):
        if values.shape[1] != dim:
            raise DamagedRowsError(f"a text has vectors of {values.shape[1]}, not {dim}.", [row])
        kept = values[:longest]
        target[: len(kept)] = kept
        present[: len(kept)] = True
    return torch.from_numpy(padded), torch.from_numpy(mask)


def is_final(meta: ColumnMeta) -> bool:
    """Whether rows are final latents that were drawn once, when they were made."""
    return meta.kind == "array" and meta.content == FINAL_LATENTS


def require_moments(name: str, meta: ColumnMeta) -> None:
    """Raise ConfigError unless latents can be sampled from the column."""
    if meta.final is None:
        raise ConfigError(
            f"column {name} has no rule for final latents in the store's description. "
            'Read it with latents="moments".'
        )


def _each(rows: Sequence[bytes], decode: Callable[[bytes], RowT]) -> list[RowT]:
    """Decode every row, or raise one DamagedRowsError that names all that cannot be."""
    found, bad, reasons = [], [], []
    for position, row in enumerate(rows):
        try:
            found.append(decode(row))
        except (StoreError, UnicodeDecodeError) as err:
            bad.append(position)
            reasons.append(str(err))
    if bad:
        raise DamagedRowsError(f"{len(bad)} rows cannot be decoded: {reasons[0]}", bad)
    return found
