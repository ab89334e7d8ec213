"""Videos named by tables, and the spans that their rows list."""

from __future__ import annotations

import logging
import posixpath
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from reducio_latents.core.text import printable
from reducio_latents.corpus.cells import (
    CAPTIONS,
    Cells,
    Column,
    has_texts,
    plain_captions,
    plain_list,
    values_of,
)
from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    ID_NAMES,
    LOST,
    URL_NAMES,
    CorpusSpan,
    CorpusVideo,
    as_captions,
    extension,
    file_columns,
    is_utf8,
    is_video_name,
    match_name,
    storable,
)
from reducio_latents.corpus.readers import (
    BEGINNING,
    PACKED,
    TABLE_READERS,
    UNTYPED,
    Batch,
    InParquet,
    Place,
    open_table,
    table_ending,
)
from reducio_latents.corpus.rows import (
    ENTRY,
    CarriedRow,
    Gatherer,
    ListedSpans,
    carried_of,
    entries_of,
)
from reducio_latents.corpus.spans import Times, as_list, find_times, read_spans
from reducio_latents.corpus.trees import Tree, open_tree
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.files.source import VideoSource, is_url, join_url, public_url
from reducio_latents.video import is_still_name

log = logging.getLogger(__name__)

SAMPLE = 256
"""Rows from which is told what the columns are."""
_PAGE = re.compile(r"(?:youtu\.be/|[?&]v=|/shorts/|/embed/)([A-Za-z0-9_-]{11})(?![A-Za-z0-9_-])")
NOT_THERE = "no video file of this name lies in the folder of the table, or below --root"
AMBIGUOUS = "several video files have this name"


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """How to read a table where its names do not tell."""

    path: str | None = None
    caption: str | None = None
    start: str | None = None
    end: str | None = None


def read_tables(
    tree: Tree,
    names: Sequence[str],
    root: str | None,
    columns: TableColumns,
    begins: Mapping[str, Place | None] | None = None,
) -> TableRows:
    """Read the videos that tables name, relative paths being relative to `root` or their table.

    Rows are read one after another, of some tables from where they begin only, or none. Raise
    CorpusError for a table that cannot be read, has no rows or no column of paths.
    """
    found, begins = TableRows(names), begins or {}
    for name in names:
        where = printable(public_url(join_url(tree.root, name)))
        finder = _Finder(root or tree.root, "" if root else posixpath.dirname(name), bool(root))
        read, begin = TABLE_READERS[table_ending(name)], begins.get(name, BEGINNING)
        if begin is None:
            continue
        batches = read(open_table(tree, name), where, BEGINNING)
        first, sample = list[Batch](), list[dict[str, Any]]()
        while len(sample) < SAMPLE and (batch := next(batches, None)) is not None:
            first.append(batch)
            sample += [batch.row(i) for i in range(min(SAMPLE, len(batch.numbers)))]
        if not first:
            raise CorpusError(f"{where} has no rows. Name one video a row.")
        table = _Table(where, name, sample[:SAMPLE], columns, finder)
        if begin.end:
            first, batches = [], read(open_table(tree, name), where, begin)
        for batch in chain(first, batches):
            table.take(batch, found)
            found.rows += len(batch.numbers)
            if batch.end >= 0 and extension(name) != PACKED:
                found.ends.append((name, Place(batch.end, batch.numbers[-1]), len(found.names)))
        found.ends.append((name, None, len(found.names)))
        first, batch = [], None
    if lost := found.lost:
        log.warning("%d captions are left out, %s: %s first.", len(lost), LOST, lost[0])
    return found


