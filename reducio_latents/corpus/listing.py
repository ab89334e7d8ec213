"""List a corpus: find out what kind it is, and return its videos in order of name."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import get_args

from reducio_latents.core.choices import Label
from reducio_latents.core.collecting import no_collecting
from reducio_latents.core.regular import NotAFileError
from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import (
    VIDEO_EXTENSIONS,
    CorpusVideo,
    is_video_name,
    storable,
)
from reducio_latents.corpus.listed import EarlierListing, Listing, list_tables
from reducio_latents.corpus.patterns import (
    compile_glob,
    expand_braces,
    glob_depth,
    is_pattern,
    split_pattern,
)
from reducio_latents.corpus.readers import TABLE_READERS, is_table_name, table_ending
from reducio_latents.corpus.shot_lists import read_shots
from reducio_latents.corpus.table import TableColumns, read_tables
from reducio_latents.corpus.tars import is_tar_name, list_tar
from reducio_latents.corpus.texts import (
    SIDE_FILES,
    Described,
    SideFiles,
    few,
    read_beside,
    side_files,
    side_name,
)
from reducio_latents.corpus.trees import Found, Tree, open_tree
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.files.source import VideoSource, is_url, join_url, public_url
from reducio_latents.version import __version__

log = logging.getLogger(__name__)

TAR_READERS = 8
"""Tars whose headers are read at once; what they wait for is the disk or the network."""


_METAS = re.compile(r"((?:.*/)?)metas/v\d+/[^/]+\.json")
_NO_CLIPS = ("filtered_clips", "previews")
_NO_TABLES = ("metas", "processed_videos", "processed_clip_chunks", "iv2_embd", "ce1_embd")
"""What Curator writes beside `clips`."""
_LISTED_FRAMES = re.compile(r".+\.scenes\.txt", re.IGNORECASE).fullmatch


def list_corpus(
    corpus: str | Path,
    *,
    path_column: str | None = None,
    caption_column: str | None = None,
    start_column: str | None = None,
    end_column: str | None = None,
    root: str | Path | None = None,
    label: str = "none",
) -> list[CorpusVideo]:
    """Return every video of a corpus, sorted by name, without opening any.

    `corpus` is a folder (searched through; hidden names skipped), a glob or brace pattern, a CSV,
    TSV, JSON, JSONL or Parquet table, a list of names (.txt), or WebDataset tars of videos; local,
    or a URL that fsspec opens. A folder or pattern without videos and tars is its tables, as one.
    `path_column`, `caption_column`, `start_column` and `end_column` name a table's columns where
    their names do not tell (`caption_column` also a key of JSON beside videos); `start_column`
    alone may hold starts and ends, and is `none` where a table's times are not meant. A table's
    relative paths are relative to its own folder, or to `root`. `x.txt` beside `x.mp4` is its
    caption, `x.json` what else is known of it. With `label` `folder` the name of the folder that a
    video is in is a field of it, `label`, and its caption if it has no other.

    A video that a table names but that is missing stays in the list: it fails when it is probed,
    with a reason. Raise CorpusError if the corpus as a whole cannot be listed or has no video.
    """
    columns = TableColumns(
        path=path_column, caption=caption_column, start=start_column, end=end_column
    )
    return list_changed(corpus, columns, None if root is None else str(root), label).videos


@no_collecting()
def list_changed(
    corpus: str | Path,
    columns: TableColumns,
    root: str | None,
    label: str,
    before: EarlierListing | None = None,
) -> Listing:
    """List a corpus as `list_corpus` does, without reading rows of tables that are as they were."""
    if label not in get_args(Label):
        raise ConfigError(f"label is {label!r}; choose one of {', '.join(get_args(Label))}.")
    with _explained(corpus):
        location = _locate(corpus)
        tree = open_tree(location.root)
        found = _Sorted() if location.table is not None else _search(tree, location.patterns)
        tables = [] if found.found else found.tables
        tables = tables if location.table is None else [location.table]
        videos: Iterable[CorpusVideo]
        listing = Listing([])
        if tables:
            base = None if root is None else _absolute(root)
            settings = repr((__version__, location.root, base, columns, label))
            videos, listing = list_tables(
                tree, tables, base, columns, settings, before or EarlierListing()
            )
        else:
            given = {"path_column": columns.path, "root": root} | {
                "start_column": columns.start, "end_column": columns.end
            }  # fmt: skip
            for option in (name for name, value in given.items() if value is not None):
                shown = printable(public_url(str(corpus)))
                raise ConfigError(
                    f"{option} is for tables, and {shown} is not a table. Leave it out."
                )
            videos = _list_files(tree, found, columns.caption)
        if label == "folder":
            videos = map(_labelled, videos)
        shown, whole = printable(public_url(str(corpus))), not len(listing.unread)
        return listing._replace(videos=_checked(videos, shown, whole))


@no_collecting()
def list_shots(tables: str) -> list[CorpusVideo]:
    """Return the videos whose shots tables tell, without looking for the videos.

    `tables` is a table like a clip list, one that is named after its video, or many in a folder or
    by a pattern: `NAME-Scenes.csv` of PySceneDetect, `NAME.scenes.txt` of TransNetV2, and the like.
    Raise CorpusError if they tell no times.
    """
    shown = printable(public_url(tables))
    with _explained(tables):
        location = _locate(tables)
        tree = open_tree(location.root)
        if location.table is not None:
            names = [location.table]
        else:
            found = _search(tree, location.patterns)
            names = [*_not_beside(found), *filter(_LISTED_FRAMES, found.texts)]
        found_in = {name: read_shots(tree, name) for name in names}
        lists = [name for name, told in found_in.items() if told is None]
        rows = [told for told in found_in.values() if told is not None]
        rows += read_tables(tree, lists, None, TableColumns()).listed() if lists else []
    if not any(row.spans for row in rows):
        raise CorpusError(
            f"{shown} is no table of shots: it gives no times. Write one shot a row: video, start "
            "and end."
        )
    return rows


def corpus_root(corpus: str | Path, root: str | Path | None = None) -> str:
    """Return the folder or URL to which a corpus' addresses are relative.

    With the videos' `address`, it gives their URLs.
    """
    if root is not None:
        return _absolute(str(root))
    with _explained(corpus):
        return _locate(corpus).root


@contextmanager
def _explained(corpus: str | Path) -> Iterator[None]:
    try:
        yield
    except CorpusError:
        raise
    except (OSError, EOFError) as err:
        name, why = (getattr(err, name, None) for name in ("filename", "strerror"))
        place = f" ({name})" if name else ""
        said = f"{public_url(str(corpus))} cannot be listed: {why or err}{place}"
        raise CorpusError(f"{printable(said)}. Check path and rights.") from err


@dataclass(frozen=True)
class _Location:
    root: str
    table: str | None = None
    """Name of the table below `root`."""
    patterns: tuple[str, ...] = ()
    """Names and globs below `root`; "" is all of it."""


def _absolute(text: str) -> str:
    text = text.removeprefix("file://")
    return text.rstrip("/") if is_url(text) else os.path.abspath(text)  # noqa: PTH100


def _locate(corpus: str | Path) -> _Location:
    """Tell what the user's argument is from what is there, and from its name."""
    text = _absolute(str(corpus))
    parent, _, name = text.rpartition("/")
    parent = parent or "/"
    kind = open_tree(text).kind("")
    if kind == "folder":
        return _Location(text, patterns=("",))
    if kind == "file":
        if is_table_name(name):
            return _Location(parent, table=name)
        if is_video_name(name) or is_tar_name(name):
            return _Location(parent, patterns=(name,))
        raise CorpusError(
            f"{printable(public_url(str(corpus)))} is neither a folder, a table "
            f"({', '.join(TABLE_READERS)}), a tar nor a video, by its name. Give one of these, "
            "or a pattern. Of packed tables .gz is read; unpack others."
        )
    if is_pattern(text):
        base, pattern = split_pattern(text)
        return _Location(base, patterns=tuple(expand_braces(pattern)))
    shown = printable(public_url(str(corpus)))
    raise CorpusError(f"{shown}: there is no such file or folder. Check the path.")


