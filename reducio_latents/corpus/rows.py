"""What the rows of a table say, kept in columns: a span takes some bytes, not a dict."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.core.config import Scalar
from reducio_latents.corpus.entry import CorpusSpan, CorpusVideo
from reducio_latents.store.plan.tables import CLIP_SCHEMA, column_of, common_type

CHUNK = 1 << 14
"""Rows that are gathered as Python values before they become columns."""
CAPTIONS = CLIP_SCHEMA.field("captions").type
_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_NUMBER = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?$"
_NO_END = -1.0


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


class Gatherer:
    """Takes rows one by one, as mappings of what a column can hold, and makes columns of them."""

    def __init__(self, *, untyped: bool) -> None:
        self.untyped = untyped
        """Whether texts that are numbers are to be numbers, as in CSV."""
        self.rows = 0
        self._waiting: list[Mapping[str, Scalar]] = []
        self._chunks: list[tuple[int, dict[str, pa.Array]]] = []

    def add(self, row: Mapping[str, Scalar]) -> None:
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: column_of([row.get(name) for row in rows]) for name in names}
        self._chunks.append((len(rows), columns))

    def finish(self, order: NDArray[Any] | None = None) -> Carried:
        """Return the columns; of the rows in `order`, if one is given."""
        self._flush()
        columns = {}
        for name in sorted({name for _, chunk in self._chunks for name in chunk}):
            found = [(rows, chunk.pop(name, None)) for rows, chunk in self._chunks]
            kind = common_type(list(dict.fromkeys(a.type for _, a in found if a is not None)))
            pieces = [pa.nulls(n, kind) if a is None else a.cast(kind) for n, a in found]
            column = self._typed(pa.chunked_array(pieces, kind))
            columns[name] = column if order is None else taken(column, order)
        self._chunks = []
        return Carried(columns)

    def _typed(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Make a column of texts numbers if each is one and nothing is lost: `007` stays text."""
        if not self.untyped or not pa.types.is_string(column.type):
            return column
        for pattern, kind in ((_INTEGER, pa.int64()), (_NUMBER, pa.float64())):
            if pc.all(pc.match_substring_regex(column, pattern)).as_py():
                numbers = column.cast(kind)
                if kind == pa.int64() or pc.all(pc.is_finite(numbers)).as_py():
                    return numbers
        return column


def taken(column: pa.ChunkedArray, index: NDArray[Any]) -> pa.ChunkedArray:
    """Return column[index] in chunks: one array of texts cannot hold 2 GiB."""
    pieces = [column.take(index[i : i + CHUNK]) for i in range(0, len(index), CHUNK)]
    return pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], column.type)


class SpanColumns:
    """All spans of a table, those of one video together, by start."""

    def __init__(
        self,
        times: Mapping[str, NDArray[Any]],
        problems: Sequence[str],
        captions: pa.ChunkedArray,
        carried: Carried,
    ) -> None:
        self._times, self._problems = times, problems
        self.captions, self.carried = captions, carried

    def bare(self, begin: int, end: int) -> Iterator[CorpusSpan]:
        """Yield spans without captions and values, which take longer to read than all else."""
        columns = (self._times[name][begin:end].tolist() for name in _TIMES)
        for start, stop, from_s, in_frames, problem in zip(*columns, strict=True):
            yield CorpusSpan(
                start,
                None if stop == _NO_END else stop,
                in_frames=bool(in_frames),
                from_s=from_s,
                problem=self._problems[problem - 1] if problem else None,
            )


_TIMES = ("start", "end", "from_s", "in_frames", "problem")


