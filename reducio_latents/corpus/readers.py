"""The rows of a table, one after another: CSV, TSV, lists of names, JSON, JSON lines, Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import posixpath
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reducio_latents.core.parsing import bounded, once, parse_json
from reducio_latents.core.text import printable
from reducio_latents.corpus.cells import Cells, cells_of
from reducio_latents.corpus.entry import extension, file_columns, is_utf8
from reducio_latents.corpus.spans import is_time_name
from reducio_latents.corpus.trees import Tree
from reducio_latents.errors import CorpusError
from reducio_latents.files.parquet import PICTURE_NAMES, video_leaf
from reducio_latents.video import PICTURE, is_still_name

log = logging.getLogger(__name__)

MAX_FIELD = 1 << 24
"""Characters of one cell of CSV. More is a quote that is not closed."""
MAX_ROW, PIECE = 1 << 26, 1 << 20
"""Bytes of one row of JSON, and how many are read at once."""
BATCH, BATCH_BYTES = 1 << 14, 1 << 22
"""Rows that are in memory at once, and about how many bytes of them."""
Numbered = Iterator[tuple[Any, dict[str, Any], int]]
"""Rows, each with its number and its size."""


class Place(NamedTuple):
    """A place between two rows of a table."""

    end: int = 0
    """Bytes up to there."""
    number: int = 0
    """Of the last line, or row, before it."""


BEGINNING = Place()


class Batch(NamedTuple):
    """Some rows of a table."""

    columns: dict[str, Cells]
    kind: str
    numbers: Sequence[Any]
    """Where they stand, for messages: `line`, and the number of the line."""
    rows: Sequence[dict[str, Any]] = ()
    """As they were read, if not as columns."""
    end: int = -1
    """Bytes of the table up to the next row, wherever that is sure whatever may follow; else -1."""

    def row(self, i: int) -> dict[str, Any]:
        """Return the cells of a row; one that JSON does not have is not there."""
        if self.rows:
            return dict(self.rows[i])
        return {
            name: cells[i].as_py() if isinstance(cells, pa.Array) else cells[i]
            for name, cells in self.columns.items()
        }

    def place(self, i: int) -> str:
        return f"{self.kind} {self.numbers[i]}"


def _batches(rows: Numbered, kind: str, end: int = -1) -> Iterator[Batch]:
    """Yield so many rows together as are small; they begin at `end` if sizes are of bytes."""
    numbers, some, size = list[Any](), list[dict[str, Any]](), 0
    for number, row, length in chain(rows, [(None, None, BATCH_BYTES)]):
        if row is not None:
            numbers.append(number)
            some.append(row)
        size += length
        end += length if row is not None and end >= 0 else 0
        if some and (len(some) == BATCH or size >= BATCH_BYTES):
            names = dict.fromkeys(chain.from_iterable(some))
            columns = {name: cells_of([row.get(name) for row in some]) for name in names}
            yield Batch(columns, kind, numbers, some, end)
            numbers, some, size = [], [], 0


def _read_csv(file: BinaryIO, where: str, begin: Place) -> Iterator[Batch]:
    """Read by Arrow what it and Python's parser, which is strict, read alike; from where that is
    not sure on, by the latter."""
    likely = b"\t" if where.lower().endswith(".tsv") else b","
    with file:
        rest, names = file.read(BATCH_BYTES), list[str]()
        # PySceneDetect writes a line of all cuts above its table.
        at = rest.find(b"\n") + 1 if rest.startswith(b"Timecode List:") else 0
        rest, line = rest[at:], int(at > 0)
        head = rest[: rest.find(b"\n") + 1] or rest
        delimiter = max((likely, b",", b"\t", b";", b"|"), key=head.count).decode()
        if head.strip() and len(_ends_of_rows(head, delimiter, last=True)) == 1:
            (cells,) = csv.reader([_decode(head, first=True)], delimiter=delimiter)
            names, at, line = _header(cells, where), at + len(head), line + 1
        rest = rest[len(head) :]
        if names and begin.end:
            file.seek(begin.end)
            rest, (at, line) = b"", begin
        while names:
            block = rest + (more := file.read(BATCH_BYTES))
            if not block:
                return
            ends = _ends_of_rows(block, delimiter, last=not more)
            if more and not len(ends) and len(block) < MAX_FIELD:
                rest = block  # a row goes on
                continue
            size, lines = ends[-1].tolist() if len(ends) else (0, 0)
            columns = _parsed(block[:size], names, delimiter)
            if columns is None or len(columns[names[0]]) != len(ends):
                break
            last = at + size + (not block[:size].endswith(b"\n"))
            yield Batch(columns, "line", array("q", (line + ends[:, 1]).tobytes()), (), last)
            rest, at, line = block[size:], at + size, line + lines
        file.seek(at)
        yield from _batches(_python_csv(file, where, delimiter, names, line), "line")


def _ends_of_rows(block: bytes, delimiter: str, *, last: bool) -> NDArray[np.int64]:
    """Return where the rows in some bytes of CSV end, and how many lines there are until there.

    Nothing if its quotes or line ends are such that parsers differ. With `last` its end is the end
    of a row too.
    """
    nothing = np.zeros((0, 2), np.int64)
    if b"\0" in block or block.count(b"\r") != block.count(b"\r\n"):
        return nothing
    data = np.frombuffer(block, np.uint8)
    quotes, lines = np.flatnonzero(data == ord('"')), np.flatnonzero(data == ord("\n"))
    if last and not block.endswith(b"\n"):
        lines = np.append(lines, len(block) - 1)
    between = np.zeros(256, bool)
    between[list(f'{delimiter}\r\n"'.encode())] = True
    around = np.concatenate([[True], between[data], [True]])
    if not (around[quotes[::2]].all() and around[quotes[1::2] + 2].all()):
        return nothing
    outside = np.searchsorted(quotes, lines, "right") % 2 == 0
    rows: NDArray[np.int64] = np.stack([lines + 1, np.arange(1, len(lines) + 1)], 1)[outside]
    return rows


def _parsed(block: bytes, names: list[str], delimiter: str) -> dict[str, Cells] | None:
    """Return columns of texts; None for what is not as it should be."""
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(block),
            pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1),
            pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return None
    return {name: table[name].combine_chunks() for name in names}


def _python_csv(
    file: BinaryIO, where: str, delimiter: str, names: list[str], line: int
) -> Numbered:
    """Yield the rows that follow `line`; raise CorpusError for what is wrong with one."""
    csv.field_size_limit(MAX_FIELD)
    encoding = "utf-8" if names else "utf-8-sig"
    with TextIOWrapper(file, encoding, "surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            for row in filter(None, reader):
                number = line + reader.line_num
                if not names:
                    names = _header(row, where)
                    continue
                if len(row) != len(names):
                    raise CorpusError(
                        f"{where}, line {number}: {len(row)} cells, but {len(names)} "
                        "columns. Put text with the delimiter in it between double quotes."
                    )
                cells = {name: cell or None for name, cell in zip(names, row, strict=True)}
                yield number, cells, sum(map(len, row))
        except csv.Error as err:
            raise CorpusError(
                f"{where}, line {line + reader.line_num}: {err}. Correct it."
            ) from err
    if not names:
        raise CorpusError(f"{where} is empty. The first line names the columns.")


def _header(row: list[str], where: str) -> list[str]:
    _require_utf8("".join(row), where)
    names = [name.strip() or f"column_{i}" for i, name in enumerate(row, start=1)]
    _require_once(names, where)
    return names


def _require_once(names: list[str], where: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise CorpusError(f"{where} has two columns named {twice[0]!r}. Rename one.")


_LISTED = re.compile(r"(.*?)((?:\s+\d+)*)\s*")


def _name_rows(file: BinaryIO, where: str) -> Numbered:
    """Read a list without a header, as UCF-101 has them: a name a line, then maybe numbers."""
    for number, line, size in _lines(file, where):
        match = _LISTED.fullmatch(line.strip())
        if match and match[1]:
            numbers = {f"column_{i}": n for i, n in enumerate(match[2].split(), start=2)}
            yield number, {"path": match[1], **numbers}, size


def _decode(line: bytes, *, first: bool) -> str:
    """Return text, a byte that is not UTF-8 as half a surrogate pair: it costs its cell."""
    return line.decode("utf-8-sig" if first else "utf-8", "surrogateescape")


def _require_utf8(text: str, where: str) -> None:
    for i in range(len(text)):
        if not is_utf8(text[i]):
            byte = f"byte {ord(text[i]) & 0xFF:#04x} at {i}"
            raise CorpusError(
                f"{printable(where)} is not UTF-8: {byte}. Save it as UTF-8 (iconv -t UTF-8)."
            )


def _lines(file: BinaryIO, where: str, begin: Place = BEGINNING) -> Iterator[tuple[int, str, int]]:
    """Yield lines, each with its number and its bytes: of a last one without an end, one more."""
    number, rest = begin.number, b""
    with file:
        file.seek(begin.end)
        while True:
            piece = file.read(PIECE)
            *lines, rest = (rest + piece).split(b"\n") if piece else (rest, b"")
            for line in lines:
                number += 1
                text = _decode(line, first=number == 1)
                _require_utf8(text[:2] if number == 1 else "", where)
                yield number, text, len(line) + 1
            if len(rest) >= MAX_ROW:
                at = f"{where}, line {number + 1}"
                raise CorpusError(f"{at} is longer than {MAX_ROW >> 20} MiB.")
            if not piece:
                return


def _read_json_lines(file: BinaryIO, where: str, begin: Place) -> Iterator[Batch]:
    return _batches(_json_line_rows(_lines(file, where, begin), where), "line", begin.end)


def _json_line_rows(lines: Iterator[tuple[int, str, int]], where: str) -> Numbered:
    size = 0
    for number, line, length in lines:
        size += length
        if line.strip():
            at = f"{where}, line {number}"
            try:
                row = parse_json(line, unique=True)
            except ValueError as err:
                raise CorpusError(f"{at} is not JSON: {err}. Correct it.") from err
            yield number, _object(row, at), size
            size = 0


def _object(row: Any, at: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise CorpusError(f"{at} is not a JSON object. Correct it.")
    if not all(map(is_utf8, row)):
        raise CorpusError(f"{at}: a name is half a surrogate pair. Correct it.")
    return row


def _json_rows(file: BinaryIO, where: str) -> Numbered:
    """Read an array of objects, one by one; or an object, as `_rows_of` does.

    Of an object that is larger than `MAX_ROW` each member is a row.
    """
    found, size = dict[str, Any](), 0
    with file:
        for number, (name, value, length) in enumerate(_members(file, where), start=1):
            if name is None:
                yield number, _object(value, f"{where}, row {number}"), length
                continue
            if name in found:
                raise CorpusError(f"{where} has two values named {name!r}. Correct it.")
            found[name], size = value, size + length
            if size > MAX_ROW:
                if (rows := _objects(found)) is None:
                    raise CorpusError(
                        f"{where} is larger than {MAX_ROW >> 20} MiB, and no object of rows by "
                        "name. Write one row a line, as .jsonl."
                    )
                yield from ((at, row, length) for at, row in rows.items())
                found = {}
    if found:
        yield from ((at, row, 0) for at, row in _rows_of(_object(found, where), where).items())


def _objects(value: Any) -> dict[Any, dict[str, Any]] | None:
    """Return the rows in a list of objects, or in an object of objects by the names of videos, with
    where each stands; None for what is neither."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return dict(enumerate(value, start=1))
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        return {repr(name): {"video_id": name, **row} for name, row in value.items()}
    return None


