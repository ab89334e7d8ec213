"""The kinds of rows: how one becomes bytes, comes back, and is held against what it must be.

A column's kind follows from `ColumnMeta.kind` and `ColumnMeta.content`, here alone; how a kind's
rows stand in a batch is said in `dataset.fields`. Rows of arrays are their values in C order,
little-endian; others are any bytes. A column with `compression` stores each row as Zarr's codecs
would: (vlen-bytes,) zstd. numpy only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import Buffer
from reducio_latents.store import quantize, text_rows
from reducio_latents.store.limits import MAX_ROW_BYTES, must_hold
from reducio_latents.store.meta import ColumnMeta

Array = NDArray[np.generic]
Row = Buffer | Array | None
VLEN_HEADER = struct.Struct("<II")
"""Number of values in a chunk of Zarr's vlen-bytes (always 1), and the length of the value."""
ZSTD_LEVEL = 3
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
NPY_ALIGNMENT = 64
SCORES_CONTENT = "scores"
"""`ColumnMeta.content` of rows of `ScoresRows`."""
MAX_SCORES, MAX_NAME = 1000, 100
PAGE_BYTES = 4096
ROOM_TOKENS, ROOM_DIM = 512, 4096
"""Of the texts of a clip, in the mean, for which there is room."""
_LATENT_AXES = ("channel", "t", "y", "x")
AXES = {
    "moments": _LATENT_AXES,
    "final latents": _LATENT_AXES,
    "pixels": ("channel", "y", "x"),
    "tokens": ("token", "value"),
    "vector": ("value",),
    "seconds": ("frame",),
    SCORES_CONTENT: ("score",),
}
"""How axes of rows are called, by content; of latents of pictures without `t`."""
CAPTION_SEPARATOR = "\0"
"""Between the captions of one clip, in a row of text."""


