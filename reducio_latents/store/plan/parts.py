"""A plan's parts as files: one for the first run, one more each time that videos were added."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducio_latents.core.config import convert
from reducio_latents.core.parsing import parse_json
from reducio_latents.errors import StoreError
from reducio_latents.files import Files
from reducio_latents.store.limits import MAX_SHARDS, must_hold, require_count
from reducio_latents.store.plan.bounded import BoundedParquet, require_few_rows
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.tables import CLIP_SCHEMA, REMOVED, VIDEO_SCHEMA

PLAN_FOLDER = "plan"
PENDING = f"{PLAN_FOLDER}/pending"
"""Folder of parts that are being stored: their videos, named by the sums of both tables."""
Kind = Literal["part", "videos"]
"""A part's tables: of its clips, of its videos."""
KINDS: tuple[Kind, ...] = ("videos", "part")
PART_KINDS = (*KINDS, "sha256")
PLACE = ("bucket", "shard", "row", "status")
"""Columns that say where a clip stands."""
PLAN_FORMAT_VERSION = 1
METADATA_KEY = b"reducio_latents.plan"
CHECKSUM_KEY = b"reducio_latents.plan.sha256"
FOOTER_BYTES = 1 << 16
"""Read at once from the end of a part: enough for the metadata of a million clips."""
ROW_GROUP = 1 << 16
COMMENT, PROOF = "# ", "#sum "
DAMAGED = "Restore it from a copy, or make the store anew"


class PlanTakenError(StoreError):
    """Another run has stored a part of this number; what is still missing can be planned again."""


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

    def packed(self) -> StoredPart:
        """Return the part as it is stored, a tenth as large."""
        data = {"part": _to_parquet(self.clips, self), "videos": _to_parquet(self.videos, self)}
        about = _About(self.spec, self.shards, self.clips.num_rows)
        return StoredPart(self.number, about, lambda kind: data[kind], "a plan in the making")


class _About(NamedTuple):
    """What a part says of itself in its footer."""

    spec: PlanSpec
    shards: Mapping[str, ShardRange]
    clips: int