class TableRows:
    """What the rows of tables name and say."""

    def __init__(self, tables: Sequence[str]) -> None:
        self.untyped = all(table_ending(name) in UNTYPED for name in tables)
        self.ends: list[tuple[str, Place | None, int]] = []
        """Places in tables, or the end of one, and how many videos were named up to there."""
        self.types: dict[str, dict[str, pa.DataType]] = {"videos": {}, "spans": {}}
        """Of the columns that are carried."""
        self.rows = 0
        self.names: dict[str, int] = {}
        self.sources: list[VideoSource] = []
        self.problems: dict[int, str] = {}
        self.spans, self.values = Gatherer(), Gatherer()
        self.places: list[tuple[int, str, Batch]] = []
        """The first number of some rows of whole videos, their table, and where they stand."""
        self.lost: list[str] = []
        """Rows whose captions are too large."""

    def video(self, name: str, source: VideoSource, problem: str | None) -> int:
        """Return the number of a video."""
        number = self.names.setdefault(name, len(self.sources))
        if number == len(self.sources):
            self.sources.append(source)
            if problem is not None:
                self.problems[number] = problem
        return number

    def listed(self) -> Iterator[CorpusVideo]:
        """Yield the videos in order of name; what the rows say is given up.

        Several rows may name a video if they list spans of it; else those that are equal count
        once. Raise CorpusError for rows of one video that differ and list no spans.
        """
        names = sorted(self.names)
        rank = np.empty(len(names), np.int32)
        rank[[self.names[name] for name in names]] = np.arange(len(names))
        of_spans, untyped = self.spans.rows, self.untyped
        rows = self.values.finish(rank, untyped, self.types["videos"], self.conflict)
        spans = self.spans.finish(rank, untyped, self.types["spans"])
        for kind, said in (("videos", rows), ("spans", spans)):
            self.types[kind] = {name: c.type for name, c in said.carried.columns.items()}
        if repeated := of_spans - len(spans.entries):
            log.warning(
                "%d rows repeat a span of another row: they count once, with the captions of all.",
                repeated,
            )
        row_of = np.full(len(names), -1)
        row_of[rows.entries["owner"]] = np.arange(len(rows.entries))
        ends = np.searchsorted(spans.entries["owner"], np.arange(-1, len(names)), "right")
        texts = chain.from_iterable(chunk.to_pylist() for chunk in rows.captions.chunks)
        each = zip(names, row_of.tolist(), ends.tolist(), ends[1:].tolist(), strict=False)
        for name, row, begin, end in each:
            number = self.names[name]
            yield CorpusVideo(
                name,
                self.sources[number],
                tuple(next(texts)) if row >= 0 else (),
                CarriedRow(rows.carried, row) if row >= 0 else {},
                self.problems.get(number),
                ListedSpans(spans, begin, end) if begin < end else (),
            )

    def conflict(self, rank: int, one: int, other: int) -> CorpusError:
        """Return what is wrong with two rows of one video that say different things."""
        at = [bisect_right(self.places, row, key=itemgetter(0)) - 1 for row in (one, other)]
        (begin, _, first), (again, where, second) = (self.places[i] for i in at)
        shown = printable(sorted(self.names)[rank])
        return CorpusError(
            f"{where} names {shown} twice, in {first.place(one - begin)} and "
            f"{second.place(other - again)}, with other values. Keep one row; several captions go "
            "into one row, as a list."
        )