def _rows_of(found: dict[str, Any], where: str) -> dict[Any, dict[str, Any]]:
    """Return the rows of an object: itself; its members; or those in one of them; or in several
    that name videos: what others say of a video are lists in its row, as MSR-VTT's captions."""
    whole, parts = _objects(found), {n: rows for n, v in found.items() if (rows := _objects(v))}
    if whole and len(parts) < len(whole):
        return whole
    if _names_a_video(found) or not parts:
        return {1: found}
    columns = {name: file_columns(list(next(iter(rows.values())))) for name, rows in parts.items()}
    naming = [rows for name, rows in parts.items() if columns[name] or len(parts) == 1]
    for key in dict.fromkeys(chain.from_iterable(columns.values())) if len(naming) > 1 else ():
        names = [[str(row.get(key)) for row in rows.values()] for rows in naming]
        own = next((i for i, some in enumerate(names) if len({*some}) == len(some)), None)
        if own is None or not all(key in row for rows in naming for row in rows.values()):
            continue
        told: dict[str, dict[str, list[Any]]] = {name: {} for name in names[own]}
        for row in (row for rows in naming if rows is not naming[own] for row in rows.values()):
            for column, cell in row.items():
                told.setdefault(str(row[key]), {}).setdefault(column, []).append(cell)
        if left := len(told) - len(names[own]):
            log.warning("%s says something of %d videos that it does not list.", where, left)
        return {at: {**told[str(row[key])], **row} for at, row in naming[own].items()}
    if len(naming) == 1:
        return naming[0]
    raise CorpusError(
        f"{where} holds {', '.join(map(repr, parts))}, and it is not clear how they go together. "
        "Write one row a video, as .jsonl."
    )


