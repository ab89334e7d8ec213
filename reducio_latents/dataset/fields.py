"""From stored rows to what a batch holds: images, texts, token vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.reader import DamagedRowsError
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.row_kinds import (
    BytesRows,
    ImageRows,
    TextRows,
    TokenVectorRows,
    captions_of,
)
from reducio_latents.store.text_rows import decode_text_row

RowT = TypeVar("RowT")
Words = Callable[[], Iterable[np.uint64]]
"""Gives a random number for each row."""


class PayloadFields(Protocol):
    """What the fields of rows of any length depend on."""

    def __call__(
        self, name: str, kind: BytesRows, rows: Sequence[bytes], bucket: str, wanted: Wanted
    ) -> dict[str, Any]:
        """Return the fields of a batch, name -> tensor or list; raise DamagedRowsError."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a batch."""

    words: Words
    """Which caption of each row is taken, and whose vectors."""
    images: str = "tensor"
    text_tokens: int | None = None


def payload_fields(
    name: str, kind: BytesRows, rows: Sequence[bytes], bucket: str, wanted: Wanted
) -> dict[str, Any]:
    """Return what a batch holds of a column whose rows have any length."""
    known = (PAYLOAD_FIELDS[cls] for cls in type(kind).__mro__ if cls in PAYLOAD_FIELDS)
    return next(known)(name, kind, rows, bucket, wanted)


def _bytes(
    name: str, kind: BytesRows, rows: Sequence[bytes], bucket: str, wanted: Wanted
) -> dict[str, Any]:
    return {name: list(rows)}


def _images(
    name: str, kind: BytesRows, rows: Sequence[bytes], bucket: str, wanted: Wanted
) -> dict[str, Any]:
    """uint8 (N, 3, H, W), or the files as they are."""
    if wanted.images != "tensor":
        return {name: list(rows)}
    pixels = _each(rows, lambda row: kind.value(row, bucket))
    size = Bucket.parse(bucket)
    shape = (len(rows), 3, size.height, size.width)
    stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
    return {name: torch.from_numpy(stacked)}


def _texts(
    name: str, kind: BytesRows, rows: Sequence[bytes], bucket: str, wanted: Wanted
) -> dict[str, Any]:
    """One caption of each row; where there are several, the row's word decides which."""
    several = _each(rows, captions_of)
    return {name: _chosen(several, wanted.words)}


def _token_vectors(
    name: str, kind: BytesRows, rows: Sequence[bytes], bucket: str, wanted: Wanted
) -> dict[str, Any]:
    """(N, L, dim) of the caption that a column of texts gives, and which of it are tokens."""
    vectors = _chosen(_each(rows, decode_text_row), wanted.words)
    padded, mask = pad_vectors(vectors, wanted.text_tokens)
    return {name: padded, f"{name}_mask": mask}


PAYLOAD_FIELDS: dict[type[BytesRows], PayloadFields] = {
    BytesRows: _bytes,
    ImageRows: _images,
    TextRows: _texts,
    TokenVectorRows: _token_vectors,
}
"""How rows of a kind, or of those that it builds on, stand in a batch."""


def fact_field(values: Sequence[Any], kind: str) -> Tensor | list[str]:
    """Return what a batch holds of one thing that is known of clips, None where it is not.

    Numbers and truth values are (N,), NaN for None; texts a list, "" for None.
    """
    if kind == "text":
        texts = ("" if value is None else value for value in values)
        return [text if isinstance(text, str) else json.dumps(text) for text in texts]
    numbers = [math.nan if value is None else value for value in values]
    return torch.tensor(numbers, dtype=getattr(torch, kind))


def _chosen(several: Sequence[Sequence[RowT]], words: Words) -> list[RowT]:
    if all(len(captions) == 1 for captions in several):
        return [captions[0] for captions in several]
    pairs = zip(several, words(), strict=True)
    return [captions[int(word) % len(captions)] for captions, word in pairs]


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
        except StoreError as err:
            bad.append(position)
            reasons.append(str(err))
    if bad:
        raise DamagedRowsError(f"{len(bad)} rows cannot be decoded: {reasons[0]}", bad)
    return found