@dataclass(frozen=True, eq=False)
class BytesRows:
    """Rows of any bytes and length; what other kinds build on."""

    column: ColumnMeta
    extension: ClassVar[str] = "bin"
    """Of a row as a file of its own."""
    zarr_fill: ClassVar[Any] = ""
    zarr_type: ClassVar[str] = "variable_length_bytes"
    zarr_codec: ClassVar[Mapping[str, Any]] = {"name": "vlen-bytes", "configuration": {}}
    has_header: ClassVar[bool] = True
    """Whether to Zarr's codec a row has a `VLEN_HEADER` before it."""
    shares_equal_rows: ClassVar[bool] = True
    """Whether rows that are equal are stored once."""
    is_same_by_any: ClassVar[bool] = False
    """Whether rows mean the same whatever encoder made them."""

    @property
    def alike(self) -> tuple[Any, ...]:
        """Equal for columns whose rows may stand in one batch."""
        if self.is_same_by_any:
            return (type(self),)
        return (self.column.kind, self.column.content, self.column.fingerprint)

    @property
    def is_compressed(self) -> bool:
        return self.column.compression != "none"

    def zarr_codecs(self) -> list[Mapping[str, Any]]:
        settings = {"level": ZSTD_LEVEL, "checksum": False}
        zstd_codec = [{"name": "zstd", "configuration": settings}]
        return [self.zarr_codec, *(zstd_codec if self.is_compressed else [])]

    def has_bucket(self, bucket: str) -> bool:
        """Whether the column can have rows in a bucket."""
        return True

    def shape(self, bucket: str) -> tuple[int, ...]:
        """Return the shape of each row; () where rows are no arrays."""
        return ()

    def row_bytes(self, bucket: str) -> int | None:
        """Return the size of every stored row, None where they differ."""
        return None

    def piece_bytes(self, bucket: str) -> int:
        """Return a quarter of the room for a row of any length, in the mean. See `zarr`."""
        return PAGE_BYTES * 2

    def axes(self, bucket: str) -> tuple[str, ...]:
        """Return a name for each axis of `shape`."""
        return ()

    def file_head(self, bucket: str) -> bytes:
        """Return what stands before a stored row in a file of its own."""
        return b""

    @property
    def file_extension(self) -> str:
        """The extension of a stored row as a file of its own."""
        return f"{self.extension}.zst" if self.is_compressed else self.extension

    def misfit(self, row: Row, bucket: str) -> str:
        """Return why a row cannot be stored in this column; nothing if it can."""
        return "" if isinstance(row, Buffer) else f"a row is {type(row).__name__}, not bytes"

    def store(self, row: Buffer | Array) -> Buffer:
        """Return a row as it is stored."""
        data = self._to_bytes(row)
        if not self.is_compressed:
            return data
        head = VLEN_HEADER.pack(1, memoryview(data).nbytes) if self.has_header else b""
        return bytes(zstd.compress(head + bytes(data), ZSTD_LEVEL))

    def _to_bytes(self, row: Buffer | Array) -> Buffer:
        return row if isinstance(row, Buffer) else row.tobytes()

    def unpack(self, stored: Buffer, bucket: str) -> bytes:
        """Return the bytes of a stored row; raise StoreError if they cannot be had of it."""
        if not self.is_compressed:
            return bytes(stored)
        expected = self._unpacked_bytes(bucket)
        size = zstd_size(stored)
        if size is None or size > MAX_ROW_BYTES or size != (expected or size):
            raise StoreError(
                f"a row cannot be decompressed: it says that it holds {size} bytes. Run `verify`."
            )
        try:
            # Into what was declared, so that no frame can grow beyond it.
            data = bytes(zstd.decompress(stored, bytearray(size)))
        except (RuntimeError, ValueError) as err:
            raise StoreError(f"a row cannot be decompressed ({err}). Run `verify`.") from err
        if not self.has_header:
            return data
        if len(data) < VLEN_HEADER.size or VLEN_HEADER.unpack_from(data) != (1, len(data) - 8):
            raise StoreError("a row has another length than it says. Run `verify`.")
        return data[VLEN_HEADER.size :]

    def _unpacked_bytes(self, bucket: str) -> int | None:
        return None

    def is_finite(self, row: Array) -> bool:
        """Whether the values of an array are such as the column may hold."""
        return bool(np.isfinite(row).all())

    def decode(self, stored: Buffer, bucket: str) -> Array | bytes:
        """Return the array or the bytes of a stored row; raise StoreError for another shape."""
        return self.unpack(stored, bucket)

    def value(self, row: Array | bytes, bucket: str) -> Any:
        """Return what a person wants to see of a decoded row: pixels, text, vectors."""
        return row


class JsonRows(BytesRows):
    """Rows of JSON, read by who asks for them."""

    extension = "json"


class TextRows(BytesRows):
    """UTF-8 text: the captions of a clip, `CAPTION_SEPARATOR` between them."""

    extension = "txt"
    is_same_by_any = True

    def value(self, row: Array | bytes, bucket: str) -> str:
        return captions_of(bytes(row))[0]