def _names_a_video(row: dict[str, Any]) -> bool:
    return any(isinstance(row.get(name), str) for name in file_columns(list(row)))


def _members(file: BinaryIO, where: str) -> Iterator[tuple[str | None, Any, int]]:
    """Yield the items of an array, or the members of an object with their names; and how many
    characters each is."""
    decoder = json.JSONDecoder(object_pairs_hook=once)
    source = TextIOWrapper(file, "utf-8-sig", "surrogateescape")
    text, at = source.read(PIECE), 0
    _require_utf8(text[:2], where)

    def has_more() -> bool:
        nonlocal text, at
        if piece := source.read(max(PIECE, len(text) - at)):  # little is parsed many times
            text, at = text[at:] + piece, 0
        return bool(piece)

    def mark() -> str:
        """Return the character with which the next value begins, or all ends."""
        nonlocal at
        while True:
            match = _BETWEEN.match(text, at)
            at = match.end() if match else at
            if at < len(text) or not has_more():
                return text[at : at + 1]

    def value() -> tuple[Any, int]:
        nonlocal at
        mark()
        while True:
            err: Exception | None = None
            try:
                found, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as failed:
                found, end, err = None, len(text), failed
            if end == len(text) and end - at < MAX_ROW and has_more():
                continue  # what was read may go on
            try:
                if err is not None:
                    raise err
                begin, at = at, end
                return bounded(found), end - begin
            except (ValueError, RecursionError) as failed:
                what = str(failed).partition(": line")[0]
                by_line = ", or write a row a line, as .jsonl" if len(text) > MAX_ROW else ""
                raise CorpusError(f"{where} is not JSON: {what}. Correct it{by_line}.") from failed

    opening = mark()
    if opening not in ("[", "{"):
        _object(value()[0], where)
    at += 1
    while mark() != ("]" if opening == "[" else "}"):
        name = value()[0] if opening == "{" else None
        yield name, *value()


