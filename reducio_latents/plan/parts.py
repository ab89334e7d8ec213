"""A plan's parts as files: one for the first run, one more each time that videos were added."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from reducio_latents.config import from_mapping
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.plan.spec import PlanSpec
from reducio_latents.plan.tables import CLIP_SCHEMA, VIDEO_SCHEMA

FOLDER = "plan"
FORMAT_VERSION = 1
METADATA_KEY = b"reducio_latents.plan"
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
    """A part in a store; a table is read when it is first asked for."""

    def __init__(self, files: Files, number: int) -> None:
        self.number = number
        self._files = files
        about = _about(self._clip_file.schema_arrow.metadata, self._where("part"))
        self.spec: PlanSpec = about["spec"]
        self.shards: Mapping[str, ShardRange] = about["shards"]

    @cached_property
    def videos(self) -> pa.Table:
        file = _open(self._files, part_path("videos", self.number))
        return _read(file, VIDEO_SCHEMA, self._where("videos"))

    @cached_property
    def clips(self) -> pa.Table:
        return _read(self._clip_file, CLIP_SCHEMA, self._where("part"))

    @cached_property
    def _clip_file(self) -> pq.ParquetFile:
        return _open(self._files, part_path("part", self.number))

    def _where(self, kind: str) -> str:
        return f"{self._files.url}/{part_path(kind, self.number)}"


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
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: text}),
        sink,
        row_group_size=ROW_GROUP,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        write_page_checksum=True,
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
        path = part_path("sha256", number)
        try:
            lines = files.read(path).decode().splitlines()
            sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        except (FileNotFoundError, UnicodeDecodeError):
            sums = {}
        for name in (part_path("videos", number), part_path("part", number)):
            if name not in sums:
                damage.append((path, f"has no checksum of {name}"))
            elif files.size(name) is None:
                damage.append((name, "is missing"))
            elif hashlib.sha256(files.read(name)).hexdigest() != sums[name]:
                damage.append((name, f"does not match its checksum in {path}"))
    return damage


def _open(files: Files, path: str) -> pq.ParquetFile:
    where = f"{files.url}/{path}"
    try:
        local = files.local_path(path)
        source = pa.memory_map(str(local)) if local else pa.BufferReader(files.read(path))
        return pq.ParquetFile(source, page_checksum_verification=True)
    except FileNotFoundError as err:
        raise StoreError(f"{where} is missing. {DAMAGED}.") from err
    except (OSError, pa.ArrowException) as err:
        raise StoreError(f"{where} is damaged ({err}). {DAMAGED}.") from err


def _read(file: pq.ParquetFile, schema: pa.Schema, where: str) -> pa.Table:
    try:
        table = file.read()
    except (OSError, pa.ArrowException) as err:
        raise StoreError(f"{where} is damaged ({err}). {DAMAGED}.") from err
    for wanted in schema:
        if table.schema.field(wanted.name).type != wanted.type:
            raise StoreError(f"{where}: column {wanted.name} is not {wanted.type}. {DAMAGED}.")
    return table


def _about(metadata: Mapping[bytes, bytes] | None, where: str) -> dict[str, Any]:
    """Read what a part says of itself."""
    try:
        raw = json.loads((metadata or {})[METADATA_KEY])
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{where} has format {version}; this version reads {FORMAT_VERSION}. "
                "Install the version that wrote it, or make the store anew."
            )
        return {
            "spec": from_mapping(PlanSpec, raw["spec"], where=where),
            "shards": {bucket: ShardRange(*map(int, r)) for bucket, r in raw["shards"].items()},
        }
    except (KeyError, TypeError, ValueError) as err:
        if isinstance(err, StoreError):
            raise
        raise StoreError(f"{where} is not a part of a plan ({err!r}). {DAMAGED}.") from err