@dataclass
class _Sorted:
    """What a search comes across."""

    found: dict[str, Found] = field(default_factory=dict)
    """Videos, tars, and folders that cannot be listed."""
    texts: dict[str, str | None] = field(default_factory=dict)
    """What may stand beside videos: name -> why it cannot be read, if that is known."""
    tables: list[str] = field(default_factory=list)

    def keep(self, walk: Iterable[Found], regexes: Sequence[re.Pattern[str]] = ()) -> None:
        for item in walk:
            path = item.path
            meant = not regexes or any(regex.fullmatch(path) for regex in regexes)
            if path.endswith(SIDE_FILES):
                self.texts[path] = item.problem
            if path.endswith("/"):  # a folder that cannot be listed: it may hold videos
                self.found[path] = item
            elif (is_video_name(path) or is_tar_name(path)) and meant:
                self.found[path] = item
            elif (
                is_table_name(path) and meant and table_ending(path) != ".txt" and not item.problem
            ):
                self.tables.append(path)


def _list_files(tree: Tree, found: _Sorted, caption_key: str | None) -> list[CorpusVideo]:
    tars = [i.path for i in found.found.values() if i.problem is None and is_tar_name(i.path)]
    side = SideFiles(caption_key)
    in_tars = set(tars)
    items = [item for item in found.found.values() if item.path not in in_tars]
    curators = {match[1] for name in found.texts if (match := _METAS.fullmatch(name))}
    items = _without_rejects(items, curators)
    videos = [
        CorpusVideo(storable(i.path), VideoSource(join_url(tree.root, i.path)), problem=i.problem)
        for i in items
    ]
    names = [video.video for video in videos]
    of = side_files(names, found.texts)
    for number, said in enumerate(read_beside(tree, names, of, found.texts, side)):
        if said != Described():
            videos[number] = replace(
                videos[number], captions=said.captions, extra=said.extra, spans=said.spans
            )
    if caption_key is not None and not tars and not any(n.endswith(".json") for n in found.texts):
        raise ConfigError(
            "caption_column is for tables and tars; beside videos, captions are .txt files. "
            "Leave it out."
        )
    with ThreadPoolExecutor(TAR_READERS) as pool:
        videos += chain.from_iterable(pool.map(lambda name: list_tar(tree, name, side), tars))
    side.finish()
    known = {*of.values()}
    its_own = tuple(f"{folder}{name}" for folder in curators for name in _NO_TABLES)
    known |= {name for name in found.tables if name.startswith(its_own)}
    if tables := [name for name in _not_beside(found) if name not in known]:
        _take_from_tables(tree, videos, tables)
    return videos