_BETWEEN = re.compile(r"[ \t\r\n,:]*")


def _read_parquet(file: BinaryIO, where: str, begin: Place) -> Iterator[Batch]:
    try:
        with pq.ParquetFile(file) as table:
            schema, about = table.schema_arrow, table.metadata
            _require_once(schema.names, where)
            names = [field.name for field in schema if not _is_binary(field.type)]
            leaf = video_leaf(schema) or ""
            videos, struct, _ = leaf.partition(".")
            pictures = videos.lower() in PICTURE_NAMES
            leaf = leaf if _has_values(table, leaf) else ""
            for name in schema.names:
                if name not in (*names, videos):
                    log.warning("%s: column %s is binary and is left out.", where, name)
            if struct and schema.field(videos).type.get_field_index("path") >= 0:
                names.append(f"{videos}.path")
            sizes = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            some = min(BATCH, max(1, BATCH_BYTES * about.num_rows // max(1, sizes)))
            ends, row, group = group_ends(about), begin.number, 0
            for batch in _batches_of_groups(table, ends, begin, some, names):
                numbers = range(row, row := row + batch.num_rows)
                while group < len(ends) and ends[group].number < row:
                    group += 1
                end = ends[group].end if batch.num_rows and ends[group].number == row else -1
                found = zip(batch.schema.names, batch.columns, strict=True)
                columns = {name: _plain(column, name) for name, column in found}
                if leaf:
                    paths: list[Any] = [None] * len(numbers)
                    if videos in columns:
                        paths = pc.struct_field(columns[videos], "path").to_pylist()
                    titles = [posixpath.basename(path or "") for path in paths]
                    if pictures:
                        pairs = zip(numbers, titles, strict=True)
                        titles = [_as_picture(number, title) for number, title in pairs]
                    columns[videos] = list(map(InParquet, numbers, titles))
                yield Batch(columns, "row", [number + 1 for number in numbers], (), end)
    except CorpusError:
        raise
    except (pa.ArrowException, OSError) as err:
        raise CorpusError(f"{where} is not a readable Parquet file: {err}. Check it.") from err


def group_ends(about: pq.FileMetaData) -> list[Place]:
    """Return where the row groups of a Parquet file end: how many bytes and rows come before."""
    ends = [Place()]
    for i in range(about.num_row_groups):
        group = about.row_group(i)
        chunks = (group.column(k) for k in range(group.num_columns))
        begins = ((c.dictionary_page_offset or c.data_page_offset, c) for c in chunks)
        end = max((at + c.total_compressed_size for at, c in begins), default=0)
        ends.append(Place(end, ends[-1].number + group.num_rows))
    return ends[1:]


def _batches_of_groups(
    table: pq.ParquetFile, ends: Sequence[Place], begin: Place, some: int, names: list[str]
) -> Iterator[pa.RecordBatch]:
    """Yield rows after `begin`, about so many together: some batches end where groups do."""
    groups, first = list[int](), begin.number
    for i, (_, last) in enumerate(ends):
        groups += [i] if last > begin.number else []
        if groups and (last - first >= some or i == len(ends) - 1):
            yield from table.iter_batches(some, groups, columns=names, use_threads=False)
            groups, first = [], last


class InParquet(NamedTuple):
    """A video that lies in a row of the table itself."""

    row: int
    name: str = ""
    """As the table has it, without folders; a picture's ends as such."""


def _as_picture(row: int, name: str) -> str:
    return name if is_still_name(name) else f"{name or row}{PICTURE}"


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


def _plain(column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    if pa.types.is_duration(column.type) and is_time_name(name):
        whole = column.cast(pa.duration("ns")).cast(pa.int64())
        return pc.divide(whole.cast(pa.float64(), safe=False), 1e9)
    if pa.types.is_temporal(column.type):  # finer than Python's own times
        return column.cast(pa.int64() if pa.types.is_duration(column.type) else pa.string())
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        return column.cast(pa.string())
    return column


def _in_batches(
    rows: Callable[[BinaryIO, str], Numbered], kind: str
) -> Callable[[BinaryIO, str, Place], Iterator[Batch]]:
    return lambda file, where, _: _batches(rows(file, where), kind)


TABLE_READERS: dict[str, Callable[[BinaryIO, str, Place], Iterator[Batch]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _in_batches(_json_rows, "row"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _in_batches(_name_rows, "line"),
}
"""How the rows after a place are read; those of some kinds all are, wherever it is."""
UNTYPED = (".csv", ".tsv", ".txt")
"""Tables whose cells are all text, numbers too."""


PACKED = ".gz"


def table_ending(name: str) -> str:
    """Return the ending that says what kind of table it is, packed or not."""
    return extension(name[: -len(PACKED)] if extension(name) == PACKED else name)


def is_table_name(name: str) -> bool:
    return table_ending(name) in TABLE_READERS


def open_table(tree: Tree, name: str) -> BinaryIO:
    """Open a table for reading; one that is packed is unpacked on the way."""
    file = tree.open(name)
    if extension(name) != PACKED:
        return file
    unpacked = gzip.GzipFile(fileobj=file)
    unpacked.myfileobj = cast(Any, file)  # so that it is closed with it
    return cast(BinaryIO, unpacked)
