"""List a corpus: find out what kind it is, and return its videos in order of name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import (
    VIDEO_EXTENSIONS,
    CorpusVideo,
    is_video_name,
    storable,
)
from reducio_latents.corpus.patterns import (
    compile_glob,
    expand_braces,
    glob_depth,
    is_pattern,
    split_pattern,
)
from reducio_latents.corpus.table import TABLE_EXTENSIONS, is_table_name, list_table
from reducio_latents.corpus.tars import is_tar_name, list_tar
from reducio_latents.corpus.texts import read_texts, text_name, warn_of_lost_captions
from reducio_latents.corpus.trees import Found, Tree, open_tree
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.files.inside import NotAFileError
from reducio_latents.files.source import VideoSource, is_url, join_url, public_url

TAR_READERS = 8
"""Tars whose headers are read at once; what they wait for is the disk or the network."""


def list_corpus(
    corpus: str | Path,
    *,
    path_column: str | None = None,
    caption_column: str | None = None,
    root: str | Path | None = None,
) -> list[CorpusVideo]:
    """Return every video of a corpus, sorted by name, without opening any.

    `corpus` is a folder (searched through; hidden names skipped), a glob or brace pattern, a CSV,
    TSV, JSONL or Parquet table, or WebDataset tars of videos; local, or a URL that fsspec opens.
    `path_column` and `caption_column` name a table's columns where their names do not tell
    (`caption_column` also a key of the JSON members of tars). A table's relative paths are relative
    to its own folder, or to `root`. `x.txt` beside `x.mp4` is its caption.

    A video that a table names but that is missing stays in the list: it fails when it is probed,
    with a reason. Raise CorpusError if the corpus as a whole cannot be listed or has no video.
    """
    with _explained(corpus):
        location = _locate(corpus)
        tree = open_tree(location.root)
        if location.table is not None:
            base = location.root if root is None else _absolute(str(root))
            videos = list_table(tree, location.table, base, path_column, caption_column)
        elif path_column is not None or root is not None:
            option = "root" if path_column is None else "path_column"
            shown = printable(public_url(str(corpus)))
            raise ConfigError(f"{option} is for tables, and {shown} is not a table. Leave it out.")
        else:
            videos = _list_files(tree, location.patterns, caption_column)
    return _checked(videos, printable(public_url(str(corpus))))


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
    except OSError as err:
        place = f" ({err.filename})" if err.filename else ""
        said = f"{public_url(str(corpus))} cannot be listed: {err.strerror or err}{place}"
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
            f"({', '.join(TABLE_EXTENSIONS)}), a tar nor a video, by its name. Give one of these, "
            "or a pattern."
        )
    if is_pattern(text):
        base, pattern = split_pattern(text)
        return _Location(base, patterns=tuple(expand_braces(pattern)))
    shown = printable(public_url(str(corpus)))
    raise CorpusError(f"{shown}: there is no such file or folder. Check the path.")


def _list_files(tree: Tree, patterns: Iterable[str], caption_key: str | None) -> list[CorpusVideo]:
    found, texts = _search(tree, patterns)
    tars = [item.path for item in found if item.problem is None and is_tar_name(item.path)]
    if caption_key is not None and not tars:
        raise ConfigError(
            "caption_column is for tables and tars; beside videos, captions are .txt files. "
            "Leave it out."
        )
    in_tars = set(tars)
    videos = [_file_entry(tree, item) for item in found if item.path not in in_tars]
    return [*_with_captions(tree, videos, texts), *_list_tars(tree, tars, caption_key)]


def _search(tree: Tree, patterns: Iterable[str]) -> tuple[Iterable[Found], dict[str, str | None]]:
    """Return what the patterns match, each once, and all texts that were passed: name -> why it
    cannot be read, if that is known."""
    globs = []
    found: dict[str, Found] = {}
    texts: dict[str, str | None] = {}
    for pattern in patterns:
        if is_pattern(pattern):
            globs.append(pattern)
        elif is_tar_name(pattern):
            found[pattern] = Found(pattern)
        elif pattern == "" or tree.kind(pattern) == "folder":
            _keep(tree.walk(pattern, None), found, texts)
        else:  # named one by one: taken whatever its extension is
            found[pattern] = Found(pattern)
            with suppress(NotAFileError):
                if tree.kind(text_name(pattern)) == "file":
                    texts[text_name(pattern)] = None
    if globs:
        depths = [glob_depth(pattern) for pattern in globs]
        deepest = None if None in depths else max(depth for depth in depths if depth)
        _keep(tree.walk("", deepest), found, texts, [compile_glob(pattern) for pattern in globs])
    return found.values(), texts


def _keep(
    walk: Iterable[Found],
    found: dict[str, Found],
    texts: dict[str, str | None],
    regexes: Sequence[re.Pattern[str]] = (),
) -> None:
    """Sort what a walk comes across into videos and tars, problems and texts."""
    for item in walk:
        path = item.path
        if path.endswith(".txt"):
            texts[path] = item.problem
        elif path.endswith("/"):  # a folder that cannot be listed: it may hold videos
            found[path] = item
        elif (is_video_name(path) or is_tar_name(path)) and (
            not regexes or any(regex.fullmatch(path) for regex in regexes)
        ):
            found[path] = item


def _file_entry(tree: Tree, item: Found) -> CorpusVideo:
    source = VideoSource(join_url(tree.root, item.path))
    return CorpusVideo(storable(item.path), source, problem=item.problem)


def _with_captions(
    tree: Tree, videos: list[CorpusVideo], texts: dict[str, str | None]
) -> Iterable[CorpusVideo]:
    beside = {video.video: text_name(video.video) for video in videos}
    wanted = sorted(texts.keys() & set(beside.values()))
    lost = [name for name in wanted if texts[name] is not None]
    warn_of_lost_captions(tree.root, lost, str(texts[lost[0]]) if lost else "")
    captions = read_texts(tree, [name for name in wanted if texts[name] is None])
    for video in videos:
        caption = captions.get(beside[video.video])
        yield replace(video, captions=(caption,)) if caption else video


def _list_tars(tree: Tree, names: list[str], caption_key: str | None) -> Iterable[CorpusVideo]:
    with ThreadPoolExecutor(TAR_READERS) as pool:
        for videos in pool.map(lambda name: list_tar(tree, name, caption_key), names):
            yield from videos


def _checked(videos: Iterable[CorpusVideo], corpus: str) -> list[CorpusVideo]:
    """Sort by name, bytewise, and refuse a corpus that is empty or names one video twice."""
    listing = sorted(videos, key=lambda video: video.video)  # code points sort as UTF-8 bytes do
    if not listing:
        raise CorpusError(
            f"{corpus} holds no video. Videos end in .mp4, .mkv, .mov, .webm, .avi or one of "
            f"{len(VIDEO_EXTENSIONS) - 5} other ways; name others in a table."
        )
    if all(video.problem is not None for video in listing):
        first = listing[0]
        raise CorpusError(
            f"{corpus} holds no video that can be read: {printable(first.video)}: {first.problem}."
        )
    for one, other in pairwise(listing):
        if one.video == other.video:
            raise CorpusError(f"{corpus} holds {printable(one.video)} twice. Rename or remove one.")
    return listing
