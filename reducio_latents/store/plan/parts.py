"""A plan's parts as files: one for the first run, one more each time that videos were added."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from reducio_latents.core.config import from_mapping
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.files.parquet import read_parquet
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import CLIP_SCHEMA, VIDEO_SCHEMA

FOLDER = "plan"
FORMAT_VERSION = 1
METADATA_KEY = b"reducio_latents.plan"
CHECKSUM_KEY = b"reducio_latents.plan.sha256"
FOOTER_BYTES = 1 << 16
"""Read at once from the end of a part: enough for the metadata of a million clips."""
ROW_GROUP = 1 << 16
DAMAGED = "Restore it from a copy, or make the store anew"


class ShardRange(NamedTuple):
    """The shards of one bucket in one part: numbered from `first`, full but for the last."""

    first: int
    rows: int


@dataclass(frozen=True)
class PlanPart:
    """What one run adds to a plan, in memory."""

    number: int
    spec: PlanSpec
    videos: pa.Table
    """One row a video, sorted by name: `tables.VIDEO_SCHEMA`."""
    clips: pa.Table
    """One row a clip: `tables.CLIP_SCHEMA` and what the corpus carried. The planned ones first, by
    bucket, shard and row, so that a shard is a slice; then the duplicates, by video."""
    shards: Mapping[str, ShardRange]
    """By bucket, in the order of `clips`."""
    changed: tuple[str, ...] = field(default=(), compare=False)
    """Videos of earlier parts whose bytes are not what they were; their clips are left as is."""
    gone: tuple[str, ...] = field(default=(), compare=False)
    """Videos of earlier parts that the corpus does not list any more."""


class StoredPart:
    """A part in a store. Its footer is read at once, a table when it is first asked for."""

    def __init__(self, files: Files, number: int) -> None:
        self.number = number
        self._files = files
        self.spec, self.shards = _read_about(files, part_path("part", number))

    @cached_property
    def videos(self) -> pa.Table:
        return _read_table(self._files, "videos", self.number, VIDEO_SCHEMA)

    @cached_property
    def clips(self) -> pa.Table:
        return _read_table(self._files, "part", self.number, CLIP_SCHEMA)


Part = PlanPart | StoredPart


def part_path(kind: str, number: int) -> str:
    """Return where a part's `part` (its clips), `videos` or `sha256` lies in the store."""
    return f"{FOLDER}/{kind}-{number:05d}.{'txt' if kind == 'sha256' else 'parquet'}"


def write_part(files: Files, number: int, part: PlanPart) -> None:
    """Write a part: the videos, checksums of both files, and last the clips, which commit it.

    The same part again is no change, so that two processes may plan the same corpus at once. Raise
    StoreError if another one has the number, or the one before it is missing.
    """
    if number != part.number:
        raise StoreError(f"part {part.number} of the plan cannot be stored as part {number}.")
    path = part_path("part", number)
    if number and files.size(part_path("part", number - 1)) is None:
        raise StoreError(f"{files.url} has no part {number - 1} of the plan, only this {number}.")
    clips, videos = _to_parquet(part.clips, part), _to_parquet(part.videos, part)
    if files.size(path) is not None:
        if files.read(path) == clips and files.read(part_path("videos", number)) == videos:
            return
        raise StoreError(
            f"{files.url}/{path} exists with other clips: another run has planned meanwhile. "
            "Run the same command again."
        )
    sums = {part_path("part", number): clips, part_path("videos", number): videos}
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sums.items()]
    files.write(part_path("videos", number), videos)
    files.write(part_path("sha256", number), "".join(lines).encode())
    files.write(path, clips)


def _to_parquet(table: pa.Table, part: PlanPart) -> bytes:
    """Serialise with nothing in it that depends on when or where."""
    about = {
        "format_version": FORMAT_VERSION,
        "part": part.number,
        "spec": asdict(part.spec),
        "shards": {bucket: list(shards) for bucket, shards in part.shards.items()},
    }
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: text, CHECKSUM_KEY: checksum}),
        sink,
        row_group_size=ROW_GROUP,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_parts(files: Files) -> list[StoredPart]:
    """Return the parts of the plan below `files`; raise StoreError if one is missing or damaged."""
    parts = [StoredPart(files, number) for number in _numbers(files)]
    for part in parts[1:]:
        if part.spec != parts[0].spec:
            where = f"{files.url}/{part_path('part', part.number)}"
            raise StoreError(f"{where} has other settings than part 0. {DAMAGED}.")
    return parts


