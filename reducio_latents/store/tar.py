"""The WebDataset container, byte by byte: one tar for the columns of a shard that came together.

    16x256x256/shard-000000.tar           members by clip, in the order of rows:
      <clip>.json                         clip id, bucket, video, start_s, columns of this tar, and
                                          of those of latents what a row holds and `final`, the rule
                                          by which it becomes what a model trains on
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
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from reducio_latents.core.parsing import compact_json, parse_json
from reducio_latents.files import Buffer
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.limits import column_folder
from reducio_latents.store.row_kinds import BytesRows, FinalLatentsRows, MomentsRows

BLOCK = 512
END_BYTES = 2 * BLOCK
HEAD_BYTES = 32 * BLOCK
"""Enough for the first member of a tar, whose JSON names the columns."""

Places = tuple[tuple[int, int], ...]


class Member(NamedTuple):
    """How the rows of one column become members."""

    suffix: str
    """Their name after the clip's key."""
    head: bytes
    """What stands in each before the row's payload."""
    rows: Sequence[Buffer | None]
    latents: Mapping[str, Any] | None = None
    """What the JSON of each clip says of the column, if it is one of latents."""


def tar_path(key: ShardKey, column: str | None = None) -> str:
    """Return the path of a shard's tar, or of the tar of a column that came later."""
    return f"{key.bucket}/shard-{key.shard:06d}{f'.{column_folder(column)}' if column else ''}.tar"


def member_of(kind: BytesRows, name: str, bucket: str, rows: Sequence[Buffer | None]) -> Member:
    latents: dict[str, Any] | None = None
    if isinstance(kind, MomentsRows):
        latents = {"holds": ["mean", "log-variance"], "axis": 0, "final": kind.column.final}
    elif isinstance(kind, FinalLatentsRows):
        latents = {"holds": ["final latents"], "axis": 0, "final": None}
    suffix = f".{column_folder(name)}.{kind.file_extension}"
    return Member(suffix, kind.file_head(bucket), rows, latents)


def pack_tar(
    clips: Sequence[Mapping[str, Any]], bucket: str, members: Mapping[str, Member]
) -> tuple[Buffer, dict[str, Places]]:
    """Return the bytes of a tar, and where each column's payloads lie in it.

    `clips` holds what is known of each row's clip, its `clip_id` at least.
    """
    from webdataset import TarWriter

    names = sorted(members)
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    latents = {name: about for name in names if (about := members[name].latents)}
    shared = {"bucket": bucket, "columns": names} | ({"latents": latents} if latents else {})
    file = io.BytesIO()
    # Its names begin with no `_` that would hide them; times and owners are none, for equal bytes.
    tar = TarWriter(
        file,
        user="",
        group="",
        mode=0o644,
        encoder=False,
        keep_meta=True,
        mtime=0,
        format="PAX_FORMAT",
    )
    for row, clip in enumerate(clips):
        present = [name for name in names if members[name].rows[row] is not None]
        key = clip_key(clip["clip_id"])
        if present:
            tar.write({"__key__": key, "json": compact_json({**clip, **shared})})
        for name in names:
            suffix, head, rows, _ = members[name]
            payload = rows[row]
            if payload is None:
                ranges[name].append((-1, 0))
                continue
            data = b"".join([head, payload])
            tar.write({"__key__": key, suffix.removeprefix("."): data})
            start = tar.tarstream.offset + -len(data) // BLOCK * BLOCK
            ranges[name].append((start + len(head), len(data) - len(head)))
    end = tar.tarstream.offset + END_BYTES
    tar.close()
    file.truncate(end)  # tar's own padding to a tape's record is left out
    return file.getbuffer(), {name: tuple(found) for name, found in ranges.items()}


def columns_of(files_head: bytes) -> set[str] | None:
    """Return the columns that a tar holds, told by its first bytes; None if they do not tell."""
    try:
        with tarfile.open(fileobj=io.BytesIO(files_head), mode="r:") as tar:
            first = tar.next()
            if first is None or not first.name.endswith(".json"):
                return None
            about = files_head[first.offset_data : first.offset_data + first.size]
            return set(parse_json(about)["columns"])
    except (tarfile.TarError, ValueError, KeyError, TypeError):
        return None


def find_rows(data: bytes, clips: Sequence[Mapping[str, Any]], member: Member) -> Places | None:
    """Return where a tar holds exactly these rows; None if it does not."""
    places = member_places(data)
    if places is None:
        return None
    found = []
    for clip, row in zip(clips, member.rows, strict=True):
        start, size = row_place(places, clip, member)
        whole = data[start - len(member.head) : start + size] if start >= 0 else None
        if whole != (None if row is None else member.head + bytes(row)):
            return None
        found.append((start, size))
    return tuple(found)


def member_places(data: bytes) -> dict[str, tuple[int, int]] | None:
    """Return where each member of a tar lies; None if it is no whole tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return {info.name: (info.offset_data, info.size) for info in tar}
    except (tarfile.TarError, ValueError, EOFError, OverflowError):
        return None


def row_place(
    places: Mapping[str, tuple[int, int]], clip: Mapping[str, Any], member: Member
) -> tuple[int, int]:
    """Return where a clip's payload lies among the members of a tar; (-1, 0) if it has none."""
    start, size = places.get(clip_key(clip["clip_id"]) + member.suffix, (-1, 0))
    return (-1, 0) if start < 0 else (start + len(member.head), size - len(member.head))


def clip_key(clip_id: str) -> str:
    """Return a clip id as the key of its members: percent-encoded, dots too."""
    return re.sub(r"[.~]", lambda m: f"%{ord(m[0]):02X}", quote(clip_id, safe=""))
