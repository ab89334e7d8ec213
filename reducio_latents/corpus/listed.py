"""What tables listed before: of what is as it was, no row is read again.

A table is compared block by block, a block being some MiB of rows or some row groups of Parquet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import SEEK_END
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reducio_latents.core.parsing import compact_json, parse_json
from reducio_latents.corpus.cells import Column
from reducio_latents.corpus.entry import CorpusVideo, extension
from reducio_latents.corpus.readers import BEGINNING, Place, group_ends
from reducio_latents.corpus.table import TableColumns, TableRows, read_tables
from reducio_latents.corpus.trees import Tree
from reducio_latents.files import Files
from reducio_latents.files.parquet import read_parquet
from reducio_latents.files.source import VideoSource, is_url, join_url, public_url
from reducio_latents.store.plan.parts import plan_sums
from reducio_latents.store.writer import LISTED
from reducio_latents.video.identity import HASHED_BYTES, stamp_of

KEPT_FROM = 1 << 26
"""Bytes of tables from which on it is kept what they listed. Fewer are soon read."""
_SCHEMA = pa.schema([("video", pa.string()), ("block", pa.int32())])
_ABOUT = b"reducio_latents"


class Block(NamedTuple):
    """Rows of a table that follow those of its block before."""

    table: str
    place: Place
    """Where they end."""
    sha256: str
    at_end: bool
    """Whether nothing may follow them: a last line has no end, or it is all one JSON text."""


@dataclass(frozen=True)
class EarlierListing:
    """What tables listed. A block comes after all that were there before it was."""

    settings: str = ""
    blocks: Sequence[Block] = ()
    stamps: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, Mapping[str, pa.DataType]] = field(default_factory=dict)
    """Of the columns that are carried."""
    videos: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    first: Column = field(default_factory=lambda: np.zeros(0, np.int32))
    """Of each video the first block that names it."""

    def same(self, tree: Tree, tables: Sequence[str]) -> int:
        """Return how many blocks, from the first, are as they were."""
        lost, of = len(self.blocks), dict[str, list[tuple[int, Block]]]()
        for number, block in enumerate(self.blocks):
            of.setdefault(block.table, []).append((number, block))
        for name, blocks in of.items():
            if name not in tables:
                lost = min(lost, blocks[0][0])
            elif not (stamp := _stamp(tree, name)) or stamp != self.stamps.get(name):
                now = _sums(tree, name, BEGINNING, [block for _, block in blocks])
                others = (number for number, block in blocks if next(now, None) != block.sha256)
                lost = min(lost, next(others, lost))
        return lost

    def first_of(self, names: Iterable[str]) -> int:
        """Return the first block that names one of these videos."""
        at = pc.index_in(self.videos, pa.array(list(names), pa.string()))
        return int(self.first[np.asarray(pc.is_valid(at))].min(initial=len(self.blocks)))

    def kept(self, blocks: int) -> EarlierListing:
        """Return it of the first blocks, and of the videos that no other names first."""
        here = self.first < blocks
        return replace(
            self,
            blocks=self.blocks[:blocks],
            videos=self.videos.filter(pa.array(here)),
            first=self.first[here],
        )


class Listing(NamedTuple):
    """What a listing lists now."""

    videos: list[CorpusVideo]
    """In order of name."""
    unread: pa.Array = pa.array([], pa.string())
    """The names of those whose rows are as they were, and were not read."""
    record: Callable[[], EarlierListing | None] = lambda: None
    """Makes what the next listing may compare with; None if it would not help, or not be sure."""


def list_tables(
    tree: Tree,
    names: Sequence[str],
    root: str | None,
    columns: TableColumns,
    settings: str,
    before: EarlierListing,
) -> tuple[Iterator[CorpusVideo], Listing]:
    """Return the videos of tables, and a listing without them.

    Of each video that a row names all rows are read: from the block on that names it first. Raise
    CorpusError as `read_tables` and `TableRows.listed` do.
    """
    same = before.same(tree, names) if before.settings == settings else 0
    stamps = {name: _stamp(tree, name) for name in names}
    while True:
        kept = before.kept(same)
        begins = {block.table: None if block.at_end else block.place for block in kept.blocks}
        rows = read_tables(tree, names, root, columns, begins)
        again = min(same, kept.first_of(rows.names))
        if again == same:
            break
        same = again if same == len(before.blocks) else 0
    if same:
        rows.types = {kind: {**types} for kind, types in before.types.items()}

    def record() -> EarlierListing | None:
        sizes = {name: _size(tree, name) for name in names if not is_url(tree.root)}
        private = any(public_url(s.url) != s.url for s in rows.sources if is_url(s.url))
        if sum(sizes.values()) < KEPT_FROM or private or not all(stamps.values()):
            return None
        blocks, first = [*kept.blocks], [0]
        for name in names:
            if (begin := begins.get(name, BEGINNING)) is None:
                continue
            found = list(_ends(rows, name, begin, sizes[name]))
            ends = [Block(name, place, "", at_end) for place, at_end, _ in found]
            sums = list(_sums(tree, name, begin, ends))
            if len(sums) < len(ends):
                return None
            blocks += [end._replace(sha256=one) for end, one in zip(ends, sums, strict=True)]
            first += [count for _, _, count in found]
        if stamps != {name: _stamp(tree, name) for name in names}:
            return None
        number = np.repeat(np.arange(len(kept.blocks), len(blocks)), np.diff(first))
        return EarlierListing(
            settings,
            blocks,
            stamps,
            rows.types,
            pa.concat_arrays([kept.videos, pa.array(list(rows.names), pa.string())]),
            np.concatenate([kept.first, number.astype(np.int32)]),
        )

    return rows.listed(), Listing([], kept.videos, record)


def _stamp(tree: Tree, name: str) -> str:
    return stamp_of(VideoSource(join_url(tree.root, name)))


def _size(tree: Tree, name: str) -> int:
    with tree.open(name) as file:
        return file.seek(0, SEEK_END)


def _ends(
    rows: TableRows, table: str, begin: Place, size: int
) -> Iterator[tuple[Place, bool, int]]:
    """Yield where the blocks of a table that was read end, whether nothing may follow, and how many
    videos were named up to there."""
    last = begin
    for name, place, count in rows.ends:
        if name == table and place is not None:
            yield (last := Place(min(place.end, size), place.number)), place.end > size, count
        elif name == table and last.end < size and extension(name) != ".parquet":
            yield Place(size, last.number), True, count


def _sums(tree: Tree, name: str, begin: Place, blocks: Sequence[Block]) -> Iterator[str]:
    """Yield the checksums of what is where blocks were, up to one that cannot be there."""
    with tree.open(name) as file:
        size, head, ends = file.seek(0, SEEK_END), b"", {block.place for block in blocks}
        if extension(name) == ".parquet":
            try:
                about = pq.read_metadata(file)
            except (pa.ArrowException, OSError):
                return
            head, ends = str(about.schema.to_arrow_schema()).encode(), set(group_ends(about))
        at = file.seek(begin.end)
        for block in blocks:
            if block.place not in ends or (block.at_end and block.place.end != size):
                return
            digest = hashlib.sha256(head)
            while piece := file.read(min(HASHED_BYTES, block.place.end - at)):
                digest.update(piece)
                at += len(piece)
            if at < block.place.end:
                return
            yield digest.hexdigest()


def read_listed(files: Files) -> EarlierListing:
    """Return what was listed for the plan of a store, or nothing of it: it is read anew then."""
    try:
        data = files.read(LISTED)
        table = read_parquet(data[32:])
        about = parse_json(table.schema.metadata[_ABOUT])
        plan = about.pop("plan")
        if hashlib.sha256(data[32:]).digest() != data[:32] or plan != plan_sums(files)[: len(plan)]:
            return EarlierListing()
        blocks = [
            Block(table_name, Place(int(end), int(number)), sha256, at_end)
            for table_name, (end, number), sha256, at_end in about.pop("blocks")
        ]
        types = {
            kind: {name: pa.type_for_alias(alias) for name, alias in of.items()}
            for kind, of in about.pop("types").items()
        }
        videos, first = (table[field.name].combine_chunks().cast(field.type) for field in _SCHEMA)
        at = first.to_numpy()
        if min([block.place.end for block in blocks], default=0) < 0 or not (
            ((at >= 0) & (at < len(blocks))).all()
        ):
            return EarlierListing()
        stamps = {**about.pop("stamps")}
        return EarlierListing(about.pop("settings"), blocks, stamps, types, videos, at)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pa.ArrowException):
        return EarlierListing()


def write_listed(files: Files, listed: EarlierListing | None) -> None:
    """Keep what was listed for the plan of a store; None: nothing is."""
    if listed is None:
        if files.size(LISTED) is not None:
            files.delete(LISTED)
        return
    about = {
        "settings": listed.settings,
        "stamps": listed.stamps,
        "types": {
            kind: {name: str(found) for name, found in of.items()}
            for kind, of in listed.types.items()
        },
        "blocks": listed.blocks,
        "plan": plan_sums(files),
    }
    table = pa.table([listed.videos, listed.first], _SCHEMA)
    sink = pa.BufferOutputStream()
    metadata = {_ABOUT: compact_json(about)}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    files.write(LISTED, hashlib.sha256(data).digest() + data)
