"""What the rows of a table say, kept in columns: a span takes some bytes, not an object."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reducio_latents.core.config import Scalar
from reducio_latents.core.starts import positions
from reducio_latents.corpus.cells import CAPTIONS, Column
from reducio_latents.corpus.entry import CorpusSpan, CorpusVideo
from reducio_latents.errors import CorpusError
from reducio_latents.store.plan.tables import column_of, common_type

CHUNK = 1 << 14
"""Rows that are gathered as Python values before they become columns."""
_KINDS = {"owner": "i4", "number": "i4", "start": "f8", "end": "f8", "from_s": "f8"}
ENTRY = np.dtype(list({**_KINDS, "in_frames": "?", "problem": "u1"}.items()))
"""What a row says of when: number of its video, its own number, then as in `CorpusSpan`; NO_END is
the video's, and a problem is 0 or which one, from 1. A row of a whole video is one span."""
NO_END = -1.0
ORDER = ("owner", "from_s", "start", "end")
Conflict = Callable[[int, int, int], CorpusError]
_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_NUMBER = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?$"


class Carried:
    """The values that rows carry: columns by name, null where a row has none."""

    def __init__(self, columns: dict[str, pa.ChunkedArray]) -> None:
        self.columns = columns

    def row(self, number: int) -> dict[str, Scalar]:
        values = {name: column[number].as_py() for name, column in self.columns.items()}
        return {name: value for name, value in values.items() if value is not None}


class CarriedRow(Mapping[str, Scalar]):
    """One row, read from its columns when it is asked for."""

    __slots__ = ("carried", "number")

    def __init__(self, carried: Carried, number: int) -> None:
        self.carried, self.number = carried, number

    def __getitem__(self, name: str) -> Scalar:
        return self.carried.row(self.number)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.carried.row(self.number))

    def __len__(self) -> int:
        return len(self.carried.row(self.number))

    def __repr__(self) -> str:
        return repr(self.carried.row(self.number))


def carried_of(rows: Sequence[Mapping[str, Scalar]]) -> dict[str, pa.Array]:
    """Return what rows carry as columns, null where one has no value."""
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: column_of([row.get(name) for row in rows]) for name in names}


def joined_columns(
    chunks: Sequence[tuple[int, dict[str, pa.Array]]],
    *,
    untyped: bool = False,
    known: Mapping[str, pa.DataType] | None = None,
) -> Carried:
    """Join columns of so many rows each; with `untyped`, as in CSV, texts that are numbers become
    numbers. `known` are the types of columns by what is not among these rows."""
    columns, known = {}, known or {}
    for name in sorted({*known, *(name for _, chunk in chunks for name in chunk)}):
        found = [(rows, chunk.pop(name, None)) for rows, chunk in chunks]
        typed = {known[name]} if name in known else set()
        kinds = {a.type for _, a in found if a is not None}
        kind = common_type(list(kinds if untyped and kinds else kinds | typed))
        pieces = [pa.nulls(n, kind) if a is None else a.cast(kind) for n, a in found]
        column = pa.chunked_array(pieces, kind)
        is_text = untyped and pa.types.is_string(kind)
        columns[name] = _typed(column, known.get(name)) if is_text else column
    return Carried(columns)


def _typed(column: pa.ChunkedArray, known: pa.DataType | None) -> pa.ChunkedArray:
    """Make a column of texts numbers if each is one and nothing is lost: `007` stays text."""
    for pattern, kind in ((_INTEGER, pa.int64()), (_NUMBER, pa.float64())):
        if known is not None and common_type(list({known, kind})) != kind:
            continue
        if pc.all(pc.match_substring_regex(column, pattern)).as_py():
            numbers = column.cast(kind)
            if kind == pa.int64() or pc.all(pc.is_finite(numbers)).as_py():
                return numbers
    return column


def taken(
    column: pa.Array | pa.ChunkedArray | Packed, index: Column, some: int = CHUNK
) -> pa.ChunkedArray:
    """Return column[index] in chunks: one array of texts cannot hold 2 GiB."""
    pieces = [column.take(index[i : i + some]) for i in range(0, len(index), some)]
    chunks = [chunk for piece in pieces for chunk in getattr(piece, "chunks", [piece])]
    return pa.chunked_array(chunks, column.type)