class StoredPart:
    """A part as it is stored. Its bytes are read and proven when they are first asked for, and
    kept; its tables are made of them a row group at a time."""

    def __init__(
        self, number: int, about: _About, load: Callable[[Kind], bytes], where: str
    ) -> None:
        self.number = number
        self.spec, self.shards, self.clip_count = about
        self.load = load
        self._where = where
        self._open: dict[Kind, BoundedParquet] = {}

    @classmethod
    def of(cls, files: Files, number: int) -> StoredPart:
        def load(kind: Kind) -> bytes:
            return _read_checked(files, part_path(kind, number), number)

        return cls(number, _read_about(files, part_path("part", number)), load, files.url)

    @property
    def videos(self) -> pa.Table:
        return self._whole("videos")

    @property
    def clips(self) -> pa.Table:
        return self._whole("part")

    @property
    def clip_schema(self) -> pa.Schema:
        return self._parquet("part").schema

    def _whole(self, kind: Kind) -> pa.Table:
        tables = list(self.tables(kind))
        return pa.concat_tables(tables) if tables else self._parquet(kind).schema.empty_table()

    def group(self, kind: Kind, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a row group of a table, or what it has of `columns`."""
        file = self._parquet(kind)
        if columns is not None:
            columns = [name for name in columns if name in file.schema.names]
        wanted = columns
        if columns is not None and kind == "part":
            wanted = list(dict.fromkeys([*columns, *PLACE]))
        with self._readable(kind):
            table = file.group(number, wanted)
            if kind == "part" and not _stand_as_planned(table, int(file.begins[number]), self):
                raise ValueError("it has clips that stand in other rows than it says")
        return table if columns is None else table.select(columns)

    def group_at(self, kind: Kind, row: int) -> tuple[int, int]:
        """Return the row group that a row is in, and the number of its first row."""
        begins = self._parquet(kind).begins
        number = int(np.searchsorted(begins, row, "right")) - 1
        return number, int(begins[number])

    def group_begin(self, number: int) -> int:
        """Return the number of the first row of a row group of clips."""
        return int(self._parquet("part").begins[number])

    def groups_with(
        self, kind: Kind, values: Sequence[str], column: str = "video"
    ) -> Iterator[int]:
        """Yield the row groups that may hold some of `values`, which are sorted, in a column."""
        return self._parquet(kind).groups_with(column, values)

    def tables(self, kind: Kind, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield a table, or columns of it, a row group at a time."""
        groups = range(len(self._parquet(kind).begins) - 1)
        return (self.group(kind, number, columns) for number in groups)

    def packed(self) -> StoredPart:
        return self

    def _parquet(self, kind: Kind) -> BoundedParquet:
        if kind not in self._open:
            with self._readable(kind):
                found = BoundedParquet(self.load(kind))
                schema = CLIP_SCHEMA if kind == "part" else VIDEO_SCHEMA
                if not pa.schema([found.schema.field(n) for n in schema.names]).equals(schema):
                    raise ValueError("it has columns of other types")
            self._open[kind] = found
        return self._open[kind]

    @contextmanager
    def _readable(self, kind: Kind) -> Iterator[None]:
        try:
            yield
        except StoreError:  # which says all of that
            raise
        except (OSError, KeyError, ValueError, MemoryError, pa.ArrowException) as err:
            where = f"{self._where}/{part_path(kind, self.number)}"
            raise StoreError(f"{where} is no part of a plan ({err}). {DAMAGED}.") from err


AnyPart = PlanPart | StoredPart


class ShardSpan(NamedTuple):
    """A shard, and where its rows are in the table of its part."""

    bucket: str
    shard: int
    begin: int
    rows: int


def shard_spans(part: StoredPart) -> Iterator[ShardSpan]:
    """Yield every shard of a part, in the order of its table."""
    for bucket, (first, rows) in part.shards.items():
        for i in range(-(-rows // part.spec.shard_rows)):
            yield span_of(part, bucket, first + i)


def span_of(part: StoredPart, bucket: str, shard: int) -> ShardSpan:
    """Return where a shard of a part is; of a shard that it lacks, no row."""
    first, rows = part.shards.get(bucket, ShardRange(0, 0))
    names = list(part.shards)
    before = names[: names.index(bucket)] if bucket in part.shards else []
    skipped = (shard - first) * part.spec.shard_rows
    count = min(part.spec.shard_rows, rows - skipped) if 0 <= skipped < rows else 0
    return ShardSpan(bucket, shard, sum(part.shards[n].rows for n in before) + skipped, count)


def _stand_as_planned(clips: pa.Table, begin: int, part: StoredPart) -> bool:
    """Whether clips that are in the table of a part from row `begin` on say that they are there."""
    size = part.spec.shard_rows
    shard, row = (clips[name].to_numpy() for name in ("shard", "row"))
    buckets, status = clips["bucket"].combine_chunks(), clips["status"].combine_chunks()
    at, good = -begin, True
    for bucket, (first, rows) in part.shards.items():
        here = slice(max(at, 0), max(min(at + rows, len(clips)), 0))
        numbers = np.arange(here.start - at, here.stop - at)
        good = good and np.array_equal(shard[here], first + numbers // size)
        good = good and np.array_equal(row[here], numbers % size)
        for column, values in ((buckets, [bucket]), (status, ["planned", REMOVED])):
            good = good and _all_in(column.slice(here.start, len(numbers)), values)
        at += rows
    good = good and _all_in(status.slice(max(at, 0)), ["duplicate", REMOVED])
    return bool(good and (shard >= 0).all() and (row >= 0).all() and (row < size).all())


def _all_in(column: pa.Array, values: list[str]) -> bool:
    return pc.all(pc.is_in(column, pa.array(values, pa.string()))).as_py() is not False


def part_path(kind: str, number: int) -> str:
    """Return where a part's `part` (its clips), `videos` or `sha256` lies in the store."""
    return f"{PLAN_FOLDER}/{kind}-{number:05d}.{'txt' if kind == 'sha256' else 'parquet'}"


def write_part(files: Files, number: int, part: AnyPart) -> None:
    """Write a part: of its three files the clips commit it, and are created once.

    The videos lie in `PENDING` by then, so that whoever comes by can complete the part if its
    writer dies. The same part again is no change: two processes may plan the same corpus at once.
    Raise PlanTakenError if another one has the number, StoreError if the one before it is missing.
    """
    if number != part.number:
        raise StoreError(f"part {part.number} of the plan cannot be stored as part {number}.")
    path = part_path("part", number)
    if number and files.size(part_path("part", number - 1)) is None:
        raise StoreError(f"{files.url} has no part {number - 1} of the plan, only this {number}.")
    stored = part.packed()
    clips, videos = stored.load("part"), stored.load("videos")
    files.write(_pending_path(number, clips, videos), videos)
    files.create(path, clips)
    complete_parts(files)
    if files.read(part_path("sha256", number)) != _sums(number, clips, videos):
        raise PlanTakenError(
            f"{files.url}/{path} exists with other clips: another run has planned meanwhile. "
            "Run the same command again."
        )


def complete_parts(files: Files) -> None:
    """Give each part whose clips are there its other two files, and forget those that lost.

    Anybody may do this at any time, and several at once: what a part consists of is settled by its
    clips, then by its checksums, both of which are created once.
    """
    for path, number in _pending(files):
        try:
            clips, videos = files.read(part_path("part", number)), files.read(path)
        except FileNotFoundError:
            continue  # it is not decided yet, or somebody else has completed it
        if path == _pending_path(number, clips, videos):
            sums, where = _sums(number, clips, videos), part_path("sha256", number)
            if not files.create(where, sums):
                there = files.read(where)
                if _sum(clips) not in there.decode(errors="replace"):  # of a part that never was
                    files.swap(where, there, sums)
            if files.read(where) == sums:
                files.write(part_path("videos", number), videos)
        files.delete(path)


def edit_part(
    files: Files, number: int, edit: Mapping[Kind, Callable[[pa.Table], pa.Table]]
) -> None:
    """Store what `edit` makes of the pieces of a part's tables, every row keeping its place.

    Nobody else may plan meanwhile. Killed in between, each table is the old or the new one, proven
    as before, and the same edit again ends it. What the first checksums were is kept as a comment.
    """
    part, where = StoredPart.of(files, number), part_path("sha256", number)
    new = {}
    for kind in reversed(KINDS):
        before = list(part.tables(kind))
        after = [edit[kind](table) for table in before] if kind in edit else before
        same = all(a.equals(b) for a, b in zip(after, before, strict=True))
        new[kind] = part.load(kind) if same else _to_parquet(pa.concat_tables(after), part)
    text = _read_sums(files, number)
    first, sums = _first_sums(text), _sums(number, new["part"], new["videos"]).decode()
    head = f"{first}{PROOF}{_sum(first.encode())}\n"
    if text in (sums, head + sums):
        return
    files.write(where, (head + _without_comments(text) + sums).encode())
    for kind, data in new.items():
        files.write(part_path(kind, number), data)
    files.write(where, (head + sums).encode())


def plan_sums(files: Files) -> list[str]:
    """Return the checksums of all parts: others, once any was edited."""
    return [_read_sums(files, number) for number in _numbers(files)]


def first_sums(files: Files) -> bytes:
    """Return the checksums that the plan's first part was made with, whatever was edited since: no
    two stores share them."""
    first = _first_sums(_read_sums(files, 0))
    return first.replace(COMMENT, "").encode()


def _first_sums(text: str) -> str:
    """Return the first checksums of a part as comments, which sha256sum passes over."""
    lines = text.splitlines(keepends=True)
    comments = [line for line in lines if line.startswith(COMMENT)]
    return "".join(comments or [COMMENT + line for line in lines])


def _without_comments(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def _pending(files: Files) -> list[tuple[str, int]]:
    pattern = re.compile(rf"{PENDING}/(\d{{5,}})-[0-9a-f-]+\.parquet")
    found = [match for path in files.list(PENDING) if (match := pattern.fullmatch(path))]
    return [(match[0], int(match[1])) for match in found]


def _pending_path(number: int, clips: bytes, videos: bytes) -> str:
    return f"{PENDING}/{number:05d}-{_sum(clips)}-{_sum(videos)}.parquet"


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sums(number: int, clips: bytes, videos: bytes) -> bytes:
    files = {part_path("part", number): clips, part_path("videos", number): videos}
    return "".join(f"{_sum(data)}  {name}\n" for name, data in files.items()).encode()


def _to_parquet(table: pa.Table, part: AnyPart) -> bytes:
    """Serialise with nothing in it that depends on when or where."""
    about = {
        "format_version": PLAN_FORMAT_VERSION,
        "part": part.number,
        "spec": {k: value for k, value in asdict(part.spec).items() if k != "shots" or value},
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
    parts = [StoredPart.of(files, number) for number in _numbers(files)]
    ends: dict[str, int] = {}
    for part in parts:
        where = f"{files.url}/{part_path('part', part.number)}"
        if part.spec != parts[0].spec:
            raise StoreError(f"{where} has other settings than part 0. {DAMAGED}.")
        for bucket, (first, rows) in part.shards.items():
            if first < ends.get(bucket, 0):
                raise StoreError(f"{where} has shards that are another part's. {DAMAGED}.")
            ends[bucket] = first - (-rows // part.spec.shard_rows)
    return parts


def _numbers(files: Files) -> list[int]:
    pattern = re.compile(rf"{PLAN_FOLDER}/part-(\d{{5,9}})\.parquet", re.ASCII)
    found = [match for path in files.list(PLAN_FOLDER) if (match := pattern.fullmatch(path))]
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
        for kind in KINDS:
            name = part_path(kind, number)
            try:
                _read_checked(files, name, number)
            except StoreError as err:
                damage.append((name, str(err)))
        where = part_path("sha256", number)
        is_there = not damage and files.size(where) is not None
        if is_there and (why := _wrong_comments(_read_sums(files, number))):
            damage.append((where, f"{files.url}/{where}: {why}. {DAMAGED}."))
    return damage


def _wrong_comments(text: str) -> str:
    """Return what is wrong with checksums that are right where files are proven by them."""
    line = r"[0-9a-f]{64}  plan/[a-z0-9.-]+\n"
    if not re.fullmatch(rf"({COMMENT}{line})*({PROOF}.*\n)?({line})*", text):
        return "it has lines that are no checksums"
    proof = next((line for line in text.split("\n") if line.startswith(PROOF)), "")
    wanted = PROOF + _sum(_first_sums(text).encode())
    return "its comments do not match their checksum" if proof not in ("", wanted) else ""


def _read_sums(files: Files, number: int) -> str:
    where = part_path("sha256", number)
    try:
        return files.read(where).decode()
    except UnicodeDecodeError as err:
        raise StoreError(f"{files.url}/{where}: {err}. {DAMAGED}.") from err


def _read_checked(files: Files, path: str, number: int) -> bytes:
    """Return a whole file, its checksum proven."""
    where = f"{files.url}/{path}"
    try:
        data = files.read(path)
        lines = _read_sums(files, number).splitlines()
    except FileNotFoundError as err:
        for pending, of in _pending(files):  # whose writer is at work, or was killed
            clips, videos = files.read(part_path("part", number)), files.read(pending)
            if of == number and pending == _pending_path(number, clips, videos):
                return clips if path == part_path("part", number) else videos
        missing = path if files.size(path) is None else part_path("sha256", number)
        raise StoreError(f"{files.url}/{missing} is missing. {DAMAGED}.") from err
    if f"{_sum(data)}  {path}" not in lines:
        raise StoreError(f"{where} does not match its checksum. {DAMAGED}.")
    return data


def _read_about(files: Files, path: str) -> _About:
    """Read what a part says of itself, and none of its rows."""
    where = f"{files.url}/{path}"
    try:
        footer = _read_footer(files, path)
        metadata = footer.metadata or {}
        text = metadata[METADATA_KEY]
        if hashlib.sha256(text).hexdigest().encode() != metadata[CHECKSUM_KEY]:
            raise StoreError(f"{where} does not match its checksum. {DAMAGED}.")
        raw = parse_json(text)
        if raw["format_version"] != PLAN_FORMAT_VERSION:
            raise StoreError(
                f"{where} has format {raw['format_version']}; this version reads "
                f"{PLAN_FORMAT_VERSION}. Install the version that wrote it, or make the store anew."
            )
        spec: PlanSpec = convert(raw["spec"], PlanSpec, where=where)
        shards = convert(raw["shards"], dict[str, tuple[int, int]], where="shards")
        rows = 0
        for bucket, (first, count) in shards.items():
            require_count(first, MAX_SHARDS, "the first shard")
            require_count(count, footer.num_rows, "the rows of a bucket")
            must_hold(bucket in {b.name for b in spec.buckets}, "shards are of an unknown bucket.")
            rows += count
        require_count(rows, footer.num_rows, "the rows of all buckets")
        require_few_rows(rows, files.size(path) or 0)
        ranges = {bucket: ShardRange(*found) for bucket, found in shards.items()}
        return _About(spec, ranges, footer.num_rows)
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
