"""Videos named by tables, and the spans that their rows list."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    ID_NAMES,
    URL_NAMES,
    CorpusVideo,
    as_captions,
    as_extra,
    extension,
    file_columns,
    is_utf8,
    is_video_name,
    match_name,
    storable,
)
from reducio_latents.corpus.readers import TABLE_READERS, UNTYPED, InParquet, TableRow
from reducio_latents.corpus.rows import CarriedRow, Gatherer, SpanGatherer
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


def list_tables(
    tree: Tree, names: Sequence[str], root: str | None, columns: TableColumns
) -> Iterator[CorpusVideo]:
    """Yield the videos that tables name, relative paths being relative to `root` or their table.

    Rows are read one after another. Several rows may name a video if they list spans of it; else
    those that are equal count once. Raise CorpusError for a table that cannot be read, has no rows
    or no column of paths, or whose rows of one video differ and list no spans.
    """
    videos: dict[str, _Video] = {}
    untyped = all(extension(name) in UNTYPED for name in names)
    values, spans = Gatherer(untyped=untyped), SpanGatherer(untyped=untyped)
    lost: list[str] = []
    for name in names:
        where = printable(public_url(join_url(tree.root, name)))
        finder = _Finder(root or tree.root, "" if root else posixpath.dirname(name), bool(root))
        rows = TABLE_READERS[extension(name)](tree.open(name), where)
        first = list(islice(rows, SAMPLE))
        if not first:
            raise CorpusError(f"{where} has no rows. Name one video a row.")
        table = _Table(where, name, first, columns, finder)
        for at, row in chain(first, rows):
            table.take(at, row, videos, values, spans, lost)
    if lost:
        log.warning("%d captions of more than 1 MiB are left out, %s first.", len(lost), lost[0])
    carried = values.finish()
    of_videos, repeated = spans.finish(len(videos))
    if repeated:
        log.warning(
            "%d rows repeat a span of another row: they count once, with the captions of all.",
            repeated,
        )
    for (path, video), listed in zip(videos.items(), of_videos, strict=True):
        yield CorpusVideo(
            path,
            video.source,
            video.captions,
            {} if video.row is None else CarriedRow(carried, video.row),
            video.problem,
            listed if len(listed) else (),
        )


@dataclass(slots=True)
class _Video:
    source: VideoSource
    place: str
    captions: tuple[str, ...] = ()
    row: int | None = None
    """Of what it carries; None if its spans do."""
    same: int = 0
    """Hash of what the row says."""
    problem: str | None = None
    number: int = field(kw_only=True)


class _Table:
    """One table: which of its columns are what."""

    def __init__(
        self,
        where: str,
        name: str,
        first: Sequence[TableRow],
        given: TableColumns,
        finder: _Finder,
    ) -> None:
        self.where, self.name, self.finder = where, name, finder
        rows = [row for _, row in first]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        self.path = _require(columns, given.path, where, "path")
        self.kind: Literal["path", "name", "identity"] = "path"
        if self.path is None:
            inside = (name for name in columns if isinstance(rows[0].get(name), InParquet))
            self.path = next(inside, None)
        if self.path is None:
            self.path = self._choose(file_columns(columns), rows)
            if self.path == match_name(ID_NAMES, columns):
                self.kind = "identity"
        if self.path is None:
            raise CorpusError(
                f"{where} has no column of paths by name; it has {', '.join(columns)}. "
                "Name it (--path-column)."
            )
        self.url = match_name(URL_NAMES, columns)
        self.caption = _require(columns, given.caption, where, "caption")
        self.caption = self.caption or match_name(
            CAPTION_NAMES, [name for name in columns if name != self.path]
        )
        for what in ("start", "end"):
            if getattr(given, what) != "none":
                _require(columns, getattr(given, what), where, what)
        rest = [name for name in columns if name not in (self.path, self.caption)]
        self.times: Times | None = find_times(rest, rows, where, given.start, given.end)
        self.untyped = extension(name) in UNTYPED
        if extension(name) == ".txt":
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

    def _inside(self, cell: InParquet, videos: Mapping[str, _Video]) -> tuple[str, VideoSource]:
        """Return name and source of a video in the table: of its own name, if no other has it."""
        if self.finder.elsewhere:
            raise ConfigError(
                f"root is for paths, and {self.where} holds the videos. Leave it out."
            )
        source = VideoSource(join_url(self.finder.base, self.name), cell.row)
        name = f"{storable(self.name)}/{posixpath.basename(cell.name or '') or cell.row}"
        return (f"{storable(self.name)}/{cell.row}" if name in videos else name), source

    def take(
        self,
        at: str,
        row: dict[str, Any],
        videos: dict[str, _Video],
        values: Gatherer,
        spans: SpanGatherer,
        lost: list[str],
    ) -> None:
        """Take one row in: a video, or spans of one."""
        assert self.path is not None
        where = f"{self.where}, {at}"
        if self.path not in row:
            raise CorpusError(
                f"{where}: {self.path} is None, not a path. Correct it, or remove the row."
            )
        cell, source = row.pop(self.path), None
        if cell is None and self.untyped:
            cell = ""
        if isinstance(cell, InParquet):
            cell, source = self._inside(cell, videos)
        path = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
        path = path.get("path") if isinstance(path, dict) else path
        if not isinstance(path, str) or not path or "\0" in path or not is_utf8(path):
            problem = f"{self.path} is {path!r:.80}, not a path"
            videos[f"{storable(self.name)}, {at}"] = _Video(
                VideoSource(""), at, problem=problem, number=len(videos)
            )
            return
        url = row.get(self.url) if self.url is not None and self.url != self.path else path
        name, wrong = path, None
        if source is None:
            name, source, wrong = self.finder.find(path, url, self.kind)
        if self.times is not None:
            found = read_spans(row, self.times, self.caption, where, lost)
            video = videos.get(name)
            if video is None:
                video = _Video(source, at, problem=wrong, number=len(videos))
                videos[name] = video
            for span in found:
                spans.add(video.number, span)
            return
        captions: tuple[str, ...] = ()
        if self.caption is not None:
            texts = row.pop(self.caption, None)
            captions = as_captions(_caption_list(texts), where=where, lost=lost)
        extra = as_extra(row, where=where)
        same = hash((captions, tuple(sorted((k, str(v)) for k, v in extra.items()))))
        video = videos.get(name)
        if video is None:
            videos[name] = _Video(
                source, at, captions, values.rows, same, wrong, number=len(videos)
            )
            values.add(extra)
        elif video.same != same:
            raise CorpusError(
                f"{self.where} names {printable(name)} twice, in {video.place} and {at}, with "
                "other values. Keep one row; several captions go into one row, as a list."
            )


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