class Packed:
    """A column of captions in compressed pieces, to be read about in order."""

    def __init__(self, pieces: Iterable[pa.Array] = ()) -> None:
        self._pieces: list[pa.Buffer] = []
        self._begins = [0]
        self.piece = lru_cache(2)(self._piece)
        for texts in pieces:
            self.append(texts)

    def append(self, texts: pa.Array) -> None:
        batch = pa.record_batch([texts], ["captions"])
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=options) as stream:
            stream.write_batch(batch)
        self._pieces.append(sink.getvalue())
        self._begins.append(len(self) + len(texts))

    def _piece(self, number: int) -> pa.Array:
        return pa.ipc.open_stream(self._pieces[number]).read_next_batch().column(0)

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, number: int) -> pa.Scalar:
        at = bisect_right(self._begins, number) - 1
        return self.piece(at)[number - self._begins[at]]

    @property
    def type(self) -> pa.DataType:
        return CAPTIONS

    @property
    def chunks(self) -> Iterator[pa.Array]:
        return map(self._piece, range(len(self._pieces)))

    def take(self, index: Column) -> pa.ChunkedArray:
        begins = np.array(self._begins)
        which = np.searchsorted(begins, index, "right") - 1
        needed = np.flatnonzero(np.bincount(which, minlength=len(self._pieces)))
        lengths = np.diff(begins)[needed]
        moved = np.zeros(len(begins), np.int64)
        moved[needed] = np.cumsum(lengths) - lengths - begins[needed]
        pieces = pa.chunked_array(map(self._piece, needed.tolist()), CAPTIONS)
        return pieces.take(index + moved[which])


def entries_of(spans: Iterable[CorpusSpan], problems: dict[str, int]) -> Column:
    """Return spans as rows of `ENTRY`; their problems are added to those that are numbered."""

    def number(problem: str | None) -> int:
        return 0 if problem is None else problems.setdefault(problem, len(problems) + 1)

    ends = ((s, NO_END if s.end is None else s.end) for s in spans)
    rows = [(0, 0, s.start, end, s.from_s, s.in_frames, number(s.problem)) for s, end in ends]
    return np.array(rows, ENTRY)


class SpanTable(NamedTuple):
    """All that a table lists, what is of one video together, by start."""

    entries: Column
    problems: Sequence[str]
    captions: Packed
    carried: Carried

    def bare(self, begin: int, end: int) -> Iterator[CorpusSpan]:
        """Yield spans without captions and values, which take longer to read than all else."""
        for _, _, start, stop, from_s, in_frames, problem in self.entries[begin:end].tolist():
            yield CorpusSpan(
                start,
                None if stop == NO_END else stop,
                in_frames=in_frames,
                from_s=from_s,
                problem=self.problems[problem - 1] if problem else None,
            )