def _numbers(files: Files) -> list[int]:
    pattern = re.compile(rf"{FOLDER}/part-(\d{{5,}})\.parquet")
    found = [match for path in files.list(FOLDER) if (match := pattern.fullmatch(path))]
    numbers = sorted(int(match[1]) for match in found)
    for expected, number in enumerate(numbers):
        if number != expected:
            missing = part_path("part", expected)
            raise StoreError(f"{files.url}/{missing} is missing. {DAMAGED}.")
    return numbers


def verify_parts(files: Files) -> list[tuple[str, str]]:
    """Prove every byte of the plan's files; return (path, what is wrong) of each that is damaged.

    Raise StoreError if a whole part is missing.
    """
    damage = []
    for number in _numbers(files):
        for name in (part_path("videos", number), part_path("part", number)):
            try:
                _read_checked(files, name, number)
            except StoreError as err:
                damage.append((name, str(err)))
    return damage


def _read_checked(files: Files, path: str, number: int) -> bytes:
    """Return a whole file, its checksum proven."""
    where = f"{files.url}/{path}"
    try:
        data = files.read(path)
        lines = files.read(part_path("sha256", number)).decode().splitlines()
    except FileNotFoundError as err:
        missing = path if files.size(path) is None else part_path("sha256", number)
        raise StoreError(f"{files.url}/{missing} is missing. {DAMAGED}.") from err
    except UnicodeDecodeError as err:
        raise StoreError(f"{files.url}/{part_path('sha256', number)}: {err}. {DAMAGED}.") from err
    if f"{hashlib.sha256(data).hexdigest()}  {path}" not in lines:
        raise StoreError(f"{where} does not match its checksum. {DAMAGED}.")
    return data


def _read_table(files: Files, kind: str, number: int, schema: pa.Schema) -> pa.Table:
    path = part_path(kind, number)
    data = _read_checked(files, path, number)
    try:
        table = read_parquet(data)
        same = table.select(schema.names).schema.equals(schema)
    except (OSError, KeyError, pa.ArrowException) as err:
        raise StoreError(f"{files.url}/{path} is no part of a plan ({err}). {DAMAGED}.") from err
    if not same:
        raise StoreError(f"{files.url}/{path} has columns of other types. {DAMAGED}.")
    return table


def _read_about(files: Files, path: str) -> tuple[PlanSpec, Mapping[str, ShardRange]]:
    """Read what a part says of itself, and none of its rows."""
    where = f"{files.url}/{path}"
    try:
        metadata = _read_footer(files, path).metadata or {}
        text = metadata[METADATA_KEY]
        if hashlib.sha256(text).hexdigest().encode() != metadata[CHECKSUM_KEY]:
            raise StoreError(f"{where} does not match its checksum. {DAMAGED}.")
        raw = json.loads(text)
        if raw["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{where} has format {raw['format_version']}; this version reads "
                f"{FORMAT_VERSION}. Install the version that wrote it, or make the store anew."
            )
        spec = from_mapping(PlanSpec, raw["spec"], where=where)
        return spec, {bucket: ShardRange(*found) for bucket, found in raw["shards"].items()}
    except StoreError:
        raise
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as err:
        raise StoreError(f"{where} is no part of a plan ({err}). {DAMAGED}.") from err


def _read_footer(files: Files, path: str) -> pq.FileMetaData:
    """Read the end of a Parquet file: metadata, its length (4 bytes), PAR1."""
    size = files.size(path) or 0
    tail = files.read_range(path, max(0, size - FOOTER_BYTES), min(size, FOOTER_BYTES))
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < needed <= size:
        tail = files.read_range(path, size - needed, needed)
    return pq.read_metadata(pa.BufferReader(tail))
