"""The rows of a table, one after another: CSV, TSV, lists of names, JSON, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import Any, BinaryIO, NamedTuple

from reducio_latents.core.parsing import bounded, once, parse_json
from reducio_latents.corpus.entry import extension, file_columns, is_utf8
from reducio_latents.corpus.spans import is_time_name
from reducio_latents.corpus.texts import not_utf8
from reducio_latents.errors import CorpusError

log = logging.getLogger(__name__)

MAX_FIELD = 1 << 24
"""Characters of one cell of CSV. More is a quote that is not closed."""
MAX_ROW = 1 << 26
"""Bytes of one row of JSON."""
BATCH = 1024
"""Rows of Parquet that are in memory."""
TableRow = tuple[str, dict[str, Any]]
"""Where it stands, for messages (`line 3`), and its cells."""


def _read_csv(file: BinaryIO, where: str) -> Iterator[TableRow]:
    delimiter = "\t" if where.lower().endswith(".tsv") else ","
    csv.field_size_limit(MAX_FIELD)
    with TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next((row for row in reader if row), None)
            if header is None:
                raise CorpusError(f"{where} is empty. The first line names the columns.")
            header = [name.strip() or f"column_{i}" for i, name in enumerate(header, start=1)]
            _require_once(header, where)
            for row in reader:
                if len(row) != len(header) and row:
                    raise CorpusError(
                        f"{where}, line {reader.line_num}: {len(row)} cells, but {len(header)} "
                        "columns. Put text with the delimiter in it between double quotes."
                    )
                if row:
                    yield (
                        f"line {reader.line_num}",
                        {name: cell or None for name, cell in zip(header, row, strict=True)},
                    )
        except UnicodeDecodeError as err:
            raise not_utf8(where, err) from err
        except csv.Error as err:
            raise CorpusError(f"{where}, line {reader.line_num}: {err}. Correct it.") from err


def _require_once(names: list[str], where: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise CorpusError(f"{where} has two columns named {twice[0]!r}. Rename one.")


_LISTED = re.compile(r"(.*?)((?:\s+\d+)*)\s*")


def _read_names(file: BinaryIO, where: str) -> Iterator[TableRow]:
    """Read a list without a header, as UCF-101 has them: a name a line, then maybe numbers."""
    for number, line in enumerate(_lines(file, where), start=1):
        match = _LISTED.fullmatch(line.strip())
        if match and match[1]:
            numbers = {f"column_{i}": n for i, n in enumerate(match[2].split(), start=2)}
            yield f"line {number}", {"path": match[1], **numbers}


def _lines(file: BinaryIO, where: str) -> Iterator[str]:
    number = 0
    with file:
        while line := file.readline(MAX_ROW):
            number += 1
            if len(line) == MAX_ROW:
                raise CorpusError(f"{where}, line {number} is longer than {MAX_ROW >> 20} MiB.")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as err:
                raise not_utf8(f"{where}, line {number}", err) from err


def _read_json_lines(file: BinaryIO, where: str) -> Iterator[TableRow]:
    for number, line in enumerate(_lines(file, where), start=1):
        if line.strip():
            try:
                row = parse_json(line, unique=True)
            except ValueError as err:
                raise CorpusError(
                    f"{where}, line {number} is not JSON: {err}. Correct it."
                ) from err
            yield f"line {number}", _object(row, f"{where}, line {number}")


def _object(row: Any, at: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise CorpusError(f"{at} is not a JSON object. Correct it.")
    if not all(map(is_utf8, row)):
        raise CorpusError(f"{at}: a name is half a surrogate pair. Correct it.")
    return row


def _read_json(file: BinaryIO, where: str) -> Iterator[TableRow]:
    """Read an array of objects, one by one; or an object: a row, or several by name or in a list.

    An object of several rows is read whole, up to `MAX_ROW`.
    """
    with file:
        pieces = _values(file, where)
        kind = next(pieces)
        if kind == "[":
            for number, item in enumerate(pieces, start=1):
                yield f"row {number}", _object(item, f"{where}, row {number}")
            return
        found = _object(next(pieces), where)
    lists = [
        value
        for value in found.values()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if len(lists) == 1 and not _names_a_video(found):
        for number, item in enumerate(lists[0], start=1):
            yield f"row {number}", _object(item, where)
    elif len(found) > 1 and all(isinstance(value, dict) for value in found.values()):
        for name, value in found.items():
            yield f"row {name!r}", {"video_id": name, **_object(value, where)}
    else:
        yield "row 1", found


def _names_a_video(row: dict[str, Any]) -> bool:
    return any(isinstance(row.get(name), str) for name in file_columns(list(row)))


def _values(file: BinaryIO, where: str) -> Iterator[Any]:
    """Yield "[" and then the items of an array, or "{" and the one object that a file holds."""
    decoder, source = json.JSONDecoder(object_pairs_hook=once), _decoded(file, where)
    text, at, array = "", 0, None
    while True:
        match = _BETWEEN.match(text, at)
        at = match.end() if match else at
        if array is None and at < len(text):
            array = text[at] == "["
            yield text[at]
            at += array
            continue
        if array and text[at : at + 1] == "]":
            return
        err: Exception | None = None
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as failed:
            found, end, err = None, len(text), failed
        if end == len(text) and end - at < MAX_ROW and (piece := next(source, "")):
            text, at = text[at:] + piece, 0  # what was read may go on
            continue
        try:
            if err is not None:
                raise err
            yield bounded(found)
        except (ValueError, RecursionError) as failed:
            what = str(failed).partition(": line")[0]
            raise CorpusError(f"{where} is not JSON: {what}. Correct it.") from failed
        if not array:
            return
        at = end


_BETWEEN = re.compile(r"[ \t\r\n,]*")


def _decoded(file: BinaryIO, where: str) -> Iterator[str]:
    with TextIOWrapper(file, "utf-8-sig") as text:
        try:
            while piece := text.read(1 << 20):
                yield piece
        except UnicodeDecodeError as err:
            raise not_utf8(where, err) from err


def _read_parquet(file: BinaryIO, where: str) -> Iterator[TableRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from reducio_latents.files.parquet import video_leaf

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            fields = list(table.schema_arrow)
            _require_once([field.name for field in fields], where)
            names = [field.name for field in fields if not _is_binary(field.type)]
            leaf = video_leaf(table.schema_arrow) or ""
            videos, struct, _ = leaf.partition(".")
            leaf = leaf if _has_values(table, leaf) else ""
            for field in fields:
                if field.name not in (*names, videos):
                    log.warning("%s: column %s is binary and is left out.", where, field.name)
            if struct and table.schema_arrow.field(videos).type.get_field_index("path") >= 0:
                names.append(f"{videos}.path")
            if not names and leaf:  # as many rows, of nothing
                for number in range(1, table.metadata.num_rows + 1):
                    yield f"row {number}", {videos: InParquet(number - 1)}
                return
            for batch in table.iter_batches(BATCH, columns=names, use_threads=False):
                columns = list(map(_plain_column, batch.columns, batch.schema.names))
                for cells in zip(*columns, strict=True):
                    row = dict(zip(batch.schema.names, cells, strict=True))
                    if leaf:
                        name = (row.get(videos) or {}).get("path") if struct else None
                        row[videos] = InParquet(number, name)
                    number += 1
                    yield f"row {number}", row
    except CorpusError:
        raise
    except (pa.ArrowException, OSError) as err:
        raise CorpusError(f"{where} is not a readable Parquet file: {err}. Check it.") from err


class InParquet(NamedTuple):
    """A video that lies in a row of the table itself."""

    row: int
    name: str | None = None


def _has_values(table: Any, leaf: str) -> bool:
    """Whether a column of a Parquet file has any value, by what the file says of itself."""
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    empty = [
        chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values
        for chunk in chunks
        if chunk.path_in_schema == leaf
    ]
    return not all(empty)


def _is_binary(kind: Any) -> bool:
    return "binary" in str(kind)  # also inside a list or struct


def _plain_column(column: Any, name: str) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_duration(column.type) and is_time_name(name):
        seconds = column.cast(pa.duration("ns")).cast(pa.int64()).cast(pa.float64(), safe=False)
        return [None if value is None else value / 1e9 for value in seconds.to_pylist()]
    if pa.types.is_temporal(column.type):  # finer than Python's own times
        column = column.cast(pa.int64() if pa.types.is_duration(column.type) else pa.string())
    values: list[Any] = column.to_pylist()
    return values


TABLE_READERS: dict[str, Callable[[BinaryIO, str], Iterator[TableRow]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_names,
}
UNTYPED = (".csv", ".tsv", ".txt")
"""Tables whose cells are all text, numbers too."""


def is_table_name(name: str) -> bool:
    return extension(name) in TABLE_READERS
