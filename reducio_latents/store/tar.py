"""The WebDataset container, byte by byte: one tar for the columns of a shard that came together.

    16x256x256/shard-000000.tar           members by clip, in the order of rows:
      <clip>.json                         clip id, bucket, video, start_s, columns of this tar
      <clip>.caption.txt                  ... and a member a column, in the order of their names
      <clip>.content_image.webp
      <clip>.motion.npy
    16x256x256/shard-000000.text.tar      a column that came later

Names are such that the stock `webdataset` groups and decodes them: a clip id's characters other
than letters, digits, `_` and `-` are percent-encoded, since a dot would end the key. The bytes
depend on the rows alone: POSIX ustar headers, no owner, time 0; names that do not fit have a pax
header before theirs. A clip that failed in all columns has no member. Equal rows are not shared.
Rows of a column with `compression` are stored as they are compressed, `.npy.zst` without a head.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from reducio_latents.core.fingerprint import compact_json
from reducio_latents.files import Buffer
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.meta import ColumnMeta

BLOCK = 512
NPY_ALIGNMENT = 64
END = bytes(2 * BLOCK)
EXTENSIONS = {
    "image/webp": "webp",
    "image/png": "png",
    "image/jpeg": "jpg",
    "text/plain": "txt",
    "application/json": "json",
}
"""Media type of a column of kind `bytes` -> extension of its members; `bin` for others."""
HEAD_BYTES = 8 * BLOCK
"""Enough for the first member of a tar, whose JSON names the columns."""

Ranges = tuple[tuple[int, int], ...]


class Member(NamedTuple):
    """How the rows of one column become members."""

    suffix: str
    """Their name after the clip's key."""
    head: bytes
    """What stands in each before the row's payload."""
    rows: Sequence[Buffer | None]


def tar_path(key: ShardKey, column: str | None = None) -> str:
    """Return the path of a shard's tar, or of the tar of a column that came later."""
    return f"{key.bucket}/shard-{key.shard:06d}{f'.{column}' if column else ''}.tar"


def member_of(column: ColumnMeta, name: str, bucket: str, rows: Sequence[Buffer | None]) -> Member:
    extension = "npy" if column.kind == "array" else EXTENSIONS.get(column.content, "bin")
    if column.compression != "none":
        return Member(f".{name}.{extension}.zst", b"", rows)
    head = npy_head(column.dtype, column.row_shapes[bucket]) if column.kind == "array" else b""
    return Member(f".{name}.{extension}", head, rows)


def npy_head(dtype: str, shape: Sequence[int]) -> bytes:
    """Return the head of a .npy file, format 1.0, whose length is a multiple of 64."""
    described = {
        "descr": np.dtype(dtype).newbyteorder("<").str,
        "fortran_order": False,
        "shape": tuple(shape),
    }
    text = repr(described).encode()
    padding = -(10 + len(text) + 1) % NPY_ALIGNMENT
    length = len(text) + padding + 1
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text + b" " * padding + b"\n"


def pack_tar(
    clips: Sequence[Mapping[str, Any]], bucket: str, members: Mapping[str, Member]
) -> tuple[list[Buffer], dict[str, Ranges]]:
    """Return a tar in parts, and where each column's payloads lie in it.

    `clips` holds what is known of each row's clip, its `clip_id` at least.
    """
    names = sorted(members)
    parts: list[Buffer] = []
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    offset = 0
    for row, clip in enumerate(clips):
        present = [name for name in names if members[name].rows[row] is not None]
        key = clip_key(clip["clip_id"])
        if present:
            about = compact_json({**clip, "bucket": bucket, "columns": names})
            offset = _append(parts, offset, f"{key}.json", [about])
        for name in names:
            suffix, head, rows = members[name]
            payload = rows[row]
            if payload is None:
                ranges[name].append((-1, 0))
                continue
            offset = _append(parts, offset, key + suffix, [head, payload])
            size = memoryview(payload).nbytes
            ranges[name].append((offset - _padded(len(head) + size) + len(head), size))
    parts.append(END)
    return parts, {name: tuple(found) for name, found in ranges.items()}


def columns_of(files_head: bytes) -> set[str] | None:
    """Return the columns that a tar holds, told by its first bytes; None if they do not tell."""
    try:
        with tarfile.open(fileobj=io.BytesIO(files_head), mode="r:") as tar:
            first = tar.next()
            if first is None or not first.name.endswith(".json"):
                return None
            about = files_head[first.offset_data : first.offset_data + first.size]
            return set(json.loads(about)["columns"])
    except (tarfile.TarError, ValueError, KeyError, TypeError):
        return None


def find_rows(data: bytes, clips: Sequence[Mapping[str, Any]], member: Member) -> Ranges | None:
    """Return where a tar holds exactly these rows; None if it does not."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            places = {info.name: (info.offset_data, info.size) for info in tar}
    except tarfile.TarError:
        return None
    suffix, head, rows = member
    found = []
    for clip, row in zip(clips, rows, strict=True):
        place = places.get(clip_key(clip["clip_id"]) + suffix)
        if (place is None) != (row is None):
            return None
        if place is None or row is None:
            found.append((-1, 0))
            continue
        start, size = place[0] + len(head), place[1] - len(head)
        if data[place[0] : place[0] + place[1]] != head + bytes(row):
            return None
        found.append((start, size))
    return tuple(found)


def clip_key(clip_id: str) -> str:
    """Return a clip id as the key of its members: percent-encoded, dots too."""
    return re.sub(r"[.~]", lambda m: f"%{ord(m[0]):02X}", quote(clip_id, safe=""))


def _append(parts: list[Buffer], offset: int, name: str, payload: Sequence[Buffer]) -> int:
    """Append a member and return the offset after it."""
    size = sum(memoryview(part).nbytes for part in payload)
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    header = info.tobuf(tarfile.PAX_FORMAT)  # plain ustar, unless the name is too long
    parts += [header, *payload, bytes(_padded(size) - size)]
    return offset + len(header) + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