class ImageRows(BytesRows):
    """Image files, RGB, of the bucket's size."""

    is_same_by_any = True

    @property
    def extension(self) -> str:  # type: ignore[override]
        format_ = self.column.content.partition("/")[2]
        return {"jpeg": "jpg", "png": "png", "webp": "webp"}.get(format_, "bin")

    def piece_bytes(self, bucket: str) -> int:
        size = Bucket.parse(bucket)
        return _whole_pages(size.height * size.width * 3 * 3 // 8)  # 1.5 times the pixels

    def value(self, row: Array | bytes, bucket: str) -> NDArray[np.uint8]:
        """Return uint8 (3, H, W)."""
        return np.ascontiguousarray(image_pixels(bytes(row), bucket).transpose(2, 0, 1))


class TokenVectorRows(BytesRows):
    """The token vectors of each caption of a clip, as `text_rows` packs them."""

    def piece_bytes(self, bucket: str) -> int:
        dim = self.column.config.get("dim")
        dim = dim if isinstance(dim, int) and 0 < dim <= ROOM_DIM else ROOM_DIM
        return _whole_pages(dim * 2 * ROOM_TOKENS // 4)

    def value(self, row: Array | bytes, bucket: str) -> NDArray[np.floating]:
        return text_rows.decode_text_row(bytes(row))[0]


class PooledVectorRows(TokenVectorRows):
    """Likewise, one vector for each caption."""

    def value(self, row: Array | bytes, bucket: str) -> NDArray[np.floating]:
        return text_rows.pooled_vectors(bytes(row))[0]


class ArrayRows(BytesRows):
    """Arrays: of a bucket, all rows have one shape."""

    extension = "npy"
    zarr_codec: ClassVar[Mapping[str, Any]] = {
        "name": "bytes",
        "configuration": {"endian": "little"},
    }
    has_header = shares_equal_rows = False

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.column.dtype)

    @property
    def zarr_fill(self) -> Any:
        # NaN: an empty row that is read by mistake shows at once.
        return "NaN" if self.dtype.kind == "f" else 0

    @property
    def zarr_type(self) -> str:  # type: ignore[override]
        return self.column.dtype

    def has_bucket(self, bucket: str) -> bool:
        return bucket in self.column.row_shapes

    def shape(self, bucket: str) -> tuple[int, ...]:
        if bucket not in self.column.row_shapes:
            raise StoreError(f"the column has no rows in bucket {bucket}.")
        return self.column.row_shapes[bucket]

    def row_bytes(self, bucket: str) -> int | None:
        return None if self.is_compressed else self._unpacked_bytes(bucket)

    def _unpacked_bytes(self, bucket: str) -> int:
        return math.prod(self.shape(bucket)) * self.dtype.itemsize

    def axes(self, bucket: str) -> tuple[str, ...]:
        count = len(self.shape(bucket))
        names = AXES.get(self.column.content.partition("/")[0], ())
        names = (names[0], *names[2:]) if (count, len(names)) == (3, 4) else names
        return names if len(names) == count else tuple(f"axis_{i}" for i in range(count))

    def file_head(self, bucket: str) -> bytes:
        return b"" if self.is_compressed else npy_head(self.dtype, self.shape(bucket))

    def misfit(self, row: Row, bucket: str) -> str:
        shape, dtype = getattr(row, "shape", ()), getattr(row, "dtype", None)
        if not self.has_bucket(bucket):
            return f"the store has no bucket {bucket}"
        if shape == self.shape(bucket) and dtype == self.dtype:
            return ""
        return f"a row is {dtype} {shape}, the store holds {self.dtype} {self.shape(bucket)}"

    def _to_bytes(self, row: Buffer | Array) -> Buffer:
        if isinstance(row, Buffer):
            return row
        return np.ascontiguousarray(row, dtype=row.dtype.newbyteorder("<")).tobytes()

    def decode(self, stored: Buffer, bucket: str) -> Array:
        data = self.unpack(stored, bucket)
        if len(data) != self._unpacked_bytes(bucket):
            raise StoreError(f"a row has {len(data)} bytes, not those of {self.shape(bucket)}.")
        return np.frombuffer(data, self.dtype.newbyteorder("<")).reshape(self.shape(bucket))


class MomentsRows(ArrayRows):
    """A posterior's mean, then its log-variance, along the first axis."""

    def shape(self, bucket: str) -> tuple[int, ...]:
        shape = super().shape(bucket)
        if not shape or shape[0] % 2:
            raise StoreError(f"rows of shape {shape} are no moments: two halves of an axis.")
        return shape


class FinalLatentsRows(ArrayRows):
    """Final latents that were drawn once, when they were made."""


class Int8TokenRows(ArrayRows):
    """Tokens in 8 bits a value, as `quantize` packs them."""

    def value(self, row: Array | bytes, bucket: str) -> NDArray[np.float32]:
        return quantize.dequantize(np.asarray(row, np.int8))


class ScoresRows(ArrayRows):
    """Numbers with names; NaN where a clip lacks one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values of a row; raise StoreError if the description has none that fit."""
        names = self.column.config.get("names")
        try:
            must_hold(isinstance(names, list), "there are none.")
            found = require_score_names(names or ())
            sizes = set(self.column.row_shapes.values())
            must_hold(sizes <= {(len(found),)}, "they are not as many as the values of a row.")
            return found
        except ConfigError as err:
            raise StoreError(f"the names of scores: {err}") from err

    def is_finite(self, row: Array) -> bool:
        return not np.isinf(row).any()

    def value(self, row: Array | bytes, bucket: str) -> dict[str, float]:
        return dict(zip(self.names, np.asarray(row).tolist(), strict=True))


def require_score_names(names: Sequence[Any]) -> tuple[str, ...]:
    """Raise ConfigError unless these are names that scores may have."""
    for name in names:
        good = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
        must_hold(good, f"{str(name)[:MAX_NAME]!r} is no name of a score.")
    must_hold(len(set(names)) == len(names) <= MAX_SCORES, f"give up to {MAX_SCORES}, each once.")
    return tuple(names)


ROW_KINDS: dict[tuple[str, str], type[BytesRows]] = {
    ("array", ""): ArrayRows,
    ("array", "moments"): MomentsRows,
    ("array", "final latents"): FinalLatentsRows,
    ("array", quantize.INT8_MEDIA_TYPE): Int8TokenRows,
    ("array", SCORES_CONTENT): ScoresRows,
    ("bytes", ""): BytesRows,
    ("bytes", "image"): ImageRows,
    ("bytes", "text"): TextRows,
    ("bytes", "application/json"): JsonRows,
    ("bytes", text_rows.TEXT_MEDIA_TYPE): TokenVectorRows,
    ("bytes", text_rows.POOLED_MEDIA_TYPE): PooledVectorRows,
}
"""`ColumnMeta.kind` and its content, or what stands before the content's `/`, or nothing."""


def row_kind(column: ColumnMeta) -> BytesRows:
    """Return what the rows of a column are."""
    whole, general = column.content, column.content.partition("/")[0]
    names = [(column.kind, name) for name in (whole, general, "")]
    return next(ROW_KINDS[name] for name in names if name in ROW_KINDS)(column)


def _whole_pages(size: int) -> int:
    return max(1, -(-size // PAGE_BYTES)) * PAGE_BYTES


def npy_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the head of a .npy file, format 1.0, whose length is a multiple of 64."""
    descr = dtype.newbyteorder("<").str
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    padding = -(10 + len(text) + 1) % NPY_ALIGNMENT
    length = len(text) + padding + 1
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text + b" " * padding + b"\n"


def captions_of(row: bytes) -> list[str]:
    """Return the captions of a row of text, one or more; StoreError if they are no text."""
    try:
        return row.decode().split(CAPTION_SEPARATOR)
    except UnicodeDecodeError as err:
        raise StoreError(f"a text is not UTF-8 ({err}). Run `verify`.") from err


def image_pixels(row: bytes, bucket: str) -> NDArray[np.uint8]:
    """Return uint8 RGB (H, W, 3) of an image of the bucket's size; StoreError for any other."""
    from reducio_latents.core.images import decode_image

    size = Bucket.parse(bucket)
    return decode_image(row, "content image", (size.height, size.width))


def zstd_size(frame: Buffer) -> int | None:
    """Return the bytes that a zstd frame says it holds; None if it does not say.

    Source: RFC 8878, 3.1.1.1.
    """
    head = bytes(memoryview(frame)[:18])
    if head[:4] != ZSTD_MAGIC or len(head) < 6:
        return None
    flags = head[4]
    single, width = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6]
    width = width or single
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not width or len(head) < start + width:
        return None
    size = int.from_bytes(head[start : start + width], "little")
    return size + 256 if width == 2 else size