class ListedSpans(Sequence[CorpusSpan]):
    """The spans of one video."""

    __slots__ = ("begin", "end", "listed")

    def __init__(self, listed: SpanTable, begin: int, end: int) -> None:
        self.listed, self.begin, self.end = listed, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    @overload
    def __getitem__(self, index: int) -> CorpusSpan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CorpusSpan]: ...
    def __getitem__(self, index: int | slice) -> CorpusSpan | Sequence[CorpusSpan]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(self.begin, self.end)[index]
        (bare,) = self.listed.bare(number, number + 1)
        return replace(
            bare,
            captions=tuple(self.listed.captions[number].as_py()),
            extra=CarriedRow(self.listed.carried, number),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def bare(self) -> Iterator[CorpusSpan]:
        """Yield the spans without captions and values."""
        return self.listed.bare(self.begin, self.end)


def bare_spans(spans: Sequence[CorpusSpan]) -> Iterable[CorpusSpan]:
    """Return the spans where only their times are asked for."""
    return spans.bare() if isinstance(spans, ListedSpans) else spans


class Gatherer:
    """Takes what rows say, whosever they are, and sorts it by video."""

    def __init__(self) -> None:
        self.problems: dict[str, int] = {}
        self.rows = 0
        self._entries: list[Column] = []
        self._captions = Packed()
        self._carried: list[tuple[int, dict[str, pa.Array]]] = []
        self._empty: dict[str, pa.DataType] = {}

    def add(self, entries: Column, captions: pa.Array, carried: Mapping[str, pa.Array]) -> None:
        """Take rows in: of `ENTRY`, lists of texts, and columns, all of one length."""
        self.rows += len(entries)
        if len(entries):
            self._entries.append(entries)
            self._captions.append(captions)
            empty = {k for k, column in carried.items() if column.null_count == len(column)}
            self._empty |= dict.fromkeys(empty, pa.null())
            self._carried.append((len(entries), {k: carried[k] for k in carried.keys() - empty}))

    def finish(
        self,
        rank: Column,
        untyped: bool,
        known: Mapping[str, pa.DataType],
        conflict: Conflict | None = None,
    ) -> SpanTable:
        """Return all of it, of rows that say the same once.

        `rank` is the place of each video in the order of names. Two rows of one video are two
        spans, if they have other times, else one with the captions of both. With a `conflict` they
        are to be equal: it makes an error of the place of the video and the numbers of the rows.
        `known` are types of columns, as in `joined_columns`.
        """
        entries, at = np.empty(sum(map(len, self._entries)), ENTRY), 0
        while self._entries:  # which are let go of one by one
            part = self._entries.pop(0)
            entries[at : at + len(part)] = part
            at += len(part)
        entries["owner"] = rank[entries["owner"]]
        captions, carried = self._captions, self._carried
        del self._captions, self._carried
        known = {**self._empty, **known}
        columns = joined_columns(carried, untyped=untyped, known=known).columns
        order = ("owner",) if conflict else ORDER
        if not _in_order(entries, (*order, "number")):
            index = np.lexsort([entries[key] for key in ("number", *reversed(order))])
            every = pa.chunked_array(captions.chunks, CAPTIONS)
            entries, captions = entries[index], Packed(taken(every, index).chunks)
            columns = {name: taken(column, index) for name, column in columns.items()}
        same = order if conflict else (*ORDER, "in_frames", "problem")
        again = np.zeros(len(entries), bool)
        again[1:] = np.logical_and.reduce([entries[k][1:] == entries[k][:-1] for k in same])
        again &= entries["problem"] == 0
        if again.any():
            if conflict is None:
                captions = Packed(_joined_captions(captions, ~again))
            else:
                _require_same(entries, again, captions, Carried(columns), conflict)
                captions = Packed(captions.take(np.flatnonzero(~again)).chunks)
            kept = np.flatnonzero(~again)
            entries = entries[kept]
            columns = {name: taken(column, kept) for name, column in columns.items()}
        return SpanTable(entries, list(self.problems), captions, Carried(columns))


def _in_order(entries: Column, keys: Sequence[str]) -> bool:
    later, same = np.zeros(max(0, len(entries) - 1), bool), np.ones(max(0, len(entries) - 1), bool)
    for key in keys:
        later |= same & (entries[key][:-1] < entries[key][1:])
        same &= entries[key][:-1] == entries[key][1:]
    return bool(later.all())


def _require_same(
    entries: Column,
    again: Column,
    captions: Packed,
    carried: Carried,
    conflict: Conflict,
) -> None:
    for i in np.flatnonzero(again).tolist():
        one, other = ((captions[j].as_py(), carried.row(j)) for j in (i - 1, i))
        if one != other:
            raise conflict(*map(int, (entries["owner"][i], *entries["number"][i - 1 : i + 1])))


def _joined_captions(captions: Packed, first: Column) -> Iterator[pa.Array]:
    """Join the captions of each row that is a first one with those of the rows up to the next."""
    at, rows = 0, list[list[str]]()
    for chunk in captions.chunks:
        for texts, is_first in zip(chunk.to_pylist(), first[at : at + len(chunk)], strict=True):
            if is_first:
                rows.append(texts)
            else:
                rows[-1] = list(dict.fromkeys([*rows[-1], *texts]))
        at += len(chunk)
        yield pa.array(rows[:-1], CAPTIONS)
        del rows[:-1]
    yield pa.array(rows, CAPTIONS)


class Said(NamedTuple):
    """What is said of all spans of some videos, one after another; a whole video is one."""

    captions: pa.Array | Packed
    columns: Mapping[str, pa.Array | pa.ChunkedArray]
    rows: Column
    """Which row of captions and columns is which span's."""


def said_of_spans(videos: Sequence[CorpusVideo]) -> Said:
    """Return it as the columns it is in, if it is all of one table; else gathered."""
    found = _of_one_table(videos)
    if found is not None and not any(video.extra for video in videos):
        return Said(found[0].captions, found[0].carried.columns, found[1])
    rows = [video.extra for video in videos if isinstance(video.extra, CarriedRow)]
    if rows and len(rows) == len(videos) and len({id(row.carried) for row in rows}) == 1:
        texts = pa.array([video.captions for video in videos], CAPTIONS)
        index = np.array([row.number for row in rows])
        of_videos = {name: taken(c, index) for name, c in rows[0].carried.columns.items()}
        return Said(texts, of_videos, np.arange(len(videos)))
    captions, extras = list[Sequence[str]](), list[Mapping[str, Scalar]]()
    for video in videos:
        captions += [span.captions for span in video.spans] or [video.captions]
        extras += [{**video.extra, **span.extra} for span in video.spans] or [video.extra]
    parts = [extras[i : i + CHUNK] for i in range(0, len(extras), CHUNK)]
    carried = joined_columns([(len(part), carried_of(part)) for part in parts])
    return Said(pa.array(captions, CAPTIONS), carried.columns, np.arange(len(captions)))


def _of_one_table(videos: Sequence[CorpusVideo]) -> tuple[SpanTable, Column] | None:
    """Return the table that all spans of the videos are of, and which they are in it."""
    lists = [video.spans for video in videos if isinstance(video.spans, ListedSpans)]
    if not lists or len(lists) < len(videos) or len({id(spans.listed) for spans in lists}) > 1:
        return None
    begins, counts = np.array([(spans.begin, len(spans)) for spans in lists]).T
    return lists[0].listed, np.repeat(begins, counts) + positions(counts)


def entries_of_videos(videos: Sequence[CorpusVideo]) -> tuple[Column, Sequence[str]]:
    """Return all spans of videos, one after another, and what their problems are; a whole video is
    one."""
    found = _of_one_table(videos)
    if found is not None:
        return found[0].entries[found[1]], found[0].problems
    if not any(video.spans for video in videos):
        entries = np.zeros(len(videos), ENTRY)
        entries["end"] = NO_END
        return entries, []
    problems: dict[str, int] = {}
    lists = (bare_spans(video.spans) if video.spans else [CorpusSpan()] for video in videos)
    return entries_of(chain.from_iterable(lists), problems), list(problems)
