"""From stored rows to what a batch holds: images, texts, token vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset.reader import DamagedRowsError
from reducio_latents.errors import StoreError
from reducio_latents.store.row_kinds import (
    BytesRows,
    ImageRows,
    PooledVectorRows,
    TextRows,
    TokenVectorRows,
    captions_of,
)
from reducio_latents.store.text_rows import (
    decode_text_row,
    empty_caption,
    empty_row,
    pooled_vectors,
)

RowT = TypeVar("RowT")
Words = Callable[[], Iterable[np.uint64]]
"""Gives a random number for each row."""


@dataclass(frozen=True)
class AskedRows:
    """Rows of any length of one column, and what is asked of them."""

    name: str
    kind: BytesRows
    rows: Sequence[bytes]
    bucket: str
    words: Words
    """Which caption of each row is taken, and whose vectors."""
    dropped: Callable[[], Iterable[bool]] | None = None
    """Which rows have the empty caption instead; None: none has."""
    images: str = "tensor"
    text_tokens: int | None = None


def payload_fields(it: AskedRows) -> dict[str, Any]:
    """Return the fields of a batch, name -> tensor or list; raise DamagedRowsError."""
    known = (PAYLOAD_FIELDS[cls] for cls in type(it.kind).__mro__ if cls in PAYLOAD_FIELDS)
    return next(known)(it)


def _bytes(it: AskedRows) -> dict[str, Any]:
    return {it.name: list(it.rows)}


def _images(it: AskedRows) -> dict[str, Any]:
    """uint8 (N, 3, H, W), or the files as they are."""
    if it.images != "tensor":
        return {it.name: list(it.rows)}
    pixels = _each(it.rows, lambda row: it.kind.value(row, it.bucket))
    size = Bucket.parse(it.bucket)
    shape = (len(it.rows), 3, size.height, size.width)
    stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
    return {it.name: torch.from_numpy(stacked)}


def _texts(it: AskedRows) -> dict[str, Any]:
    """One caption of each row; where there are several, the row's word decides which."""
    several = _each(it.rows, captions_of)
    return {it.name: _chosen(several, it, lambda: "")}


def _token_vectors(it: AskedRows) -> dict[str, Any]:
    """(N, L, dim) of the caption that a column of texts gives, and which of it are tokens."""
    vectors = _chosen(_each(it.rows, decode_text_row), it, lambda: empty_caption(it.kind.column))
    at_left = it.kind.column.config.get("padding_side") == "left"
    padded, mask = pad_vectors(vectors, it.text_tokens, at_left=at_left)
    return {it.name: padded, f"{it.name}_mask": mask}


def _pooled(it: AskedRows) -> dict[str, Any]:
    """(N, dim) of the caption that a column of texts gives."""
    found = _each(it.rows, pooled_vectors)
    vectors = _chosen(found, it, lambda: pooled_vectors(empty_row(it.kind.column))[0])
    padded, _ = pad_vectors([vector[None] for vector in vectors], 1)
    return {it.name: padded[:, 0]}


PAYLOAD_FIELDS: dict[type[BytesRows], Callable[[AskedRows], dict[str, Any]]] = {
    BytesRows: _bytes,
    ImageRows: _images,
    TextRows: _texts,
    TokenVectorRows: _token_vectors,
    PooledVectorRows: _pooled,
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


def _chosen(
    several: Sequence[Sequence[RowT]], it: AskedRows, empty: Callable[[], RowT]
) -> list[RowT]:
    if all(len(captions) == 1 for captions in several):
        chosen = [captions[0] for captions in several]
    else:
        pairs = zip(several, it.words(), strict=True)
        chosen = [captions[int(word) % len(captions)] for captions, word in pairs]
    if it.dropped is None:
        return chosen
    none = empty()
    return [none if drop else row for row, drop in zip(chosen, it.dropped(), strict=True)]


def pad_vectors(
    vectors: Sequence[NDArray[Any]], length: int | None, *, at_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (N, L, dim), zero after each text's end, and the mask (N, L), true before it.

    L is `length`, longer texts being cut, or that of the longest. With `at_left` the zeros come
    before each text's beginning.
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
        start = longest - len(kept) if at_left else 0
        target[start : start + len(kept)] = kept
        present[start : start + len(kept)] = True
    return torch.from_numpy(padded), torch.from_numpy(mask)


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