def _without_rejects(items: list[Found], curators: set[str]) -> list[Found]:
    """Leave out what Curator has filtered out, and its previews, of the folders that it wrote."""
    beside = tuple(f"{folder}{name}/" for folder in curators for name in _NO_CLIPS)
    kept = [item for item in items if not item.path.startswith(beside)]
    if left := len(items) - len(kept):
        log.warning(
            "%d files in %s are left out, as Curator means them. Give such a folder as the corpus "
            "to take them.",
            left,
            " and ".join(_NO_CLIPS),
        )
    return kept


def _take_from_tables(tree: Tree, videos: list[CorpusVideo], tables: list[str]) -> None:
    """Add to videos what rows of the tables among them say of them, and name the other tables."""
    numbers = {video.source.url: i for i, video in enumerate(videos)}
    files = Counter(map(posixpath.basename, numbers))
    by_file = {posixpath.basename(url): i for url, i in numbers.items()}

    def number(row: CorpusVideo) -> int | None:
        file = posixpath.basename(row.source.url)
        if row.source.offset is not None:
            return None
        return numbers.get(row.source.url, by_file.get(file) if files[file] == 1 else None)

    rows_of = dict[str, list[CorpusVideo]]()
    for name in tables:
        with suppress(CorpusError):  # it is of something else
            rows = list(read_tables(tree, [name], None, TableColumns()).listed())
            if any(number(row) is not None for row in rows):
                rows_of[name] = rows
    if len(rows_of) > 1:  # which may have rows of one video
        try:
            every = list(read_tables(tree, list(rows_of), None, TableColumns()).listed())
            rows_of = {"": every} | {name: [] for name in rows_of}
        except CorpusError as err:
            log.warning("%s Until then they are not read.", err)
            rows_of = {}
    without, beside = 0, {i for i, video in enumerate(videos) if video.spans}
    for row in chain.from_iterable(rows_of.values()):
        if (i := number(row)) is None:
            without += 1
            continue
        video = videos[i]
        own = video.spans or row.spans
        videos[i] = replace(
            video,
            captions=video.captions or row.captions,
            extra={**row.extra, **video.extra},
            spans=(*video.spans, *row.spans) if video.spans and i not in beside else own,
        )
    if without:
        log.warning(
            "%d videos of %s are not in the folder.", without, few([*filter(None, rows_of)])
        )
    if unread := [name for name in tables if name not in rows_of]:
        log.warning(
            "%d tables lie among the videos, name none of them and are not read: %s. For their "
            "captions and spans, give them as the corpus.",
            len(unread),
            few(unread),
        )


