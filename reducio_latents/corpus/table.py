"""Videos named by a table: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import TextIOWrapper
from typing import Any, BinaryIO

from reducio_latents.core.parsing import parse_json
from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    CorpusVideo,
    as_captions,
    as_extra,
    extension,
    is_utf8,
    match_name,
)
from reducio_latents.corpus.texts import not_utf8
from reducio_latents.corpus.trees import Tree
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.files.source import VideoSource, join_url, public_url

log = logging.getLogger(__name__)

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
# fmt: off
PATH_NAMES = (
    "path", "video", "video_path", "videopath", "video_file", "file", "file_path", "filepath",
    "file_name", "filename", "location", "url", "video_url", "uri",
)
# fmt: on
"""Names of a column that holds the paths, the likeliest first; case does not matter."""


def is_table_name(name: str) -> bool:
    return extension(name) in TABLE_EXTENSIONS


@dataclass(frozen=True, slots=True)
class _Table:
    """A table's columns, and for each row where it stands, for messages: `line 3`."""

    columns: dict[str, list[Any]]
    places: list[str]
    untyped: bool = False
    """Whether all cells are text, numbers too."""


def list_table(
    tree: Tree, name: str, base: str, path_column: str | None, caption_column: str | None
) -> list[CorpusVideo]:
    """Return the videos that the table names, relative paths being relative to `base`.

    Raise CorpusError if it cannot be read, has no rows or no column of paths, or if two rows name
    one video and differ; rows that are equal count once.
    """
    where = printable(public_url(join_url(tree.root, name)))
    with tree.open(name) as file:
        table = _READERS[extension(name)](file, where)
    if not table.places:
        raise CorpusError(f"{where} has no rows. Name one video a row.")
    columns = list(table.columns)
    path_column = _find(columns, path_column, PATH_NAMES, where, "path")
    if path_column is None:
        raise CorpusError(
            f"{where} has no column of paths by name; it has {', '.join(columns)}. "
            "Name it (--path-column)."
        )
    caption_column = _find(columns, caption_column, CAPTION_NAMES, where, "caption")
    first: dict[str, tuple[str, CorpusVideo]] = {}
    for place, row in _rows(table, keep_text=(path_column, caption_column)):
        at, path = f"{where}, {place}", row.pop(path_column)
        if not isinstance(path, str) or not path or "\0" in path or not is_utf8(path):
            raise CorpusError(
                f"{at}: {path_column} is {path!r}, not a path. Correct it, or remove the row."
            )
        captions = as_captions(row.pop(caption_column), where=at) if caption_column else ()
        source, path = VideoSource(join_url(base, path)), public_url(path)
        video = CorpusVideo(path, source, captions, as_extra(row, where=at))
        earlier, same = first.setdefault(path, (place, video))
        if replace(same, source=source) != video:
            raise CorpusError(
                f"{where} names {printable(path)} twice, in {earlier} and {place}, with other "
                "values. Keep one row; several captions go into one row, as a list."
            )
    return [video for _, video in first.values()]


def _find(
    columns: list[str], given: str | None, names: tuple[str, ...], where: str, what: str
) -> str | None:
    if given is None:
        return match_name(names, columns)
    if given not in columns:
        close = get_close_matches(given, columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(columns)}."
        raise ConfigError(f"{what}_column is {given!r}, which {where} does not have; {hint}")
    return given


def _rows(table: _Table, keep_text: tuple[str | None, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row's place and values, numbers as numbers but in the columns `keep_text`."""
    columns = dict(table.columns)
    if table.untyped:
        for name in columns.keys() - set(keep_text):
            columns[name] = _as_numbers(columns[name])
    for place, *values in zip(table.places, *columns.values(), strict=True):
        yield place, dict(zip(columns, values, strict=True))


def _read_csv(file: BinaryIO, where: str) -> _Table:
    delimiter = "\t" if where.lower().endswith(".tsv") else ","
    with TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except UnicodeDecodeError as err:
            raise not_utf8(where, err) from err
        except csv.Error as err:
            raise CorpusError(f"{where}, line {reader.line_num}: {err}. Correct it.") from err
    if not rows:
        raise CorpusError(f"{where} is empty. The first line names the columns.")
    header = [name.strip() or f"column_{i}" for i, name in enumerate(rows[0][1], start=1)]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise CorpusError(f"{where} has two columns named {twice[0]!r}. Rename one.")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise CorpusError(
                f"{where}, line {line}: {len(row)} cells, but {len(header)} columns. "
                "Put text with the delimiter in it between double quotes."
            )
    columns = {name: [row[i] for _, row in rows[1:]] for i, name in enumerate(header)}
    return _Table(columns, [f"line {line}" for line, _ in rows[1:]], untyped=True)


_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d{1,3})?")


def _as_numbers(cells: list[str]) -> list[Any]:
    """Return a column as numbers if each cell is one and nothing is lost: `007` stays text."""
    present = [cell for cell in cells if cell]
    for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
        if present and all(map(pattern.fullmatch, present)):
            numbers = [kind(cell) if cell else None for cell in cells]
            if all(number is None or math.isfinite(number) for number in numbers):
                return numbers
    return [cell or None for cell in cells]


def _read_json_lines(file: BinaryIO, where: str) -> _Table:
    rows, places = [], []
    for number, line in enumerate(_text_lines(file, where), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as err:
            raise CorpusError(f"{where}, line {number} is not JSON: {err}. Correct it.") from err
        if not isinstance(row, dict):
            raise CorpusError(f"{where}, line {number} is not a JSON object. Correct it.")
        if not all(map(is_utf8, row)):
            raise CorpusError(
                f"{where}, line {number}: a name is half a surrogate pair. Correct it."
            )
        rows.append(row)
        places.append(f"line {number}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _Table({name: [row.get(name) for row in rows] for name in names}, places)


def _text_lines(file: BinaryIO, where: str) -> Iterator[str]:
    with TextIOWrapper(file, "utf-8-sig", newline="\n") as text:
        try:
            yield from text
        except UnicodeDecodeError as err:
            raise not_utf8(where, err) from err


def _read_parquet(file: BinaryIO, where: str) -> _Table:
    import pyarrow as pa

    from reducio_latents.files.parquet import read_parquet

    try:
        table = read_parquet(file)
    except (pa.ArrowException, OSError) as err:
        raise CorpusError(f"{where} is not a readable Parquet file: {err}. Check it.") from err
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if "binary" in str(field.type):  # also inside a list or struct
            log.warning("%s: column %s is binary and is left out.", where, field.name)
            continue
        if pa.types.is_temporal(field.type):  # finer than Python's own times
            column = column.cast(pa.int64() if pa.types.is_duration(field.type) else pa.string())
        columns[field.name] = column.to_pylist()
    return _Table(columns, [f"row {i}" for i in range(1, table.num_rows + 1)])


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
