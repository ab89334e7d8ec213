"""A row of the column `text`: the token vectors of each caption of a clip, unpadded.

    version u8 = 1 | values u8 | captions u16 | dim u32          8 bytes, little-endian
    tokens u32 | tokens before truncation u32                     for each caption
    values of the first caption (tokens, dim), of the second, ...

`values` is 0 for float16, 1 for bfloat16, 2 for int8, where a token is dim + 4 bytes as `quantize`
packs them. A clip without captions has one, the empty one. numpy only.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.choices import TextValues
from reducio_latents.errors import StoreError
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.quantize import TAIL_BYTES, dequantize, quantize, relative_errors

TEXT_MEDIA_TYPE = "application/x-token-vectors"
"""`ColumnMeta.content` of a column of such rows."""
POOLED_MEDIA_TYPE = "application/x-pooled-vectors"
"""Likewise, where each caption has one vector."""
VALUES = get_args(TextValues)
VERSION = 1
_HEAD = struct.Struct("<BBHI")
_CAPTION = struct.Struct("<II")


class CaptionTokens(NamedTuple):
    """One caption as the text encoder saw it."""

    vectors: NDArray[np.float32]
    """(tokens, dim)."""
    full_length: int
    """Tokens that it had before it was cut to the longest that is kept."""


def pack_text_row(captions: Sequence[CaptionTokens], values: str) -> bytes:
    """Return the row of a clip's captions, one or more; `values` is one of `VALUES`."""
    dim = captions[0].vectors.shape[1]
    head = _HEAD.pack(VERSION, VALUES.index(values), len(captions), dim)
    lengths = [_CAPTION.pack(len(c.vectors), c.full_length) for c in captions]
    return b"".join([head, *lengths, *(_PACKERS[values](c.vectors) for c in captions)])


def decode_text_row(payload: bytes | memoryview) -> list[NDArray[np.floating]]:
    """Return the token vectors (tokens, dim) of each caption.

    float16 as stored; bfloat16 and int8 come as float32, which holds them exactly. Raises
    StoreError for other bytes.
    """
    found = []
    for values, tokens, dim in _token_bytes(payload):
        if values == "float16":
            found.append(tokens.view("<f2").reshape(-1, dim))
        elif values == "bfloat16":
            wide = tokens.view("<u2").astype(np.uint32) << 16
            found.append(wide.view(np.float32).reshape(-1, dim))
        else:
            found.append(dequantize(tokens.view(np.int8).reshape(-1, dim + TAIL_BYTES)))
    return found


def pooled_vectors(payload: bytes | memoryview) -> list[NDArray[np.floating]]:
    """Return the vector (dim,) of each caption; StoreError where one has more or none."""
    found = decode_text_row(payload)
    if any(len(vectors) != 1 for vectors in found):
        raise StoreError("a pooled text is not one vector: it is damaged. Run `verify`.")
    return [vectors[0] for vectors in found]


def text_row_lengths(payload: bytes | memoryview) -> list[tuple[int, int]]:
    """Return (tokens kept, tokens before truncation) of each caption."""
    _, count, _ = _read_head(payload)
    return [_CAPTION.unpack_from(payload, _HEAD.size + i * _CAPTION.size) for i in range(count)]


def text_row_errors(payload: bytes | memoryview) -> NDArray[np.float32]:
    """Return the relative error of each token, (tokens of all captions,), of an int8 row."""
    rows = [
        relative_errors(tokens.view(np.int8).reshape(-1, dim + TAIL_BYTES))
        for values, tokens, dim in _token_bytes(payload)
        if values == "int8"
    ]
    return np.concatenate(rows) if rows else np.zeros(0, np.float32)


def empty_caption(column: ColumnMeta) -> NDArray[np.floating]:
    """Return the token vectors (tokens, dim) of the empty caption, for guidance dropout.

    Raises StoreError for a column that holds no text.
    """
    return decode_text_row(empty_row(column))[0]


def empty_row(column: ColumnMeta) -> bytes:
    """Return the row of a clip without captions; StoreError for a column that holds no text."""
    if column.empty_row is None:
        raise StoreError("this column keeps no vectors of the empty caption: it is not of text.")
    try:
        return base64.b64decode(column.empty_row, validate=True)
    except ValueError as err:
        raise StoreError(f"the description's empty_row is not base64: {err}.") from err


def _read_head(payload: bytes | memoryview) -> tuple[str, int, int]:
    if len(payload) < _HEAD.size:
        raise StoreError(f"a text row has {len(payload)} bytes: it is damaged. Run `verify`.")
    version, values, count, dim = _HEAD.unpack_from(payload)
    if not count or not dim:
        raise StoreError("a text row has no caption, or no values: it is damaged. Run `verify`.")
    if version != VERSION or values >= len(VALUES):
        raise StoreError(
            f"a text row is of version {version}, values {values}; this version reads {VERSION}. "
            "It is damaged (run `verify`), or a newer version wrote it."
        )
    return VALUES[values], count, dim


def _token_bytes(payload: bytes | memoryview) -> list[tuple[str, NDArray[np.uint8], int]]:
    values, count, dim = _read_head(payload)
    width = dim + TAIL_BYTES if values == "int8" else 2 * dim
    start = _HEAD.size + count * _CAPTION.size
    if len(payload) < start:
        raise StoreError("a text row ends within its lengths: it is damaged. Run `verify`.")
    data = np.frombuffer(payload, np.uint8)
    found = []
    for kept, _ in text_row_lengths(payload):
        found.append((values, data[start : start + kept * width], dim))
        start += kept * width
    if start != len(payload):
        raise StoreError(f"a text row has {len(payload)} bytes, not {start}: it is damaged.")
    return found


def _pack_bfloat16(vectors: NDArray[np.float32]) -> bytes:
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    # Round to nearest, ties to even: add half a step, less where the kept bit is even.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


_PACKERS: dict[str, Callable[[NDArray[np.float32]], bytes]] = {
    "float16": lambda vectors: vectors.astype("<f2").tobytes(),
    "bfloat16": _pack_bfloat16,
    "int8": lambda vectors: quantize(vectors).tobytes(),
}