class ListedSpans(Sequence[CorpusSpan]):
    """The spans of one video."""

    __slots__ = ("begin", "columns", "end")

    def __init__(self, columns: SpanColumns, begin: int, end: int) -> None:
        self.columns, self.begin, self.end = columns, begin, end

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
        (bare,) = self.columns.bare(number, number + 1)
        return CorpusSpan(
            bare.start,
            bare.end,
            tuple(self.columns.captions[number].as_py()),
            CarriedRow(self.columns.carried, number),
            bare.in_frames,
            bare.from_s,
            bare.problem,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def bare(self) -> Iterator[CorpusSpan]:
        """Yield the spans without captions and values."""
        return self.columns.bare(self.begin, self.end)


def bare_spans(spans: Sequence[CorpusSpan]) -> Iterable[CorpusSpan]:
    """Return the spans where only their times are asked for."""
    return spans.bare() if isinstance(spans, ListedSpans) else spans


class SpanGatherer:
    """Takes the spans of a table one by one, whosever they are."""

    def __init__(self, *, untyped: bool) -> None:
        self._carried = Gatherer(untyped=untyped)
        self._owners = array("q")
        self._times: dict[str, array[Any]] = {
            name: array("d" if name in _TIMES[:3] else "B") for name in _TIMES
        }
        self._problems: dict[str, int] = {}
        self._waiting: list[Sequence[str]] = []
        self._captions: list[pa.Array] = []

    def add(self, owner: int, span: CorpusSpan) -> None:
        """Take a span of the video of that number."""
        problem = 0
        if span.problem is not None:
            problem = self._problems.setdefault(span.problem, len(self._problems) + 1)
        end = _NO_END if span.end is None else span.end
        values = (span.start, end, span.from_s, span.in_frames, problem)
        for name, value in zip(_TIMES, values, strict=True):
            self._times[name].append(value)
        self._owners.append(owner)
        self._carried.add(span.extra)
        self._waiting.append(span.captions)
        if len(self._waiting) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._captions.append(pa.array(self._waiting, CAPTIONS))
        self._waiting = []

    def finish(self, videos: int) -> tuple[list[ListedSpans], int]:
        """Return the spans of each video, and how many repeated another one.

        Of those that are equal the first one is kept, with the captions of all.
        """
        self._flush()
        owners = np.asarray(self._owners)
        times = {name: np.asarray(column) for name, column in self._times.items()}
        order = np.lexsort((times["end"], times["start"], times["from_s"], owners))
        owners = owners[order]
        times = {name: column[order] for name, column in times.items()}
        first = np.diff(owners, prepend=-1) != 0
        for column in times.values():
            first[1:] |= np.diff(column) != 0
        first |= times["problem"] != 0
        captions = pa.chunked_array(self._captions, CAPTIONS)
        stands = np.array_equal(order, np.arange(len(order)))  # as most tables do
        captions = captions if stands else taken(captions, order)
        if not first.all():
            captions = _joined(captions, first)
            order, owners, stands = order[first], owners[first], False
            times = {name: column[first] for name, column in times.items()}
        self._captions = []
        carried = self._carried.finish(None if stands else order)
        columns = SpanColumns(times, list(self._problems), captions, carried)
        ends = np.searchsorted(owners, np.arange(-1, videos), side="right").tolist()
        found = [ListedSpans(columns, a, b) for a, b in pairwise(ends)]
        return found, len(first) - len(order)


def _joined(captions: pa.ChunkedArray, first: NDArray[Any]) -> pa.ChunkedArray:
    """Join the captions of each row that is a first one with those of the rows up to the next."""
    chunks, rows = [], list[list[str]]()
    for begin in range(0, len(captions), CHUNK):
        if len(rows) > CHUNK:
            chunks.append(pa.array(rows[:-1], CAPTIONS))
            del rows[:-1]
        part = slice(begin, begin + CHUNK)
        for texts, is_first in zip(captions[part].to_pylist(), first[part].tolist(), strict=True):
            if is_first:
                rows.append(texts)
            else:
                rows[-1] = list(dict.fromkeys([*rows[-1], *texts]))
    return pa.chunked_array([*chunks, pa.array(rows, CAPTIONS)], CAPTIONS)


class Said(NamedTuple):
    """What is said of all spans of some videos, one after another; a whole video is one."""

    captions: pa.Array | pa.ChunkedArray
    columns: Mapping[str, pa.Array | pa.ChunkedArray]
    rows: NDArray[Any]
    """Which row of captions and columns is which span's."""


def said_of_spans(videos: Sequence[CorpusVideo]) -> Said:
    """Return it as the columns it is in, if it is all of one table; else gathered."""
    lists = [video.spans for video in videos if isinstance(video.spans, ListedSpans)]
    if lists and len(lists) == len(videos) and len({id(spans.columns) for spans in lists}) == 1:
        columns = lists[0].columns
        begins = np.array([spans.begin for spans in lists])
        counts = np.array([len(spans) for spans in lists])
        index = np.arange(counts.sum()) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        if not any(video.extra for video in videos):
            return Said(columns.captions, columns.carried.columns, index)
    rows = [video.extra for video in videos if isinstance(video.extra, CarriedRow)]
    if rows and len(rows) == len(videos) and len({id(row.carried) for row in rows}) == 1:
        texts = pa.array([video.captions for video in videos], CAPTIONS)
        index = np.array([row.number for row in rows])
        of_videos = {name: taken(c, index) for name, c in rows[0].carried.columns.items()}
        return Said(texts, of_videos, np.arange(len(videos)))
    captions, carried = list[Sequence[str]](), Gatherer(untyped=False)
    for video in videos:
        captions += [span.captions for span in video.spans] or [video.captions]
        for extra in [{**video.extra, **s.extra} for s in video.spans] or [dict(video.extra)]:
            carried.add(extra)
    index = np.arange(len(captions))
    return Said(pa.array(captions, CAPTIONS), carried.finish().columns, index)