def _not_beside(found: _Sorted) -> list[str]:
    """Return the tables that say nothing of one video alone, as JSON of its name does."""
    beside = {side_name(name, ".json") for name in found.found}
    return [name for name in found.tables if name not in beside]


def _labelled(video: CorpusVideo) -> CorpusVideo:
    """Add the name of the folder that a video is in as a field, and as the caption without one."""
    folder = posixpath.basename(posixpath.dirname(video.video.rstrip("/")))
    inside = video.source.offset is not None and (is_tar_name(folder) or is_table_name(folder))
    if not folder or inside or video.problem is not None:
        return video
    captions = video.captions or (folder,)
    spans = [
        replace(s, captions=s.captions or (folder,), extra={**s.extra, "label": folder})
        for s in video.spans
    ]
    return replace(
        video, captions=captions, extra={**video.extra, "label": folder}, spans=tuple(spans)
    )


def _search(tree: Tree, patterns: Iterable[str]) -> _Sorted:
    """Return what the patterns match, each once, and all that may stand beside it."""
    globs, found = [], _Sorted()
    for pattern in patterns:
        if is_pattern(pattern):
            globs.append(pattern)
        elif is_tar_name(pattern):
            found.found[pattern] = Found(pattern)
        elif pattern == "" or tree.kind(pattern) == "folder":
            found.keep(tree.walk(pattern, None))
        elif is_table_name(pattern):
            found.tables.append(pattern)
        else:  # named one by one: taken whatever its extension is
            found.found[pattern] = Found(pattern)
            for ending in SIDE_FILES:
                name = side_name(pattern, ending)
                with suppress(NotAFileError):
                    if tree.kind(name) == "file":
                        found.texts[name] = None
    if globs:
        depths = [glob_depth(pattern) for pattern in globs]
        deepest = None if None in depths else max(depth for depth in depths if depth)
        found.keep(tree.walk("", deepest), [compile_glob(pattern) for pattern in globs])
    found.tables.sort()
    return found


def _checked(videos: Iterable[CorpusVideo], corpus: str, whole: bool) -> list[CorpusVideo]:
    """Sort by name, bytewise, and refuse one name twice, and a whole corpus without a video."""
    listing = sorted(videos, key=lambda video: video.video)  # code points sort as UTF-8 bytes do
    if not listing and whole:
        raise CorpusError(
            f"{corpus} holds no video and no picture. Videos end in .mp4, .mkv, .mov, .webm, .avi "
            f"or one of {len(VIDEO_EXTENSIONS) - 5} other ways; name others in a table."
        )
    if whole and all(video.problem is not None for video in listing):
        first = listing[0]
        raise CorpusError(
            f"{corpus} holds no video that can be read: {printable(first.video)}: {first.problem}."
        )
    for one, other in pairwise(listing):
        if one.video == other.video:
            raise CorpusError(f"{corpus} holds {printable(one.video)} twice. Rename or remove one.")
    return listing