class _Table:
    """One table: which of its columns are what."""

    def __init__(
        self,
        where: str,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        given: TableColumns,
        finder: _Finder,
    ) -> None:
        self.where, self.name, self.finder = where, name, finder
        columns = list(dict.fromkeys(name for row in rows for name in row))
        path = _require(columns, given.path, where, "path")
        self.kind: Literal["path", "name", "identity"] = "path"
        if path is None:
            inside = (name for name in columns if isinstance(rows[0].get(name), InParquet))
            path = next(inside, None)
        if path is None:
            path = self._choose(file_columns(columns), rows)
            if path == match_name(ID_NAMES, columns):
                self.kind = "identity"
        if path is None:
            is_data = any(is_video_name(name) or name.isdecimal() for name in columns)
            no_header = "write a first line, or " if is_data else ""
            raise CorpusError(
                f"{where} has no column of paths by name; it has {', '.join(columns)}. "
                f"Name it ({no_header}--path-column)."
            )
        self.path = path
        url = match_name(URL_NAMES, columns)
        self.url = None if url == path else url
        self.caption = _require(columns, given.caption, where, "caption")
        self.caption = self.caption or match_name(
            CAPTION_NAMES, [name for name in columns if name != self.path]
        )
        for what in ("start", "end"):
            if getattr(given, what) != "none":
                _require(columns, getattr(given, what), where, what)
        rest = [name for name in columns if name not in (self.path, self.caption)]
        self.times: Times | None = find_times(rest, rows, where, given.start, given.end)
        self.untyped = table_ending(name) in UNTYPED
        if table_ending(name) == ".txt":
            self.kind = "name"

    @staticmethod
    def _choose(names: list[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Prefer an address to an identity only if it is that of a file, not of a page."""
        for name in names:
            cell = next((row[name] for row in rows if row.get(name)), None)
            if name == names[-1] or not (
                isinstance(cell, str) and is_url(cell) and not is_video_name(urlsplit(cell).path)
            ):
                return name
        return None

    def take(self, batch: Batch, found: TableRows) -> None:
        """Take rows in: videos, or spans of some."""
        columns, rows = dict(batch.columns), len(batch.numbers)
        owners = self._owners(batch, columns.pop(self.path, [None] * rows), found)
        columns = {n: c for n, c in columns.items() if not isinstance(c[0], InParquet)}

        def place(i: int) -> str:
            return f"{self.where}, {batch.place(i)}"

        nothing = pa.nulls(rows, pa.string())
        if self.times is None:
            entries, plain = np.zeros(rows, ENTRY), np.ones(rows, bool)
        else:
            entries, plain = self.times.columns(columns, rows)
        texts, are_texts = plain_captions(columns.pop(self.caption or "", nothing))
        if self.times is not None:
            plain &= are_texts
        elif not are_texts.all():
            lists = texts.to_pylist()
            for i in np.flatnonzero(~are_texts & (owners >= 0)).tolist():
                cell = _caption_list(batch.row(i).get(self.caption or ""))
                lists[i] = as_captions(cell, where=place(i), lost=found.lost)
            texts = pa.array(lists, CAPTIONS)
        entries["owner"], entries["number"] = owners, found.rows + np.arange(rows)
        kept = plain & (owners >= 0)
        carried = {name: values_of(cells, place) for name, cells in columns.items()}
        gathered = found.spans if self.times is not None else found.values
        if not kept.all():
            entries, texts = entries[kept], texts.filter(kept)
            carried = {name: column.filter(kept) for name, column in carried.items()}
        gathered.add(entries, texts, carried)
        if self.times is None:
            found.places.append((found.rows, self.where, batch._replace(columns={}, rows=())))
            return
        spans, numbers = list[CorpusSpan](), list[int]()
        for i in np.flatnonzero(~plain & (owners >= 0)).tolist():
            row = batch.row(i)
            del row[self.path]
            own = read_spans(row, self.times, self.caption, place(i), found.lost)
            numbers += [i] * len(own)
            spans += own
        entries = entries_of(spans, gathered.problems)
        entries["owner"], entries["number"] = owners[numbers], found.rows + np.array(numbers, "i4")
        texts = pa.array([span.captions for span in spans], CAPTIONS)
        gathered.add(entries, texts, carried_of([span.extra for span in spans]))

    def _owners(self, batch: Batch, cells: Cells, found: TableRows) -> Column:
        """Return the number of the video that each row names; -1 of one that names none, which
        becomes a video with that problem."""
        rows, urls = len(batch.numbers), cells
        if self.url is not None:
            urls = batch.columns.get(self.url, [None] * rows)
        if not has_texts(cells) or not has_texts(urls):
            pairs = zip(range(rows), plain_list(cells), plain_list(urls), strict=True)
            return np.array([self._owner(batch, *found_at, found) for found_at in pairs], np.int64)
        codes = np.zeros(rows, np.int64)
        for texts in (cells,) if urls is cells else (cells, urls):
            code = texts.dictionary_encode().indices.fill_null(-1)
            codes = codes * (rows + 1) + np.asarray(code)
        _, first, which = np.unique(codes, return_index=True, return_inverse=True)
        order = np.argsort(first)  # as they stand, so that few tables are sorted
        numbers, at = np.zeros(len(first), np.int64), first[order]
        of_each = (texts.take(at).to_pylist() for texts in (cells, urls))
        pairs = zip(at.tolist(), *of_each, strict=True)
        numbers[order] = [self._owner(batch, *found_at, found) for found_at in pairs]
        owners = numbers[which]
        for i in set(np.flatnonzero(owners < 0).tolist()).difference(first.tolist()):
            self._owner(batch, i, cells[i].as_py(), None, found)
        return owners

    def _owner(self, batch: Batch, i: int, cell: Any, url: Any, found: TableRows) -> int:
        if cell is None and batch.rows and self.path not in batch.rows[i]:
            raise CorpusError(
                f"{self.where}, {batch.place(i)}: {self.path} is None, not a path. Correct it, or "
                "remove the row."
            )
        source = None
        if type(cell) is int and self.kind == "identity":
            cell = str(cell)
        if cell is None and self.untyped:
            cell = ""
        if isinstance(cell, InParquet):
            cell, source = self._inside(cell, found.names)
        path = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
        path = path.get("path") if isinstance(path, dict) else path
        if not isinstance(path, str) or not path or "\0" in path or not is_utf8(path):
            name = f"{storable(self.name)}, {batch.place(i)}"
            found.video(name, VideoSource(""), f"{self.path} is {path!r:.80}, not a path")
            return -1
        name, wrong = path, None
        if source is None:
            url = path if self.url is None else url
            name, source, wrong = self.finder.find(path, url, self.kind)
        return found.video(name, source, wrong)

    def _inside(self, cell: InParquet, names: Mapping[str, int]) -> tuple[str, VideoSource]:
        """Return name and source of a video in the table: of its own name, if no other has it."""
        if self.finder.elsewhere:
            raise ConfigError(
                f"root is for paths, and {self.where} holds the videos. Leave it out."
            )
        source = VideoSource(join_url(self.finder.base, self.name), cell.row)
        name = f"{storable(self.name)}/{cell.name or cell.row}"
        if name in names:
            ending = extension(name) if is_still_name(name) else ""
            name = f"{storable(self.name)}/{cell.row}{ending}"
        return name, source


def _caption_list(cell: Any) -> Any:
    """Return a list of captions that is written as text as the list that it is."""
    try:
        found = as_list(cell)
    except CorpusError:
        return cell
    texts = isinstance(found, list) and all(isinstance(item, str) for item in found)
    return found if texts else cell


def _require(columns: list[str], given: str | None, where: str, what: str) -> str | None:
    if given is not None and given not in columns:
        close = get_close_matches(given, columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(columns)}."
        raise ConfigError(f"{what}_column is {given!r}, which {where} does not have; {hint}")
    return given


class _Finder:
    """Finds the file that a cell names: a path, an address, or a name without its ending."""

    def __init__(self, base: str, folder: str, elsewhere: bool) -> None:
        self.base, self.folder = base, folder
        """Names are relative to the base, what tables say to the folder below it."""
        self.elsewhere = elsewhere
        """Whether the base is not where the table is."""
        self._files: dict[str, str] | None = None

    def find(
        self, path: str, url: Any, kind: Literal["path", "name", "identity"]
    ) -> tuple[str, VideoSource, str | None]:
        """Return name, source, and what is wrong with it; `url` is an address of the video too.

        An `identity` is a file's name without its ending; a `name` may be in other case.
        """
        stem = path
        if self.folder and not is_url(path) and not path.startswith("/"):
            path = f"{self.folder}/{path}"
        page = _PAGE.search(url) if isinstance(url, str) and is_url(url) else None
        is_page = page is not None and path == url
        problem = None
        if kind == "name":
            if not self._is_there(path):
                path = self._find(path, ignore_case=True) or path
        elif (
            is_page or kind == "identity" or not (is_url(path) or extension(path))
        ) and not self._is_there(path):
            names = [stem, page[1]] if page is not None else [stem]
            found = [file for name in names if (file := self._find(name)) is not None]
            if found and found[0]:
                path = found[0]
            elif found:
                problem = AMBIGUOUS
            elif is_page or kind == "identity":
                problem = NOT_THERE
        return public_url(path), VideoSource(join_url(self.base, path)), problem

    def _is_there(self, path: str) -> bool:
        """Whether a path on this machine is a file as it stands."""
        url = join_url(self.base, path)
        return not is_url(url) and Path(url).is_file()

    def _find(self, name: str, *, ignore_case: bool = False) -> str | None:
        """Return the one video below the base of this path, name, or name without its ending; ""
        if there are several."""
        if self._files is None:
            self._files = {}
            with suppress(FileNotFoundError):
                # Pictures last: one that is called as a video is, is its thumbnail.
                listed = open_tree(self.base).walk(self.folder, None)
                for item in sorted(listed, key=lambda found: is_still_name(found.path)):
                    if item.problem is None and is_video_name(item.path):
                        file = posixpath.basename(item.path)
                        keys = {item.path, file, posixpath.splitext(file)[0]}
                        for key in [item.path.lower()] if ignore_case else keys:
                            held = self._files.setdefault(key, item.path)
                            same_kind = is_still_name(held) == is_still_name(item.path)
                            if held != item.path and same_kind:
                                self._files[key] = ""
        return self._files.get(name.lower() if ignore_case else name)
